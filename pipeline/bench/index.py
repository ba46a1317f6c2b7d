"""Index of a large data set: time and memory of opening it for the first and second time, 20,000 and 200,000 files.

Opening is what a plan does with a data set: list its files or map the index, check that its test images can be read,
and draw the few shots. Files are links to a small image in 100 class folders, three quarters in train/, a quarter in
test/. Each run is a process of its own, timed after its imports; memory is the increase of its peak since then.
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

from pipeline.bench.harness import BenchResult, bench, machine
from pipeline.console import Echo

SIZES = (20_000, 200_000)
CLASSES = 100
LINKS = 30_000
"""Number of links to one file, below the limits of file systems."""
OPEN = """
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
def index(echo: Echo) -> BenchResult:
    """Seconds to open a data set of 200,000 files for the second time; details for the first time and 20,000 files."""
    results: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for n in SIZES:
            echo(f"{n:,} files")
            card = _files(Path(folder) / str(n), n)
            results[n] = {}
            for turn in ("first", "second"):
                seconds, mib = _open(card, Path(folder) / "cache")
                results[n] |= {f"{turn} s": seconds, f"{turn} MiB": mib}
    small, large = (results[n] for n in SIZES)
    detail: dict[str, Any] = {f"{n:,} files": figures for n, figures in results.items()}
    detail["first time, ratio for 10 times the files"] = large["first s"] / small["first s"]
    second = large["second s"]
    return BenchResult("index", second, second, 1, detail | machine(), value=second, unit="s")


def _files(root: Path, n: int) -> dict[str, Any]:
    """Create the files; return the fields of their card."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    n_links, counts = 0, {"train": n * 3 // 4, "test": n // 4}
    image = root
    for split, count in counts.items():
        for label in range(CLASSES):
            folder = root / split / f"class{label:03}"
            folder.mkdir(parents=True)
            for i in range(count // CLASSES):
                if n_links % LINKS == 0:
                    image = root / f"image{n_links}"
                    image.write_bytes(buffer.getvalue())
                os.link(image, folder / f"{i:06}.png")
                n_links += 1
    card = {"name": "many", "layout": "folder", "path": str(root), "classes": CLASSES, "template": "a {}", "val": 0}
    return card | counts


def _open(card: dict[str, Any], cache: Path) -> tuple[float, float]:
    """Open the data set in a new process; return seconds and MiB."""
    command = [sys.executable, "-c", OPEN, json.dumps(card)]
    done = subprocess.run(command, env=os.environ | {"FAREBOX_CACHE": str(cache)}, check=True, capture_output=True)
    seconds, mib = json.loads(done.stdout)
    return float(seconds), float(mib)
