"""Images that a client made, as the endpoint receives them: 8-bit pixels, each from an image of a base set."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

from methods.base import PixelImages
from pipeline.data.images import Images, as_images


@dataclass(frozen=True, eq=False)
class MadeImages:
    """P sets of B images. Phase and messages are those of the base images; a local endpoint stores no features of them.

    Set by set, image i of set p is number p * B + i.
    """

    base: Images
    pixels_PB3SS: np.ndarray
    """uint8, contiguous."""

    @classmethod
    def of(cls, images: PixelImages) -> MadeImages:
        """Return a copy of the client's pixels. Raises TypeError if the base is not the task's images."""
        return cls(as_images(images.base), images.pixels_PB3SS.detach().numpy().copy())

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, rows: slice) -> MadeImages:
        return MadeImages(self.base[rows], np.ascontiguousarray(self.pixels_PB3SS[:, rows]))

    @property
    def n_sets(self) -> int:
        """P."""
        return len(self.pixels_PB3SS)

    @property
    def row_bytes(self) -> int:
        """Bytes of one image in all sets."""
        return self.n_sets * int(np.prod(self.pixels_PB3SS.shape[2:]))

    @property
    def split(self) -> str:
        """Split of the base images, to whose phase a call is billed."""
        return self.base.split

    def where(self, i: int) -> str:
        """Return the base of image number i, for messages."""
        return f"an image made from {self.base.where(i % len(self.base))}"

    @property
    def keys(self) -> list[str]:
        """Content key of each image, by its pixels, set by set."""
        return [f"made/{hashlib.sha256(pixels.data).hexdigest()}" for pixels in self._pixels]

    def picture(self, i: int) -> Image.Image:
        """Return image number i, 8-bit RGB."""
        return Image.fromarray(np.ascontiguousarray(self._pixels[i].transpose(1, 2, 0)))

    @property
    def _pixels(self) -> np.ndarray:
        return self.pixels_PB3SS.reshape(-1, *self.pixels_PB3SS.shape[2:])

    @property
    def digest(self) -> str:
        """SHA-256 of shape, pixels and the base's digest."""
        h = hashlib.sha256(f"{self.pixels_PB3SS.shape}/{self.base.digest}/".encode())
        h.update(self.pixels_PB3SS.data)
        return h.hexdigest()
