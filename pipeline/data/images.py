"""Ordered sets of images by reference, and the transforms from bytes to pixels.

Every pixel that the endpoint gets is a function of image bytes, transform name and view number only.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from pipeline.cards import BITS
from pipeline.data.decode import Examined, cores, decode, examine
from pipeline.data.file_keys import Checked
from pipeline.data.source import Source, content_key, opened
from pipeline.errors import DataError

if TYPE_CHECKING:  # a plan checks images and computes with none
    from torch import Tensor

PLAIN = 0
CHECKED_AT_ONCE = 2_000
"""Number of images that a check decodes before it writes the outcomes to disk."""
_VIEWS_PER_SEED = 10_000  # the plain image is view 0, others are 1 + seed * 10,000 + v


@dataclass(frozen=True, eq=False)
class Images:
    """An ImageSet (see methods.base) over rows of a source. Requests are billed to the phase of its `split`."""

    source: Source
    split: str
    rows: np.ndarray
    views_of: np.ndarray
    """View number of each row; 0 is the plain image."""
    augment: str = "crop_flip"

    @classmethod
    def plain(cls, source: Source, split: str, rows: np.ndarray, augment: str) -> Images:
        """Return plain images: no views."""
        return cls(source, split, np.asarray(rows), np.full(len(rows), PLAIN), augment)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> Images:
        index = row_index(rows)
        return Images(self.source, self.split, self.rows[index], self.views_of[index], self.augment)

    def views(self, n: int, seed: int = 0) -> Images:
        """Return n augmented views of each image, view-major."""
        return Images(self.source, self.split, *view_rows(self.rows, self.views_of, n, seed), self.augment)

    def pixels(self, size: int) -> Tensor:
        """Return grey thumbnails [B, size * size] of the plain images, in [0, 1]."""
        import torch

        thumbs = [
            np.asarray(self.decoded(i).convert("L").resize((size, size), Image.Resampling.BOX), np.float32)
            for i in range(len(self))
        ]
        return torch.from_numpy(np.stack(thumbs)).flatten(1) / 255

    def array(self, size: int) -> Tensor:
        """Return the images or their views as [B, 3, size, size] in [0, 1], by the rule shortest and bicubic.

        Rounded to 8 bits again, they are what a model with this rule and size gets.
        """
        return Preprocess(size).pixels(self)

    def bytes_of(self, i: int) -> bytes:
        """Return the encoded bytes of the i-th image."""
        return opened(self.source).image_bytes(self.rows[i])

    def decoded(self, i: int) -> Image.Image:
        """Return the i-th image as upright RGB, without the augmentation of its view."""
        return load(self.source, int(self.rows[i]))

    def where(self, i: int) -> str:
        """Return the file or table row of the i-th image, and its view, for messages."""
        view = int(self.views_of[i])
        return opened(self.source).where(self.rows[i]) + (f" (view {view})" if view != PLAIN else "")

    @property
    def keys(self) -> list[str]:
        """Content key of each row: key of the image, `bits` of the card if given, augmentation and view."""
        contents = opened(self.source).keys_of(self.rows)
        if self.source.bits is not None:
            contents = [f"{key}/bits{self.source.bits}" for key in contents]
        views = self.views_of.tolist()
        return [
            key if view == PLAIN else f"{key}/{self.augment}/{view}" for key, view in zip(contents, views, strict=True)
        ]

    def key_of(self, i: int) -> str:
        """Return the content key of the i-th row."""
        return self[[i]].keys[0]

    @property
    def digest(self) -> str:
        """Digest of the referenced images and views, in order."""
        h = hashlib.sha256(f"{self.source.digest}/{self.augment}/".encode())
        h.update(np.ascontiguousarray(self.rows, dtype="<i8").tobytes())
        h.update(np.ascontiguousarray(self.views_of, dtype="<i8").tobytes())
        return h.hexdigest()


def load(source: Source, row: int) -> Image.Image:
    """Decode the image of one row to upright RGB.

    Raises:
        DataError: The image cannot be decoded; the message has its file, or its row of a table.
    """
    source = opened(source)
    data = source.image_bytes(row)
    try:
        return decode(data, source.bits)
    except DataError as error:
        raise DataError(_unreadable(source, row, len(data), str(error))) from error


def row_index(rows: slice | Sequence[int] | Tensor) -> slice | np.ndarray:
    """Return the index that selects these rows of an array; an empty list selects none."""
    return rows if isinstance(rows, slice) else np.asarray(rows) if len(rows) else np.empty(0, np.int64)


def view_rows(rows: np.ndarray, views_of: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and view numbers of n augmented views of each row, view-major.

    Raises:
        ValueError: n is out of range, or the rows are already views.
    """
    if not 0 < n < _VIEWS_PER_SEED:
        raise ValueError(f"{n} views requested, 1 to {_VIEWS_PER_SEED - 1} are possible")
    if (views_of != PLAIN).any():
        raise ValueError("these images are already views: take views of the plain images")
    numbers = 1 + seed * _VIEWS_PER_SEED + np.arange(n)
    return np.tile(rows, n), np.repeat(numbers, len(rows))


def check_readable(source: Source, name: str, rows: Sequence[int] | np.ndarray) -> None:
    """Check that the images of these rows can be decoded. Images that were checked before are not decoded again.

    Raises:
        DataError: An image cannot be decoded, or 16-bit images use fewer than 16 bits and the card has no `bits`.
    """
    for row, size, reason in not_readable(source, rows):
        problem = _unreadable(opened(source), row, size, reason)
        raise DataError(f"data set {name!r}: {problem}: repair the file or remove it")
    if unused_bits(source, rows):  # images of other rows may be brighter
        everything = np.arange(len(opened(source).labels))
        for _ in not_readable(source, everything):
            pass
        if finding := unused_bits(source, everything):
            raise DataError(f"data set {name!r}: {finding}")


def unused_bits(source: Source, rows: Sequence[int] | np.ndarray) -> str:
    """Return a finding if the 16-bit images among these rows use fewer bits and the card has no `bits`, else ""."""
    source = opened(source)
    peak = int(source.peaks_of(rows).max(initial=0))
    if source.bits is not None or not 0 < peak.bit_length() < BITS[-1]:
        return ""
    bits = max(BITS[0], peak.bit_length())
    return (
        f"the greatest value of its 16-bit images is {peak:,} of 65,535, so they would be decoded too dark: set "
        f"bits: {bits} in its card to scale grey images (bits: 16 leaves them dark), or convert them to 8 bits"
    )


def not_readable(
    source: Source, rows: Sequence[int] | np.ndarray, progress: Callable[[int, int], None] | None = None
) -> Iterator[tuple[int, int, str]]:
    """Decode the images of these rows as a run does, except those that were checked before.

    Args:
        source: The data set.
        rows: Row numbers.
        progress: Called every CHECKED_AT_ONCE images with the number of decoded images and the number of all.

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
            if progress:
                progress(start + len(some), len(todo))


def _examined(source: Source, row: int) -> tuple[int, str, Examined]:
    """Return size, content key and outcome of one image."""
    data = source.image_bytes(row)
    return len(data), content_key(data), examine(data, source.bits)


def _unreadable(source: Source, row: int, size: int, reason: str) -> str:
    return f"{source.where(row)} is not a readable image ({size:,} bytes, {reason})"


def recoded(image: Image.Image, codec: str) -> Image.Image:
    """Return an 8-bit image as it arrives: unchanged (float), or after JPEG coding of quality 90 (jpeg90)."""
    if codec == "float":
        return image
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    with Image.open(file) as coded:
        return coded.convert(image.mode)


@dataclass(frozen=True)
class Preprocess:
    """The input rule of a model: resize the short side and crop the centre (or squash), then normalise."""

    size: int
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    mode: str = "shortest"
    """shortest, or squash: resize both sides to `size`."""
    filter: str = "bicubic"

    @property
    def name(self) -> str:
        """Name of the rule, part of cache keys."""
        return f"resize{self.size}-{self.filter}-{self.mode}-{self.mean}-{self.std}"

    @property
    def summary(self) -> str:
        """Description of the rule: size, shape, interpolation, mean and standard deviation."""
        shape = "squashed" if self.mode == "squash" else "cropped"
        mean, std = (", ".join(f"{n:.4g}" for n in numbers) for numbers in (self.mean, self.std))
        return f"{shape} to {self.size}x{self.size} ({self.filter}), mean {mean}, std {std}"

    @property
    def _filter(self) -> Image.Resampling:
        return Image.Resampling[self.filter.upper()]

    def pixels(self, images: Images) -> Tensor:
        """Return the pixels [B, 3, size, size] of the images."""
        import torch

        return torch.stack([self.one(images, i) for i in range(len(images))])

    def one(self, images: Images, i: int, codec: str = "float") -> Tensor:
        """Return the pixels [3, size, size] of the i-th image, sent as `recoded` says. Thread-safe."""
        return self.normalised(np.asarray(recoded(self.image(images, i), codec)))

    def image(self, images: Images, i: int) -> Image.Image:
        """Return the i-th image or its view at the size of the model's input, 8-bit RGB. Thread-safe."""
        image, view = images.decoded(i), int(images.views_of[i])
        return self._centre(image) if view == PLAIN else self._random_crop(image, images.key_of(i), images.augment)

    def normalised(self, rgb: np.ndarray) -> Tensor:
        """Return the pixels [3, size, size] of an 8-bit RGB array [size, size, 3]."""
        import torch

        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        array = (np.asarray(rgb, np.float32) / 255 - mean) / std
        return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1), dtype=np.float32))

    def _centre(self, image: Image.Image) -> Image.Image:
        short = min(image.size)
        width, height = (self.size * side // short for side in image.size)  # as in torchvision, including the rounding
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
    """Return the images if they are `Images`. Raises TypeError otherwise."""
    if not isinstance(images, Images):
        raise TypeError(f"expected the task's images, got {type(images).__name__}")
    return images
