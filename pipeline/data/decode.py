"""From an image's bytes to RGB pixels as a person sees them, or the reason why there are none.

Alpha is laid on white, 16-bit grey is brought to 8 bits, the turn that a camera noted in EXIF is made, an animation is
its first frame. (CoOp's loader makes no EXIF turn; images without one, as all embedded ones are, come out the same.)
"""

from __future__ import annotations

import io
import os
import struct
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.errors import DataError

T = TypeVar("T")

# "Corrupt EXIF data" is no concern of a person whose pixels are sound
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")

PROBLEMS = (Image.DecompressionBombError, OSError, ValueError, SyntaxError, TypeError, LookupError, struct.error)
"""What Pillow raises at bytes that are no image, or a damaged one."""
JPEGS = ("JPEG", "MPO")
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by EXIF's orientation."""


def decode(data: bytes) -> Image.Image:
    """An upright RGB image from encoded bytes; transparent parts become white. DataError when unreadable."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return _rgb(_upright(image))
    except PROBLEMS as error:
        raise DataError(f"an image of {len(data)} bytes cannot be decoded: {error}") from error


def unreadable(data: bytes) -> str | None:
    """Why these bytes are no image; None when they are one.

    PNG is judged by its checksums and JPEG by its end, without decoding; all others are decoded.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format == "PNG" and image.mode not in ("I", "F"):
                image.verify()
                return None
            ends = data.rfind(b"\xff\xd9") > data.rfind(b"\xff\xda")  # an end of image after the last start of scan
            if not (image.format in JPEGS and ends):
                image.load()
                _rgb(image)
    except UnidentifiedImageError:
        return "no known image format"
    except PROBLEMS as error:
        return str(error)
    return None


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except PROBLEMS:  # its EXIF is damaged, its pixels are not
        return image
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    """16 bits a pixel as 8; Pillow's own conversion makes white of all that is above 255. ValueError for wider ones."""
    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() > 0xFFFF:
        raise ValueError(f"its pixels are {pixels.dtype.name}: wanted 8 or 16 bits, from black to white")
    return Image.fromarray((pixels >> 8).astype(np.uint8))


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ahead(function: Callable[[int], T], n: int, threads: int, window: int) -> Iterator[T]:
    """function(0) .. function(n - 1) in order, computed by threads at most `window` beyond what has been taken."""
    pool = ThreadPoolExecutor(threads)
    waiting = deque(pool.submit(function, i) for i in range(min(n, window)))
    try:
        for i in range(window, window + n):
            first = waiting.popleft()
            if i < n:
                waiting.append(pool.submit(function, i))
            yield first.result()
    finally:
        pool.shutdown(cancel_futures=True)
