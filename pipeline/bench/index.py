"""A large data set's index: seconds and memory of its first start and of its second, at 20,000 and 200,000 files.

A start is what a plan does with a data set: list or map it, see that its test images can be read, draw the few shots.
Files are links to one small image in 100 class folders, three quarters in train/ and a quarter in test/. Each start is
a process of its own, timed after its imports; memory is what its peak adds to what the imports took.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.bench.harness import BenchResult, Say, bench, machine

SIZES = (20_000, 200_000)
CLASSES = 100
LINKS = 30_000
"""Links to one file, fewer than any file system's limit."""
START = """
import json, resource, sys, time
from pipeline.cards import DatasetCard
from pipeline.data.dataset import check_card, source_of
from pipeline.data.few_shot import draw
card = DatasetCard(**json.loads(sys.argv[1]))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, began = peak(), time.perf_counter()
check_card(card)
draw(source_of(card), card.name, 16, 1, "min4").digest(source_of(card))
print(json.dumps([time.perf_counter() - began, peak() - before]))
"""


@bench("index")
def index(say: Say) -> BenchResult:
    """The second start of a data set of 200,000 files, and how the first grows from 20,000."""
    found: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for n in SIZES:
            say(f"{n:,} files")
            card = _files(Path(folder) / str(n), n)
            found[n] = {}
            for start in ("first", "second"):
                seconds, mib = _start(card, Path(folder) / "cache")
                found[n] |= {f"{start} s": seconds, f"{start} MiB": mib}
    small, large = (found[n] for n in SIZES)
    detail: dict[str, Any] = {f"{n:,} files": figures for n, figures in found.items()}
    detail["first start, times as long for 10 times the files"] = large["first s"] / small["first s"]
    second = large["second s"]
    return BenchResult("index", second, second, 1, detail | machine(), value=second, unit="s")


def _files(root: Path, n: int) -> dict[str, Any]:
    """Make the files; the fields of their card."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    made, counts = 0, {"train": n * 3 // 4, "test": n // 4}
    image = root
    for split, count in counts.items():
        for label in range(CLASSES):
            folder = root / split / f"class{label:03}"
            folder.mkdir(parents=True)
            for i in range(count // CLASSES):
                if made % LINKS == 0:
                    image = root / f"image{made}"
                    image.write_bytes(buffer.getvalue())
                os.link(image, folder / f"{i:06}.png")
                made += 1
    card = {"name": "many", "layout": "folder", "path": str(root), "classes": CLASSES, "template": "a {}", "val": 0}
    return card | counts


def _start(card: dict[str, Any], cache: Path) -> tuple[float, float]:
    """Seconds and MiB of one start."""
    words = [sys.executable, "-c", START, json.dumps(card)]
    done = subprocess.run(words, env=os.environ | {"FAREBOX_CACHE": str(cache)}, check=True, capture_output=True)
    seconds, mib = json.loads(done.stdout)
    return float(seconds), float(mib)
