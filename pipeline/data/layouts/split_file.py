"""Read split files: JSON lists of [path, label, class name] under train, val and test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os.path import normpath
from pathlib import Path

from pipeline.data.layouts.listing import Listing, Options, Row, batches, folders, scored
from pipeline.data.layouts.official_splits import Sample, Splits
from pipeline.data.layouts.skipped import UNLISTED, Contents, Inventory
from pipeline.errors import DataError, one_line
from pipeline.untrusted import read_json


@dataclass(frozen=True)
class OwnSplitFile:
    """Reader of a user's split file. Its paths are relative to its folder, or to a folder beside it."""

    needs: tuple[str, ...] = ()

    def lists(self, folder: Path) -> bool:
        """Return True: the file alone lists the rows."""
        return folder.is_file()

    def read(self, folder: Path, options: Options) -> Listing:
        """List the rows of the file `folder`. The folder that contains the first image is taken as the image folder."""
        listed, notes = split_file(folder)
        splits, where = scored(listed, options, folder), folder.parent
        if lines := repeated(splits):
            raise DataError(f"{folder} lists {lines[0]}: remove the repetitions")
        first = next((path for rows in splits.values() for path, _, _ in rows), "")
        roots = [root for root in (where / name for name in folders(where)) if (root / first).is_file()]
        if (where / first).is_file():
            roots = [where]
        if len(roots) > 1:
            raise DataError(
                f"{folder}: {roots[0].name}/ and {roots[1].name}/ beside it both contain {first}: move one of them out"
            )
        return listing_of(roots[0] if roots else where, splits, (folder,), str(folder), notes=notes)


def split_file(path: Path) -> tuple[Splits, tuple[str, ...]]:
    """Read a file {"train" | "val" | "test": [[path, label, class name], ...]}.

    Returns:
        The rows by split, and a note for each other list.

    Raises:
        DataError: The file has another content.
    """
    try:
        content = read_json(path)
        splits = {name: [_row(*row) for row in content[name]] for name in ("train", "val", "test")}
    except KeyError as error:
        raise DataError(f"{path} has no list {error}: expected train, val and test") from error
    except (DataError, ValueError, TypeError, OverflowError) as error:
        reason = one_line(error)
        raise DataError(
            f"{path} is not a split file: expected lists of [path, label, class name] ({reason})"
        ) from error
    others = [key for key in content if key not in splits]
    return splits, tuple(f"{path.name} has {key!r} beside train, val and test: it is not used" for key in others)


def _row(path: object, label: object, name: object) -> Sample:
    """Return one row of a split file. Raises TypeError when its fields have other types."""
    if not (isinstance(path, str) and type(label) is int and isinstance(name, str)):
        raise TypeError(f"found [{path!r}, {label!r}, {name!r}]")
    return path, label, name


def listing_of(
    root: Path, splits: Splits, watched: Sequence[Path], where: str, origin: str = "", notes: tuple[str, ...] = ()
) -> Listing:
    """Return the listing of rows that contain their class names.

    Args:
        root: Folder of the images.
        splits: The rows.
        watched: Files that the rows were read from.
        where: What the rows were read from, for messages.
        origin: How the split was generated.
        notes: Notes about the content.

    Raises:
        DataError: A label has two names, labels are missing, or an image has two labels.
    """
    names: dict[int, str] = {}
    for path, label, name in (row for rows in splits.values() for row in rows):
        if names.setdefault(label, name) != name:
            raise DataError(f"{where} gives label {label} two names, {names[label]!r} and {name!r} ({path})")
    gaps = sorted(set(range(len(names))) - set(names))
    if gaps or not names:
        raise DataError(f"{where} has {len(names)} labels but no label {gaps[0] if gaps else 0}: expected 0, 1, 2, ...")
    _check_labels(splits, where)

    def rows() -> Iterator[Row]:
        for split, of_split in splits.items():
            yield from ((path, label, split) for path, label, _ in of_split)

    def contents() -> Contents:
        inventory = Inventory(root)
        inventory.unused(root, {normpath(path) for rows in splits.values() for path, _, _ in rows}, UNLISTED)
        return inventory.contents().plus(notes=notes)

    classnames = tuple(names[label] for label in range(len(names)))
    return Listing(
        root,
        classnames,
        classnames,
        batches(rows),
        tuple(watched),
        origin,
        "labels of its lists",
        contents,
        stated=True,
    )


def repeated(splits: Splits) -> list[str]:
    """Return one line for each split that lists an image more than once."""
    lines = []
    for split, rows in splits.items():
        count = Counter(normpath(image) for image, _, _ in rows)
        if len(count) < len(rows):
            lines.append(f"{count.most_common(1)[0][0]} more than once under {split}")
    return lines


def _check_labels(splits: Splits, where: str) -> None:
    """Raise DataError for an image that is listed under two labels."""
    label_of: dict[str, int] = {}
    for image, label, _ in (row for rows in splits.values() for row in rows):
        if (other := label_of.setdefault(normpath(image), label)) != label:
            raise DataError(f"{where} lists {image} with the labels {other} and {label}: remove one")
