"""Decode an image's bytes to upright RGB pixels, or say why they cannot be decoded.

Alpha is composited on white, 16 bits a channel are reduced to 8, the EXIF orientation is applied, and the first frame
of an animation is used. (CoOp's loader ignores the EXIF orientation; images without one give the same pixels.)

Image files are untrusted: only the formats in FORMATS are opened, and the size of an image is checked from its header
before any memory for its pixels is allocated.
"""

from __future__ import annotations

import io
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageFile, PngImagePlugin, UnidentifiedImageError

from pipeline.errors import DataError, one_line

T = TypeVar("T")

RULES = 2
"""Version of the decoder: it is part of the cache key of checks (file_keys.py)."""
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Allowed formats, by Pillow's names. For others, such as EPS, Pillow would start Ghostscript."""
MAX_PIXELS = 2**26
"""8,192 x 8,192. Decoding needs 4 bytes per pixel, and up to 12 for an image with alpha."""
MAX_RATIO = 100
"""Maximum ratio of the longer side to the shorter one, which the model's resize preserves."""
MAX_BYTES = 2**29
"""Maximum size of an encoded image: enough for MAX_PIXELS of uncompressed 16-bit RGB."""
TEXT_BYTES = 2**26
"""Maximum size of the decompressed text of a PNG, which is discarded."""

# Images with damaged metadata but complete pixels are accepted; sizes are checked below.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = TEXT_BYTES

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
"""Transposition that makes an image upright, by EXIF orientation."""
TILE_WIDTH, TILE_LENGTH, PHOTOMETRIC = 322, 323, 262
"""TIFF tags."""
GREY_STEPS = {"L;2": 85, "L;4": 17}
"""Difference between neighbouring greys after conversion to 8 bits, by Pillow's raw mode."""
END_OF_IMAGE = b"\xff\xd9"
PADDING = bytes(16)
"""Replacement of a JPEG's end marker: more bytes than libjpeg reads ahead."""
CORNER = 4
"""Side in pixels of the corner that is examined, which is part of the last block of a JPEG."""


class Examined(NamedTuple):
    """The outcome of decoding one image for a check."""

    reason: str | None
    """Why the image cannot be used; None if it can."""
    peak: int = 0
    """Maximum value of an image with 16 bits per channel; 0 for an image with 8 bits or fewer."""


def decode(data: bytes, bits: int | None = None) -> Image.Image:
    """Decode an encoded image to an upright RGB image; transparent parts become white.

    Args:
        data: The content of an image file.
        bits: Number of bits that 16-bit grey images use, 8 to 16. None means 16.

    Raises:
        DataError: The bytes are not an image that can be used. The message is the reason, without the name of the file.
    """
    image, _ = _decoded(data, bits)
    return image


def examine(data: bytes, bits: int | None = None) -> Examined:
    """Check an image by decoding it as `decode` does.

    A baseline JPEG that has an end marker before all of its pixels is rejected too: libjpeg fills the missing pixels
    with one colour and reports no error.
    """
    try:
        _, peak = _decoded(data, bits, check_end=True)
    except DataError as error:
        return Examined(str(error))
    return Examined(None, peak)


def _decoded(data: bytes, bits: int | None, check_end: bool = False) -> tuple[Image.Image, int]:
    """Return the RGB image, and its peak as in `Examined`."""
    if len(data) > MAX_BYTES:
        raise DataError(f"larger than {MAX_BYTES // 2**20} MiB")
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            _check_size(image)
            sixteen = _has_16_bits(image)
            _scale_transparency(image)
            image.load()
            if check_end and image.format == "JPEG":
                _check_end(image, data)
            return _rgb(_upright(image), sixteen, bits)
    except UnidentifiedImageError as error:
        raise DataError("no known image format") from error
    except Exception as error:  # Pillow's plugins raise many types of exceptions for damaged files
        raise DataError(one_line(error) or type(error).__name__) from error


@cache
def _formats() -> tuple[str, ...]:
    """Return those of FORMATS that this version of Pillow supports."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    size = f"{width:,} x {height:,} pixels"
    if min(image.size) < 1:
        raise ValueError(f"{size}: expected at least 1 x 1")
    if width * height > MAX_PIXELS:
        raise ValueError(f"{size}: at most {MAX_PIXELS:,} are read; resize it")
    if max(image.size) > MAX_RATIO * min(image.size):
        raise ValueError(f"{size}: the longer side may be at most {MAX_RATIO} times the shorter; crop it")
    if _tag(image, TILE_WIDTH) * _tag(image, TILE_LENGTH) > MAX_PIXELS:
        raise ValueError(f"a TIFF tile of more than {MAX_PIXELS:,} pixels")


def _tag(image: Image.Image, number: int, default: int = 0) -> int:
    """Return an integer TIFF tag; `default` for other images and other values."""
    value = getattr(image, "tag_v2", {}).get(number, default)
    return value if isinstance(value, int) else default


def _has_16_bits(image: Image.Image) -> bool:
    """Return True if channels have more than 8 bits, according to the arguments of the decoder."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return True
    for tile in image.tile if isinstance(image, ImageFile.ImageFile) else ():
        arguments = tile.args if isinstance(tile.args, tuple) else (tile.args,)
        if any(isinstance(a, str) and ";16" in a for a in arguments):
            return True
        if tile.codec_name in ("ppm", "ppm_plain") and 65535 in arguments:
            return True
    return False


def _scale_transparency(image: Image.Image) -> None:
    """Scale the transparent grey of a 2-bit or 4-bit PNG to 8 bits, as Pillow scales the pixels."""
    raw = str(image.tile[0].args) if isinstance(image, ImageFile.ImageFile) and image.tile else ""
    if image.format == "PNG" and raw in GREY_STEPS and "transparency" in image.info:
        image.info["transparency"] *= GREY_STEPS[raw]


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF, intact pixels
        return image
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image, sixteen: bool, bits: int | None) -> tuple[Image.Image, int]:
    if sixteen and "transparency" in image.info:
        raise ValueError("16 bits a channel with a transparent colour; convert it to 8 bits")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey(image, bits or 16)
    if sixteen and bits not in (None, 16):
        raise ValueError(f"16 bits a channel in colour, and `bits: {bits}` scales grey only; convert it to 8 bits")
    peak = _colour_peak(image) if sixteen else 0
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image if image.mode == "RGBA" and "transparency" not in image.info else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image if image.mode == "RGB" else image.convert("RGB"), peak  # convert would copy the pixels


def _colour_peak(image: Image.Image) -> int:
    """Return an upper bound of the 16-bit values: Pillow keeps the upper 8 bits of each channel."""
    extrema: Any = image.getextrema()  # of each channel; a fourth is alpha, except in CMYK
    return max(high for _, high in extrema[: 4 if image.mode == "CMYK" else 3]) * 256 + 255


def _grey(image: Image.Image, bits: int) -> tuple[Image.Image, int]:
    """Reduce pixels from `bits` bits to 8. (Pillow's own conversion makes every value above 255 white.)"""
    if _tag(image, PHOTOMETRIC, default=1) == 0:
        raise ValueError("16 bits a pixel with 0 as white; convert it to 8 bits")
    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() > 0xFFFF:
        raise ValueError(f"its pixels are {pixels.dtype.name}: expected 8 or 16 bits, from black to white")
    peak = int(pixels.max())
    if peak >= 2**bits:
        raise ValueError(f"it has values up to {peak:,}, more than `bits: {bits}` in the card allows")
    return Image.fromarray((pixels >> (bits - 8)).astype(np.uint8)).convert("RGB"), peak


def _check_end(image: Image.Image, data: bytes) -> None:
    """Raise ValueError for a baseline JPEG that has an end marker before all of its pixels.

    libjpeg fills missing blocks with one colour. So an image whose last corner has one colour is decoded again, with
    padding instead of the end marker: the decoder then fails if blocks are missing.
    """
    width, height = image.size
    corner = np.asarray(image.crop((max(0, width - CORNER), max(0, height - CORNER), width, height)))
    one_colour = not np.ptp(corner, axis=(0, 1)).any()
    if one_colour and _padding_works() and not _decodes_with_padding(data):
        raise ValueError("its pixels end early, before its end marker")


def _decodes_with_padding(data: bytes) -> bool:
    """Return False for a baseline JPEG that can be decoded only with its end marker; True for all others."""
    try:
        with Image.open(io.BytesIO(data[: data.rfind(END_OF_IMAGE)] + PADDING), formats=("JPEG",)) as image:
            if not image.info.get("progressive"):
                image.load()
    except OSError:
        return False
    return True


@cache
def _padding_works() -> bool:
    """Return True if this version of Pillow decodes a complete JPEG with padding instead of its end marker."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), "white").save(buffer, "JPEG")
    return _decodes_with_padding(buffer.getvalue())


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ahead(function: Callable[[int], T], n: int, threads: int, window: int) -> Iterator[T]:
    """Yield function(0) to function(n - 1) in order, computed by threads at most `window` results ahead."""
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
