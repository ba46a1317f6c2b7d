"""Predictions of one test set as a sealed Arrow file: image_key, label, predicted class and logits."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.files import sealed_arrow

HALF_ABOVE = 2**24
"""Logits with more elements than this are stored as float16; the predicted class is taken before rounding."""


class Predictions(NamedTuple):
    """Predictions of a trial on one test set, in the order of the test images."""

    image_keys: list[str]
    labels: np.ndarray
    predicted: np.ndarray
    """Class with the highest logit before rounding, [B]."""
    logits_BC: np.ndarray

    @property
    def digest(self) -> str:
        """SHA-256 of keys, labels and logits, as stated by the row."""
        return _digest(self.image_keys, self.labels, self.logits_BC)


def pack(image_keys: Sequence[str], labels: np.ndarray, logits: np.ndarray) -> tuple[bytes, str]:
    """Return the file content and the digest for logits [B, C] and labels [B]."""
    logits = np.ascontiguousarray(logits, dtype=np.float32)
    labels = np.ascontiguousarray(labels, dtype=np.int64)
    predicted = logits.argmax(1).astype(np.int64)
    if logits.size > HALF_ABOVE and float(np.abs(logits).max()) < float(np.finfo(np.float16).max):
        logits = logits.astype(np.float16)
    columns = {
        "image_key": pa.array(image_keys, pa.string()),
        "label": pa.array(labels),
        "predicted": pa.array(predicted),
        "logits": pa.FixedSizeListArray.from_arrays(pa.array(logits.ravel()), logits.shape[1]),
    }
    return sealed_arrow(pa.table(columns)), _digest(image_keys, labels, logits)


def unpack(data: bytes) -> Predictions:
    """Parse the content of a file whose checksum is verified.

    Raises:
        KeyError, ValueError, pa.ArrowException: the content is not a file of predictions.
    """
    table = pa.ipc.open_file(data).read_all().combine_chunks()
    shape = (len(table), table["logits"].type.list_size)
    return Predictions(
        table["image_key"].to_pylist(),
        table["label"].to_numpy(),
        table["predicted"].to_numpy(),
        table["logits"].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(shape),
    )


def _digest(image_keys: Sequence[str], labels: np.ndarray, logits: np.ndarray) -> str:
    h = hashlib.sha256("\n".join(image_keys).encode())
    for array in (labels, logits):
        h.update(f"{array.dtype.str}{array.shape}".encode())
        h.update(np.ascontiguousarray(array).tobytes())
    return h.hexdigest()
