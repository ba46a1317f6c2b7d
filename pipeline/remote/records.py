"""The recorded answers of a remote endpoint. An answer is written before it is used, and asked for once.

A folder `records` beside the storage is shared by sweeps, as the feature store is. It has one folder for each source of
answers (`HttpCard.source`): adapter, model and form of the images. In it, features are stored by the content key of an
image and by the text of a prompt, and scores by the content key of an image, in one store for each prompt set.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.blackbox.feature_store import FeatureStore
from pipeline.errors import DamagedFile, StorageError
from pipeline.files import read_sealed_json, sealed_json, write_atomic

IDENTITY = "identity.json"
"""File with the fingerprint of the model that gave the recorded answers."""
UNTOLD = float(np.finfo(np.float32).min)
"""Stored in place of -inf, which a store of features does not take."""


def folder_of(records: Path, source: str) -> Path:
    """Return the folder of a source's records."""
    return records / hashlib.sha256(source.encode()).hexdigest()[:16]


class Records:
    """The recorded answers of one source. One thread at a time may use it."""

    def __init__(self, folder: Path, source: str) -> None:
        self.folder, self.source = folder_of(folder, source), source
        self._stores: dict[tuple[str, int], Answers] = {}

    def features(self, width: int) -> Answers:
        """Return the store of the features [D] of images and prompts."""
        return self._store("features", width)

    def scores(self, prompt_set: str, width: int) -> Answers:
        """Return the store of the scores [C] of images under a prompt set, which is named by its digest."""
        return self._store(f"scores {prompt_set}", width)

    def _store(self, name: str, width: int) -> Answers:
        if (name, width) not in self._stores:
            self._stores[name, width] = Answers(self.folder, f"{self.source}; {name}", width)
        return self._stores[name, width]

    def identity(self) -> dict[str, Any] | None:
        """Return the recorded identity of the model; None if there is none yet.

        Raises:
            StorageError: it is damaged or cannot be read.
        """
        try:
            return read_sealed_json(self.folder / IDENTITY)
        except FileNotFoundError:
            return None
        except (OSError, DamagedFile) as error:
            raise StorageError(f"{error}: restore the file, or state identity.probe in the card") from error

    def write_identity(self, identity: dict[str, Any]) -> None:
        """Record the identity of the model."""
        write_atomic(self.folder / IDENTITY, sealed_json({"source": self.source, **identity}))


class Answers:
    """Recorded rows of float32 by key. -inf is allowed."""

    def __init__(self, folder: Path, name: str, width: int) -> None:
        self.store = FeatureStore(folder, name, width, paid=True)
        self.in_flight: dict[str, Any] = {}
        """Futures of the rows that are being asked for, by key."""

    def read(self, keys: list[str]) -> tuple[np.ndarray, list[int]]:
        """Return rows [B, width], and the indices of keys without a record, whose rows are undefined."""
        rows, missing = self.store.read(keys)
        array = rows.numpy()
        return np.where(array == np.float32(UNTOLD), -np.inf, array).astype(np.float32), missing

    def add(self, keys: list[str], rows: np.ndarray) -> None:
        """Record rows. Raises StorageError if the disk does not take them."""
        told = np.where(np.isneginf(rows), np.float32(UNTOLD), rows).astype(np.float32)
        self.store.add(keys, torch.from_numpy(told))
