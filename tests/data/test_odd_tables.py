"""Labels of tables keep their meaning across files and splits; files are parts of one table or are refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cards import DatasetCard
from pipeline.data.dataset import check_card, source_of
from pipeline.data.indexed_source import IndexedSource
from pipeline.errors import DataError
from tests.support.miniature import picture

NAMES = ("ant", "bee", "cow")
SPLITS = ("train", "val", "test")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAREBOX_CACHE", str(tmp_path / "cache"))


def class_label(names: object) -> dict[str, str]:
    """Metadata as Hugging Face's `datasets` writes it."""
    return {"huggingface": json.dumps({"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}})}


def write(path: Path, labels: Any, metadata: dict[str, str] | None = None, **columns: list[Any]) -> Path:
    """Three images, one of each class in the order of NAMES, with these labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = pa.array([picture(f"{path}{i}") for i in range(3)], pa.binary())
    table = pa.table({"image": images, "label": labels, **columns})
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


def encoded(names: Sequence[str]) -> list[int]:
    """Labels of NAMES by an encoder whose classes have this order."""
    return [names.index(name) for name in NAMES]


def three(root: Path, order: Sequence[str] = NAMES) -> Path:
    """A file for each split, each with ClassLabel names in this order."""
    for split in SPLITS:
        write(root / f"{split}-00000-of-00001.parquet", encoded(order), class_label(list(order)))
    return root


def card(path: Path, **changes: Any) -> DatasetCard:
    fields: dict[str, Any] = {"name": "own", "layout": "table", "path": str(path), "classes": 3, "template": "a {}"}
    return DatasetCard(**fields | dict.fromkeys(SPLITS, 3) | changes)


def names_by_image(found: DatasetCard) -> list[str]:
    """The class name of each image, where every file has one of each in the order of NAMES."""
    check_card(found)
    source = source_of(found)
    return [source.classnames[label] for label in source.labels]


def refused(found: DatasetCard) -> str:
    with pytest.raises(DataError) as caught:
        check_card(found)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- labels ---------------------------------------------------------------------------------------------------------


def test_each_table_file_is_read_with_its_own_class_names(tmp_path: Path) -> None:
    root = three(tmp_path / "own", ("cow", "ant", "bee"))
    write(root / "test-00000-of-00001.parquet", encoded(NAMES), class_label(list(NAMES)))
    write(root / "val-00000-of-00001.parquet", list(NAMES))  # text
    found = card(root)
    assert names_by_image(found) == list(NAMES) * 3
    assert source_of(found).classnames == ("cow", "ant", "bee"), "the order of the training file"


def test_dictionary_columns_are_read_with_their_own_dictionaries(tmp_path: Path) -> None:
    for split, order in zip(SPLITS, (NAMES, NAMES[::-1], ("bee", "cow", "ant")), strict=True):
        column = pa.DictionaryArray.from_arrays(pa.array(encoded(order), pa.int8()), pa.array(order))
        write(tmp_path / f"own/{split}.parquet", column)
    assert names_by_image(card(tmp_path / "own")) == list(NAMES) * 3


def test_a_file_may_have_fewer_classes_than_the_training_file(tmp_path: Path) -> None:
    root = three(tmp_path / "own")
    write(root / "test-00000-of-00001.parquet", [1, 0, 0], class_label(["bee", "ant"]))
    assert names_by_image(card(root))[:3] == ["ant", "bee", "bee"]


def test_text_labels_that_are_numbers_are_in_numeric_order(tmp_path: Path) -> None:
    for split in SPLITS:
        write(tmp_path / f"own/{split}.parquet", ["10", "9", "1"])
    assert source_of(card(tmp_path / "own")).class_ids == ("1", "9", "10")


@pytest.mark.parametrize(
    ("labels", "metadata", "line"),
    [
        ([0, 1, 2], class_label(["ant", "bee", "horse"]), "has the class 'horse', which {root}/train-00000-of"),
        ([0, 1, 2], None, "has numbers as labels and no class names, {root}/train-00000-of-00001.parquet has cl"),
        ([0, 1, 3], class_label(NAMES), "row 2 of {file} has the label 3: expected one of 3 classes"),
        ([0, -1, 1], class_label(NAMES), "row 1 of {file} has the label -1: expected one of 3 classes (images with"),
        ([0, None, 1], class_label(NAMES), "row 1 of {file} has the label None: expected one of 3 classes (images"),
        (["ant", "bee", "Ant"], None, "row 2 of {file} has the label 'Ant': expected one of 3 classes"),
        ([0, 1, 2], class_label({"0": "ant"}), "{file} has class names in its metadata that are not a list of text"),
        ([[0], [1], [2]], class_label(NAMES), "{file} has labels of type list<element: int64> in 'label': expected wh"),
        ([{"a": 1}] * 3, None, "{file} has labels of type struct<a: int64> in 'label': expected whole numbers or text"),
        ([0.0, 1.0, 2.0], class_label(NAMES), "{file} has labels of type double in 'label': expected whole numbers"),
        ([True, False, True], class_label(NAMES), "{file} has labels of type bool in 'label': expected whole numbers"),
    ],
)  # fmt: skip
def test_invalid_labels_are_rejected(tmp_path: Path, labels: Any, metadata: Any, line: str) -> None:
    root = three(tmp_path / "own")
    file = write(root / "test-00000-of-00001.parquet", labels, metadata)
    assert line.format(root=root, file=file) in refused(card(root))


def test_plain_numbers_must_be_whole_and_not_negative(tmp_path: Path) -> None:
    for split in SPLITS:
        write(tmp_path / f"own/{split}.parquet", [0, 1, 2] if split == "train" else [-1, -1, -1])
    said = refused(card(tmp_path / "own", classnames=NAMES))
    assert "test.parquet has the label -1: expected 0, 1, 2, ... (images without labels: move the file out, or" in said
    for split in ("val", "test"):
        write(tmp_path / f"own/{split}.parquet", list(NAMES))
    assert "has labels of text" in refused(card(tmp_path / "own", classnames=NAMES))


def test_test_images_without_labels_are_not_used_if_val_is_scored(tmp_path: Path) -> None:
    root = three(tmp_path / "own")
    write(root / "test-00000-of-00001.parquet", [-1, -1, -1], class_label(NAMES))
    assert names_by_image(card(root, test_split="val", val=0)) == list(NAMES) * 2
    splits = ["train", "val", "test"]
    one = write(tmp_path / "one.parquet", [0, 0, -1], split=splits)
    source = source_of(card(one, classnames=("ant",), test_split="val"))
    assert [len(source.rows_of(split)) for split in SPLITS] == [1, 0, 1]


def test_two_classes_with_the_same_name_are_identified_by_position(tmp_path: Path) -> None:
    names = ["crane", "bee", "crane"]
    for split in SPLITS:
        write(tmp_path / f"own/{split}.parquet", [0, 1, 2], class_label(names))
    assert "has the classes 'crane' and 'crane', which have the same prompt" in refused(card(tmp_path / "own"))
    found = card(tmp_path / "own", duplicates="allow")
    check_card(found)
    assert source_of(found).class_ids == ("crane#0", "bee", "crane#2")
    assert source_of(found).labels.tolist() == [0, 1, 2] * 3
    write(tmp_path / "own/test.parquet", [0, 1, 2], class_label(names[1:] + names[:1]))
    assert "has its class names in another order than" in refused(found)


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("train.parquet", "val.parquet", "test.parquet"),
        ("Training-0.parquet", "validation-0.parquet", "testing-0.parquet"),
        ("data/train-00000-of-00001-0123456789abcdef.parquet", "data/dev.parquet", "data/test_00.parquet"),
        ("default/train/0000.parquet", "default/validation/0000.parquet", "default/test/0000.parquet"),
        ("train/part-00000-1b9d6bcd-bbfd-4b2d.snappy.parquet", "val/data.parquet", "test/any.PARQUET"),
    ],
)
def test_files_and_folders_that_are_named_by_their_split_are_read(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        write(tmp_path / "own" / name, [0, 1, 2], class_label(NAMES))
    check_card(card(tmp_path / "own"))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("train_unlabeled-0.parquet", "'train_unlabeled' is not the name of a split: rename it to train-0.parquet (or"),
        ("test_small-00000-of-00001.parquet", "'test_small' is not the name of a split: rename it to test-0.parquet"),
        ("test2.parquet", "'test2' is not the name of a split"),
        ("train_extra/0000.parquet", "'train_extra' is not the name of a split"),
        (
            "test-0.parquet",
            "test-0.parquet and test-00000-of-00001.parquet in {root} both mean the test split: mo",
        ),
        ("TEST-00000-of-00001.parquet", "both mean the test split"),
        ("other/test-00000-of-00001.parquet", "both mean the test split: move one of them out, or use the path"),
        ("test/0000.parquet", "both mean the test split"),
        ("validation-00000-of-00001.parquet", "both mean the val split"),
    ],
)
def test_two_tables_of_one_split_are_rejected(tmp_path: Path, name: str, line: str) -> None:
    root = three(tmp_path / "own")
    write(root / name, [0, 1, 2], class_label(NAMES))
    assert line.format(root=root) in refused(card(root))


def test_a_missing_shard_is_rejected(tmp_path: Path) -> None:
    root = three(tmp_path / "own")
    (root / "train-00000-of-00001.parquet").rename(root / "train-00001-of-00002.parquet")
    parts = f"train-00001-of-00002.parquet in {root} says 2 parts, 1 are there (part 0 is missing)"
    assert refused(card(root)) == f"{parts}: restore the others"


def test_a_split_column_and_the_names_of_files_must_agree(tmp_path: Path) -> None:
    splits = list(SPLITS)
    write(tmp_path / "own/all.parquet", [0, 1, 2], class_label(NAMES), split=splits)
    check_card(card(tmp_path / "own", train=1, val=1, test=1))
    write(tmp_path / "own/backup.parquet", [0, 1, 2], class_label(NAMES), split=splits)
    assert "all.parquet and backup.parquet in " in refused(card(tmp_path / "own"))
    (tmp_path / "own/backup.parquet").rename(tmp_path / "own/test.parquet")
    assert "has a column `split`, " in refused(card(tmp_path / "own"))
    (tmp_path / "own/all.parquet").unlink()
    assert "row 0 of " in (said := refused(card(tmp_path / "own")))
    assert said.endswith("has the split 'train', but the name of the file means test: rename the file")


def test_files_that_are_not_tables_are_counted_and_a_pointer_is_named(tmp_path: Path) -> None:
    root = three(tmp_path / "own")
    write(root / ".cache/test-00000-of-00001.parquet", [0, 1, 2])
    write(root / "cache-1.arrow", [0, 1, 2])
    (root / "README.md").write_text("words")
    (root / "cover.png").write_bytes(picture("cover"))
    check_card(card(root))
    source = source_of(card(root))
    assert isinstance(source, IndexedSource)
    assert {reason: n for reason, n, _ in source.index.contents.skipped} == {
        "hidden files and folders": 1,
        "tables that are not used": 1,
        "other files": 1,
        "images outside the tables": 1,
    }
    (root / "test-00000-of-00001.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert refused(card(root)).endswith("test-00000-of-00001.parquet is a Git LFS pointer: type git lfs pull")
