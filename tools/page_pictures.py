"""Take the pictures of the page in docs/img/: a wide window and a phone, each light and dark. Needs Chromium.

python -m tools.page_pictures storage=runs/demo
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image

from pipeline.commands.leaderboard import Options, leaderboard
from pipeline.config.compose import compose
from tools.browser import Browser

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "img"
PICTURES = {
    "page_light.png": (1280, 900, False),
    "page_dark.png": (1280, 900, True),
    "page_phone_light.png": (390, 844, False),
    "page_phone_dark.png": (390, 844, True),
}
"""Width, height and dark mode of each picture."""


def take(storage: str) -> None:
    text, _ = leaderboard(compose([storage]), Options("html"))
    with tempfile.TemporaryDirectory() as folder, Browser() as browser:
        page = Path(folder) / "leaderboard.html"
        page.write_text(text)
        for name, (width, height, dark) in PICTURES.items():
            browser.look(width, height, dark)
            browser.open(page.as_uri())
            browser.picture(Path(folder) / name)
            picture = Image.open(Path(folder) / name).convert("RGB")
            few = picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
            few.save(FOLDER / name, optimize=True)
            print(f"{name}: {(FOLDER / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].startswith("storage="):
        sys.exit("usage: python -m tools.page_pictures storage=DIR")
    take(sys.argv[1])
