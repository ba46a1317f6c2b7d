"""Generate the split of a data set from its official files, as CoOp does when its split file is missing.

Source: KaiyangZhou/CoOp, datasets/*.py. Each data set is split by the rule that its loader has there. The shuffle is
seeded by the card's `split_seed`; CoOp's depends on the seed of the run that comes first.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.data.layouts.file_kinds import IMAGES
from pipeline.data.layouts.listing import files, folders
from pipeline.errors import DataError
from pipeline.untrusted import read_json, read_text

Sample = tuple[str, int, str]
"""One image: path relative to the image folder, label, class name."""
Splits = dict[str, list[Sample]]
"""Images by split."""

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


def parts_of_each_class(items: Sequence[Sample], rng: random.Random) -> Splits:
    """Shuffle each class and split it: half for training, a fifth for validation, the rest for testing.

    CoOp: DescribableTextures.read_and_split_data.
    """
    splits: Splits = {"train": [], "val": [], "test": []}
    for members in _by_label(items).values():
        rng.shuffle(members)
        n_train, n_val = round(len(members) * 0.5), round(len(members) * 0.2)
        if not n_train or not n_val or len(members) == n_train + n_val:
            raise DataError(f"class {members[0][2]!r} has {len(members)} images, too few to split into three parts")
        splits["train"] += members[:n_train]
        splits["val"] += members[n_train : n_train + n_val]
        splits["test"] += members[n_train + n_val :]
    return splits


def fifth_for_val(trainval: Sequence[Sample], test: Sequence[Sample], rng: random.Random) -> Splits:
    """Shuffle each class of the official training list and take a fifth for validation; keep the official test list.

    CoOp: OxfordPets.split_trainval.
    """
    splits: Splits = {"train": [], "val": [], "test": list(test)}
    for members in _by_label(trainval).values():
        rng.shuffle(members)
        n_val = round(len(members) * 0.2)
        if not n_val:
            raise DataError(
                f"class {members[0][2]!r} has {len(members)} training images, too few for a validation part"
            )
        splits["val"] += members[:n_val]
        splits["train"] += members[n_val:]
    return splits


def _by_label(items: Sequence[Sample]) -> dict[int, list[Sample]]:
    by_label: dict[int, list[Sample]] = {}
    for item in items:
        by_label.setdefault(item[1], []).append(item)
    return by_label


def class_folders(
    folder: Path, rng: random.Random, images: str, names: dict[str, str] | None = None, left_out: tuple[str, ...] = ()
) -> Splits:
    """Split class folders into three parts.

    Args:
        folder: Folder of the data set.
        rng: Generator of the shuffle.
        images: Name of the folder that contains the class folders.
        names: Class names by folder name, where they differ.
        left_out: Class folders that are not used.
    """
    kept = [name for name in folders(folder / images) if name not in left_out]
    return parts_of_each_class(
        [
            (f"{kind}/{image}", label, (names or {}).get(kind, kind))
            for label, kind in enumerate(kept)
            for image in files(folder / images / kind, IMAGES)
        ],
        rng,
    )


def pets(folder: Path, rng: random.Random) -> Splits:
    """Read annotations/: lines of 'image class species breed'. A class name is an image's name without its number."""

    def items(name: str) -> list[Sample]:
        rows = [line.split(" ") for line in lines(folder / "annotations" / name)]
        return [(f"{row[0]}.jpg", int(row[1]) - 1, row[0].rpartition("_")[0].lower()) for row in rows]

    return fifth_for_val(items("trainval.txt"), items("test.txt"), rng)


def cars(folder: Path, rng: random.Random) -> Splits:
    """Read devkit/*.mat and cars_test_annos_withlabels.mat. The year of a class name is moved to its beginning."""
    names = [str(name[0]) for name in matrix(folder / "devkit/cars_meta.mat", "class_names")[0]]

    def items(images: str, file: Path) -> list[Sample]:
        samples = []
        for row in matrix(file, "annotations")[0]:
            label = int(row["class"][0, 0]) - 1
            name, _, year = names[label].rpartition(" ")
            samples.append((f"{images}/{row['fname'][0]}", label, f"{year} {name}"))
        return samples

    trainval = items("cars_train", folder / "devkit/cars_train_annos.mat")
    return fifth_for_val(trainval, items("cars_test", folder / "cars_test_annos_withlabels.mat"), rng)


def flowers(folder: Path, rng: random.Random) -> Splits:
    """Read imagelabels.mat, which has the label of each image of jpg/ in order, and cat_to_name.json."""
    names = read_json(folder / "cat_to_name.json")
    labels = [int(label) for label in matrix(folder / "imagelabels.mat", "labels")[0]]
    return parts_of_each_class(
        [(f"image_{i:05d}.jpg", label - 1, names[str(label)]) for i, label in enumerate(labels, start=1)], rng
    )


def sun(folder: Path, rng: random.Random) -> Splits:
    """Read the first official partition. A name such as /c/church/indoor becomes 'indoor church'."""
    label_of = labels_of(folder / "ClassName.txt", [line[1:] for line in lines(folder / "ClassName.txt")])

    def items(name: str) -> list[Sample]:
        samples = []
        for line in lines(folder / name):
            scene = line[1:].rpartition("/")[0]
            if scene not in label_of:
                raise DataError(f"{folder / name} has the class {scene!r}, which ClassName.txt does not")
            samples.append((line[1:], label_of[scene], " ".join(reversed(scene.split("/")[1:]))))
        return samples

    return fifth_for_val(items("Training_01.txt"), items("Testing_01.txt"), rng)


def ucf(folder: Path, rng: random.Random) -> Splits:
    """Read the first official partition. ApplyEyeMakeup becomes Apply_Eye_Makeup."""
    lists = folder / "ucfTrainTestlist"
    label_of = {name: int(label) - 1 for label, name in (line.split(" ") for line in lines(lists / "classInd.txt"))}

    def items(name: str) -> list[Sample]:
        samples = []
        for line in lines(lists / name):
            action, _, video = line.split(" ")[0].partition("/")
            if action not in label_of:
                raise DataError(f"{lists / name} has the class {action!r}, which classInd.txt does not")
            words = "_".join(re.findall("[A-Z][^A-Z]*", action))
            samples.append((f"{words}/{video.removesuffix('.avi')}.jpg", label_of[action], words))
        return samples

    return fifth_for_val(items("trainlist01.txt"), items("testlist01.txt"), rng)


def lines(path: Path) -> list[str]:
    """Return the non-empty lines of a text file, stripped.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        return [line.strip() for line in read_text(path).splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def labels_of(path: Path, classes: Sequence[str]) -> dict[str, int]:
    """Return the label of each class: its position in the list.

    Raises:
        DataError: A class occurs twice in the file `path`.
    """
    label_of = {name: label for label, name in enumerate(classes)}
    if len(label_of) < len(classes):
        raise DataError(f"{path} lists {next(c for c in classes if classes.count(c) > 1)!r} more than once")
    return label_of


def matrix(path: Path, name: str) -> Any:
    """Return an array of a MATLAB file. Raises DataError when it cannot be read."""
    from scipy.io import loadmat  # rarely needed, slow to import

    try:
        return loadmat(str(path))[name]
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise DataError(f"{path} is not a MATLAB file with {name!r}: {error}") from error
