"""An ordered set of images held by reference, and the transforms that turn bytes into pixels.

Every pixel that the endpoint sees is a function of (image bytes, transform name, view number): nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.data.decode import decode, unreadable
from pipeline.data.source import Source, content_key, opened
from pipeline.errors import DataError

PLAIN = 0
CHECKED_AT_ONCE = 2_000
"""Images that are looked at before that is remembered."""
_VIEWS_PER_SEED = 10_000  # view numbers: 0 is the plain image, then 1 + seed * 10,000 + v

AUGMENTATIONS = {
    "crop_flip": "random resized crop (area 0.5 to 1, bicubic) and horizontal flip, as in CraFT and Tip-Adapter",
    "crop": "random resized crop (area 0.5 to 1, bicubic), no flip: for images whose mirror image means another thing",
}


@dataclass(frozen=True, eq=False)
class Images:
    """An ImageSet (see methods.base) over rows of a source. `split` decides the phase that its calls are billed to."""

    source: Source
    split: str
    rows: np.ndarray
    views_of: np.ndarray
    """View number of each row; 0 is the plain image."""
    augment: str = "crop_flip"

    @classmethod
    def plain(cls, source: Source, split: str, rows: np.ndarray, augment: str) -> Images:
        """The images as they are."""
        return cls(source, split, np.asarray(rows), np.full(len(rows), PLAIN), augment)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> Images:
        index = rows if isinstance(rows, slice) else np.asarray(rows) if len(rows) else np.empty(0, np.int64)
        return Images(self.source, self.split, self.rows[index], self.views_of[index], self.augment)

    def views(self, n: int, seed: int = 0) -> Images:
        """n augmented copies of each image, view-major."""
        return Images(self.source, self.split, *view_rows(self.rows, self.views_of, n, seed), self.augment)

    def pixels(self, size: int) -> Tensor:
        """Grey thumbnails [B, size * size] in [0, 1] of the plain images."""
        thumbs = [
            np.asarray(decode(self.bytes_of(i)).convert("L").resize((size, size), Image.Resampling.BOX), np.float32)
            for i in range(len(self))
        ]
        return torch.from_numpy(np.stack(thumbs)).flatten(1) / 255

    def bytes_of(self, i: int) -> bytes:
        """Encoded bytes of the i-th image."""
        return opened(self.source).image_bytes(self.rows[i])

    def where(self, i: int) -> str:
        """File or table row of the i-th image, and its view, for messages."""
        view = int(self.views_of[i])
        return opened(self.source).where(self.rows[i]) + (f" (view {view})" if view != PLAIN else "")

    @property
    def keys(self) -> list[str]:
        """Content key of each row's view: image key, augmentation and view number."""
        contents = opened(self.source).keys_of(self.rows)
        views = self.views_of.tolist()
        return [
            key if view == PLAIN else f"{key}/{self.augment}/{view}" for key, view in zip(contents, views, strict=True)
        ]

    def key_of(self, i: int) -> str:
        """Content key of the i-th row's view."""
        return self[[i]].keys[0]

    @property
    def digest(self) -> str:
        """Digest of what is referred to, in order."""
        h = hashlib.sha256(f"{self.source.digest}/{self.augment}/".encode())
        h.update(np.ascontiguousarray(self.rows, dtype="<i8").tobytes())
        h.update(np.ascontiguousarray(self.views_of, dtype="<i8").tobytes())
        return h.hexdigest()


def view_rows(rows: np.ndarray, views_of: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and view numbers of n augmented copies of each row, view-major.

    Raises:
        ValueError: n is out of range, or the rows are views already.
    """
    if not 0 < n < _VIEWS_PER_SEED:
        raise ValueError(f"{n} views asked, 1 to {_VIEWS_PER_SEED - 1} can be given")
    if (views_of != PLAIN).any():
        raise ValueError("these images are views already: take views of the plain images")
    numbers = 1 + seed * _VIEWS_PER_SEED + np.arange(n)
    return np.tile(rows, n), np.repeat(numbers, len(rows))


def check_readable(source: Source, name: str, rows: Sequence[int] | np.ndarray) -> None:
    """DataError for an image of these rows that is none."""
    for row, size, reason in not_readable(source, rows):
        found = f"{opened(source).where(row)} is not a readable image ({size} bytes, {reason})"
        raise DataError(f"data set {name!r}: {found}: mend the file or leave it out")


def not_readable(
    source: Source, rows: Sequence[int] | np.ndarray, seen: Callable[[int, int], None] | None = None
) -> Iterator[tuple[int, int, str]]:
    """(row, bytes, reason) of each of these images that is none; `seen` is told how many were looked at of how many.

    Files are read side by side, and what was found is remembered CHECKED_AT_ONCE at a time.
    """
    source = opened(source)
    todo = source.unchecked(rows)
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(todo), CHECKED_AT_ONCE):
            some, readable = todo[start : start + CHECKED_AT_ONCE], {}
            looks = pool.map(lambda row: _look(source.image_bytes(row)), some)
            for row, (size, key, reason) in zip(some, looks, strict=True):
                if reason:
                    yield row, size, reason
                else:
                    readable[row] = key
            source.mark_checked(readable)
            if seen:
                seen(start + len(some), len(todo))


def _look(data: bytes) -> tuple[int, str, str | None]:
    return len(data), content_key(data), unreadable(data)


@dataclass(frozen=True)
class Preprocess:
    """A model's own input rule: resize the short side and crop the centre (or squash), then normalise."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    mode: str = "shortest"
    """shortest, or squash: both sides to `size`, whatever the shape."""
    filter: str = "bicubic"

    @property
    def name(self) -> str:
        """Written into cache keys."""
        return f"resize{self.size}-{self.filter}-{self.mode}-{self.mean}-{self.std}"

    @property
    def _filter(self) -> Image.Resampling:
        return Image.Resampling[self.filter.upper()]

    def pixels(self, images: Images) -> Tensor:
        """[B, 3, size, size]"""
        return torch.stack([self.one(images, i) for i in range(len(images))])

    def one(self, images: Images, i: int) -> Tensor:
        """[3, size, size] of the i-th image; safe to call from several threads."""
        image, view = decode(images.bytes_of(i)), int(images.views_of[i])
        image = self._centre(image) if view == PLAIN else self._random_crop(image, images.key_of(i), images.augment)
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        array = (np.asarray(image, np.float32) / 255 - mean) / std
        return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1), dtype=np.float32))

    def _centre(self, image: Image.Image) -> Image.Image:
        short = min(image.size)
        width, height = (self.size * side // short for side in image.size)  # cut and rounded as torchvision does
        if self.mode == "squash":
            width = height = self.size
        if image.size != (width, height):
            image = image.resize((width, height), self._filter)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        return image.crop((left, top, left + self.size, top + self.size))

    def _random_crop(self, image: Image.Image, key: str, augment: str) -> Image.Image:
        rng = np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))
        width, height = image.size
        area = width * height * rng.uniform(0.5, 1.0)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = min(width, float(np.sqrt(area * ratio))), min(height, float(np.sqrt(area / ratio)))
        left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
        flip = augment == "crop_flip" and rng.random() < 0.5
        image = image.resize((self.size, self.size), self._filter, box=(left, top, left + w, top + h))
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image


def as_images(images: object) -> Images:
    """The boundary's type check: a method must hand back an ImageSet that it was given, or part of one."""
    if not isinstance(images, Images):
        raise TypeError(f"expected the task's images, got {type(images).__name__}")
    return images
