"""Renders the packages' pictures: the pre-training corpus, and the held-out drawings of the datasets."""

from __future__ import annotations

import io
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emoji
import numpy as np
import resvg_py
from PIL import Image, ImageDraw, ImageFont

from tools.embedded import fetch
from tools.embedded.drawings import Drawing, Drawings, fit, join
from tools.embedded.settings import SIZE

SKIN = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}

# Glyph fonts of the corpus: name, font file, style. Brand marks are left out (trademarks).
FONTS = (
    ("fontawesome5", "fontawesome5-solid-webfont{}-5.15.4", "solid"),
    ("fontawesome5", "fontawesome5-regular-webfont{}-5.15.4", "outline"),
    ("fontawesome6", "fontawesome6-solid-webfont{}-6.7.2", "solid"),
    ("fontawesome6", "fontawesome6-regular-webfont{}-6.7.2", "outline"),
    ("phosphor", "phosphor{}-1.3.0", ""),
    ("remix", "remixicon{}-2.5.0", ""),
    ("codicon", "codicon{}-0.0.36", ""),
    ("elusive", "elusiveicons-webfont{}-2.0", ""),
)
HELD_OUT_FONT = ("mdi", "materialdesignicons6-webfont{}-6.9.96", "")
GLYPH_PIXELS = 112  # drawn larger than needed, then reduced, for smooth edges

# Words at the end of an icon's name that tell its style, and how a caption says them.
STYLE_WORDS = {
    "bold": "bold",
    "thin": "thin",
    "light": "light",
    "fill": "filled",
    "filled": "filled",
    "line": "outline",
    "outline": "outline",
    "duotone": "two tone",
    "solid": "solid",
}

Rendered = Iterator[tuple[Drawing, np.ndarray]]


def build_corpus() -> Drawings:
    """Pictures for pre-training: two emoji vendors and eight icon fonts."""
    parts: list[tuple[Drawing, np.ndarray]] = []
    for vendor, package in (("google", fetch.NOTO), ("twitter", fetch.TWEMOJI)):
        parts += _sprites(vendor, package)
    for font in FONTS:
        parts += _glyphs(*font)
    return join(parts)


def build_held_out() -> Drawings:
    """Pictures for the datasets: Material Design Icons, Tabler outline and the three Fluent styles."""
    parts = [*_glyphs(*HELD_OUT_FONT), *_tabler()]
    for style in ("flat", "modern", "high-contrast"):
        parts += _fluent(style)
    return join(parts)


def split_style(name: str, style: str) -> tuple[str, str]:
    """An icon's name without its style words, and the style: ``bell outline`` gives (bell, outline)."""
    words = name.split()
    while len(words) > 1 and words[-1] in STYLE_WORDS:
        style = STYLE_WORDS[words.pop()]
    return " ".join(words), style


def _table() -> list[dict[str, Any]]:
    """The emoji list (Unicode groups, code points) that comes with the sprites."""
    table: list[dict[str, Any]] = json.loads((fetch.fetch(fetch.NOTO) / "package" / "emoji.json").read_text())
    return table


def _without_selector(code: str) -> str:
    return code.replace("-FE0F", "")


def _readable_names() -> dict[str, str]:
    """Code points to the name people use, from the ``emoji`` package."""
    names = {}
    for characters, entry in emoji.EMOJI_DATA.items():
        code = "-".join(f"{ord(c):04X}" for c in characters)
        names[_without_selector(code)] = entry["en"].strip(":").replace("_", " ")
    return names


def _names(entry: dict[str, Any], readable: dict[str, str]) -> tuple[str, ...]:
    best = readable[_without_selector(entry["unified"])].replace(":", "")
    others = [(entry["name"] or "").lower(), *(re.sub("[_-]", " ", n) for n in entry["short_names"])]
    # "flag xy" with a country code says nothing that words can learn from.
    names = [" ".join(n.split()) for n in (best, *others) if n and not n.startswith("flag ")]
    return tuple(dict.fromkeys(names or [best]))


def _sprites(vendor: str, package: fetch.Package) -> Rendered:
    """A vendor's 64-pixel emoji, one skin tone at a time."""
    folder = fetch.fetch(package) / "package" / "img" / vendor / "64"
    readable = _readable_names()
    for entry in _table():
        toned = {k: v for k, v in (entry.get("skin_variations") or {}).items() if "-" not in k}
        for tone, variant in [("", entry), *toned.items()]:
            path = folder / variant["image"]
            if not variant.get(f"has_img_{vendor}") or not path.exists():
                continue
            yield _emoji(vendor, entry, readable, SKIN.get(tone, "")), fit(Image.open(path))


def _emoji(source: str, entry: dict[str, Any], readable: dict[str, str], skin: str = "") -> Drawing:
    return Drawing(
        source=source,
        concept=entry["unified"],
        names=_names(entry, readable),
        subgroup=entry["subcategory"],
        group=entry["category"],
        skin=skin,
    )


def _glyphs(source: str, pattern: str, style: str) -> Rendered:
    """Every glyph of an icon font, black on transparent, centred; aliases become further names."""
    folder = fetch.fetch(fetch.FONTS) / "qtawesome" / "fonts"
    font = ImageFont.truetype(str(folder / (pattern.format("") + ".ttf")), GLYPH_PIXELS)
    aliases: dict[int, list[str]] = defaultdict(list)
    for name, code in json.loads((folder / (pattern.format("-charmap") + ".json")).read_text()).items():
        aliases[int(str(code).removeprefix("0x"), 16)].append(name)
    for code, names in aliases.items():
        left, top, right, bottom = font.getbbox(chr(code))
        width, height = right - left, bottom - top
        if width <= 0 or height <= 0:
            continue
        side = int(max(width, height, GLYPH_PIXELS)) + 16
        mask = Image.new("L", (side, side), 0)
        corner = ((side - width) // 2 - left, (side - height) // 2 - top)
        ImageDraw.Draw(mask).text(corner, chr(code), font=font, fill=255)
        picture = np.zeros((SIZE, SIZE, 4), np.uint8)
        picture[..., 3] = np.asarray(mask.resize((SIZE, SIZE), Image.Resampling.LANCZOS))
        words = tuple(n.replace("-", " ") for n in names)
        yield Drawing(source=source, concept=names[0], names=words, style=style), picture


def _svg(text: str) -> np.ndarray:
    data = resvg_py.svg_to_bytes(svg_string=text, width=SIZE, height=SIZE, skip_system_fonts=True)
    return fit(Image.open(io.BytesIO(data)))


def _tabler() -> Rendered:
    folder = fetch.fetch(fetch.TABLER) / "pytablericons" / "icons" / "outline"
    for path in sorted(folder.glob("*.svg")):
        picture = _svg(path.read_text().replace("currentColor", "#000"))
        yield Drawing("tabler", path.stem, (path.stem.replace("-", " "),), style="outline"), picture


def _slug(name: str) -> str:
    """The name as Fluent's file names spell it."""
    name = re.sub("[’'“”]", "", name.lower()).replace("&", "and")
    name = name.translate(str.maketrans("ñåéôçãí", "naeocai"))
    return re.sub("[^a-z0-9]+", "-", name).strip("-")


def _fluent(style: str) -> Rendered:
    """One Fluent style, at the default skin tone: tones of one drawing would only repeat it."""
    readable = _readable_names()
    entries: dict[str, dict[str, Any]] = {}
    for entry in _table():
        entries.setdefault(_slug(readable[_without_selector(entry["unified"])]), entry)
    folder: Path = fetch.fetch(fetch.FLUENT) / "package" / "icons" / style
    for path in sorted(folder.glob("*.svg")):
        name = path.stem if path.stem in entries else path.stem.removesuffix("-default")
        if name in entries:
            yield _emoji(f"fluent-{style}", entries[name], readable), _svg(path.read_text())
