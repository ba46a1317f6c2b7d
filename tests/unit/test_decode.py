"""Images of every kind come out as a person sees them, or are named before anything is asked."""

from __future__ import annotations

import contextlib
import io
import random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data.decode import ORIENTATION, decode, unreadable
from pipeline.errors import DataError


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def seen(data: bytes) -> np.ndarray:
    """Pixels [H, W, 3]; the check before a run must say the same as the decoder."""
    assert unreadable(data) is None
    found = decode(data)
    assert found.mode == "RGB"
    return np.asarray(found).astype(int)


RAMP = np.tile(np.arange(0, 256, 16, dtype=np.uint8), (8, 1))  # black on the left, bright on the right
COLOURS = np.zeros((8, 16, 3), np.uint8)
COLOURS[:, :8, 0], COLOURS[:, 8:, 2] = 200, 200  # red on the left, blue on the right


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("bits", [8, 16])
def test_grey_of_8_and_16_bits_is_the_same_picture(kind: str, bits: int) -> None:
    pixels = RAMP if bits == 8 else RAMP.astype(np.uint16) * 257
    assert np.abs(seen(encoded(Image.fromarray(pixels), kind)) - RAMP[:, :, None]).max() == 0


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_few_colours_are_widened(mode: str) -> None:
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
def test_alpha_is_laid_on_white(mode: str, kind: str) -> None:
    image = Image.new("RGBA", (16, 8), (0, 0, 0, 0))
    image.paste((20, 20, 20, 255), (8, 0, 16, 8))
    found = seen(encoded(image.convert(mode), kind, lossless=True))
    assert found[:, :8].min() == 255 and np.abs(found[:, 8:] - 20).max() <= 2


def test_half_transparent_parts_are_blended_with_white() -> None:
    assert seen(encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 51)))).ravel().tolist() == [204] * 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_turn_that_a_camera_noted_is_made(kind: str, orientation: int) -> None:
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
    stored = np.ascontiguousarray(undo.get(orientation, lambda a: a)(upright))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    found = seen(encoded(Image.fromarray(stored), kind, exif=exif))
    assert found.shape == upright.shape and np.abs(found - upright).mean() < 8


def test_damaged_exif_turns_nothing_and_hides_nothing() -> None:
    for exif in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nonsense"):
        found = seen(encoded(Image.fromarray(COLOURS), "JPEG", exif=exif))
        assert found.shape == COLOURS.shape and np.abs(found - COLOURS).mean() < 20


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_is_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    found = seen(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert np.abs(found - (255, 0, 0)).max() < 12


def test_pixels_without_black_and_white_are_named() -> None:
    for pixels in (np.ones((4, 4), np.float32), np.full((4, 4), 70_000, np.int32), np.full((4, 4), -1, np.int32)):
        data = encoded(Image.fromarray(pixels), "TIFF")
        assert "wanted 8 or 16 bits, from black to white" in str(unreadable(data))
        with pytest.raises(DataError, match="wanted 8 or 16 bits"):
            decode(data)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
def test_a_jpeg_cut_short_is_found_without_decoding_whole_ones(progressive: bool, share: float) -> None:
    whole = encoded(NOISE, "JPEG", progressive=progressive)
    exif = Image.Exif()
    exif[0x010E] = "\xff\xd9 in a description"
    described = encoded(NOISE, "JPEG", progressive=progressive, exif=exif)
    for data in (whole, described):
        assert unreadable(data) is None and unreadable(data + b"\0" * 100) is None
        cut = data[: int(len(data) * share)]
        assert unreadable(cut)
        with pytest.raises(DataError):
            decode(cut)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
def test_other_images_cut_short_are_found_too(kind: str, share: float) -> None:
    whole = encoded(NOISE, kind)
    assert unreadable(whole) is None
    assert unreadable(whole[: int(len(whole) * share)])


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_bytes_are_decoded_or_named_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)  # a damaged size takes no time
    rng = random.Random(0)
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"):
        whole = encoded(NOISE.resize((16, 16)), kind)
        for _ in range(150):
            data = bytearray(whole)
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(min(len(data), 300))] = rng.randrange(256)
            unreadable(bytes(data))
            with contextlib.suppress(DataError):
                assert decode(bytes(data)).mode == "RGB"
