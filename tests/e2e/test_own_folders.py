"""Data sets as folders of images, through the real command: what is refused. test_installed.py runs one on Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ray

from pipeline import cli
from tests.support import miniature
from tests.support.command import charges
from tests.support.miniature import put


class Refusal:
    """`farebox run` in this process, on a published layout under a root."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self.storage, self.capsys = root, root.parent / "storage", capsys

    def __call__(self, dataset: object, root: Path | None = None) -> str:
        words = ["sweep=smoke", f"storage={self.storage}", f"datasets=[{dataset}]", f"data.root={root or self.root}"]
        code = cli.main(["run", *words])
        out, err = self.capsys.readouterr()
        assert code == 2 and len(err.splitlines()) == 1 and "Traceback" not in out + err, err
        assert not charges(self.storage)
        return err.removeprefix("farebox: ").strip()


@pytest.fixture
def refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Refusal:
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    return Refusal(tmp_path / "data", capsys)


def test_a_folder_that_is_not_there_is_refused(refusal: Refusal) -> None:
    assert refusal("oxford_pets") == f"nothing at {refusal.root}/oxford_pets"


def test_a_root_one_level_off_is_refused(refusal: Refusal) -> None:
    folder = miniature.make(refusal.root, "oxford_pets")
    assert f"set data.root={refusal.root}, the folder above it" in refusal("oxford_pets", folder)
    assert f"is there: set data.root={refusal.root}" in refusal("oxford_pets", refusal.root.parent)


def test_an_unreadable_image_is_refused_by_its_file(refusal: Refusal) -> None:
    folder = miniature.make(refusal.root, "dtd")
    card = miniature.card(refusal.root, "dtd")
    first = json.loads((folder / "split_zhou_DescribableTextures.json").read_text())["test"][0][0]
    (folder / "images" / first).write_bytes(b"")
    assert f"{folder}/images/{first} is not a readable image (0 bytes" in refusal(card)


def test_a_broken_split_file_is_refused(refusal: Refusal) -> None:
    folder = miniature.make(refusal.root, "dtd")
    path = folder / "split_zhou_DescribableTextures.json"
    splits = json.loads(path.read_text())
    for change, line in (
        ({"train": [["gone.jpg", 0, "banded"]]}, f"1 of its images are not under {folder}/images, the first is gone"),
        ({"train": [[splits["train"][0][0], 9, "spots"]]}, "has 3 labels but no label 2"),
        (
            {"train": [[splits["train"][0][0], 2, "banded"]]},
            "has the classes 'banded' and 'banded', which have the same prompt",
        ),
    ):
        path.write_text(json.dumps(splits | change))
        assert line in refusal("dtd")
    path.write_text("{")
    assert f"{path} is not a split" in refusal("dtd")


def test_a_class_with_too_few_images_is_refused(refusal: Refusal) -> None:
    miniature.make(refusal.root, "dtd")
    card = miniature.card(refusal.root, "dtd")
    words = [
        "sweep=smoke",
        f"storage={refusal.storage}",
        f"datasets=[{card}]",
        f"data.root={refusal.root}",
        "shots=[4]",
    ]
    assert cli.main(["plan", *words]) == 2
    assert (
        "class 'banded' has 3: set shots to 3 or fewer, or data.small_classes=take_all"
        in refusal.capsys.readouterr()[1]
    )
    assert cli.main(["plan", *words, "data.small_classes=take_all"]) == 0


def test_an_unknown_class_is_refused(refusal: Refusal) -> None:
    folder = refusal.root / "own"
    for split, kinds in (("train", ("cat", "dog")), ("val", ("cat", "dog")), ("test", ("cat", "horse"))):
        for kind in kinds:
            put(folder / split / kind / "1.jpg")
    card = refusal.root / "own.yaml"
    card.write_text("layout: folder\npath: own\nclasses: 2\ntrain: 2\nval: 2\ntest: 2\ntemplate: 'a {}'\n")
    assert refusal(card).endswith(f"{folder}/test has the class 'horse', which {folder}/train does not have")
