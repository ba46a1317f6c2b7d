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
MARKERS |= {"SOFT+FEATURES": "D", "TEXT+LABELS": "<", "TEXT+TOPK": ">", "": "x"}


def colour(label: str) -> str:
    """Return the colour of a method; for a label that is not listed, one derived from the label."""
    return COLOURS.get(label) or SPARE[zlib.crc32(label.encode()) % len(SPARE)]
