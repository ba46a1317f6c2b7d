"""Every constant of the embedded build that a reader may want to find in one place."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "embedded"  # scratch, ignored by git
DOWNLOADS = WORK / "downloads"
UNPACKED = WORK / "unpacked"
PACKAGE = ROOT / "pipeline" / "embedded"  # what ships
CARDS = ROOT / "conf" / "dataset"

SIZE = 64  # pixels a side, of every picture and of the model's input
CONTEXT = 32  # tokens of text, start and end included

# CLIP's usual statistics: open_clip's preprocessing applies these by default.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# Near-duplicates: root mean square difference of two aligned 16x16 grey thumbnails (``dedupe``),
# contrast in [0, 1]. Below NEAR two pictures count as the same: a copy at another size and place
# lies below 0.035. The corpus gives way to all held-out drawings by a coarser rule of its own.
THUMB = 16
NEAR = 0.06
NEAR_CORPUS = 0.08

SPLIT_SEED = 20
JITTER_SEED = 123
TRAIN_SEED = 0

# Images a class: the most that are kept, and the least with which a class may appear.
MOST = {"train": 48, "val": 8, "test": 50}
LEAST = {"train": 32, "val": 4, "test": 20}
