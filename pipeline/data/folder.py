"""Image folders: train/, val/ and test/ with a folder for each class, or class folders alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.class_names import in_order
from pipeline.data.file_kinds import has_images
from pipeline.data.listing import Listing, Options, Row, batches, folders, scored
from pipeline.data.official import Named, parts_of_each_class
from pipeline.data.skipped import Inventory
from pipeline.errors import DataError

NAMES_OF_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""What files, folders and rows may call a split, in lower case."""


@dataclass(frozen=True)
class ImageFolder:
    """Classes in numeric order if all are numbered, else in that of their names; images in that of their names."""

    needs: tuple[str, ...] = ()

    def lists(self, folder: Path) -> bool:
        """Return False: images are found by listing them."""
        return False

    def read(self, folder: Path, options: Options) -> Listing:
        """List by the folders train, val and test if there is one of them, else make a split."""
        inventory = Inventory(folder)
        names = inventory.folders(folder)
        splits: dict[str, str] = {}
        for name in split_folders(folder, names):
            split = NAMES_OF_SPLITS[name.lower()]
            if splits.setdefault(split, name) != name:
                raise DataError(f"{folder} has {splits[split]}/ and {name}/, which both mean {split}: leave one")
        if not splits:
            return self._whole(folder, names, options, inventory)
        used = scored(splits, options, folder)
        for name in names:
            if name not in used.values():
                inventory.skip_folder(folder / name, "folders that are no split")
        return self._split(folder, used, inventory)

    def _split(self, folder: Path, splits: dict[str, str], inventory: Inventory) -> Listing:
        kinds = {}
        for split, name in splits.items():
            kinds[split] = _not_empty(folder / name, inventory.folders(folder / name), inventory)
            if not kinds[split] and has_images(folder / name):
                raise DataError(
                    f"{folder / name} holds images but no class folders: wanted {name}/CLASS/IMAGE (if {name} is a "
                    "class, rename it)"
                )
        found = kinds.get("train") or {kind for of_split in kinds.values() for kind in of_split}
        if not found:
            inventory.contents().check(str(folder))
            raise DataError(f"{folder / next(iter(splits.values()))} holds no class folders: wanted one for each class")
        classes, order = in_order(found, "class folders")
        label_of = {kind: label for label, kind in enumerate(classes)}
        for split, of_split in kinds.items():
            if foreign := [kind for kind in of_split if kind not in label_of]:
                inventory.contents().check(str(folder))  # such as images one level too deep, which would explain it
                train = folder / splits["train"]
                empty = " (its folder there is empty)" if (train / foreign[0]).is_dir() else ""
                raise DataError(f"{folder / splits[split]} has the class {foreign[0]!r}, which {train} has not{empty}")
            kinds[split] = [kind for kind in classes if kind in of_split]

        def rows() -> Iterator[Row]:
            for split, of_split in kinds.items():
                for kind in of_split:
                    where, label = f"{splits[split]}/{kind}", label_of[kind]
                    yield from ((f"{where}/{image}", label, split) for image in inventory.images(folder / where))

        watched = [folder, *(folder / name for name in splits.values())]
        watched += [folder / name / kind for name in splits.values() for kind in folders(folder / name)]
        return Listing(
            folder, tuple(classes), tuple(classes), batches(rows), tuple(watched), "", order, inventory.contents
        )

    def _whole(self, folder: Path, names: list[str], options: Options, inventory: Inventory) -> Listing:
        if options.test_split:
            raise DataError(f"{folder} has no {options.test_split} split: leave test={options.test_split} out")
        found = _not_empty(folder, names, inventory)
        if not found:
            inventory.contents().check(str(folder))
            wanted = f"{folder}/CLASS/IMAGE, or the same under train/, val/ and test/"
            raise DataError(f"{folder} holds no images in class folders: wanted {wanted}")
        classes, order = in_order(found, "class folders")
        items: list[Named] = [
            (f"{kind}/{image}", label, kind)
            for label, kind in enumerate(classes)
            for image in inventory.images(folder / kind)
        ]
        if options.test_only:
            made, how = {"test": items}, ""
            inventory.notes.append("all images are test images, since nothing is fitted on a shift set")
        else:
            made = parts_of_each_class(items, random.Random(options.split_seed))
            seed = f"made here with split_seed {options.split_seed}"
            how = f"{seed}: half of each class for train, a fifth for val, the rest for test"

        def rows() -> Iterator[Row]:
            return ((path, label, split) for split, of_split in made.items() for path, label, _ in of_split)

        watched = (folder, *(folder / name for name in names))
        return Listing(folder, tuple(classes), tuple(classes), batches(rows), watched, how, order, inventory.contents)


def split_folders(folder: Path, names: list[str]) -> list[str]:
    """Return the folders that are splits: those with a split's name that hold class folders.

    If all folders with a split's name hold images directly, and so do other folders, they are classes.
    """
    named = [name for name in names if name.lower() in NAMES_OF_SPLITS]
    flat = [name for name in named if has_images(folder / name) and not _has_classes(folder / name)]
    if len(flat) < len(named) or not any(has_images(folder / name) for name in names if name not in flat):
        return named
    return []


def _has_classes(folder: Path) -> bool:
    return any(has_images(folder / name) for name in folders(folder))


def _not_empty(where: Path, names: list[str], inventory: Inventory) -> list[str]:
    """Return the class folders that hold images; the others are no classes, which is noted."""
    empty = [name for name in names if not has_images(where / name)]
    for name in empty:
        inventory.images(where / name)
    if empty:
        shown = ", ".join(empty[:3]) + (", ..." if len(empty) > 3 else "")
        inventory.notes.append(f"{len(empty):,} folders in {where} hold no images and are no classes: {shown}")
    return [name for name in names if name not in set(empty)]
