"""The image sets that a method works with: opaque positions in a set that a trial opened.

A handle contains view numbers and positions in a set that the trial opened (train, val, or the batch to predict). The
trial's session looks up the set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol

import numpy as np
from torch import Tensor

from methods.base import Access
from pipeline.data.images import Images, row_index, view_rows
from pipeline.errors import AccessDenied


class ImageHandle:
    """Implements `methods.base.ImageSet`: positions in a set that a trial opened, and a view number for each."""

    __slots__ = ("_positions", "_set", "_views")
    _set: str
    _positions: np.ndarray
    _views: np.ndarray

    def __init__(self, name: str, positions: np.ndarray, views: np.ndarray) -> None:
        for array in (positions, views):
            array.flags.writeable = False
        for attribute, value in (("_set", name), ("_positions", positions), ("_views", views)):
            object.__setattr__(self, attribute, value)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"an image set cannot be changed: {name}")

    def __reduce__(self) -> tuple[type[ImageHandle], tuple[str, np.ndarray, np.ndarray]]:
        return ImageHandle, (self._set, self._positions, self._views)

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> ImageHandle:
        index = row_index(rows)
        return ImageHandle(self._set, self._positions[index], self._views[index])

    def views(self, n: int, seed: int = 0) -> ImageHandle:
        """Return n augmented copies of each image, view-major."""
        return ImageHandle(self._set, *view_rows(self._positions, self._views, n, seed))

    def pixels(self, size: int) -> Tensor:
        """Return grey thumbnails [B, size * size] in [0, 1] of the plain images."""
        return self._read(lambda images: images.pixels(size))

    def array(self, size: int) -> Tensor:
        """Return the images or their views [B, 3, size, size] in [0, 1]; only for methods that declare PIXELS."""
        return self._read(lambda images: images.array(size), Access.PIXELS)

    def _read(self, read: Callable[[Images], Tensor], needed: Access | None = None) -> Tensor:
        reader = OPEN.get(self._set)
        if reader is None:
            raise AccessDenied(f"{len(self)} images of another trial, or of an earlier batch, cannot be read")
        return reader.read(self, read, needed)


class Reader(Protocol):
    """The session that opened a set."""

    def read(self, images: ImageHandle, read: Callable[[Images], Tensor], needed: Access | None) -> Tensor:
        """Read pixels of a set on the client."""
        ...


OPEN: dict[str, Reader] = {}
"""The session of each open image set."""
