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

from pipeline.data.decode import BITS, Examined, cores, decode, examine
from pipeline.data.known import Checked
from pipeline.data.source import Source, content_key, opened
from pipeline.errors import DataError

PLAIN = 0
CHECKED_AT_ONCE = 2_000
"""Images that are decoded by a check before their outcomes are written to disk."""
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
        index = row_index(rows)
        return Images(self.source, self.split, self.rows[index], self.views_of[index], self.augment)

    def views(self, n: int, seed: int = 0) -> Images:
        """n augmented copies of each image, view-major."""
        return Images(self.source, self.split, *view_rows(self.rows, self.views_of, n, seed), self.augment)

    def pixels(self, size: int) -> Tensor:
        """Grey thumbnails [B, size * size] in [0, 1] of the plain images."""
        thumbs = [
            np.asarray(self.decoded(i).convert("L").resize((size, size), Image.Resampling.BOX), np.float32)
            for i in range(len(self))
        ]
        return torch.from_numpy(np.stack(thumbs)).flatten(1) / 255

    def bytes_of(self, i: int) -> bytes:
        """Encoded bytes of the i-th image."""
        return opened(self.source).image_bytes(self.rows[i])

    def decoded(self, i: int) -> Image.Image:
        """Upright RGB image of the i-th row, without its view's augmentation."""
        return load(self.source, int(self.rows[i]))

    def where(self, i: int) -> str:
        """File or table row of the i-th image, and its view, for messages."""
        view = int(self.views_of[i])
        return opened(self.source).where(self.rows[i]) + (f" (view {view})" if view != PLAIN else "")

    @property
    def keys(self) -> list[str]:
        """Content key of each row's view: image key, the card's `bits` if it states them, augmentation and view."""
        contents = opened(self.source).keys_of(self.rows)
        if self.source.bits is not None:
            contents = [f"{key}/bits{self.source.bits}" for key in contents]
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


def load(source: Source, row: int) -> Image.Image:
    """Decode the image of one row to upright RGB.

    Raises:
        DataError: the image cannot be decoded; the message names its file, or its row of a table.
    """
    source = opened(source)
    data = source.image_bytes(row)
    try:
        return decode(data, source.bits)
    except DataError as error:
        raise DataError(_unreadable(source, row, len(data), str(error))) from error


def row_index(rows: slice | Sequence[int] | Tensor) -> slice | np.ndarray:
    """What selects these rows of an array; an empty list selects none."""
    return rows if isinstance(rows, slice) else np.asarray(rows) if len(rows) else np.empty(0, np.int64)


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
    """Decode the images of these rows that were not decoded before.

    Raises:
        DataError: an image cannot be decoded, or the set's 16-bit images use fewer bits than 16 and its card is silent.
    """
    for row, size, reason in not_readable(source, rows):
        found = _unreadable(opened(source), row, size, reason)
        raise DataError(f"data set {name!r}: {found}: repair the file or remove it")
    if _uses_few_bits(source, rows):  # of these rows: a brighter image may be among the others
        everything = np.arange(len(opened(source).labels))
        for _ in not_readable(source, everything):
            pass
        if finding := unused_bits(source, everything):
            raise DataError(f"data set {name!r}: {finding}")


def unused_bits(source: Source, rows: Sequence[int] | np.ndarray) -> str:
    """Return a line that says that the 16-bit images among these rows use fewer bits; an empty string if not."""
    if not _uses_few_bits(source, rows):
        return ""
    peak = int(opened(source).peaks_of(rows).max())
    bits = max(BITS[0], peak.bit_length())
    return (
        f"the greatest value of its 16-bit images is {peak:,} of 65,535, so they would be decoded too dark: set "
        f"bits: {bits} in its card to scale grey images (bits: 16 leaves them dark), or convert them to 8 bits"
    )


def _uses_few_bits(source: Source, rows: Sequence[int] | np.ndarray) -> bool:
    source = opened(source)
    peak = int(source.peaks_of(rows).max(initial=0))
    return source.bits is None and 0 < peak.bit_length() < BITS[-1]


def not_readable(
    source: Source, rows: Sequence[int] | np.ndarray, seen: Callable[[int, int], None] | None = None
) -> Iterator[tuple[int, int, str]]:
    """Decode the images of these rows as a run does, except those that were decoded before.

    Args:
        source: The data set.
        rows: Row numbers.
        seen: Called with the number of images decoded and the number of all, every CHECKED_AT_ONCE images.

    Yields:
        (row, size in bytes, reason) of each image that cannot be used.
    """
    source = opened(source)
    todo = source.unchecked(rows)
    with ThreadPoolExecutor(cores()) as pool:
        for start in range(0, len(todo), CHECKED_AT_ONCE):
            some, readable = todo[start : start + CHECKED_AT_ONCE], {}
            for row, (size, key, outcome) in zip(some, pool.map(lambda row: _examined(source, row), some), strict=True):
                if outcome.reason:
                    yield row, size, outcome.reason
                else:
                    readable[row] = Checked(key, outcome.peak)
            source.mark_checked(readable)
            if seen:
                seen(start + len(some), len(todo))


def _examined(source: Source, row: int) -> tuple[int, str, Examined]:
    """Size, content key and outcome of one image."""
    data = source.image_bytes(row)
    return len(data), content_key(data), examine(data, source.bits)


def _unreadable(source: Source, row: int, size: int, reason: str) -> str:
    return f"{source.where(row)} is not a readable image ({size:,} bytes, {reason})"


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
    def summary(self) -> str:
        """The same for people: size, shape, interpolation, mean and standard deviation."""
        shape = "squashed" if self.mode == "squash" else "cropped"
        mean, std = (", ".join(f"{n:.4g}" for n in numbers) for numbers in (self.mean, self.std))
        return f"{shape} to {self.size}x{self.size} ({self.filter}), mean {mean}, std {std}"

    @property
    def _filter(self) -> Image.Resampling:
        return Image.Resampling[self.filter.upper()]

    def pixels(self, images: Images) -> Tensor:
        """[B, 3, size, size]"""
        return torch.stack([self.one(images, i) for i in range(len(images))])

    def one(self, images: Images, i: int) -> Tensor:
        """[3, size, size] of the i-th image; safe to call from several threads."""
        image, view = images.decoded(i), int(images.views_of[i])
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
