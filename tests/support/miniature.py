"""The fifteen CoOp layouts in miniature: real folders and file formats, a few generated images a class."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf
from PIL import Image
from scipy.io import savemat

from pipeline.config.card_files import dataset_card
from pipeline.data.dataset import manifest_of
from pipeline.data.layouts.listing import SPLITS

Splits = Mapping[str, Sequence[tuple[str, int, str]]]
PER_CLASS = {"train": 3, "val": 2, "test": 2}
WNIDS = ("n01440764", "n01443537", "n01484850", "n01491361")
IMAGENET_NAMES = ("tench", "goldfish", "great white shark", "tiger shark")


def picture(name: str, kind: str = "PNG") -> bytes:
    """A small image that no other name has."""
    colours = np.frombuffer(hashlib.sha256(name.encode()).digest()[:12], np.uint8).reshape(2, 2, 3)
    buffer = io.BytesIO()
    Image.fromarray(colours).resize((8, 8), Image.Resampling.NEAREST).save(buffer, kind)
    return buffer.getvalue()


def put(path: Path, kind: str = "") -> None:
    """An image file, its content made from its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(str(path), kind or ("PNG" if path.suffix == ".png" else "JPEG")))


def text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def split_of(path: Callable[[str, int, str], str], names: Sequence[str], n: Mapping[str, int] = PER_CLASS) -> Splits:
    """Rows as a split file has them; `path` makes an image's from (class name, number, split)."""
    number = iter(range(1, 10_000))
    return {
        split: [(path(name, next(number), split), y, name) for y, name in enumerate(names) for _ in range(k)]
        for split, k in n.items()
    }


def with_split_file(folder: Path, images: str, file: str, splits: Splits) -> None:
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(json.dumps(splits))
    for rows in splits.values():
        for path, _, _ in rows:
            put(folder / images / path)


# --- eleven sets ----------------------------------------------------------------------------------------------------


def caltech101(folder: Path) -> None:
    splits = split_of(lambda c, i, _: f"{c}/image_{i:04d}.jpg", ["face", "leopard", "accordion"])
    with_split_file(folder, "101_ObjectCategories", "split_zhou_Caltech101.json", splits)


def oxford_pets(folder: Path) -> None:
    splits = split_of(lambda c, i, _: f"{c.title()}_{i}.jpg", ["abyssinian", "american_bulldog"])
    with_split_file(folder, "images", "split_zhou_OxfordPets.json", splits)


def stanford_cars(folder: Path) -> None:
    splits = split_of(
        lambda c, i, split: f"cars_{'test' if split == 'test' else 'train'}/{i:05d}.jpg",
        ["2000 AM General Hummer SUV", "2012 Audi TTS Coupe"],
    )
    with_split_file(folder, "", "split_zhou_StanfordCars.json", splits)


def oxford_flowers(folder: Path) -> None:
    splits = split_of(lambda c, i, _: f"image_{i:05d}.jpg", ["pink primrose", "hard-leaved pocket orchid"])
    with_split_file(folder, "jpg", "split_zhou_OxfordFlowers.json", splits)


def food101(folder: Path) -> None:
    splits = split_of(lambda c, i, _: f"{c}/{i}.jpg", ["apple_pie", "baby_back_ribs"])
    with_split_file(folder, "images", "split_zhou_Food101.json", splits)


def fgvc_aircraft(folder: Path) -> None:
    names = ["707-320", "F-16A/B", "Boeing 717"]
    text(folder / "variants.txt", *names)
    for split, rows in split_of(lambda c, i, _: f"{i:07d}", names).items():
        text(folder / f"images_variant_{split}.txt", *(f"{image} {name}" for image, _, name in rows))
        for image, _, _ in rows:
            put(folder / "images" / f"{image}.jpg")


def sun397(folder: Path) -> None:
    splits = split_of(lambda c, i, _: f"{c[0]}/{'/'.join(reversed(c.split()))}/sun_{i}.jpg", ["abbey", "indoor church"])
    with_split_file(folder, "SUN397", "split_zhou_SUN397.json", splits)


def dtd(folder: Path) -> None:
    splits = split_of(lambda c, i, _: f"{c}/{c}_{i:04d}.jpg", ["banded", "polka-dotted"])
    with_split_file(folder, "images", "split_zhou_DescribableTextures.json", splits)


def eurosat(folder: Path) -> None:
    splits = split_of(lambda c, i, _: f"{c.split()[0]}/{c.split()[0]}_{i}.jpg", ["Annual Crop Land", "Sea or Lake"])
    with_split_file(folder, "2750", "split_zhou_EuroSAT.json", splits)


def ucf101(folder: Path) -> None:
    names = ["Apply_Eye_Makeup", "Archery"]
    splits = split_of(lambda c, i, _: f"{c}/v_{c.replace('_', '')}_g{i:02d}_c01.jpg", names)
    with_split_file(folder, "UCF-101-midframes", "split_zhou_UCF101.json", splits)


def classnames_txt(folder: Path) -> None:
    text(folder / "classnames.txt", *(f"{w} {name}" for w, name in zip(WNIDS, IMAGENET_NAMES, strict=True)))


def class_folders(folder: Path, kinds: Sequence[str], n: int, suffix: str = ".JPEG") -> None:
    for kind in kinds:
        for i in range(n):
            put(folder / kind / f"{kind}_{i}{suffix}")


def imagenet(folder: Path) -> None:
    classnames_txt(folder)
    class_folders(folder / "images/train", WNIDS, 6)
    class_folders(folder / "images/val", WNIDS, 2)


# --- ImageNet's shifts ----------------------------------------------------------------------------------------------


def imagenetv2(folder: Path) -> None:
    classnames_txt(folder)
    class_folders(folder / "imagenetv2-matched-frequency-format-val", [str(y) for y in range(4)], 2, ".jpeg")


def imagenet_sketch(folder: Path) -> None:
    classnames_txt(folder)
    class_folders(folder / "images", WNIDS, 2)


def imagenet_a(folder: Path) -> None:
    classnames_txt(folder)
    class_folders(folder / "imagenet-a", (WNIDS[1], WNIDS[3]), 2, ".jpg")
    text(folder / "imagenet-a/README.txt", "read me")


def imagenet_r(folder: Path) -> None:
    classnames_txt(folder)
    class_folders(folder / "imagenet-r", WNIDS[2:], 2, ".jpg")
    text(folder / "imagenet-r/README.txt", "read me")


MAKERS: dict[str, Callable[[Path], None]] = {
    made.__name__: made
    for made in (
        *(caltech101, oxford_pets, stanford_cars, oxford_flowers, food101, fgvc_aircraft, sun397, dtd, eurosat, ucf101),
        *(imagenet, imagenetv2, imagenet_sketch, imagenet_a, imagenet_r),
    )
}


def make(root: Path, name: str) -> Path:
    """The layout of this name under a root, in the folder that its card names."""
    folder = root / dataset_card(name, str(root)).path
    MAKERS[name](folder)
    return folder


def card(root: Path, name: str, file: Path | None = None) -> Path:
    """A card like the published one, with the counts of what was made under the root; the counts are read from it."""
    published = dataset_card(name, str(root))
    rows = manifest_of(published)
    fields = {
        "name": name,
        "layout": published.layout,
        "path": Path(published.path).name,
        "classes": len(rows.classnames),
        **{split: len(rows.rows_of(split)) for split in SPLITS},
        "template": published.template,
        "shift_of": published.shift_of,
    }
    file = file or root / f"{name}.yaml"
    OmegaConf.save(OmegaConf.create(fields), file)
    return file


# --- official files, where the split file is missing ----------------------------------------------------------------


def raw_pets(folder: Path) -> None:
    for name, n in (("trainval", 10), ("test", 3)):
        rows = [(f"{kind}_{name}{i}", y) for y, kind in enumerate(("Abyssinian", "american_bulldog")) for i in range(n)]
        text(folder / f"annotations/{name}.txt", *(f"{image} {y + 1} 1 1" for image, y in rows))
        for image, _ in rows:
            put(folder / f"images/{image}.jpg")


def raw_cars(folder: Path) -> None:
    names = ["AM General Hummer SUV 2000", "Audi TTS Coupe 2012"]
    kind = np.dtype([("class", object), ("fname", object)])

    def annotations(images: str, n: int, file: str) -> None:
        rows = np.empty((1, 2 * n), kind)
        for i in range(2 * n):
            rows[0, i] = (np.array([[1 + i % 2]]), f"{i + 1:05d}.jpg")
            put(folder / images / f"{i + 1:05d}.jpg")
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        savemat(folder / file, {"annotations": rows})

    annotations("cars_train", 10, "devkit/cars_train_annos.mat")
    annotations("cars_test", 3, "cars_test_annos_withlabels.mat")
    savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array([names], dtype=object)})


def raw_flowers(folder: Path) -> None:
    labels = [2, 1] * 10
    for i in range(len(labels)):
        put(folder / f"jpg/image_{i + 1:05d}.jpg")
    savemat(folder / "imagelabels.mat", {"labels": np.array([labels], np.uint8)})
    (folder / "cat_to_name.json").write_text(json.dumps({"1": "pink primrose", "2": "hard-leaved pocket orchid"}))


def raw_sun(folder: Path) -> None:
    scenes = ("/a/abbey", "/c/church/indoor")
    text(folder / "ClassName.txt", *scenes)
    for name, n in (("Training_01", 10), ("Testing_01", 3)):
        images = [f"{scene}/sun_{name}{i}.jpg" for scene in scenes for i in range(n)]
        text(folder / f"{name}.txt", *images)
        for image in images:
            put(folder / "SUN397" / image[1:])


def raw_ucf(folder: Path) -> None:
    lists = folder / "ucfTrainTestlist"
    text(lists / "classInd.txt", "1 ApplyEyeMakeup", "2 Archery")
    for name, n in (("trainlist01", 10), ("testlist01", 3)):
        videos = [(f"{kind}/v_{kind}_{name}{i}.avi", y + 1) for y, kind in enumerate(("ApplyEyeMakeup", "Archery"))
                  for i in range(n)]  # fmt: skip
        text(lists / f"{name}.txt", *(f"{video} {y}" if name == "trainlist01" else video for video, y in videos))
        for video, _ in videos:
            image = video.replace("ApplyEyeMakeup/", "Apply_Eye_Makeup/").replace(".avi", ".jpg")
            put(folder / "UCF-101-midframes" / image)


def raw_caltech(folder: Path) -> None:
    class_folders(
        folder / "101_ObjectCategories", ("Faces", "Faces_easy", "BACKGROUND_Google", "accordion"), 10, ".jpg"
    )


def raw_food(folder: Path) -> None:
    class_folders(folder / "images", ("apple_pie", "baby_back_ribs"), 10, ".jpg")


def raw_eurosat(folder: Path) -> None:
    class_folders(folder / "2750", ("AnnualCrop", "SeaLake"), 10, ".jpg")


RAW: dict[str, Callable[[Path], None]] = {
    "caltech101": raw_caltech,
    "oxford_pets": raw_pets,
    "stanford_cars": raw_cars,
    "oxford_flowers": raw_flowers,
    "food101": raw_food,
    "sun397": raw_sun,
    "dtd": raw_food,
    "eurosat": raw_eurosat,
    "ucf101": raw_ucf,
}
