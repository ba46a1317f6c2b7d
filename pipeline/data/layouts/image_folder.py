"""Image folders: train/, val/ and test/ with a folder for each class, or class folders alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.layouts.class_names import in_order
from pipeline.data.layouts.file_kinds import has_images
from pipeline.data.layouts.listing import Listing, Options, Row, batches, folders, scored
from pipeline.data.layouts.official_splits import Sample, parts_of_each_class
from pipeline.data.layouts.skipped import Inventory
from pipeline.errors import DataError

NAMES_OF_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Names that files, folders and rows may use for a split, in lower case."""


@dataclass(frozen=True)
class ImageFolder:
    """Reader of image folders.

    Classes are in numeric order if all are numbered, else sorted by name. Images are sorted by name.
    """

    needs: tuple[str, ...] = ()

    def lists(self, folder: Path) -> bool:
        """Return False: the images themselves are listed."""
        return False

    def read(self, folder: Path, options: Options) -> Listing:
        """List the images of the folders train, val and test; without such folders, generate a split."""
        inventory = Inventory(folder)
        names = inventory.folders(folder)
        splits: dict[str, str] = {}
        for name in split_folders(folder, names):
            split = NAMES_OF_SPLITS[name.lower()]
            if splits.setdefault(split, name) != name:
                raise DataError(f"{folder} has {splits[split]}/ and {name}/, which both mean {split}: remove one")
        if not splits:
            return self._whole(folder, names, options, inventory)
        used = scored(splits, options, folder)
        for name in names:
            if name not in used.values():
                inventory.skip_folder(folder / name, "folders that are not a split")
        return self._split(folder, used, inventory)

    def _split(self, folder: Path, splits: dict[str, str], inventory: Inventory) -> Listing:
        kinds = {}
        for split, name in splits.items():
            kinds[split] = _not_empty(folder / name, inventory.folders(folder / name), inventory)
            if not kinds[split] and has_images(folder / name):
                raise DataError(
                    f"{folder / name} contains images but no class folders: expected {name}/CLASS/IMAGE "
                    f"(if {name} is a class, rename it)"
                )
        unsorted = kinds.get("train") or {kind for of_split in kinds.values() for kind in of_split}
        if not unsorted:
            inventory.contents().check(str(folder))
            raise DataError(f"{folder / next(iter(splits.values()))} has no class folders: expected one for each class")
        classes, order = in_order(unsorted, "class folders")
        label_of = {kind: label for label, kind in enumerate(classes)}
        for split, of_split in kinds.items():
            if foreign := [kind for kind in of_split if kind not in label_of]:
                inventory.contents().check(str(folder))  # images one level too deep would explain it
                train = folder / splits["train"]
                empty = " (its folder there is empty)" if (train / foreign[0]).is_dir() else ""
                raise DataError(
                    f"{folder / splits[split]} has the class {foreign[0]!r}, which {train} does not have{empty}"
                )
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
        not_empty = _not_empty(folder, names, inventory)
        if not not_empty:
            inventory.contents().check(str(folder))
            expected = f"{folder}/CLASS/IMAGE, or the same under train/, val/ and test/"
            raise DataError(f"{folder} contains no images in class folders: expected {expected}")
        classes, order = in_order(not_empty, "class folders")
        items: list[Sample] = [
            (f"{kind}/{image}", label, kind)
            for label, kind in enumerate(classes)
            for image in inventory.images(folder / kind)
        ]
        if options.test_only:
            splits, origin = {"test": items}, ""
            inventory.notes.append("all images are test images, since methods are not fitted on a shift set")
        else:
            splits = parts_of_each_class(items, random.Random(options.split_seed))
            seed = f"generated with split_seed {options.split_seed}"
            origin = f"{seed}: half of each class for train, a fifth for val, the rest for test"

        def rows() -> Iterator[Row]:
            return ((path, label, split) for split, of_split in splits.items() for path, label, _ in of_split)

        watched = (folder, *(folder / name for name in names))
        return Listing(
            folder, tuple(classes), tuple(classes), batches(rows), watched, origin, order, inventory.contents
        )


def split_folders(folder: Path, names: list[str]) -> list[str]:
    """Return the folders that are splits: those with the name of a split that contain class folders.

    If all folders with the name of a split directly contain images, and so do other folders, they are classes.
    """
    named = [name for name in names if name.lower() in NAMES_OF_SPLITS]
    flat = [name for name in named if has_images(folder / name) and not has_classes(folder / name)]
    if len(flat) < len(named) or not any(has_images(folder / name) for name in names if name not in flat):
        return named
    return []


def has_classes(folder: Path) -> bool:
    """Return True when a folder contains class folders: folders that directly contain images."""
    return any(has_images(folder / name) for name in folders(folder))


def _not_empty(where: Path, names: list[str], inventory: Inventory) -> list[str]:
    """Return the folders that contain images, and note the others, which are not classes."""
    empty = [name for name in names if not has_images(where / name)]
    for name in empty:
        inventory.images(where / name)
    if empty:
        shown = ", ".join(empty[:3]) + (", ..." if len(empty) > 3 else "")
        inventory.notes.append(f"{len(empty):,} folders in {where} contain no images and are not classes: {shown}")
    return [name for name in names if name not in set(empty)]
