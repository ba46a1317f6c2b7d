"""A user's own images: folders, Parquet and Arrow files, Hugging Face's layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cards import DatasetCard
from pipeline.data.dataset import check_card, source_of
from pipeline.data.few_shot import draw
from pipeline.data.source import content_key
from pipeline.errors import DataError
from tests.support.miniature import picture, put

COUNTS = {"train": 3, "val": 2, "test": 2}


def card(path: Path, layout: str, **changes: Any) -> DatasetCard:
    """Two classes, with COUNTS images each in the splits."""
    counts = {split: 2 * n for split, n in COUNTS.items()}
    fields: dict[str, Any] = {"name": "own", "layout": layout, "path": str(path), "classes": 2, "template": "a {}"}
    return DatasetCard(**fields | counts | changes)


def refused(card: DatasetCard) -> str:
    with pytest.raises(DataError) as caught:
        check_card(card)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check(found: DatasetCard, names: tuple[str, ...] = ("cat", "dog")) -> None:
    """The data set is whole, and its few shots can be drawn."""
    check_card(found)
    source = source_of(found)
    assert source.classnames == names
    for split in source.splits:
        rows = source.rows_of(split)
        assert source.keys_of(rows) == [content_key(source.image_bytes(row)) for row in rows]
    assert len(set(source.keys_of(range(len(source.labels))))) == len(source.labels)
    drawn = draw(source, "own", 2, 1, "min4")
    assert source.labels[list(drawn.train)].tolist() == [0, 0, 1, 1]
    assert len(drawn.digest(source)) == 64


# --- image folders --------------------------------------------------------------------------------------------------


def image_folder(root: Path, train: str = "train", val: str = "val", test: str = "test") -> Path:
    for split, name in (("train", train), ("val", val), ("test", test)):
        for kind in ("cat", "dog"):
            for i in range(COUNTS[split]):
                put(root / name / kind / f"{i}.{('jpg', 'png', 'JPEG')[i]}")
    (root / train / "cat/notes.txt").write_text("not an image")
    (root / train / ".hidden").mkdir()
    return root


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_train_val_and_test_folders(tmp_path: Path, val: str) -> None:
    check(card(image_folder(tmp_path, val=val), "folder"))


def test_a_folder_of_class_folders_is_split_with_the_seed_of_the_card(tmp_path: Path) -> None:
    for kind in ("big_cat", "dog"):
        for i in range(10):
            put(tmp_path / kind / f"{i}.jpg")
    found = card(tmp_path, "folder", train=10, val=4, test=6)
    check(found, ("big cat", "dog"))
    again, other = (card(tmp_path, "folder", train=10, val=4, test=6, split_seed=seed) for seed in (1, 2))
    assert source_of(again).digest == source_of(found).digest != source_of(other).digest
    assert "generated with split_seed 1" in source_of(found).index.split_origin  # type: ignore[attr-defined]


def test_class_names_of_the_card_replace_folder_names(tmp_path: Path) -> None:
    image_folder(tmp_path)
    named = card(tmp_path, "folder", classnames=("tabby cat", "corgi"))
    check(named, ("tabby cat", "corgi"))
    assert source_of(named).class_ids == ("cat", "dog")
    assert source_of(named).digest != source_of(card(tmp_path, "folder")).digest, "they are in the prompts"
    assert "1 class names are given, " in refused(card(tmp_path, "folder", classnames=("one",)))
    assert "has the classes 'x' and 'x', which have the same prompt: rename or merge one" in refused(
        card(tmp_path, "folder", classnames=("x", "x"))
    )


def test_a_path_that_is_not_a_data_folder_is_named(tmp_path: Path) -> None:
    assert refused(card(tmp_path / "gone", "folder")) == f"nothing at {tmp_path / 'gone'}"
    assert f"contains no images in class folders: expected {tmp_path}/CLASS/IMAGE" in refused(card(tmp_path, "folder"))
    image_folder(tmp_path)
    put(tmp_path / "test/horse/1.jpg")
    assert refused(card(tmp_path, "folder")).endswith(
        f"/test has the class 'horse', which {tmp_path}/train does not have"
    )
    few = tmp_path / "few"
    for kind in ("cat", "dog"):
        put(few / kind / "1.jpg")
    assert "class 'cat' has 1 images, too few to split into three parts" in refused(card(few, "folder"))


def test_a_test_only_folder_is_a_shift_set(tmp_path: Path) -> None:
    for kind in ("cat", "dog"):
        put(tmp_path / "test" / kind / "1.jpg")
    shift = card(tmp_path, "folder", train=0, val=0, test=2, shift_of="icons")
    check_card(shift)
    assert source_of(shift).splits == ("test",)


# --- tables ---------------------------------------------------------------------------------------------------------


def rows(split: str, seed: str = "") -> list[tuple[bytes, int]]:
    return [(picture(f"{seed}{split}{label}{i}"), label) for i in range(COUNTS[split]) for label in (0, 1)]


def plain_table(metadata: dict[str, str] | None, labels: tuple[Any, Any] = (0, 1)) -> pa.Table:
    found = [(image, labels[label], split) for split in COUNTS for image, label in rows(split)]
    images, numbers, splits = zip(*found, strict=True)
    table = pa.table({"image": list(images), "label": list(numbers), "split": list(splits)})
    return table.replace_schema_metadata(metadata)


FEATURES = {
    "info": {
        "features": {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}},
    }
}


def hugging_face(split: str) -> pa.Table:
    """As a data set's repository holds it: images as structs, labels as numbers, their names in the metadata."""
    images = [{"bytes": image, "path": f"{i}.png"} for i, (image, _) in enumerate(rows(split))]
    table = pa.table({"image": images, "label": pa.array([label for _, label in rows(split)], pa.int64())})
    return table.replace_schema_metadata({"huggingface": json.dumps(FEATURES)})


def write_arrow(path: Path, table: pa.Table, stream: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


def test_a_parquet_file_with_a_split_column(tmp_path: Path) -> None:
    pq.write_table(plain_table({"classes": '["cat", "dog"]'}), tmp_path / "own.parquet")
    check(card(tmp_path / "own.parquet", "table"))
    check(card(tmp_path, "table"))


def test_labels_may_be_text(tmp_path: Path) -> None:
    pq.write_table(plain_table(None, ("dog", "cat")), tmp_path / "own.parquet")
    check_card(card(tmp_path / "own.parquet", "table"))
    source = source_of(card(tmp_path / "own.parquet", "table"))
    assert source.classnames == ("cat", "dog") and source.labels[:2].tolist() == [1, 0]


def test_hugging_faces_parquet_shards(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        table = hugging_face(split)
        for part, half in enumerate((table[:2], table[2:])):
            pq.write_table(half, tmp_path / f"data/{name}-{part:05d}-of-00002.parquet", row_group_size=1)
    check(card(tmp_path, "table"))


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "file"])
def test_the_output_of_save_to_disk_is_read(tmp_path: Path, stream: bool) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "validation", "test"]}')
    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        write_arrow(tmp_path / name / "data-00000-of-00001.arrow", hugging_face(split), stream)
        (tmp_path / name / "state.json").write_text("{}")
    check(card(tmp_path, "table"))


def test_a_table_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "own.parquet"
    pq.write_table(plain_table({"classes": '["cat", "dog"]'}), path)
    before = source_of(card(path, "table")).digest
    check_card(card(path, "table"))
    assert source_of(card(path, "table")).digest == before
    pq.write_table(plain_table({"classes": '["lion", "dog"]'}), path)
    check_card(card(path, "table"))
    assert source_of(card(path, "table")).digest != before


@pytest.mark.parametrize(
    ("table", "line"),
    [
        (
            pa.table({"picture": [b""]}),
            "has the columns picture: expected image, label and split (or a file ",
        ),
        (plain_table(None), "has no class names: type classnames=FILE (`classnames` in the card), or give text"),
        (plain_table({"classes": '["cat"]'}), "row 1 of {path} has the label 1: expected one of 1 classes"),
        (
            plain_table({"classes": '["cat", "cat"]'}),
            "has the classes 'cat' and 'cat', which have the same prompt: ",
        ),
        (
            plain_table({"classes": '["cat", "dog"]'}).set_column(2, "split", pa.array(["train"] * 13 + ["probe"])),
            "row 13 of {path} has the split 'probe': expected train, val or test",
        ),
        (
            plain_table({"classes": '["cat", "dog"]'}).set_column(0, "image", pa.nulls(14, pa.binary())),
            "row 0 of {path} has no image bytes (only a path, or nothing)",
        ),
        (
            plain_table({"classes": '["cat", "dog"]'}).set_column(0, "image", pa.array([b""] * 14)),
            "own.parquet#10 of {path} is not a readable image (0 bytes, no known image format)",
        ),
    ],
    ids=["columns", "names", "label gap", "one name twice", "split", "no bytes", "empty"],
)
def test_an_invalid_table_is_rejected(tmp_path: Path, table: pa.Table, line: str) -> None:
    path = tmp_path / "own.parquet"
    pq.write_table(table, path)
    assert line.format(path=path) in refused(card(path, "table"))


def test_files_that_are_not_tables_are_named(tmp_path: Path) -> None:
    assert refused(card(tmp_path, "table")) == f"{tmp_path} contains no .parquet or .arrow file"
    for name in ("own.parquet", "own.arrow"):
        (tmp_path / name).write_bytes(b"neither one nor the other")
        assert f"{tmp_path / name} is not a readable {name[4:]} file: " in refused(card(tmp_path / name, "table"))


def test_rows_are_memory_mapped(tmp_path: Path) -> None:
    pq.write_table(plain_table({"classes": '["cat", "dog"]'}), tmp_path / "own.parquet")
    source = source_of(card(tmp_path, "table"))
    before = pa.total_allocated_bytes()
    images = [source.image_bytes(row) for row in np.arange(14)]
    assert pa.total_allocated_bytes() == before and len(set(images)) == 14
