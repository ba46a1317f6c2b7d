"""The fifteen data sets as CoOp's installation guide lays them out, and the splits that its loaders would make.

Source: KaiyangZhou/CoOp, DATASETS.md and datasets/*.py. Eleven sets lie in a folder with one file that lists
[path, label, class name] for train, val and test; where that file is missing, CoOp makes it from the official
annotations with an unseeded shuffle, so that what is made here follows the same rule and is not the published split.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.data.listing import Listing, Options, Row, batches
from pipeline.data.official import (
    CALTECH_LEFT_OUT,
    CALTECH_NAMES,
    EUROSAT_NAMES,
    Made,
    cars,
    class_folders,
    flowers,
    labels_of,
    lines,
    pets,
    sun,
    ucf,
)
from pipeline.data.skipped import Inventory
from pipeline.data.split_file import named, repeated, split_file
from pipeline.errors import DataError

# --- sets with a split file ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SplitFile:
    """A data set whose split is a JSON file, or is made from the official files."""

    images: str
    """Folder that the split file's paths are relative to."""
    split: str
    make: Callable[[Path, random.Random], Made]
    raw: tuple[str, ...]
    """What `make` reads."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Without these in its folder, nothing can be read."""
        return (self.images,) if self.images else ("cars_train", "cars_test")

    def lists(self, folder: Path) -> bool:
        """The split file alone says what there is."""
        return (folder / self.split).is_file()

    def read(self, folder: Path, options: Options) -> Listing:
        """The published split where its file is there, else one made by the same rule."""
        path = folder / self.split
        if path.is_file():
            made, notes = split_file(path)
            notes += tuple(f"{self.split} lists {line}" for line in repeated(made))
            return named(folder / self.images, made, (path,), str(path), notes=notes)
        if lacks := [name for name in self.raw if not (folder / name).exists()]:
            raise DataError(
                f"{path} is not there, and without {' and '.join(lacks)} no split can be made in its place: download "
                "either (docs/data.md says where)"
            )
        watched = tuple(folder / name for name in self.raw)
        try:
            made = self.make(folder, random.Random(options.split_seed))
        except (ValueError, KeyError, IndexError, TypeError) as error:
            wanted = f"{' and '.join(self.raw)} are not as their authors publish them"
            raise DataError(f"{folder}: {wanted} ({type(error).__name__}: {error})") from error
        words = (
            f"made here with split_seed {options.split_seed}, since {self.split} is missing: not the published split"
        )
        return named(folder / self.images, made, watched, str(folder), words)


# --- sets whose files say the split --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Aircraft:
    """FGVC-Aircraft: official lists of 'image class name' for train, val and test."""

    needs: tuple[str, ...] = (
        "images",
        "variants.txt",
        "images_variant_train.txt",
        "images_variant_val.txt",
        "images_variant_test.txt",
    )

    def lists(self, folder: Path) -> bool:
        """The official lists alone say what there is."""
        return all((folder / name).is_file() for name in self.needs[1:])

    def read(self, folder: Path, options: Options) -> Listing:
        """The official lists."""
        label_of = labels_of(folder / "variants.txt", lines(folder / "variants.txt"))
        made: Made = {}
        for split in ("train", "val", "test"):
            made[split] = []
            for line in lines(folder / f"images_variant_{split}.txt"):
                image, _, name = line.partition(" ")
                if name not in label_of:
                    raise DataError(f"images_variant_{split}.txt in {folder} has the class {name!r}, variants.txt not")
                made[split].append((f"{image}.jpg", label_of[name], name))
        return named(folder / "images", made, tuple(folder / name for name in self.needs[1:]), str(folder))


@dataclass(frozen=True)
class ImageNet:
    """ImageNet and its shifts: folders of images, named by WordNet id (or by number), and classnames.txt."""

    images: str
    splits: tuple[tuple[str, str], ...]
    """(folder under `images`, split)"""
    numbered: bool = False
    """Class folders are 0, 1, ...: the places of their classes in classnames.txt."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Without these in its folder, nothing can be read."""
        return (*(f"{self.images}/{part}".rstrip("/") for part, _ in self.splits), "classnames.txt")

    def lists(self, folder: Path) -> bool:
        """Images are found by listing them."""
        return False

    def read(self, folder: Path, options: Options) -> Listing:
        """Labels are the sorted folders' numbers, and images are in sorted order (CoOp's follows the file system)."""
        root = folder / self.images
        pairs = [row.partition(" ") for row in lines(folder / "classnames.txt")]
        name_of = {wnid: name for wnid, _, name in pairs}
        known = list(labels_of(folder / "classnames.txt", [wnid for wnid, _, _ in pairs]))
        if not known:
            raise DataError(f"{folder}/classnames.txt is empty: wanted lines such as 'n01440764 tench'")
        inventory = Inventory(root)
        found = {part: self._classes(root / part, known, inventory) for part, _ in self.splits}
        kinds = next(iter(found.values()))
        for others in found.values():
            if set(kinds) ^ set(others):
                odd = min(set(kinds) ^ set(others))
                raise DataError(
                    f"class folder {odd} is not in each of {', '.join(str(root / p) for p, _ in self.splits)}"
                )
        ids = [known[int(kind)] if self.numbered else kind for kind in kinds]

        def rows() -> Iterator[Row]:
            for part, split in self.splits:
                for label, kind in enumerate(kinds):
                    where = f"{part}/{kind}".lstrip("/")
                    yield from ((f"{where}/{image}", label, split) for image in inventory.images(root / where))

        watched = [folder / "classnames.txt"]
        for part in found:
            watched += [root / part, *(root / part / kind for kind in kinds)]
        names, order = (
            tuple(name_of[wnid] for wnid in ids),
            f"class folders in {'numeric' if self.numbered else 'text'} order",
        )
        return Listing(root, names, tuple(ids), batches(rows), tuple(watched), "", order, inventory.contents)

    def _classes(self, where: Path, known: Sequence[str], inventory: Inventory) -> list[str]:
        kinds = inventory.folders(where)
        if not kinds:
            raise DataError(f"{where} holds no class folders: wanted one for each class, as in {where / known[0]}")
        allowed = {str(label) for label in range(len(known))} if self.numbered else set(known)
        if foreign := [kind for kind in kinds if kind not in allowed]:
            raise DataError(f"{where} has the class folder {foreign[0]}, which classnames.txt does not list")
        return sorted(kinds, key=int) if self.numbered else kinds


SHIFT = (("", "test"),)
COOP: dict[str, SplitFile | Aircraft | ImageNet] = {
    "imagenet": ImageNet("images", (("train", "train"), ("val", "test"))),
    "caltech101": SplitFile(
        "101_ObjectCategories",
        "split_zhou_Caltech101.json",
        partial(class_folders, images="101_ObjectCategories", names=CALTECH_NAMES, left_out=CALTECH_LEFT_OUT),
        ("101_ObjectCategories",),
    ),
    "oxford_pets": SplitFile(
        "images", "split_zhou_OxfordPets.json", pets, ("annotations/trainval.txt", "annotations/test.txt")
    ),
    "stanford_cars": SplitFile(
        "",
        "split_zhou_StanfordCars.json",
        cars,
        ("devkit/cars_meta.mat", "devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat"),
    ),
    "oxford_flowers": SplitFile(
        "jpg", "split_zhou_OxfordFlowers.json", flowers, ("imagelabels.mat", "cat_to_name.json")
    ),
    "food101": SplitFile("images", "split_zhou_Food101.json", partial(class_folders, images="images"), ("images",)),
    "fgvc_aircraft": Aircraft(),
    "sun397": SplitFile(
        "SUN397", "split_zhou_SUN397.json", sun, ("ClassName.txt", "Training_01.txt", "Testing_01.txt")
    ),
    "dtd": SplitFile(
        "images", "split_zhou_DescribableTextures.json", partial(class_folders, images="images"), ("images",)
    ),
    "eurosat": SplitFile(
        "2750", "split_zhou_EuroSAT.json", partial(class_folders, images="2750", names=EUROSAT_NAMES), ("2750",)
    ),
    "ucf101": SplitFile(
        "UCF-101-midframes",
        "split_zhou_UCF101.json",
        ucf,
        tuple(f"ucfTrainTestlist/{name}.txt" for name in ("classInd", "trainlist01", "testlist01")),
    ),
    "imagenetv2": ImageNet("imagenetv2-matched-frequency-format-val", SHIFT, numbered=True),
    "imagenet_sketch": ImageNet("images", SHIFT),
    "imagenet_a": ImageNet("imagenet-a", SHIFT),
    "imagenet_r": ImageNet("imagenet-r", SHIFT),
}
"""By name, as in CoOp's configs/datasets/."""
