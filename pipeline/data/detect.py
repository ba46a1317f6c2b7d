"""What a user's path holds: which layout reads it, or what was found there and what is wanted."""

from __future__ import annotations

from pathlib import Path

from pipeline.data.folder import IMAGES, NAMES_OF_SPLITS
from pipeline.data.listing import files, folders
from pipeline.errors import DataError
from pipeline.untrusted import read_json

WANTED = (
    "train/CLASS/IMAGE beside test/CLASS/IMAGE (val/ if there is one), or CLASS/IMAGE, or a JSON file of "
    "[path, label, class name] under train, val and test, or .parquet or .arrow files"
)
TABLES = (".parquet", ".arrow")


def detect(path: Path) -> tuple[str, Path]:
    """The layout, and the file or folder that it reads. DataError when there is none, with what is wanted."""
    if not path.exists():
        raise DataError(f"nothing at {path}")
    if found := _known(path):
        return found
    if path.is_file():
        raise DataError(f"{path} is neither a table nor a split file: wanted {WANTED}")
    for name in folders(path):
        if _known(path / name):
            raise DataError(f"{path} holds {_content(path)}, but {path / name} can be read: give that one")
    raise DataError(f"{path} holds {_content(path)}: wanted {WANTED}")


def _known(path: Path) -> tuple[str, Path] | None:
    if path.is_file():
        layout = "table" if path.suffix in TABLES else "split_file" if _is_split_file(path) else ""
        return (layout, path) if layout else None
    splits = [path / name for name in files(path, (".json",)) if _is_split_file(path / name)]
    if len(splits) > 1:
        raise DataError(f"{path} holds several split files, {splits[0].name} and {splits[1].name}: give one of them")
    if splits:
        return "split_file", splits[0]
    if _holds_classes(path) or any(_holds_classes(path / name) for name in folders(path) if _is_split(name)):
        return "folder", path
    if any(next(path.rglob(f"*{ending}"), None) for ending in TABLES):
        return "table", path
    return None


def _is_split(name: str) -> bool:
    return name.lower() in NAMES_OF_SPLITS


def _is_split_file(path: Path) -> bool:
    if path.suffix != ".json":
        return False
    try:
        found = read_json(path)
    except DataError:
        return False
    return isinstance(found, dict) and all(isinstance(found.get(split), list) for split in ("train", "val", "test"))


def _holds_classes(path: Path) -> bool:
    return any(files(path / name, IMAGES) for name in folders(path))


def _content(path: Path) -> str:
    """For people: 'the folders a, b and 3 more, the files c'."""
    parts = []
    for kind, found in (("folder", folders(path)), ("file", files(path))):
        if found:
            more = f" and {len(found) - 3:,} more" if len(found) > 3 else ""
            parts.append(f"the {kind}{'s' * (len(found) > 1)} {', '.join(found[:3])}{more}")
    return " and ".join(parts) or "nothing"
