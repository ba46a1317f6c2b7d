"""Every layout is read as CoOp reads it; the draw over the real reader is that of the published index files."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.cards import DatasetCard
from pipeline.config.card_files import dataset_card
from pipeline.config.files import load, names
from pipeline.data.dataset import check_card, manifest_of, missing, source_of
from pipeline.data.decode import decode
from pipeline.data.few_shot import draw
from pipeline.data.layouts.coop import COOP
from pipeline.errors import DataError
from tests.support import miniature
from tests.support.miniature import IMAGENET_NAMES, MAKERS, RAW, WNIDS, put

SHARED = Path(__file__).resolve().parents[3] / "shared" / "coop"
SETS = {
    "dtd": "DescribableTextures",
    "eurosat": "EuroSAT",
    "oxford_flowers": "OxfordFlowers",
    "oxford_pets": "OxfordPets",
}


def made(root: Path, name: str) -> DatasetCard:
    """The card of a miniature."""
    miniature.make(root, name)
    return dataset_card(str(miniature.card(root, name)), str(root))


# --- the fifteen layouts --------------------------------------------------------------------------------------------

NAMES_IN_PROMPTS = {
    "caltech101": ("face", "leopard", "accordion"),
    "oxford_pets": ("abyssinian", "american bulldog"),
    "stanford_cars": ("2000 AM General Hummer SUV", "2012 Audi TTS Coupe"),
    "oxford_flowers": ("pink primrose", "hard-leaved pocket orchid"),
    "food101": ("apple pie", "baby back ribs"),
    "fgvc_aircraft": ("707-320", "F-16A/B", "Boeing 717"),
    "sun397": ("abbey", "indoor church"),
    "dtd": ("banded", "polka-dotted"),
    "eurosat": ("Annual Crop Land", "Sea or Lake"),
    "ucf101": ("Apply Eye Makeup", "Archery"),
    "imagenet": IMAGENET_NAMES,
    "imagenetv2": IMAGENET_NAMES,
    "imagenet_sketch": IMAGENET_NAMES,
    "imagenet_a": ("goldfish", "tiger shark"),
    "imagenet_r": ("great white shark", "tiger shark"),
}


@pytest.mark.parametrize("name", MAKERS)
def test_each_published_layout_is_read(tmp_path: Path, name: str) -> None:
    card = made(tmp_path, name)
    check_card(card)
    source = source_of(card)
    assert missing(card) == ()
    assert source.classnames == NAMES_IN_PROMPTS[name]
    shift, imagenet = bool(card.shift_of), name == "imagenet"
    wanted = {"train": 6, "test": 2} if imagenet else {"test": 2} if shift else miniature.PER_CLASS
    assert set(source.splits) == set(wanted)
    for split, n in wanted.items():
        rows = source.rows_of(split)
        assert np.bincount(source.labels[rows]).tolist() == [n] * card.classes
        for row in rows:
            assert decode(source.image_bytes(row)).size == (8, 8)
            assert Path(source.where(row)).is_file()
    everything = np.arange(len(source.labels))
    assert len(set(source.keys_of(everything))) == len(everything)


def test_every_published_data_set_has_a_miniature_a_card_and_a_layout() -> None:
    assert set(MAKERS) == set(COOP) == set(NAMES_IN_PROMPTS)
    assert set(COOP) <= set(names("dataset")) and len(COOP) == 15


@pytest.mark.parametrize("method", names("method"))
def test_the_papers_settings_name_data_sets_that_exist(method: str) -> None:
    assert set(load("method", method).get("per_dataset") or {}) <= set(names("dataset"))


@pytest.mark.parametrize("name", [n for n in MAKERS if n.startswith("imagenet")])
def test_imagenet_and_its_shift_sets_identify_classes_by_wordnet_id(tmp_path: Path, name: str) -> None:
    source = source_of(made(tmp_path, name))
    assert source.classnames == tuple(IMAGENET_NAMES[WNIDS.index(wnid)] for wnid in source.class_ids)
    assert set(source.class_ids) <= set(WNIDS)


def test_two_classes_of_imagenet_may_have_the_same_name(tmp_path: Path) -> None:
    folder = miniature.make(tmp_path, "imagenet")
    miniature.text(folder / "classnames.txt", *(f"{wnid} crane" for wnid in WNIDS))
    source = source_of(dataset_card(str(miniature.card(tmp_path, "imagenet")), str(tmp_path)))
    assert source.classnames == ("crane",) * 4 and source.class_ids == WNIDS


# --- the draw -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no published split files in {SHARED}")
@pytest.mark.parametrize("name", SETS)
def test_the_few_shot_sets_equal_the_published_index_files(tmp_path: Path, name: str) -> None:
    published = json.loads((SHARED / "few_shot_digests.json").read_text())[SETS[name]]
    card = dataset_card(name, str(tmp_path))
    reader = COOP[name]
    assert (card.classes, card.train, card.val, card.test) == (published["classes"], *published["counts"].values())
    (Path(card.path) / reader.needs[0]).mkdir(parents=True)  # no image is there, and none is looked for
    shutil.copy(SHARED / f"split_zhou_{SETS[name]}.json", card.path)
    rows = manifest_of(card)
    assert len(published["few_shot"]) == 15
    for key, wanted in published["few_shot"].items():
        shots, seed = (int(part.split("-")[i]) for part, i in zip(key.split("/"), (0, 1), strict=True))
        split = draw(rows, name, shots, seed, "min4")
        for part, drawn in (("train", split.train), ("val", split.val)):
            lines = (f"{rows.path(r)}\t{rows.labels[r]}\t{rows.classnames[rows.labels[r]]}\n" for r in drawn)
            assert hashlib.sha256("".join(lines).encode()).hexdigest() == wanted[part], (key, part)


def test_a_set_without_val_draws_validation_images_from_the_rest_of_train(tmp_path: Path) -> None:
    source = source_of(made(tmp_path, "imagenet"))
    split, without = (draw(source, "imagenet", 2, 1, rule) for rule in ("min4", "none"))
    assert split.train == without.train and not set(split.train) & set(split.val)
    assert set(split.train + split.val) <= set(source.rows_of("train").tolist())
    assert np.bincount(source.labels[list(split.val)]).tolist() == [2] * 4
    with pytest.raises(DataError, match="no val split: type validation=min4 or validation=none"):
        draw(source, "imagenet", 2, 1, "full")
    with pytest.raises(DataError, match="4 further train images a class requested from 'imagenet', but class 'tench'"):
        draw(source, "imagenet", 4, 1, "min4")


def test_full_validation_is_the_whole_val_split(tmp_path: Path) -> None:
    source = source_of(made(tmp_path, "dtd"))
    split = draw(source, "dtd", 1, 1, "full")
    assert split.val == tuple(source.rows_of("val")) and split.train == draw(source, "dtd", 1, 1, "min4").train


def test_take_all_uses_all_images_of_a_small_class_and_does_not_affect_others(tmp_path: Path) -> None:
    folder = miniature.make(tmp_path, "dtd")
    path = folder / "split_zhou_DescribableTextures.json"
    splits = json.loads(path.read_text())
    splits["train"] = splits["train"][2:]  # one banded, three polka-dotted
    path.write_text(json.dumps(splits))
    source = source_of(dataset_card("dtd", str(tmp_path)))
    with pytest.raises(DataError, match=r"class 'banded' has 1: set shots to 1 or fewer, or data.small_classes=take_a"):
        draw(source, "dtd", 2, 1, "none")
    train = draw(source, "dtd", 2, 1, "none", "take_all").train
    assert source.labels[list(train)].tolist() == [0, 1, 1]


# --- splits that are made here ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RAW)
def test_without_its_split_file_a_split_is_generated_by_the_same_rule_and_reported(tmp_path: Path, name: str) -> None:
    card = dataset_card(name, str(tmp_path))
    RAW[name](Path(card.path))
    found = source_of(card)
    assert (
        "generated with split_seed 1" in found.index.split_origin
        and "not the published split" in found.index.split_origin
    )  # type: ignore[attr-defined]
    counts = [np.bincount(found.labels[found.rows_of(split)]).tolist() for split in ("train", "val", "test")]
    by_class = name in ("caltech101", "food101", "dtd", "eurosat", "oxford_flowers")
    assert counts == ([[5, 5], [2, 2], [3, 3]] if by_class else [[8, 8], [2, 2], [3, 3]])
    assert (
        found.classnames
        == {
            **NAMES_IN_PROMPTS,
            "caltech101": ("face", "accordion"),
            "dtd": ("apple pie", "baby back ribs"),
        }[name]
    )
    another = DatasetCard(**{**vars(card), "split_seed": 2})
    assert source_of(another).digest != found.digest == source_of(DatasetCard(**vars(card))).digest
    assert len(draw(found, name, 2, 1, "min4").train) == 4


def test_a_published_split_is_not_reported_as_generated(tmp_path: Path) -> None:
    assert source_of(made(tmp_path, "dtd")).index.split_origin == ""  # type: ignore[attr-defined]
    put(tmp_path / "dtd/images/banded/new.jpg")
    assert source_of(made(tmp_path, "dtd")).index.split_origin == ""  # type: ignore[attr-defined]


# --- what the user got wrong ----------------------------------------------------------------------------------------


def refused(card: DatasetCard) -> str:
    with pytest.raises(DataError) as caught:
        check_card(card)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_data_root_that_is_missing_or_one_level_off_is_named(tmp_path: Path) -> None:
    root = tmp_path / "above/root"
    folder = miniature.make(root, "oxford_pets")
    assert refused(dataset_card("oxford_pets")).endswith(
        "type data.root=DIR (or set FAREBOX_DATA), DIR holding oxford_pets/"
    )
    too_deep, too_high = (dataset_card("oxford_pets", str(root)) for root in (folder, root.parent))
    assert refused(too_deep).endswith(f": {folder} is the data set itself; set data.root={root}, the folder above it")
    assert refused(too_high).endswith(f"but {folder} is there: set data.root={root}")
    inside = tmp_path / "again/oxford_pets"
    inside.mkdir(parents=True)
    shutil.move(folder, inside / "oxford_pets")
    said = refused(dataset_card("oxford_pets", str(tmp_path / "again")))
    assert said == f"{inside} has no images, but {inside / 'oxford_pets'} has: move its content up one level"


@pytest.mark.parametrize("name", MAKERS)
def test_a_missing_folder_is_named(tmp_path: Path, name: str) -> None:
    card = dataset_card(name, str(tmp_path))
    assert refused(card) == f"nothing at {card.path}" == missing(card)[0]
    Path(card.path).mkdir()
    assert len(missing(card)) == len(COOP[name].needs) and refused(card) == missing(card)[0]


def change(tmp_path: Path, rows: list[list[object]] | str) -> DatasetCard:
    """A DTD whose training list is replaced, or its whole split file."""
    path = miniature.make(tmp_path, "dtd") / "split_zhou_DescribableTextures.json"
    content = rows if isinstance(rows, str) else json.dumps(json.loads(path.read_text()) | {"train": rows})
    path.write_text(content)
    return dataset_card("dtd", str(tmp_path))


IMAGE, OTHER = "banded/banded_0001.jpg", "banded/banded_0002.jpg"


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([[IMAGE, 0, "banded"], [OTHER, 3, "dotted"]], "has 3 labels but no label 2: expected 0, 1, 2, ..."),
        (
            [[IMAGE, 0, "banded"], [OTHER, 2, "banded"]],
            "has the classes 'banded' and 'banded', which have the same prompt: rename or merge one",
        ),
        ([[IMAGE, 0, "striped"]], "gives label 0 two names, 'striped' and 'banded' ("),
        ([["gone/1.jpg", 0, "banded"], ["gone/2.jpg", 0, "banded"]], ": 2 of its images are not under "),
        ([["one", "two"]], "is not a split file: expected lists of [path, label, class name] ("),
        ([[IMAGE, "first", "banded"]], "is not a split file"),
        ([[IMAGE, 0.9, "banded"]], "is not a split file"),
        ([[IMAGE, True, "banded"]], "is not a split file"),
        ([[IMAGE, 0, None]], "is not a split file"),
        ([[IMAGE, 0, "banded"], [f"./{IMAGE}", 1, "polka-dotted"]], f"lists ./{IMAGE} with the labels 0 and 1: remo"),
        ("{not json", "is not a split file"),
        ("[]", "is not a split file"),
        ('{"train": []}', "has no list 'val': expected train, val and test"),
    ],
)
def test_an_invalid_split_file_is_rejected(tmp_path: Path, rows: list[list[object]] | str, line: str) -> None:
    said = refused(change(tmp_path, rows))
    assert line in said and str(tmp_path / "dtd") in said


def test_the_first_missing_image_is_named(tmp_path: Path) -> None:
    said = refused(change(tmp_path, [["gone/1.jpg", 0, "banded"]]))
    assert said.endswith(f"json: 1 of its images are not under {tmp_path}/dtd/images, the first is gone/1.jpg")


@pytest.mark.parametrize(("damage", "why"), [(b"", "0 bytes"), (b"no image", "no known image format")])
def test_a_file_that_is_not_an_image_is_named(tmp_path: Path, damage: bytes, why: str) -> None:
    card = made(tmp_path, "dtd")
    source = source_of(card)
    path = Path(source.where(int(source.rows_of("test")[0])))
    path.write_bytes(damage)
    said = refused(dataset_card(str(miniature.card(tmp_path, "dtd")), str(tmp_path)))
    if "was changed since it was indexed" in said:
        said = refused(dataset_card(str(miniature.card(tmp_path, "dtd")), str(tmp_path)))
    assert said.startswith(f"data set 'dtd': {path} is not a readable image (") and why in said


def test_class_folders_that_classnames_txt_does_not_list_are_named(tmp_path: Path) -> None:
    folder = miniature.make(tmp_path, "imagenet_a")
    put(folder / "imagenet-a/n99999999/1.jpg")
    assert "has the class folder n99999999, which classnames.txt does not list" in refused(
        dataset_card("imagenet_a", str(tmp_path))
    )


def test_imagenets_validation_images_must_be_in_class_folders(tmp_path: Path) -> None:
    folder = miniature.make(tmp_path, "imagenet")
    shutil.rmtree(folder / "images/val")
    put(folder / "images/val/ILSVRC2012_val_00000001.JPEG")
    assert "images/val has no class folders: expected one for each class" in refused(
        dataset_card("imagenet", str(tmp_path))
    )


def test_a_class_that_is_not_listed_is_named(tmp_path: Path) -> None:
    folder = miniature.make(tmp_path, "fgvc_aircraft")
    miniature.text(folder / "images_variant_val.txt", "0000001 Spaceship")
    assert "images_variant_val.txt in" in (said := refused(dataset_card("fgvc_aircraft", str(tmp_path))))
    assert "has the class 'Spaceship', variants.txt does not" in said
    for name, line in (("sun397", "/z/zoo/1.jpg"), ("ucf101", "ZooVisit/v_ZooVisit_1.avi 3")):
        card = dataset_card(name, str(tmp_path))
        RAW[name](Path(card.path))
        file = Path(card.path) / {"sun397": "Training_01.txt", "ucf101": "ucfTrainTestlist/trainlist01.txt"}[name]
        file.write_text(file.read_text() + line + "\n")
        assert "has the class '" in refused(card)


def test_without_split_file_and_official_files_both_are_named(tmp_path: Path) -> None:
    folder = miniature.make(tmp_path, "oxford_pets")
    (folder / "split_zhou_OxfordPets.json").unlink()
    said = refused(dataset_card("oxford_pets", str(tmp_path)))
    assert (
        "split_zhou_OxfordPets.json is not there, and without annotations/trainval.txt and annotations/test.txt" in said
    )


def test_counts_that_differ_from_the_card_are_rejected(tmp_path: Path) -> None:
    miniature.make(tmp_path, "dtd")
    way_out = f"; a part of the set needs a card of its own: farebox data add NAME {tmp_path}/dtd layout=dtd"
    assert refused(dataset_card("dtd", str(tmp_path))).endswith(
        f"data set 'dtd': its card says 47 classes, {tmp_path}/dtd has 2{way_out}"
    )
    card = made(tmp_path, "dtd")
    said = refused(DatasetCard(**{**vars(card), "train": 7}))
    assert said == f"data set 'dtd': its card says 7 train images, {tmp_path}/dtd has 6{way_out}"
