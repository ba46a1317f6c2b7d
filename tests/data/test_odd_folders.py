"""Every file of a data folder is used, or counted as skipped with the reason, or a finding that must be resolved."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cards import DatasetCard
from pipeline.data.dataset import check_card, source_of
from pipeline.data.indexed_source import IndexedSource
from pipeline.data.inspect import examine
from pipeline.errors import DataError
from tests.support.miniature import picture, put

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n"
COUNTS = {"train": 3, "val": 2, "test": 2}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAREBOX_CACHE", str(tmp_path / "cache"))


def own(root: Path, kinds: tuple[str, ...] = ("cat", "dog")) -> Path:
    for split, n in COUNTS.items():
        for kind in kinds:
            for i in range(n):
                put(root / split / kind / f"{i}.png")
    return root


def card(path: Path, layout: str = "folder", classes: int = 2, **changes: Any) -> DatasetCard:
    fields = {"name": "own", "layout": layout, "path": str(path), "classes": classes, "template": "a {}"}
    return DatasetCard(**fields | {split: classes * n for split, n in COUNTS.items()} | changes)


def opened(found: DatasetCard) -> IndexedSource:
    source = source_of(found)
    assert isinstance(source, IndexedSource)
    return source


def skipped(found: DatasetCard) -> dict[str, tuple[int, str]]:
    return {reason: (n, first) for reason, n, first in opened(found).index.contents.skipped}


def refused(found: DatasetCard) -> str:
    with pytest.raises(DataError) as caught:
        check_card(found)
    said = str(caught.value)
    assert "\n" not in said and len(said.replace(found.path, "")) <= 300
    return said


# --- skipped --------------------------------------------------------------------------------------------------------


def test_all_endings_of_images_are_read_in_any_case(tmp_path: Path) -> None:
    own(tmp_path / "own")
    for i, ending in enumerate(("JFIF", "jpe", "Jpeg", "avif", "jp2", "WEBP", "tif", "apng")):
        (tmp_path / f"own/test/cat/more{i}.{ending}").write_bytes(picture(str(i)))
    check_card(card(tmp_path / "own", test=12))
    assert not skipped(card(tmp_path / "own", test=12))


def test_files_that_are_not_images_are_counted_by_reason(tmp_path: Path) -> None:
    root = own(tmp_path / "own")
    for path in (".DS_Store", "test/Thumbs.db", "test/cat/._0.png", "train/cat/desktop.ini"):
        (root / path).write_bytes(b"\0\5\x16\7")
    for folder in ("__MACOSX/cat", "test/@eaDir", "train/cat/@eaDir"):
        put(root / folder / "0.png")
    for path in ("test/cat/a.txt", "test/dog/b.TXT", "val/dog/c", "notes.md", "all.zip", "val/cat/all.tar.gz"):
        (root / path).write_text("words")
    (root / "test/cat/.hidden").write_text("")
    put(root / "cover.png")
    put(root / "unlabelled/1.png")
    (root / "train/dog/empty").mkdir()
    check_card(card(root))
    assert skipped(card(root)) == {
        "system files (.DS_Store, Thumbs.db, ._*, __MACOSX, @eaDir)": (7, ".DS_Store"),
        "hidden files and folders": (1, "test/cat/.hidden"),
        "files that are not images by their ending (.txt)": (2, "test/cat/a.txt"),
        "files that are not images by their ending (no ending)": (1, "val/dog/c"),
        "archives (.gz)": (1, "val/cat/all.tar.gz"),
        "archives": (1, "all.zip"),
        "files outside the class folders": (1, "notes.md"),
        "images outside the class folders": (1, "cover.png"),
        "images in folders that are not a split": (1, "unlabelled/1.png"),
        "folders below a class folder, without images": (1, "train/dog/empty"),
    }
    assert not opened(card(root)).index.contents.findings


def test_skipped_files_are_cached_with_the_index_and_logged_by_each_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = own(tmp_path / "own")
    put(root / "cover.png")
    check_card(card(root))
    monkeypatch.setattr("pipeline.data.index._build", lambda *_: pytest.fail("the folder was listed again"))
    caplog.clear()
    check_card(card(root))
    assert [record.getMessage() for record in caplog.records] == [
        "data set 'own': skipped images outside the class folders: 1, the first is cover.png"
    ]


def test_empty_class_folders_are_not_classes(tmp_path: Path) -> None:
    root = own(tmp_path / "own")
    for split in COUNTS:
        (root / split / "bird").mkdir()
    source = opened(card(root))
    assert source.classnames == ("cat", "dog")
    notes = source.index.contents.notes
    assert notes[0] == f"1 folders in {root}/test contain no images and are not classes: bird" and len(notes) == 3
    put(root / "test/bird/0.png")
    said = refused(card(root))
    assert said.endswith(f"/test has the class 'bird', which {root}/train does not have (its folder there is empty)")


# --- findings -------------------------------------------------------------------------------------------------------


def broken_link(root: Path) -> None:
    (root / "test/cat/0.png").unlink()
    (root / "test/cat/0.png").symlink_to("/nowhere/0.png")


def broken_class(root: Path) -> None:
    shutil.rmtree(root / "test/cat")
    (root / "test/cat").symlink_to("/nowhere/cat")


def other_ending(root: Path) -> None:
    (root / "test/cat/0.png").rename(root / "test/cat/0.jpeg2000x")


def no_ending(root: Path) -> None:
    (root / "test/cat/0.png").rename(root / "test/cat/0")


def heic(root: Path) -> None:
    (root / "test/cat/new.heic").write_bytes(b"phone")


def too_deep(root: Path) -> None:
    put(root / "test/cat/more/1.png")


def all_too_deep(root: Path) -> None:
    for kind in ("cat", "dog"):
        (root / "train" / kind).rename(root / "train" / f"{kind}s")
        (root / "train" / kind).mkdir()
        (root / "train" / f"{kind}s").rename(root / "train" / kind / "images")


def fifo(root: Path) -> None:
    os.mkfifo(root / "test/cat/1.jpg")


def pointers(root: Path) -> None:
    for path in (root / "test").rglob("*.png"):
        path.unlink()
        path.write_text(POINTER)


FINDINGS: list[tuple[Callable[[Path], None], str]] = [
    (broken_link, "links to files that are not there: 1, the first is test/cat/0.png: restore the files or remove"),
    (broken_class, "links to files that are not there: 1, the first is test/cat: restore"),
    (other_ending, "images by content, but not by their ending (.jpeg2000x): 1 (1 of 1 examined), the first is test/c"),
    (no_ending, "images by content, but not by their ending (no ending): 1 (1 of 1 examined), the first is test/cat/0"),
    (heic, "images that cannot be read (.heic): 1, the first is test/cat/new.heic: convert them to PNG"),
    (too_deep, "images in a folder below a class folder: 1, the first is test/cat/more/1.png: move them"),
    (all_too_deep, "images in a folder below a class folder: 6, the first is train/cat/images/0.png: move them"),
    (fifo, "FIFOs, devices or sockets: 1, the first is test/cat/1.jpg: remove them"),
    (pointers, "4 of 14 images are Git LFS pointers, the first is test/cat/0.png: type git lfs pull in "),
]


@pytest.mark.parametrize(("damage", "line"), FINDINGS, ids=[damage.__name__ for damage, _ in FINDINGS])
def test_a_finding_is_rejected_by_a_plan_and_reported_by_check_until_it_is_resolved(
    tmp_path: Path, damage: Callable[[Path], None], line: str
) -> None:
    root = own(tmp_path / "own")
    damage(root)
    assert line in refused(card(root))
    if damage is not all_too_deep:  # which leaves no training image to describe
        for images in (False, True):
            report = examine(card(root), images, lambda _: None)
            assert report.state == "findings" and any(line in finding for finding in report.findings)
            assert not report.unreadable
    shutil.rmtree(root)
    check_card(card(own(root)))


def test_a_mounted_target_resolves_a_broken_link_without_a_change_of_the_folder(tmp_path: Path) -> None:
    root = own(tmp_path / "own")
    (root / "test/cat/0.png").rename(tmp_path / "elsewhere.png")
    (root / "test/cat/0.png").symlink_to(tmp_path / "disk/0.png")
    assert "links to files that are not there" in refused(card(root))
    (tmp_path / "disk").mkdir()
    (tmp_path / "elsewhere.png").rename(tmp_path / "disk/0.png")
    check_card(card(root))


def test_check_sees_files_that_were_overwritten_in_place(tmp_path: Path) -> None:
    root = own(tmp_path / "own")
    assert examine(card(root), False, lambda _: None).state == "fine"
    (root / "test/cat/0.png").write_text(POINTER)
    assert "1 of 14 images are Git LFS pointers" in examine(card(root), False, lambda _: None).findings[0]


def test_files_with_unknown_endings_are_examined_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = own(tmp_path / "own")
    for kind in ("cat", "dog"):
        for i in range(5):
            (root / "test" / kind / f"{i}.txt").write_text("words")
    opens: list[Path] = []
    monkeypatch.setattr("pipeline.data.layouts.skipped.is_image", lambda path: opens.append(path) or False)
    assert skipped(card(root))["files that are not images by their ending (.txt)"][0] == 10
    assert len(opens) == 4  # two of a folder


# --- splits ---------------------------------------------------------------------------------------------------------


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for kind in ("bus", "car", "train", "test"):
        for i in range(10):
            put(tmp_path / "own" / kind / f"{i}.png")
    source = opened(card(tmp_path / "own", classes=4, train=20, val=8, test=12))
    assert source.classnames == ("bus", "car", "test", "train") and "generated with" in source.split_origin


def test_images_directly_in_a_split_folder_are_rejected(tmp_path: Path) -> None:
    root = own(tmp_path / "own")
    shutil.rmtree(root / "test")
    put(root / "test/1.png")
    assert "/test contains images but no class folders: expected test/CLASS/IMAGE" in refused(card(root))
    scored = card(root, test_split="val", val=0, test=4)
    check_card(scored)
    assert skipped(scored) == {"images in folders that are not a split": (1, "test/1.png")}


def test_val_is_scored_if_the_card_says_so(tmp_path: Path) -> None:
    root = own(tmp_path / "own")
    scored = card(root, test_split="val", val=0, test=4)
    check_card(scored)
    source = opened(scored)
    assert [source.index.path(int(row))[:8] for row in source.rows_of("test")] == ["val/cat/"] * 2 + ["val/dog/"] * 2
    assert "the val images are the test images, and nothing is left in val" in source.index.contents.notes
    shutil.rmtree(root / "val")
    assert refused(scored).endswith("has no val split: leave test=val out")


def test_all_images_of_a_shift_set_of_class_folders_are_test_images(tmp_path: Path) -> None:
    for kind in ("cat", "dog"):
        for i in range(10):
            put(tmp_path / "own" / kind / f"{i}.png")
    shift = card(tmp_path / "own", train=0, val=0, test=20, shift_of="icons")
    check_card(shift)
    assert opened(shift).splits == ("test",)
    assert opened(card(tmp_path / "own")).splits == ("train", "val", "test")


def test_numbered_class_folders_are_in_numeric_order(tmp_path: Path) -> None:
    root = own(tmp_path / "own", tuple(map(str, range(11))))
    names = tuple(f"name{'abcdefghijk'[i]}" for i in range(11))
    source = opened(card(root, classes=11, classnames=names))
    assert source.class_ids == tuple(map(str, range(11))) and source.index.order == "class folders in numeric order"
    last = source.rows_of("test")[-1]
    assert source.index.path(int(last)).startswith("test/10/") and source.classnames[source.labels[last]] == "namek"
    own(root, ("01",))
    assert "class folders '01' and '1' are the same number" in refused(card(root, classes=11))


def test_class_folders_that_differ_only_in_case_are_rejected(tmp_path: Path) -> None:
    root = own(tmp_path / "own", ("Box", "box"))
    assert "has the classes 'Box' and 'box', which have the same prompt: rename or merge one" in refused(card(root))
    check_card(card(root, duplicates="allow"))


# --- split files ----------------------------------------------------------------------------------------------------


def split_file(root: Path, encoding: str = "utf-8", **lists: Any) -> DatasetCard:
    own(root / "images")
    splits = {
        split: [[f"{split}/{kind}/{i}.png", y, kind] for y, kind in enumerate(("cat", "dog")) for i in range(n)]
        for split, n in COUNTS.items()
    }
    (root / "split.json").write_text(json.dumps(splits | lists), encoding=encoding)
    return card(root / "split.json", "split_file")


def test_a_split_file_may_have_a_byte_order_mark_and_unlisted_images_are_counted(tmp_path: Path) -> None:
    found = split_file(tmp_path / "own", "utf-8-sig", extra=[])
    put(tmp_path / "own/images/other/1.png")
    check_card(found)
    assert skipped(found) == {"images that are not listed": (1, "other/1.png")}
    assert "split.json has 'extra' beside train, val and test: it is not used" in opened(found).index.contents.notes
    assert "it is UTF-16 or binary: save it as UTF-8" in refused(split_file(tmp_path / "own", "utf-16"))


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([["test/cat/0.png", 0, "cat"]] * 2, "lists test/cat/0.png more than once under test: remove the repetitions"),
        ([["test/cat/0.png", 0, "cat"], ["test/./cat/0.png", 0, "cat"]], "more than once under test"),
        ([["train/cat/0.png", 1, "dog"]], "lists train/cat/0.png with the labels 0 and 1: remove one"),
    ],
)
def test_an_image_that_is_listed_twice_is_rejected(tmp_path: Path, rows: list[list[Any]], line: str) -> None:
    assert line in refused(split_file(tmp_path / "own", test=rows))


def test_two_folders_with_the_listed_images_are_rejected(tmp_path: Path) -> None:
    found = split_file(tmp_path / "own")
    own(tmp_path / "own/copy")
    assert "copy/ and images/ beside it both contain train/cat/0.png: move one of them out" in refused(found)


# --- the same image twice -------------------------------------------------------------------------------------------


def test_check_reports_images_with_two_labels_and_images_in_train_and_test(tmp_path: Path) -> None:
    root = own(tmp_path / "own")
    for copy in ("test/dog/0.png", "test/cat/1.png", "train/cat/2.png"):
        shutil.copy(root / "test/cat/0.png", root / copy)
    report = examine(card(root), True, lambda _: None)
    assert "3 test images are in train too" in report.findings
    assert "images with another label elsewhere in the set: 1" in report.findings
    assert report.repeated == 1
    assert "the same image under two labels: " in report.text()
    assert np.array(report.conflicting).tolist() == [[f"{root}/test/cat/0.png", f"{root}/test/dog/0.png"]]
