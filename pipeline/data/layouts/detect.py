"""Detect the layout of a user's folder or file."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from pipeline.data.layouts.file_kinds import IMAGES, TABLES, ends_in
from pipeline.data.layouts.image_folder import NAMES_OF_SPLITS, has_classes
from pipeline.data.layouts.listing import files, folders
from pipeline.data.layouts.shards import tables_below
from pipeline.data.layouts.skipped import walk
from pipeline.errors import DataError
from pipeline.untrusted import read_json

EXPECTED = "train/CLASS/IMAGE and test/CLASS/IMAGE, or CLASS/IMAGE, or a JSON split file, or .parquet or .arrow files"
LOOKED_AT = 10_000
"""Number of files that are examined to name an image in a folder that has no known layout."""


def detect(path: Path) -> tuple[str, Path]:
    """Return the layout of a path, and the file or folder that its reader takes.

    Raises:
        DataError: The path has no known layout; the message says what it contains and what is expected.
    """
    if not path.exists():
        raise DataError(f"nothing at {path}")
    if found := _known(path):
        return found
    if path.is_file() and ends_in(path.name, (".json",)):
        return "split_file", path  # its reader reports what is wrong with it
    if path.is_file():
        raise DataError(f"{path} is neither a table nor a split file: expected {EXPECTED}")
    for name in folders(path):
        if _known(path / name):
            raise DataError(f"{path} contains {_content(path)}, but {path / name} can be read: use that one")
    raise DataError(f"{path} contains {_content(path)}{_first_image(path)}: expected {EXPECTED}")


def _known(path: Path) -> tuple[str, Path] | None:
    if path.is_file():
        layout = "table" if ends_in(path.name, TABLES) else "split_file" if _is_split_file(path) else ""
        return (layout, path) if layout else None
    splits = [path / name for name in files(path, (".json",)) if _is_split_file(path / name)]
    if len(splits) > 1:
        raise DataError(f"{path} contains several split files, {splits[0].name} and {splits[1].name}: use one of them")
    if splits:
        return "split_file", splits[0]
    if has_classes(path) or any(has_classes(path / name) for name in folders(path) if _is_split(name)):
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


def _first_image(path: Path) -> str:
    """Return the path of the first image below a folder, as part of a message."""
    below = (file for file, reason in islice(walk(path), LOOKED_AT) if not reason and ends_in(file.name, IMAGES))
    image = next(below, None)
    return f" (the first image is {image.relative_to(path)})" if image else ""


def _content(path: Path) -> str:
    """Describe the content of a folder: 'the folders a, b and 3 more and the file c'."""
    parts = []
    for kind, names in (("folder", folders(path)), ("file", files(path))):
        if names:
            more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
            parts.append(f"the {kind}{'s' * (len(names) > 1)} {', '.join(names[:3])}{more}")
    return " and ".join(parts) or "nothing"
