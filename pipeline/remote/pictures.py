"""Images as they are sent: made at the size of the model's input, then encoded."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image

from pipeline.cards import SentImage
from pipeline.data.images import Images, Preprocess
from pipeline.data.made_images import MadeImages

QUALITY = 95
"""Quality of JPEG files."""


class Pictures:
    """Makes the bytes of images by the rule of a card. Thread-safe."""

    def __init__(self, rule: SentImage) -> None:
        self.format = rule.format
        # without normalisation, which is the server's
        self.preprocess = Preprocess(rule.size, mode=rule.resize_mode, filter=rule.interpolation)

    def encoded(self, images: Images | MadeImages, rows: Sequence[int]) -> list[bytes]:
        """Return some of the images, or their views, as the bytes of files."""
        return [encoded(self._picture(images, i), self.format) for i in rows]

    def _picture(self, images: Images | MadeImages, i: int) -> Image.Image:
        return images.picture(i) if isinstance(images, MadeImages) else self.preprocess.image(images, i)


def encoded(image: Image.Image, file_format: str) -> bytes:
    """Return an 8-bit RGB image as the bytes of a file, which are equal for equal pixels."""
    buffer = io.BytesIO()
    # level 1 of zlib: less than half of the time of the default, a sixth more bytes
    options = {"quality": QUALITY} if file_format == "jpeg" else {"compress_level": 1}
    image.save(buffer, file_format.upper(), **options)
    return buffer.getvalue()
