"""Detect the layout of a user's folder or file."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from pipeline.data.file_kinds import IMAGES, TABLES, ends_in, has_images
from pipeline.data.folder import NAMES_OF_SPLITS
from pipeline.data.listing import files, folders
from pipeline.data.shards import tables_below
from pipeline.data.skipped import walk
from pipeline.errors import DataError
from pipeline.untrusted import read_json

WANTED = "train/CLASS/IMAGE and test/CLASS/IMAGE, or CLASS/IMAGE, or a JSON split file, or .parquet or .arrow files"
LOOKED_AT = 10_000
"""Files below a folder without a layout among which an image is looked for, to name it."""


def detect(path: Path) -> tuple[str, Path]:
    """Return the layout of a path, and the file or folder that it reads.

    Raises:
        DataError: no layout fits; the message says what is there and what is wanted.
    """
    if not path.exists():
        raise DataError(f"nothing at {path}")
    if found := _known(path):
        return found
    if path.is_file() and ends_in(path.name, (".json",)):
        return "split_file", path  # which says what is wrong with it
    if path.is_file():
        raise DataError(f"{path} is neither a table nor a split file: wanted {WANTED}")
    for name in folders(path):
        if _known(path / name):
            raise DataError(f"{path} holds {_content(path)}, but {path / name} can be read: give that one")
    raise DataError(f"{path} holds {_content(path)}{_first_image(path)}: wanted {WANTED}")


def _known(path: Path) -> tuple[str, Path] | None:
    if path.is_file():
        layout = "table" if ends_in(path.name, TABLES) else "split_file" if _is_split_file(path) else ""
        return (layout, path) if layout else None
    splits = [path / name for name in files(path, (".json",)) if _is_split_file(path / name)]
    if len(splits) > 1:
        raise DataError(f"{path} holds several split files, {splits[0].name} and {splits[1].name}: give one of them")
    if splits:
        return "split_file", splits[0]
    if _holds_classes(path) or any(_holds_classes(path / name) for name in folders(path) if _is_split(name)):
        return "folder", path
    if tables_below(path):
        return "table", path
    return None


def _is_split(name: str) -> bool:
    return name.lower() in NAMES_OF_SPLITS


def _is_split_file(path: Path) -> bool:
    if not ends_in(path.name, (".json",)):
        return False
    try:
        splits = read_json(path)
    except DataError:
        return False
    return isinstance(splits, dict) and all(isinstance(splits.get(split), list) for split in ("train", "val", "test"))


def _holds_classes(path: Path) -> bool:
    return any(has_images(path / name) for name in folders(path))


def _first_image(path: Path) -> str:
    """Return where the first image is, if it is deeper than class folders are."""
    below = (file for file, reason in islice(walk(path), LOOKED_AT) if not reason and ends_in(file.name, IMAGES))
    image = next(below, None)
    return f" (the first image is {image.relative_to(path)})" if image else ""


def _content(path: Path) -> str:
    """For people: 'the folders a, b and 3 more, the files c'."""
    parts = []
    for kind, found in (("folder", folders(path)), ("file", files(path))):
        if found:
            more = f" and {len(found) - 3:,} more" if len(found) > 3 else ""
            parts.append(f"the {kind}{'s' * (len(found) > 1)} {', '.join(found[:3])}{more}")
    return " and ".join(parts) or "nothing"
