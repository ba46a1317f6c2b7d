"""`farebox data`: what it prints, writes and refuses."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from pipeline import cli
from tests.support import miniature
from tests.support.miniature import put

SHARED = Path(__file__).resolve().parents[3] / "shared" / "coop"
SETS = {"dtd": "DescribableTextures", "eurosat": "EuroSAT", "oxford_flowers": "OxfordFlowers"} | {
    "oxford_pets": "OxfordPets"
}


class Data:
    """`farebox data` in this process, with cards of its own."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self.capsys = root, capsys

    def __call__(self, *words: object, expect: int = 0) -> str:
        code = cli.main(["data", *map(str, words)])
        out, err = self.capsys.readouterr()
        assert code == expect, out + err
        return out

    def refused(self, *words: object) -> str:
        code = cli.main(["data", *map(str, words)])
        err = [line for line in self.capsys.readouterr()[1].splitlines() if not line.startswith("listing ")]
        assert code == 2 and len(err) == 1, err
        return err[0].removeprefix("farebox: ")


@pytest.fixture
def data(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Data:
    monkeypatch.setenv("FAREBOX_CONF", str(tmp_path / "conf"))
    monkeypatch.chdir(tmp_path)
    return Data(tmp_path, capsys)


def own(root: Path) -> Path:
    for split, n in (("Train", 4), ("val", 2), ("test", 2)):
        for kind in ("tabby_cat", "dog"):
            for i in range(n):
                put(root / "own" / split / kind / f"{i}.jpg")
    return root / "own"


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no published split files in {SHARED}")
@pytest.mark.parametrize("name", SETS)
def test_an_exported_split_is_the_published_one_from_the_split_file_alone(data: Data, name: str) -> None:
    for key, wanted in json.loads((SHARED / "few_shot_digests.json").read_text())[SETS[name]]["few_shot"].items():
        words = key.replace("-shot", "").replace("seed-", "").split("/")
        data("export-split", name, "--out", "x.json", f"shots={words[0]}", f"seed={words[1]}", f"data.root={SHARED}")
        found = json.loads(Path("x.json").read_text())
        for part in ("train", "val"):
            lines = "".join(f"{path}\t{label}\t{kind}\n" for path, label, kind in found[part])
            assert hashlib.sha256(lines.encode()).hexdigest() == wanted[part], (key, part)


def test_a_split_of_images_in_a_table_names_file_and_row(data: Data) -> None:
    found = json.loads(data("export-split", "icons", "shots=1"))
    assert len(found["train"]) == len(found["val"]) == 16
    assert found["train"][0][0].startswith("icons.parquet#")
    assert "did you mean 'shots'" in data.refused("export-split", "icons", "shot=1")
    assert data.refused("export-split", "dtd", f"data.root={data.root}") == f"nothing at {data.root}/dtd"


def test_a_folder_is_added_planned_checked_and_shown(data: Data) -> None:
    said = data("add", "mine", own(data.root))
    assert "2 classes, 8 train, 4 val, 4 test images" in said
    assert "shots=2" in said  # two images a class in val
    assert '- "tabby cat"' in (data.root / "conf/dataset/mine.yaml").read_text()
    assert cli.main(["plan", "sweep=smoke", "datasets=[mine]", "shots=[2]"]) == 0
    assert "mine: fine\n" in data("check", "mine")
    data("show", "mine", "--out", "sheet.png")
    assert Image.open("sheet.png").format == "PNG"
    assert "replace it with --force" in data.refused("add", "mine", data.root / "own")
    data("add", "mine", data.root / "own", "template={} photo", "--force")
    assert 'template: "{} photo"' in (data.root / "conf/dataset/mine.yaml").read_text()


def test_a_split_file_of_ones_own_is_added(data: Data) -> None:
    folder = miniature.make(data.root, "dtd")
    assert "found: split file, 2 classes" in data("add", "./mine.yaml", folder)
    assert cli.main(["plan", "sweep=smoke", "datasets=[./mine.yaml]", "shots=[2]"]) == 0


def test_add_says_what_it_used_and_skipped_and_which_class_has_which_label(data: Data) -> None:
    for split, n in (("train", 2), ("test", 2)):
        for kind in range(11):
            for i in range(n):
                put(data.root / "own" / split / str(kind) / f"{i}.jpg")
    (data.root / "own/test/3/Thumbs.db").write_bytes(b"x")
    (data.root / "own/cover.png").write_bytes(b"x")
    (data.root / "names.txt").write_bytes("\ufeff".encode() + b"".join(b"name%d.\r\n" % i for i in range(11)) + b"\r\n")
    said = data("add", "mine", "own", "classnames=names.txt").splitlines()
    assert said[:5] == [
        "found: folder, 11 classes, 22 train, 0 val, 22 test images",
        "labels: class folders in numeric order: 0 = 0 (name0.), 1 = 1 (name1.), ..., "
        "9 = 9 (name9.), 10 = 10 (name10.)",
        "split: as its files have it",
        "skipped: images outside the class folders: 1, the first is cover.png",
        "skipped: system files (.DS_Store, Thumbs.db, ._*, __MACOSX, @eaDir): 1, the first is test/3/Thumbs.db",
    ]
    record = json.loads(data("add", "mine", "own", "classnames=names.txt", "--json", "--force"))
    assert record["classnames"][10] == "name10." and record["class_ids"][10] == "10"
    assert [skipped["files"] for skipped in record["skipped"]] == [1, 1]
    assert "skipped: images outside the class folders: 1" in data("check", "mine")
    (record,) = json.loads(data("check", "mine", "--json", "--quick"))
    assert record["skipped"][0]["reason"] == "images outside the class folders"


def test_findings_are_said_and_no_card_is_written(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    folder = own(data.root)
    (folder / "test/dog/0.jpg").rename(folder / "test/dog/0.photo")
    (folder / "test/dog/1.jpg").unlink()
    (folder / "test/dog/1.jpg").symlink_to("/nowhere")
    assert cli.main(["data", "add", "mine", str(folder)]) == 2
    assert capsys.readouterr()[1].splitlines()[1:] == [
        "skipped: files that are not images by their ending (.photo): 1, the first is test/dog/0.photo",
        "skipped: links to files that are not there: 1, the first is test/dog/1.jpg",
        "finding: images by content, but not by their ending (.photo): 1 (1 of 1 examined), the first is "
        "test/dog/0.photo: rename them (.jpg, .png, ...)",
        f"farebox: {folder}: links to files that are not there: 1, the first is test/dog/1.jpg: restore the files or "
        "remove the links (and 1 more findings)",
    ]
    assert not (data.root / "conf/dataset/mine.yaml").exists()


def test_a_set_with_train_and_val_alone_is_scored_on_val(data: Data) -> None:
    folder = own(data.root)
    shutil.rmtree(folder / "test")
    assert "type test=val to score its val images" in data.refused("add", "mine", folder)
    said = data("add", "mine", folder, "test=val")
    assert "0 val, 4 test images" in said and "note: the val images are the test images" in said
    words = next(line for line in said.splitlines() if "farebox run" in line).split()[2:-1]
    assert cli.main(["plan", "sweep=smoke", *words]) == 0
    assert "mine: fine\n" in data("check", "mine")
    assert "no choice named 'train'" in data.refused("add", "x", folder, "test=train")


def test_a_shift_set_of_class_folders_has_test_images_alone_and_the_classes_of_its_set(data: Data) -> None:
    data("add", "mine", own(data.root))
    for kind in ("dog", "Tabby Cat"):
        for i in range(10):
            put(data.root / "shift" / kind / f"{i}.jpg")
    said = data("add", "moved", "shift", "shift_of=mine")
    assert "0 train, 0 val, 20 test images" in said
    assert "note: all images are test images, since methods are not fitted on a shift set" in said
    put(data.root / "shift/horse/0.jpg")
    said = data.refused("add", "other", "shift", "shift_of=mine")
    assert "'other' has other classes than 'mine'" in said and "'horse' is not among them" in said
    assert not (data.root / "conf/dataset/other.yaml").exists()
    for split in ("train", "val"):
        put(data.root / "splits" / split / "dog/0.jpg")
    put(data.root / "splits/test/dog/0.jpg")
    assert "note: only the 1 test images are scored, 2 others are not used" in data(
        "add", "splits", "splits", "shift_of=mine"
    )


def test_a_part_of_a_published_set_gets_a_card_of_its_own(data: Data) -> None:
    folder = miniature.make(data.root, "imagenet")
    said = data("add", "part", folder, "layout=imagenet")
    assert "found: imagenet, 4 classes, 24 train, 0 val, 8 test images" in said
    assert 'template: "a photo of a {}."' in (data.root / "conf/dataset/part.yaml").read_text()
    assert cli.main(["plan", "sweep=smoke", "datasets=[part]", "shots=[2]", "eval_shift=false"]) == 0
    assert "no layout named 'imagnet'; did you mean 'imagenet'" in data.refused("add", "x", folder, "layout=imagnet")
    assert "test=val is for layouts folder" in data.refused("add", "x", folder, "layout=imagenet", "test=val")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"cat\n\ndog\n", "line 2 of names.txt is empty: expected one name a line"),
        (b"\n\n", "names.txt is empty: expected one name a line"),
        (b"cat\n", "1 class names are given, "),
        (b"cat\nCAT\n", "has the classes 'cat' and 'CAT', which have the same prompt"),
        ("cat\ndog".encode("utf-16"), "cannot be read (it is UTF-16 or binary: save it as UTF-8)"),
        (b"caf\xe9\ndog", "cannot be read ("),
        (b"tabby cat\ndog\n", "class name 'tabby cat' is given to the class 'dog'"),
    ],
)
def test_a_file_of_class_names_that_does_not_fit_is_refused(data: Data, content: bytes, line: str) -> None:
    (data.root / "names.txt").write_bytes(content)
    assert line in data.refused("add", "mine", own(data.root), "classnames=names.txt")


def test_class_names_are_refused_for_other_classes_than_they_were_written_for(data: Data) -> None:
    folder = own(data.root)
    (data.root / "names.txt").write_text("hound\ntabby\n")
    data("add", "mine", folder, "classnames=names.txt")
    for split in ("Train", "val", "test"):
        (folder / split / "dog").rename(folder / split / "zebra")
    assert "has other classes, or a different class order, than when its card was written" in data(
        "check", "mine", expect=2
    )


def test_classes_with_one_prompt_are_added_where_that_is_allowed(data: Data) -> None:
    (data.root / "names.txt").write_text("missile\nmissile\n")
    words = ("add", "mine", own(data.root), "classnames=names.txt")
    assert "or type duplicates=allow" in data.refused(*words)
    assert "note: pairs of classes with the same prompt: 1, the first is 'missile' and 'missile'" in data(
        *words, "duplicates=allow"
    )
    assert cli.main(["plan", "sweep=smoke", "datasets=[mine]", "shots=[2]"]) == 0


def test_what_cannot_be_added_is_named(data: Data) -> None:
    folder = own(data.root)
    assert f"but {folder} can be read: use that one" in data.refused("add", "x", data.root)
    assert data.refused("add", "x", "gone") == f"nothing at {data.root}/gone"
    assert "comes with Farebox" in data.refused("add", "dtd", folder)
    assert "expected NAME PATH" in data.refused("add", "x")
    assert "expected one {}" in data.refused("add", "x", folder, "template=a photo")
    assert not (data.root / "conf/dataset/x.yaml").exists()
    (data.root / "notes.txt").write_text("words")
    assert "neither a table nor a split file: expected train/CLASS" in data.refused("add", "x", data.root / "notes.txt")
    (folder / "valid").mkdir()
    assert "which both mean val: remove one" in data.refused("add", "x", folder)


def test_check_names_what_is_wrong_and_tells_it_by_its_exit_code(data: Data) -> None:
    folder = own(data.root)
    data("add", "mine", folder)
    (folder / "test/dog/0.jpg").write_bytes((folder / "Train/dog/0.jpg").read_bytes())
    (folder / "val/dog/1.jpg").write_bytes(b"")
    (record,) = json.loads(data("check", "mine", "--json", expect=3))
    assert record["state"] == "findings" and "val/dog/1.jpg (0 bytes" in record["unreadable"][0]
    assert record["duplicates"] == [[f"{folder}/test/dog/0.jpg", f"{folder}/Train/dog/0.jpg"]]
    assert record["balance"]["train"] == [4, 4.0, 4]
    assert "published at https://" in data("check", "dtd", f"data.root={data.root}", expect=2)
    (folder / "val/dog/1.jpg").unlink()
    assert "3 val images, its card says 4" in data("check", "mine", "--quick", expect=3)
