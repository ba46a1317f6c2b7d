"""The image-feature store: features by content, in Arrow files that replicas and later sweeps share.

One folder for each (weights, precision, transform); in it, files of (key, feature) rows, each written once under its
own digest's name by an atomic rename. A file that cannot be read, or whose name does not match its content, is removed
and its rows are computed again.
"""

from __future__ import annotations

import hashlib
import logging
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

log = logging.getLogger(__name__)


class FeatureStore:
    """Features [B, D] float32 by image key. Safe for several processes: files are only added."""

    def __init__(self, folder: Path, model: str, feature_dim: int) -> None:
        self.folder = folder / hashlib.sha256(model.encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        label = self.folder / "model.txt"
        if not label.exists():
            label.write_text(model + "\n")
        self.feature_dim = feature_dim
        self._rows: dict[str, np.ndarray] = {}
        self._seen: set[str] = set()

    def find(self, keys: Sequence[str]) -> list[int]:
        """Positions of `keys` that are not stored, after looking for files that others have added."""
        if any(key not in self._rows for key in keys):
            self._refresh()
        return [i for i, key in enumerate(keys) if key not in self._rows]

    def read(self, keys: Sequence[str]) -> Tensor:
        """[B, D] of keys that are all stored."""
        return torch.from_numpy(np.stack([self._rows[key] for key in keys]))

    def add(self, keys: Sequence[str], features_BD: Tensor) -> None:
        """Store rows. They are on disk when this returns."""
        rows = np.ascontiguousarray(features_BD.numpy(), dtype=np.float32)
        table = pa.table({"key": list(keys), "feature": pa.FixedSizeListArray.from_arrays(rows.ravel(), rows.shape[1])})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        data = sink.getvalue().to_pybytes()
        path = self.folder / f"{hashlib.sha256(data).hexdigest()[:32]}.arrow"
        temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        temporary.write_bytes(data)
        temporary.replace(path)
        self._seen.add(path.name)
        self._rows.update(zip(keys, rows, strict=True))

    def _refresh(self) -> None:
        for path in sorted(self.folder.glob("*.arrow")):
            if path.name in self._seen:
                continue
            self._seen.add(path.name)
            try:
                data = path.read_bytes()
                if hashlib.sha256(data).hexdigest()[:32] != path.stem:
                    raise pa.ArrowInvalid("its content does not match its name")
                table = pa.ipc.open_file(data).read_all()
                keys, features = table["key"].to_pylist(), table["feature"].combine_chunks().flatten()
                if features.type != pa.float32():
                    raise pa.ArrowInvalid(f"its features are {features.type}")
                rows = features.to_numpy().reshape(len(keys), self.feature_dim)
            except (pa.ArrowException, OSError, ValueError, KeyError, AttributeError) as error:
                log.warning("feature file %s is damaged (%s): removed, its rows are computed again", path, error)
                path.unlink(missing_ok=True)
                continue
            self._rows.update(zip(keys, rows, strict=True))
