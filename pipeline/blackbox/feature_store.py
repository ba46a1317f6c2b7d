"""The image-feature store: features by image content, in memory-mapped files that replicas and sweeps share.

There is one folder for each (weights, precision, transform, code). Its files are written once and moved into place by
an atomic rename. A file has N rows in a fixed layout:

    header           one line: checksum, model, feature width; padded with spaces to a multiple of 16 bytes
    keys             N x 16 bytes: the first bytes of the SHA-256 of an image key
    sums             N x 4 bytes: CRC-32 of a row's key and feature, little-endian
    features         N x D float32, little-endian

A file is named after the call that its features were computed for. An image is computed by one process at a time:
`claim` locks its key, as one byte of the file `locks`, and the system releases the locks of a process that ends.

The header's checksum covers header, keys and sums, and is verified when the file is opened, which reads no features.
Each feature is verified against its sum when it is read. The index in memory takes 24 bytes per image. A file that is
damaged or of another store is removed, and its rows are computed again. A store of paid answers keeps it under another
name, and fails if the disk does not take a file.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import time
import uuid
import zlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import DamagedFile
from pipeline.files import UNSEALED, check_seal, seal, write_atomic

log = logging.getLogger(__name__)

LAYOUT = 3
"""Version of the file layout, part of the folder's name."""
INCOMPLETE_MAX_AGE_S = 3600
"""Age in seconds at which an incomplete file is removed: its writer no longer exists."""
SUFFIX = ".features"
LOCKS = "locks"
"""Empty file whose bytes are locked, one for each image that is being computed."""
DAMAGED = ".damaged"
"""Suffix of a damaged file of paid features."""
_KEY, _SUM = np.dtype("S16"), np.dtype("<u4")
_FILE_BITS = 32  # a position is (file number << 32) + row
NOWHERE = -1


class FeatureFile:
    """Columns of a mapped file: keys [N] S16, sums [N] uint32, features [N, D] float32.

    Raises:
        DamagedFile: the checksum does not match, or the file is of another store.
    """

    def __init__(self, path: Path, header: bytes, feature_dim: int) -> None:
        self.path, self.call = path, path.name.rpartition("-")[0]
        row = _KEY.itemsize + _SUM.itemsize + 4 * feature_dim
        size = path.stat().st_size
        if size <= len(header) or (size - len(header)) % row:
            raise DamagedFile(path, f"{size:,} bytes are no whole number of rows")
        n, data = (size - len(header)) // row, memoryview(np.memmap(path, np.uint8, mode="r").data)
        sums, features = len(header) + n * _KEY.itemsize, len(header) + n * (_KEY.itemsize + _SUM.itemsize)
        check_seal(path, data[:features])
        if bytes(data[len(UNSEALED) : len(header)]) != header[len(UNSEALED) :]:
            raise DamagedFile(path, "it holds another model's features")
        self.keys = np.frombuffer(data, _KEY, n, len(header))
        self.sums = np.frombuffer(data, _SUM, n, sums)
        self.features = np.frombuffer(data, "<f4", n * feature_dim, features).reshape(n, feature_dim)

    def read(self, rows: np.ndarray) -> np.ndarray | None:
        """Return a copy [N, D] of the features of rows; None when one does not match its sum or is not finite."""
        keys, features = self.keys[rows].view("V16"), self.features[rows]
        sums = [_sum(key.tobytes(), feature) for key, feature in zip(keys, features, strict=True)]
        return features if sums == self.sums[rows].tolist() and _finite(features) else None


class FeatureStore:
    """Features [B, D] float32 by image key. Processes may share a store: files are only added, or removed whole.

    Args:
        folder: contains the folder of the store.
        model: what computes the features.
        feature_dim: D.
        paid: the features cost money, and are stored or the run ends.
    """

    def __init__(self, folder: Path, model: str, feature_dim: int, paid: bool = False) -> None:
        self.folder = folder / hashlib.sha256(f"{LAYOUT} {model}".encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        label = self.folder / "model.txt"
        if not label.exists():
            label.write_text(model + "\n")
        for incomplete in self.folder.glob("*.tmp"):  # of a killed replica: writing takes seconds
            with contextlib.suppress(OSError):
                if time.time() - incomplete.stat().st_mtime > INCOMPLETE_MAX_AGE_S:
                    incomplete.unlink()
        self.feature_dim, self.paid = feature_dim, paid
        header = f"{UNSEALED} {json.dumps({'model': model, 'width': feature_dim})}"
        self._header = (header + " " * (-(len(header) + 1) % 16) + "\n").encode()
        self._files: list[FeatureFile] = []
        self._seen: set[str] = set()
        self._keys, self._places = np.empty(0, _KEY), np.empty(0, np.int64)  # the index, sorted by key

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, keys: Sequence[str]) -> tuple[Tensor, list[int]]:
        """Return features [B, D], and the indices of keys that are not stored, whose rows are undefined."""
        digests = _digests(keys)
        places = self._find(digests)
        if (places == NOWHERE).any():
            self._refresh()
            places = self._find(digests)
        features = np.empty((len(keys), self.feature_dim), np.float32)
        for number in np.unique(places[places != NOWHERE] >> _FILE_BITS).tolist():
            file, of_file = self._files[number], np.flatnonzero(places >> _FILE_BITS == number)
            rows = places[of_file] & (2**_FILE_BITS - 1)
            if (stored := file.read(rows)) is not None:
                features[of_file] = stored
            else:
                self._drop(number)
                places[of_file] = NOWHERE
        return torch.from_numpy(features), np.flatnonzero(places == NOWHERE).tolist()

    @contextlib.contextmanager
    def claim(self, keys: Sequence[str], most: int) -> Iterator[list[str]]:
        """Lock up to `most` of these keys against other processes until the context ends; wait until one is free.

        A claimed key may be stored by now: read it before it is computed. On a file system without locks all keys are
        free.
        """
        positions = (_digests(keys).view("<u8")[::2] >> 2).tolist()  # below the largest offset of a file
        with (self.folder / LOCKS).open("ab") as file:  # closing it releases the locks
            free = (key for key, position in zip(keys, positions, strict=True) if _lock(file, position, wait=False))
            claimed = list(islice(free, most))
            if not claimed:  # the process holds no lock while it waits, so that two never wait for each other
                _lock(file, positions[0], wait=True)
                claimed = [keys[0]]
            yield claimed

    def calls(self, keys: Sequence[str]) -> Counter[str]:
        """Return the number of these stored images by the call that they were computed for; "" if it is not known."""
        places = self._find(_digests(keys))
        files, counts = np.unique(places[places != NOWHERE] >> _FILE_BITS, return_counts=True)
        calls: Counter[str] = Counter()
        for number, count in zip(files.tolist(), counts.tolist(), strict=True):
            calls[self._files[number].call] += count
        return calls

    def add(self, keys: Sequence[str], features_BD: Tensor, call: str = "") -> None:
        """Write features to a new file, which other processes then can read. If the disk is full, only warn.

        Args:
            keys: keys of the B images.
            features_BD: their features.
            call: the call that they were computed for, in characters of a file name.

        Raises:
            ValueError: a feature is NaN or infinite.
            StorageError: the features are paid, and cannot be written.
        """
        digests, features = _digests(keys), np.ascontiguousarray(features_BD.numpy(), dtype="<f4")
        if not _finite(features):
            raise ValueError("features that are NaN or infinite are not stored")
        sums = np.array(
            [_sum(key.tobytes(), row) for key, row in zip(digests.view("V16"), features, strict=True)], _SUM
        )
        path = self.folder / f"{call}{'-' * bool(call)}{uuid.uuid4().hex}{SUFFIX}"
        temporary, head = path.with_suffix(".tmp"), seal(self._header + digests.tobytes() + sums.tobytes())
        if self.paid:
            write_atomic(path, head + features.tobytes())
            return self._open([path])
        try:
            with temporary.open("xb") as file:
                file.write(head)
                file.write(features.data)
            temporary.replace(path)
        except OSError as error:  # for example a full disk: the features will be computed again
            log.warning("features are not stored in %s (%s)", self.folder, error)
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            return
        self._open([path])

    def _find(self, digests: np.ndarray) -> np.ndarray:
        """Return the position [B] of each key, or NOWHERE."""
        if not len(self):
            return np.full(len(digests), NOWHERE)
        at = np.searchsorted(self._keys, digests).clip(max=len(self) - 1)
        return np.where(self._keys[at] == digests, self._places[at], NOWHERE)

    def _refresh(self) -> None:
        """Map files that other processes have added."""
        self._open(path for path in sorted(self.folder.glob(f"*{SUFFIX}")) if path.name not in self._seen)

    def _open(self, paths: Iterable[Path]) -> None:
        keys, places = [self._keys], [self._places]
        for path in paths:
            self._seen.add(path.name)
            try:
                file = FeatureFile(path, self._header, self.feature_dim)
            except FileNotFoundError:  # another process removed it as damaged
                continue
            except (OSError, DamagedFile) as error:
                _remove(path, error.reason if isinstance(error, DamagedFile) else str(error), self.paid)
                continue
            keys.append(file.keys)
            places.append((len(self._files) << _FILE_BITS) + np.arange(len(file.keys)))
            self._files.append(file)
        # unique keeps the first position of a key, so indexed rows do not move
        self._keys, first = np.unique(np.concatenate(keys), return_index=True)
        self._places = np.concatenate(places)[first]

    def _drop(self, number: int) -> None:
        """Remove a damaged file and its rows from the index."""
        _remove(self._files[number].path, "a row does not match its sum, or is not finite", self.paid)
        keep = self._places >> _FILE_BITS != number
        self._keys, self._places = self._keys[keep], self._places[keep]


class MemoryStore:
    """Features [B, D] float32 by image key, in memory: those that were used last, up to `capacity` bytes."""

    def __init__(self, capacity: int, feature_dim: int) -> None:
        self.feature_dim, self.most = feature_dim, max(1, capacity // (4 * feature_dim))
        self._rows: OrderedDict[str, Tensor] = OrderedDict()

    def read(self, keys: Sequence[str]) -> tuple[Tensor, list[int]]:
        """Return features [B, D], and the indices of keys that are not stored, whose rows are undefined."""
        features, missing = torch.empty(len(keys), self.feature_dim), list[int]()
        for i, key in enumerate(keys):
            if (row := self._rows.get(key)) is None:
                missing.append(i)
            else:
                features[i] = row
                self._rows.move_to_end(key)
        return features, missing

    @contextlib.contextmanager
    def claim(self, keys: Sequence[str], most: int) -> Iterator[list[str]]:
        """See FeatureStore.claim; no other process uses this store."""
        yield list(keys[:most])

    def calls(self, keys: Sequence[str]) -> Counter[str]:
        """See FeatureStore.calls; they are not stored here."""
        return Counter()

    def add(self, keys: Sequence[str], features_BD: Tensor, call: str = "") -> None:
        """Store features, and remove those that were not used for longest."""
        self._rows.update(zip(keys, features_BD.clone(), strict=True))
        while len(self._rows) > self.most:
            self._rows.popitem(last=False)


def _digests(keys: Sequence[str]) -> np.ndarray:
    """Return the index entries [B] of keys: the first 16 bytes of their SHA-256."""
    return np.array([hashlib.sha256(key.encode()).digest()[: _KEY.itemsize] for key in keys], _KEY)


def _sum(key: bytes, feature_D: np.ndarray) -> int:
    """Return the CRC-32 of a row's key and feature."""
    return zlib.crc32(feature_D.data, zlib.crc32(key))


def _lock(file: IO[bytes], position: int, wait: bool) -> bool:
    """Lock a byte of a file; return False if another process has locked it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, position)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # the file system has no locks: an image may be computed twice
        return True
    return True


def _finite(features: np.ndarray) -> bool:
    """Return whether all float32 values are finite, by their sum in float64, which cannot overflow."""
    return bool(np.isfinite(features.sum(dtype=np.float64)))


def _remove(path: Path, why: str, keep: bool) -> None:
    """Remove a damaged file, or give it another name."""
    with contextlib.suppress(OSError):  # if it cannot be removed, this process does not read it again
        if keep:
            log.warning("recorded answers %s are damaged (%s): renamed, they are asked for again", path, why)
            path.rename(path.with_suffix(DAMAGED))
        else:
            log.warning("feature file %s is damaged (%s): removed, its rows are computed again", path, why)
            path.unlink()
