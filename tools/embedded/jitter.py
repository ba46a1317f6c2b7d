"""Nuisance jitter baked into the datasets' images: size, place, turn and colours vary at random.

Icon sets draw a thing in the same place and size every time, so that matching pixels would solve the tasks.
Each image has its own generator, seeded by the dataset's seed and the row: no image depends on another.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from tools.embedded.settings import SIZE

LEVELS = 16  # shades between ink and ground: four bits a pixel
COLOURS = 64  # palette of a coloured picture


def jittered_png(pixels: np.ndarray, one_colour: bool, seed: int, row: int) -> bytes:
    """A drawing (uint8 RGBA) as it ships: jittered, on an opaque ground, with a small palette."""
    rng = np.random.default_rng([seed, row])
    moved = _moved(Image.fromarray(pixels, "RGBA"), rng)
    tint = _Tint(rng)
    if one_colour:
        return _png(_one_colour(np.asarray(moved)[..., 3], tint))
    picture = np.asarray(moved).astype(np.float64) / 255
    colour, alpha = picture[..., :3], picture[..., 3:]
    flat = Image.fromarray(_bytes(tint(colour * alpha + tint.ground * (1 - alpha))), "RGB")
    return _png(flat.quantize(COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE))


def _moved(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Turned up to 0.2 rad, scaled 0.72 to 1.12, stretched up to 10 %, shifted up to 4 pixels."""
    turn = rng.uniform(-0.2, 0.2)
    size = 1 / rng.uniform(0.72, 1.12)
    stretch = rng.uniform(0.9, 1.1)
    shift = rng.uniform(-4, 4, 2)
    matrix = np.array(
        [
            [size * stretch * np.cos(turn), -size * np.sin(turn)],
            [size * np.sin(turn), size / stretch * np.cos(turn)],
        ]
    )
    middle = np.full(2, SIZE / 2)
    offset = middle - matrix @ (middle + shift)  # PIL wants the map from the result's place to the source's
    data = (*matrix[0], offset[0], *matrix[1], offset[1])
    return image.transform((SIZE, SIZE), Image.Transform.AFFINE, data, resample=Image.Resampling.BICUBIC)


class _Tint:
    """A random map of colours, the same for every pixel of one image."""

    def __init__(self, rng: np.random.Generator) -> None:
        # Every number is drawn whether used or not, so that one choice does not move the others.
        dark, pale = 0.6 * rng.random(3), 0.55 + 0.45 * rng.random(3)
        chance = rng.random(4)
        self.ink = dark if chance[0] < 0.4 else np.zeros(3)
        self.ground = pale if chance[1] < 0.4 else np.ones(3)
        self.grey = chance[2] < 0.2
        self.inverted = chance[3] < 0.1
        self.contrast = rng.uniform(0.7, 1.2)
        self.brightness = rng.uniform(-0.05, 0.05)

    def __call__(self, colours: np.ndarray) -> np.ndarray:
        if self.grey:
            colours = np.repeat(colours.mean(-1, keepdims=True), 3, -1)
        if self.inverted:
            colours = 1 - colours
        return np.clip((colours - 0.5) * self.contrast + 0.5 + self.brightness, 0, 1)


def _one_colour(coverage: np.ndarray, tint: _Tint) -> Image.Image:
    """Ink on ground: every pixel lies between the two, so sixteen steps between them are the palette."""
    share = np.linspace(0, 1, LEVELS)[:, None]
    image = Image.fromarray(np.rint(coverage / 255 * (LEVELS - 1)).astype(np.uint8), "P")
    image.putpalette(_bytes(tint(share * tint.ink + (1 - share) * tint.ground)).tobytes())
    return image


def _bytes(colours: np.ndarray) -> np.ndarray:
    rounded: np.ndarray = np.rint(colours * 255).astype(np.uint8)
    return rounded


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()
