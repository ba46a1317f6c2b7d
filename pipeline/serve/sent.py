"""Images that came with a request, as a source."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from pipeline.data.file_keys import Checked
from pipeline.data.images import Images
from pipeline.data.source import content_key


class SentSource:
    """The encoded images of one request, in memory. A `Source`: see pipeline/data/source.py.

    `source.opened` keeps the sources that were used last, so `forget` drops the bytes when the request has ended.
    """

    bits = None
    place = "the request"
    classnames: tuple[str, ...] = ()
    class_ids: tuple[str, ...] = ()
    splits: tuple[str, ...] = ("test",)

    def __init__(self, images: Sequence[bytes]) -> None:
        self.labels = np.zeros(len(images), np.int64)
        self._images = list(images)
        self._keys = [content_key(data) for data in images]

    @property
    def digest(self) -> str:
        """Digest of the images' content, in order."""
        return hashlib.sha256("".join(self._keys).encode()).hexdigest()

    def forget(self) -> None:
        """Drop the images' bytes."""
        self._images.clear()

    def rows_of(self, split: str) -> np.ndarray:
        """Return all rows."""
        return np.arange(len(self.labels))

    def where(self, row: int) -> str:
        """Return the position of an image in the request, for messages; the first is 0."""
        return f"images[{int(row)}]"

    def image_bytes(self, row: int) -> bytes:
        """Return the encoded image of one row."""
        return self._images[int(row)]

    def keys_of(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """Return the content key of each of these rows."""
        return [self._keys[int(row)] for row in rows]

    def unchecked(self, rows: Sequence[int] | np.ndarray) -> list[int]:
        """Return all of these rows: nothing is checked before it is decoded."""
        return [int(row) for row in rows]

    def mark_checked(self, images: Mapping[int, Checked]) -> None:
        """Record nothing."""

    def peaks_of(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return 0 for each of these rows."""
        return np.zeros(len(rows), np.int64)


@contextmanager
def sent_images(images: Sequence[bytes]) -> Iterator[Images]:
    """Provide encoded images as plain `Images`, for the time of one request."""
    source = SentSource(images)
    try:
        yield Images.plain(source, "test", source.rows_of("test"), augment="crop_flip")
    finally:
        source.forget()
