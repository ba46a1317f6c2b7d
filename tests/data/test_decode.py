"""Images of every kind come out as a person sees them, or are named before anything is asked."""

from __future__ import annotations

import io
import random
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data.decode import MAX_PIXELS, MAX_RATIO, ORIENTATION, TEXT_BYTES, decode, examine
from pipeline.errors import DataError


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def reason(data: bytes) -> str | None:
    """Why the check before a run refuses these bytes; None when it does not."""
    return examine(data).reason


def seen(data: bytes) -> np.ndarray:
    """Pixels [H, W, 3]; the check before a run must say the same as the decoder."""
    assert reason(data) is None
    found = decode(data)
    assert found.mode == "RGB"
    return np.asarray(found).astype(int)


RAMP = np.tile(np.arange(0, 256, 16, dtype=np.uint8), (8, 1))  # black on the left, bright on the right
COLOURS = np.zeros((8, 16, 3), np.uint8)
COLOURS[:, :8, 0], COLOURS[:, 8:, 2] = 200, 200  # red on the left, blue on the right


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("bits", [8, 16])
def test_8_bit_and_16_bit_grey_give_the_same_image(kind: str, bits: int) -> None:
    pixels = RAMP if bits == 8 else RAMP.astype(np.uint16) * 257
    assert np.abs(seen(encoded(Image.fromarray(pixels), kind)) - RAMP[:, :, None]).max() == 0


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_images_with_few_colours_are_converted_to_rgb(mode: str) -> None:
    image = Image.fromarray(np.where(RAMP < 128, 0, 255).astype(np.uint8)).convert(mode)
    assert set(seen(encoded(image)).ravel().tolist()) == {0, 255}


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_keeps_its_colours(kind: str) -> None:
    found = seen(encoded(Image.fromarray(COLOURS).convert("CMYK"), kind))
    assert np.abs(found - COLOURS).max() < 60
    assert np.abs(found[:, [2, 13]] - COLOURS[:, [2, 13]]).max() < 12  # away from the edge that JPEG blurs


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "GIF"), ("P", "PNG")]
)
def test_alpha_is_composited_on_white(mode: str, kind: str) -> None:
    image = Image.new("RGBA", (16, 8), (0, 0, 0, 0))
    image.paste((20, 20, 20, 255), (8, 0, 16, 8))
    found = seen(encoded(image.convert(mode), kind, lossless=True))
    assert found[:, :8].min() == 255 and np.abs(found[:, 8:] - 20).max() <= 2


def test_half_transparent_parts_are_blended_with_white() -> None:
    assert seen(encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 51)))).ravel().tolist() == [204] * 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_exif_orientation_is_applied(kind: str) -> None:
    upright = np.full((16, 32, 3), 255, np.uint8)
    upright[:8, :16] = 0  # dark at the top left
    undo = {
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    for orientation in range(1, 9):
        stored = np.ascontiguousarray(undo.get(orientation, lambda a: a)(upright))
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        found = seen(encoded(Image.fromarray(stored), kind, exif=exif))
        assert found.shape == upright.shape and np.abs(found - upright).mean() < 8, orientation


def test_damaged_exif_is_ignored() -> None:
    for exif in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nonsense"):
        found = seen(encoded(Image.fromarray(COLOURS), "JPEG", exif=exif))
        assert found.shape == COLOURS.shape and np.abs(found - COLOURS).mean() < 20


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_used(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    found = seen(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert np.abs(found - (255, 0, 0)).max() < 12


def test_pixels_without_a_defined_range_are_rejected() -> None:
    for pixels in (np.ones((4, 4), np.float32), np.full((4, 4), 70_000, np.int32), np.full((4, 4), -1, np.int32)):
        data = encoded(Image.fromarray(pixels), "TIFF")
        assert "expected 8 or 16 bits, from black to white" in str(reason(data))
        with pytest.raises(DataError, match="expected 8 or 16 bits"):
            decode(data)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
def test_a_truncated_jpeg_is_rejected_without_decoding_intact_ones_twice(progressive: bool, share: float) -> None:
    whole = encoded(NOISE, "JPEG", progressive=progressive)
    exif = Image.Exif()
    exif[0x010E] = "\xff\xd9 in a description"
    described = encoded(NOISE, "JPEG", progressive=progressive, exif=exif)
    for data in (whole, described):
        assert reason(data) is None and reason(data + b"\0" * 100) is None
        cut = data[: int(len(data) * share)]
        assert reason(cut)
        with pytest.raises(DataError):
            decode(cut)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM"])
def test_other_truncated_images_are_rejected(kind: str) -> None:
    whole = encoded(NOISE, kind)
    assert reason(whole) is None
    for share in (0.0, 0.02, 0.5, 0.9):
        assert reason(whole[: int(len(whole) * share)]), share


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_bytes_are_decoded_or_rejected_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)  # a damaged size takes no time
    rng = random.Random(0)
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"):
        whole = encoded(NOISE.resize((16, 16)), kind)
        for _ in range(150):
            data = bytearray(whole)
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(min(len(data), 300))] = rng.randrange(256)
            said = reason(bytes(data))
            try:
                assert decode(bytes(data)).mode == "RGB"
            except DataError as error:
                assert said == str(error)
            else:
                assert said is None or "end early" in said, "a run decodes what the check refuses"


# --- 16 bits a channel -----------------------------------------------------------------------------------------------


def png(depth: int, colour_type: int, rows: bytes, width: int = 2, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of one row, byte by byte, for what Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, 1, depth, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" + rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_bits_of_the_card_scale_16_bit_grey(bits: int) -> None:
    pixels = (RAMP.astype(np.uint16) * 257) >> (16 - bits)
    data = encoded(Image.fromarray(pixels))
    assert np.array_equal(np.asarray(decode(data, bits)), np.repeat(RAMP[:, :, None], 3, axis=2))
    assert examine(data, bits).peak == int(pixels.max())


def test_values_that_exceed_the_bits_of_the_card_are_rejected() -> None:
    data = encoded(Image.fromarray(np.full((2, 2), 4096, np.uint16)))
    assert examine(data, 12).reason == "it has values up to 4,096, more than `bits: 12` in the card allows"
    assert examine(data, 13).reason is None


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_16_bit_colour_and_alpha_report_their_peak_and_are_not_scaled(colour_type: int, channels: int) -> None:
    alpha = [65535] if channels in (2, 4) else []
    dark, bright = (
        png(16, colour_type, struct.pack(f">{2 * channels}H", *2 * ([value] * (channels - len(alpha)) + alpha)))
        for value in (4095, 65535)
    )
    assert 4095 <= examine(dark).peak < 2**13 and examine(bright).peak == 65535
    assert "scales grey only" in str(examine(dark, 12).reason) and examine(dark, 16).reason is None


def test_a_maximum_in_the_header_of_a_pgm_scales_its_values() -> None:
    white = struct.pack(">H", 4095)
    assert seen(b"P5\n1 1\n4095\n" + white).max() == seen(b"P6\n1 1\n4095\n" + 3 * white).max() == 255
    assert examine(b"P6\n1 1\n65535\n" + 3 * white).peak < 2**13


@pytest.mark.parametrize("grey", [0, 1, 2, 3])
def test_a_transparent_grey_of_few_bits_becomes_white(grey: int) -> None:
    transparent = (b"tRNS", struct.pack(">H", grey))
    found = seen(png(2, 0, bytes([0b00011011]), 4, transparent))[0, :, 0].tolist()
    assert found == [255 if step == grey else 85 * step for step in range(4)]
    assert seen(png(4, 0, bytes([grey << 4 | 4]), 2, transparent))[0, :, 0].tolist() == [255, 68]


def test_16_bit_images_that_pillow_misreads_are_rejected() -> None:
    keyed = png(16, 0, struct.pack(">2H", 4095, 9), 2, (b"tRNS", struct.pack(">H", 4095)))
    assert "with a transparent colour" in str(reason(keyed))
    inverted = encoded(Image.fromarray(np.full((2, 2), 4095, np.uint16)), "TIFF", tiffinfo={262: 0})
    assert "with 0 as white" in str(reason(inverted))


# --- limits ----------------------------------------------------------------------------------------------------------


def header_only(width: int, height: int, kind: str) -> bytes:
    """An image file whose header states this size."""
    if kind == "PPM":
        return b"P5\n%d %d\n255\n" % (width, height)
    data = bytearray(encoded(Image.new("L", (7, 5)), kind))
    if kind == "PNG":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif kind == "BMP":
        data[18:26] = struct.pack("<II", width, height)
    return bytes(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM"])
def test_an_image_with_too_many_pixels_is_rejected_from_its_header(kind: str) -> None:
    tracemalloc.start()
    said = reason(header_only(13_000, 13_000, kind))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert said == f"13,000 x 13,000 pixels: at most {MAX_PIXELS:,} are read; resize it"
    assert peak < 2**24
    assert "truncated" in str(reason(header_only(8192, 8192, "PPM"))), "the largest that is read"


def test_an_image_with_an_extreme_ratio_is_rejected_before_it_is_resized() -> None:
    assert reason(encoded(Image.new("L", (1, MAX_RATIO)))) is None
    for size in ((1, 65_000), (65_000, 1), (2, 2 * MAX_RATIO + 1)):
        assert "may be at most 100 times the shorter" in str(reason(encoded(Image.new("L", size))))


def test_a_png_with_long_text_is_accepted_and_a_decompression_bomb_is_rejected() -> None:
    def with_text(size: int) -> bytes:
        return png(8, 0, b"\x07\x09", 2, (b"zTXt", b"x\0\0" + zlib.compress(bytes(size))))

    assert seen(with_text(3_000_000))[0, :, 0].tolist() == [7, 9]
    assert "too large" in str(reason(with_text(TEXT_BYTES + 1)))


def test_formats_that_start_programs_are_not_opened() -> None:
    for data in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", encoded(NOISE, "PDF")):
        assert reason(data) == "no known image format"
    assert reason(encoded(NOISE, "ICO")) == "no known image format"


# --- JPEG files that end early ---------------------------------------------------------------------------------------

FLAT = Image.new("RGB", (50, 70), "white")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("options", [{}, {"restart_marker_blocks": 3}, {"progressive": True}])
def test_a_complete_jpeg_is_accepted_with_any_last_corner(mode: str, subsampling: int, options: dict[str, Any]) -> None:
    for image in (NOISE, FLAT, Image.new("RGB", (1, 1)), Image.new("RGB", (16, 9), "black")):
        for quality in (10, 95):
            whole = encoded(image.convert(mode), "JPEG", subsampling=subsampling, quality=quality, **options)
            assert reason(whole) is None


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.95])
def test_a_truncated_jpeg_with_an_end_marker_is_rejected(share: float) -> None:
    for restart in (0, 3):
        whole = encoded(NOISE.resize((160, 120)), "JPEG", restart_marker_blocks=restart)
        start = whole.rfind(b"\xff\xda") + 14
        cut = whole[: start + int((len(whole) - start) * share)].rstrip(b"\xff") + b"\xff\xd9"
        assert reason(cut) == "its pixels end early, before its end marker"
