"""`farebox data`: what it prints, writes and refuses."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from PIL import Image

from pipeline import cli
from tests import miniature
from tests.miniature import put

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
    assert "shots=[2]" in said  # two images a class in val
    assert '- "tabby cat"' in (data.root / "conf/dataset/mine.yaml").read_text()
    assert cli.main(["plan", "sweep=smoke", "datasets=[mine]", "shots=[2]"]) == 0
    assert "mine: fine\n" in data("check", "mine")
    data("show", "mine", "--out", "sheet.png")
    assert Image.open("sheet.png").format == "PNG"
    assert "replace it by --force" in data.refused("add", "mine", data.root / "own")
    data("add", "mine", data.root / "own", "template={} photo", "--force")
    assert 'template: "{} photo"' in (data.root / "conf/dataset/mine.yaml").read_text()


def test_a_split_file_of_ones_own_is_added(data: Data) -> None:
    folder = miniature.make(data.root, "dtd")
    assert "found: split file, 2 classes" in data("add", "./mine.yaml", folder)
    assert cli.main(["plan", "sweep=smoke", "datasets=[./mine.yaml]", "shots=[2]"]) == 0


def test_what_cannot_be_added_is_named(data: Data) -> None:
    folder = own(data.root)
    assert f"but {folder} can be read: give that one" in data.refused("add", "x", data.root)
    assert data.refused("add", "x", "gone") == f"nothing at {data.root}/gone"
    assert "comes with Farebox" in data.refused("add", "dtd", folder)
    assert "expected NAME PATH" in data.refused("add", "x")
    assert "expected one {}" in data.refused("add", "x", folder, "template=a photo")
    assert not (data.root / "conf/dataset/x.yaml").exists()
    (data.root / "notes.txt").write_text("words")
    assert "neither a table nor a split file: wanted train/CLASS" in data.refused("add", "x", data.root / "notes.txt")
    (folder / "valid").mkdir()
    assert "which both mean val: leave one" in data.refused("add", "x", folder)


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
