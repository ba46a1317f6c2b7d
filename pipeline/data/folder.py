"""Image folders of one's own: train/, val/ and test/ with a folder for each class, or class folders alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.listing import Listing, Row, batches, files, folders
from pipeline.data.official import Named, parts_of_each_class
from pipeline.errors import DataError

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""Files that end otherwise are left alone."""
NAMES_OF_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""What files, folders and rows may call a split, in lower case."""


@dataclass(frozen=True)
class ImageFolder:
    """Classes in the order of their folders' sorted names, images in that of theirs."""

    needs: tuple[str, ...] = ()

    def lists(self, folder: Path) -> bool:
        """Images are found by listing them."""
        return False

    def read(self, folder: Path, seed: int) -> Listing:
        """Split by the folders train, val and test if there is one of them, else made here."""
        splits: dict[str, str] = {}
        for name in folders(folder):
            split = NAMES_OF_SPLITS.get(name.lower())
            if split and splits.setdefault(split, name) != name:
                raise DataError(f"{folder} has {splits[split]}/ and {name}/, which both mean {split}: leave one")
        return self._split(folder, splits) if splits else self._whole(folder, seed)

    def _split(self, folder: Path, splits: dict[str, str]) -> Listing:
        kinds = {split: folders(folder / name) for split, name in splits.items()}
        classes = kinds.get("train") or sorted({kind for of_split in kinds.values() for kind in of_split})
        if not classes:
            raise DataError(f"{folder / next(iter(splits.values()))} holds no class folders: wanted one for each class")
        label_of = {kind: label for label, kind in enumerate(classes)}
        for split, of_split in kinds.items():
            if foreign := [kind for kind in of_split if kind not in label_of]:
                raise DataError(
                    f"{folder / splits[split]} has the class {foreign[0]!r}, which {folder / splits['train']} has not"
                )

        def rows() -> Iterator[Row]:
            for split, of_split in kinds.items():
                for kind in of_split:
                    where, label = f"{splits[split]}/{kind}", label_of[kind]
                    yield from ((f"{where}/{image}", label, split) for image in files(folder / where, IMAGES))

        watched = [folder, *(folder / name for name in splits.values())]
        watched += [folder / splits[split] / kind for split, of_split in kinds.items() for kind in of_split]
        return Listing(folder, tuple(classes), tuple(classes), batches(rows), tuple(watched))

    def _whole(self, folder: Path, seed: int) -> Listing:
        classes = folders(folder)
        images = {kind: files(folder / kind, IMAGES) for kind in classes}
        if not classes or not any(images.values()):
            wanted = f"{folder}/CLASS/IMAGE, or the same under train/, val/ and test/"
            raise DataError(f"{folder} holds no images in class folders: wanted {wanted}")
        items: list[Named] = [
            (f"{kind}/{image}", label, kind) for label, kind in enumerate(classes) for image in images[kind]
        ]
        made = parts_of_each_class(items, random.Random(seed))

        def rows() -> Iterator[Row]:
            return ((path, label, split) for split, of_split in made.items() for path, label, _ in of_split)

        watched = (folder, *(folder / kind for kind in classes))
        how = f"made here with split_seed {seed}: half of each class for train, a fifth for val, the rest for test"
        return Listing(folder, tuple(classes), tuple(classes), batches(rows), watched, how)
