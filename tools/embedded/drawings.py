"""A drawing (one RGBA picture and what is known of it) and a set of drawings on disk."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from tools.embedded.settings import SIZE


@dataclass(frozen=True)
class Drawing:
    """What is known of one picture, apart from its pixels."""

    source: str
    concept: str  # the same thing drawn by another vendor has the same concept, for emoji
    names: tuple[str, ...]
    style: str = ""  # "outline", "solid", ...: glyph fonts only
    subgroup: str = ""  # Unicode subgroup and group: emoji only
    group: str = ""
    skin: str = ""

    @property
    def is_glyph(self) -> bool:
        """One-colour icon, whose colour is free, in contrast to an emoji."""
        return not self.subgroup


@dataclass(frozen=True)
class Drawings:
    """Records and their pictures, uint8 [N, 64, 64, 4], in the same order."""

    records: list[Drawing]
    pixels: np.ndarray

    def take(self, rows: list[int]) -> Drawings:
        return Drawings([self.records[i] for i in rows], self.pixels[rows])

    def save(self, path: Path) -> None:
        np.save(path.with_suffix(".npy"), self.pixels)
        path.with_suffix(".json").write_text(json.dumps([asdict(r) for r in self.records]))

    @staticmethod
    def load(path: Path) -> Drawings:
        records = [Drawing(**r) for r in json.loads(path.with_suffix(".json").read_text())]
        records = [replace(r, names=tuple(r.names)) for r in records]
        return Drawings(records, np.load(path.with_suffix(".npy")))


def join(parts: list[tuple[Drawing, np.ndarray]]) -> Drawings:
    """Drawings from pairs of record and picture."""
    return Drawings([r for r, _ in parts], np.stack([p for _, p in parts]))


def fit(image: Image.Image) -> np.ndarray:
    """The picture at 64x64, its proportions kept, on a transparent ground."""
    image = image.convert("RGBA")
    if image.size != (SIZE, SIZE):
        image.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
        canvas = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
        canvas.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
        image = canvas
    return np.asarray(image)


def on_white(pixels: np.ndarray) -> np.ndarray:
    """RGBA uint8 [..., 4] composited on white: float RGB in [0, 1]."""
    alpha = pixels[..., 3:].astype(np.float32) / 255
    return pixels[..., :3].astype(np.float32) / 255 * alpha + 1 - alpha
