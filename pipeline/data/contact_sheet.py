"""Draw a contact sheet: the classes of a data set with their names and some images of each."""

from __future__ import annotations

import textwrap
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pipeline.data.images import load
from pipeline.data.layouts.listing import SPLITS
from pipeline.data.source import Source
from pipeline.errors import DataError

PER_PAGE = 40
EXAMPLES = 6
SIDE, GAP, NAME_WIDTH, MARGIN, HEAD = 96, 6, 190, 16, 44
ROWS_A_BLOCK = 20
"""Number of classes below each other before the next block begins."""
INK, PALE, PAPER, FRAME = "#1a1a1a", "#707070", "white", "#e4e4e4"


def sheet(source: Source, name: str, page: int = 1) -> Image.Image:
    """Draw one page: number, name, images by split and examples of each class, in label order.

    Raises:
        DataError: There is no such page.
    """
    n_pages = -(-len(source.classnames) // PER_PAGE)
    if not 1 <= page <= n_pages:
        raise DataError(
            f"page {page} requested from {name!r}, which has {len(source.classnames)} classes: 1 to {n_pages}"
        )
    labels = range((page - 1) * PER_PAGE, min(page * PER_PAGE, len(source.classnames)))
    blocks = -(-len(labels) // ROWS_A_BLOCK)
    rows = -(-len(labels) // blocks)
    width, height = NAME_WIDTH + EXAMPLES * (SIDE + GAP) + MARGIN, SIDE + GAP
    image = Image.new("RGB", (blocks * width + MARGIN, HEAD + rows * height + MARGIN), PAPER)
    pen = ImageDraw.Draw(image)
    of = f"page {page} of {n_pages}, " if n_pages > 1 else ""
    pen.text((MARGIN, 12), f"{name}: {of}{len(source.classnames):,} classes", INK, _font(18))
    of_split = [split for split in SPLITS if split in source.splits]
    for place, label in enumerate(labels):
        left, top = MARGIN + place // rows * width, HEAD + place % rows * height
        of_class = {split: _of(source, split, label) for split in of_split}
        _write(pen, left, top, f"{label}  {source.classnames[label]}", of_class)
        shown = next((rows_of for rows_of in of_class.values() if len(rows_of)), np.empty(0, np.int64))
        for i, row in enumerate(shown[_spread(len(shown))].tolist()):
            image.paste(_thumbnail(source, row), (left + NAME_WIDTH + i * (SIDE + GAP), top))
    return image


def _of(source: Source, split: str, label: int) -> np.ndarray:
    rows = source.rows_of(split)
    return rows[source.labels[rows] == label]


def _spread(n: int) -> np.ndarray:
    """Return up to EXAMPLES positions among n, from the first to the last."""
    return np.unique(np.linspace(0, n - 1, min(n, EXAMPLES)).astype(int)) if n else np.empty(0, np.int64)


def _write(pen: ImageDraw.ImageDraw, left: int, top: int, title: str, of_class: dict[str, np.ndarray]) -> None:
    lines = textwrap.wrap(title, 22, max_lines=4, placeholder=" …")
    pen.multiline_text((left, top), "\n".join(lines), INK, _font(15), spacing=3)
    counts = "  ".join(f"{split} {len(rows):,}" for split, rows in of_class.items())
    pen.text((left, top + SIDE - 14), counts, PALE, _font(11))


def _thumbnail(source: Source, row: int) -> Image.Image:
    """Return the whole image in a square, or a note that it cannot be read."""
    square = Image.new("RGB", (SIDE, SIDE), FRAME)
    try:
        image = ImageOps.contain(load(source, row), (SIDE, SIDE), Image.Resampling.LANCZOS)
    except DataError:
        ImageDraw.Draw(square).text((SIDE // 2, SIDE // 2), "unreadable", "#b00020", _font(13), anchor="mm")
        return square
    square.paste(image, ((SIDE - image.width) // 2, (SIDE - image.height) // 2))
    return square


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, which is part of matplotlib and has Latin, Greek, Cyrillic and more."""
    spec = find_spec("matplotlib")
    assert spec is not None and spec.origin is not None
    return ImageFont.truetype(str(Path(spec.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"), size)
