"""Splits made from official files, where CoOp's split file is missing: its rules, with a seeded shuffle.

Source: KaiyangZhou/CoOp, datasets/*.py.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.data.file_kinds import IMAGES
from pipeline.data.listing import files, folders
from pipeline.errors import DataError
from pipeline.untrusted import read_json, read_text

Named = tuple[str, int, str]
"""Path under the image folder, label, class name."""
Made = dict[str, list[Named]]
"""By split."""

CALTECH_LEFT_OUT = ("BACKGROUND_Google", "Faces_easy")
CALTECH_NAMES = {"airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike"}
EUROSAT_NAMES = {
    "AnnualCrop": "Annual Crop Land",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "SeaLake": "Sea or Lake",
}


def parts_of_each_class(items: Sequence[Named], rng: random.Random) -> Made:
    """Half of each class for training, a fifth for validation, the rest for testing, in shuffled order."""
    made: Made = {"train": [], "val": [], "test": []}
    for members in _by_label(items).values():
        rng.shuffle(members)
        n_train, n_val = round(len(members) * 0.5), round(len(members) * 0.2)
        if not n_train or not n_val or len(members) == n_train + n_val:
            raise DataError(f"class {members[0][2]!r} has {len(members)} images, too few to split into three parts")
        made["train"] += members[:n_train]
        made["val"] += members[n_train : n_train + n_val]
        made["test"] += members[n_train + n_val :]
    return made


def fifth_for_val(trainval: Sequence[Named], test: Sequence[Named], rng: random.Random) -> Made:
    """An official training list, of which a fifth of each class becomes validation; the official test list."""
    made: Made = {"train": [], "val": [], "test": list(test)}
    for members in _by_label(trainval).values():
        rng.shuffle(members)
        n_val = round(len(members) * 0.2)
        if not n_val:
            raise DataError(
                f"class {members[0][2]!r} has {len(members)} training images, too few for a validation part"
            )
        made["val"] += members[:n_val]
        made["train"] += members[n_val:]
    return made


def _by_label(items: Sequence[Named]) -> dict[int, list[Named]]:
    found: dict[int, list[Named]] = {}
    for item in items:
        found.setdefault(item[1], []).append(item)
    return found


def class_folders(
    folder: Path, rng: random.Random, images: str, names: dict[str, str] | None = None, left_out: tuple[str, ...] = ()
) -> Made:
    """One folder a class, split into three parts."""
    kept = [name for name in folders(folder / images) if name not in left_out]
    return parts_of_each_class(
        [
            (f"{kind}/{image}", label, (names or {}).get(kind, kind))
            for label, kind in enumerate(kept)
            for image in files(folder / images / kind, IMAGES)
        ],
        rng,
    )


def pets(folder: Path, rng: random.Random) -> Made:
    """annotations/: lines of 'image class species breed'; the class name is the image's name without its number."""

    def items(name: str) -> list[Named]:
        rows = [line.split(" ") for line in lines(folder / "annotations" / name)]
        return [(f"{row[0]}.jpg", int(row[1]) - 1, row[0].rpartition("_")[0].lower()) for row in rows]

    return fifth_for_val(items("trainval.txt"), items("test.txt"), rng)


def cars(folder: Path, rng: random.Random) -> Made:
    """devkit/*.mat and cars_test_annos_withlabels.mat; the year comes first in a class name."""
    names = [str(name[0]) for name in matrix(folder / "devkit/cars_meta.mat", "class_names")[0]]

    def items(images: str, file: Path) -> list[Named]:
        found = []
        for row in matrix(file, "annotations")[0]:
            label = int(row["class"][0, 0]) - 1
            name, _, year = names[label].rpartition(" ")
            found.append((f"{images}/{row['fname'][0]}", label, f"{year} {name}"))
        return found

    trainval = items("cars_train", folder / "devkit/cars_train_annos.mat")
    return fifth_for_val(trainval, items("cars_test", folder / "cars_test_annos_withlabels.mat"), rng)


def flowers(folder: Path, rng: random.Random) -> Made:
    """imagelabels.mat, a label for each image of jpg/ in order, and cat_to_name.json."""
    names = read_json(folder / "cat_to_name.json")
    labels = [int(label) for label in matrix(folder / "imagelabels.mat", "labels")[0]]
    return parts_of_each_class(
        [(f"image_{i:05d}.jpg", label - 1, names[str(label)]) for i, label in enumerate(labels, start=1)], rng
    )


def sun(folder: Path, rng: random.Random) -> Made:
    """The first official partition; a name such as /c/church/indoor becomes 'indoor church'."""
    label_of = labels_of(folder / "ClassName.txt", [line[1:] for line in lines(folder / "ClassName.txt")])

    def items(name: str) -> list[Named]:
        found = []
        for line in lines(folder / name):
            scene = line[1:].rpartition("/")[0]
            if scene not in label_of:
                raise DataError(f"{folder / name} has the class {scene!r}, which ClassName.txt does not")
            found.append((line[1:], label_of[scene], " ".join(reversed(scene.split("/")[1:]))))
        return found

    return fifth_for_val(items("Training_01.txt"), items("Testing_01.txt"), rng)


def ucf(folder: Path, rng: random.Random) -> Made:
    """The first official partition; ApplyEyeMakeup becomes Apply_Eye_Makeup."""
    lists = folder / "ucfTrainTestlist"
    label_of = {name: int(label) - 1 for label, name in (line.split(" ") for line in lines(lists / "classInd.txt"))}

    def items(name: str) -> list[Named]:
        found = []
        for line in lines(lists / name):
            action, _, video = line.split(" ")[0].partition("/")
            if action not in label_of:
                raise DataError(f"{lists / name} has the class {action!r}, which classInd.txt does not")
            words = "_".join(re.findall("[A-Z][^A-Z]*", action))
            found.append((f"{words}/{video.removesuffix('.avi')}.jpg", label_of[action], words))
        return found

    return fifth_for_val(items("trainlist01.txt"), items("testlist01.txt"), rng)


def lines(path: Path) -> list[str]:
    """Return a text file's lines that are not empty, without white space at their ends.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return [line.strip() for line in read_text(path).splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def labels_of(path: Path, classes: Sequence[str]) -> dict[str, int]:
    """Return the label of each class in the order of a file's lines.

    Raises:
        DataError: a class occurs twice.
    """
    label_of = {name: label for label, name in enumerate(classes)}
    if len(label_of) < len(classes):
        raise DataError(f"{path} lists {next(c for c in classes if classes.count(c) > 1)!r} more than once")
    return label_of


def matrix(path: Path, name: str) -> Any:
    """An array of a MATLAB file. DataError when it cannot be read."""
    from scipy.io import loadmat  # seldom needed, slow to import

    try:
        return loadmat(str(path))[name]
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise DataError(f"{path} is not a MATLAB file with {name!r}: {error}") from error
