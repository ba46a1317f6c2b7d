"""Colours, markers and line styles of methods in figures."""

from __future__ import annotations

import zlib

COLOURS = {
    "zero_shot": "#000000",
    "zero_shot_ensemble": "#777777",
    "pixel_nn": "#a0a0a0",
    "logit_head": "#444444",
    "craft": "#0072b2",
    "bbt": "#d98800",
    "cbbt_prompt": "#009e73",
    "cbbt": "#332288",
    "taskres": "#d55e00",
    "tip_adapter": "#3fa0dd",
    "tip_adapter_f": "#c0609a",
    "linear_probe": "#8a8a2a",
}
"""Colours of Okabe and Ito, then of Tol, which colour-blind readers can tell apart."""
SPARE = ("#882255", "#44aa99", "#aa4499", "#117733", "#cc6677", "#6699cc", "#997700", "#004488")
DASHES = {"zero_shot": (4, 2), "zero_shot_ensemble": (1, 1.5), "pixel_nn": (5, 1.5, 1, 1.5), "logit_head": (7, 1.5)}
MARKERS = {"SCORES": "o", "TEXT+SCORES": "o", "SOFT+SCORES": "s", "FEATURES": "v", "TEXT+FEATURES": "^"}
MARKERS |= {"SOFT+FEATURES": "D", "TEXT+LABELS": "<", "TEXT+TOPK": ">", "": "x", "TEXT+PIXELS+SCORES": "P"}
TEXT_CONTRAST = 4.5
"""Smallest contrast of text with its background (WCAG 2, level AA)."""


def colour(label: str) -> str:
    """Return the colour of a method; for a label that is not listed, one derived from the label."""
    return COLOURS.get(label) or SPARE[zlib.crc32(label.encode()) % len(SPARE)]


def text_colour(label: str) -> str:
    """Return the colour of a method, darkened until its name is readable on white."""
    rgb = [float(int(colour(label)[i : i + 2], 16)) for i in (1, 3, 5)]
    while contrast(shown := "#" + "".join(f"{round(v):02x}" for v in rgb), "#ffffff") < TEXT_CONTRAST:
        rgb = [0.96 * v for v in rgb]
    return shown


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours, '#rrggbb', from 1 to 21 (WCAG 2)."""
    low, high = sorted(map(_luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(shown: str) -> float:
    parts = (int(shown[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return sum(weight * v for weight, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
