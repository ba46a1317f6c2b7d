"""What the pages name exists: files, tests and links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CODE = [page for page in PAGES if page.name != "CHANGELOG.md"]
"""Pages that describe the present code; the changelog names former files too."""
FOLDERS = ("", "tests", "tests/faults", "pipeline", "pipeline/blackbox")
"""Folders, relative to which pages name files of Python."""


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def place(name: str) -> Path | None:
    """The file that a page means by this name."""
    return next((path for folder in FOLDERS if (path := ROOT / folder / name).is_file()), None)


def named_tests(page: Path) -> Iterator[tuple[str, str]]:
    """File and name of each test in a page. `::test_x` without a file means the last file named on its line."""
    for line in page.read_text().splitlines():
        file = ""
        for match in re.finditer(r"([\w/]+\.py)?(?:::(test_\w+))?", line):
            file = match[1] or file
            if match[2]:
                yield file, match[2]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", CODE, ids=label)
def test_every_file_of_python_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text().partition("## The records")[0]  # those of docs/audit.md name files of other repositories
    names = set(re.findall(r"(?<![\w./])(?:\w+/)+\w+\.py|(?<![\w./])test_\w+\.py", text))
    missing = {name for name in names if place(name) is None and not name.startswith("trainers/")}  # of released code
    assert missing <= {"methods/nearest_mean.py", "my/method.py"}


@pytest.mark.parametrize("page", CODE, ids=label)
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    for file, name in named_tests(page):
        path = place(file)
        assert path is not None, f"{file}::{name}"
        assert re.search(rf"^ *def {name}\(", path.read_text(), re.MULTILINE), f"{file}::{name}"


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target
