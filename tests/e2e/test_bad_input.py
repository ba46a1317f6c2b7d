"""What the user got wrong ends with exit 2 and one line that says so, before Ray starts, and nothing is spent."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from omegaconf import OmegaConf
from PIL import Image

from pipeline import cli
from pipeline.files import file_sha256
from pipeline.ledger.ledger import Ledger
from pipeline.sweep.storage import alone
from tests.support.command import charges, farebox
from tests.support.lab import encoded, write_card, write_source

GOOD = encoded(Image.new("RGB", (8, 8), "red"))
SPLITS = ("train",) * 4 + ("val",) * 4 + ("test",) * 4


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray must not be needed to find any of this."""

    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))


class Command:
    """`farebox run` in this process."""

    def __init__(self, storage: Path, card: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.storage, self.capsys = storage, capsys
        self.words = ["sweep=smoke", f"storage={storage}", f"datasets=[{card}]"]

    def refused(self, *words: str, verb: str = "run") -> str:
        """Its one line; checks exit code 2 and that nothing was spent."""
        code = cli.main([verb, *self.words, *words])
        out, err = self.capsys.readouterr()
        assert code == 2, err
        assert len(err.splitlines()) == 1, err
        assert err.startswith("farebox: ")
        assert "Traceback" not in out + err
        assert not charges(self.storage)
        return err.removeprefix("farebox: ").strip()


@pytest.fixture
def command(tmp_path: Path, card: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path / "storage", card, capsys)


def data(folder: Path, images: Sequence[bytes] = (GOOD,) * 12, splits: Sequence[str] = SPLITS, **card: Any) -> Path:
    """A card over twelve images of two classes."""
    source = write_source(folder / "own.parquet", images, [0, 1] * 6, splits, ["cat", "dog"])
    return write_card(folder, source, **{"classes": 2, "train": 4, "val": 4, "test": 4} | card)


# --- words ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("methods=[zero_shto]", "no method named 'zero_shto'; did you mean 'zero_shot'? (known: "),
        ("datasets=[icon]", "no dataset named 'icon'; did you mean 'icons'? (known: "),
        ("model=tinny", "no model named 'tinny'; did you mean 'tiny'? (known: "),
        ("sweep=smok", "no sweep named 'smok'; did you mean 'smoke'? (known: "),
        ("shot=[1]", "command: no key named 'shot'; did you mean 'shots'? (known: "),
        ("budget.request=5", "command: no key named 'budget.request'; did you mean 'budget.requests'?"),
        ("method.craft.popsiz=4", "method 'craft': no setting named 'popsiz'; did you mean 'popsize'?"),
        ("method.craft.popsize=many", "method 'craft': Value 'many'"),
        ("methods=[craft,craft]", "methods: 'craft' is listed twice"),
        ("budget.requests=0", "budget.requests=0: expected a whole number of 1 or more"),
        ("budget.requests=-5", "budget.requests=-5: expected a whole number of 1 or more"),
        ("budget.images=0.5", "budget.images=0.5: expected a whole number of 1 or more"),
        ("budget.sweep.requests=0", "budget.sweep.requests=0: expected a whole number of 1 or more"),
        ("shots=[0]", "shots=0: expected a whole number of 1 or more"),
        ("shots=[9]", " has 8: set shots to 8 or fewer"),
        ("seeds=[-1]", "seeds=-1: expected a whole number of 0 or more"),
        ("seeds", "'seeds' is not key=value; for example: sweep=demo shots=1,16"),
        ("shots=[1", "cannot read"),
        ("budget=5", "command: budget=5: expected keys under it, as in budget.KEY=VALUE"),
        ("replicas=two", "replicas=two: expected a whole number of 1 or more"),
        (
            "datasets=[icons_outline]",
            "'icons_outline' is a test-only set: fit on datasets=icons (eval_shift=true",
        ),
        ("budget.sweep.requests=10", "requests asked of account 'the sweep', which has 10 left"),
        ("budget.sweep.images=10", "images asked of account 'the sweep', which has 10 left"),
        (
            "storage=/dev/null/x",
            "storage=/dev/null/x cannot be written (Not a directory): choose another with stor",
        ),
        ("features=/dev/null/x", "features=/dev/null/x cannot be written (Not a directory): choose another with feat"),
    ],
)
def test_a_wrong_word_is_refused(command: Command, word: str, line: str) -> None:
    assert line in command.refused(word)


def test_a_ceiling_of_a_named_budget_is_refused_as_well(command: Command) -> None:
    said = command.refused("budget.global.name=thesis", "budget.global.requests=10")
    assert "asked of account \"global budget 'thesis'\", which has 10 left" in said


def test_limits_of_a_global_budget_without_its_name_are_refused(command: Command) -> None:
    for words in (["budget.global.requests=10"], ["budget.global.images=10", "budget.partial=true"]):
        assert "of a budget without a name: add budget.global.name" in command.refused(*words)


def test_a_ledger_that_cannot_be_opened_is_refused(command: Command, tmp_path: Path) -> None:
    assert "cannot be used: expected sqlite:///PATH or postgresql" in command.refused("budget.global.url=mysql://x/y")
    (tmp_path / "ledger.db").write_text("this is no database" * 100)
    assert "not a database" in command.refused(f"budget.global.url=sqlite:///{tmp_path}/ledger.db")


def test_sqlite_on_a_network_file_system_is_refused(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    here = {line.split()[2] for line in Path("/proc/mounts").read_text().splitlines()}
    monkeypatch.setattr("pipeline.sweep.preflight.NETWORK", here)
    said = command.refused()
    assert said.startswith("budget.global.url and mlflow would lie on a network file system")
    assert "budget.global.url=sqlite:////LOCAL/ledger.db (or postgresql" in said and "mlflow=" in said
    assert not command.storage.exists()


def test_a_cluster_that_is_not_there_is_refused(command: Command) -> None:
    assert command.refused("address=127.0.0.1:9").startswith("no Ray at address=127.0.0.1:9 (Connection refused)")
    with contextlib.closing(Ledger(f"sqlite:///{command.storage}/ledger.db")) as books:
        assert [trial for trial in books.trials() if trial.open] == []


def test_a_method_beyond_the_models_grant_is_refused(command: Command, tmp_path: Path) -> None:
    model = tmp_path / "scores.yaml"
    model.write_text("kind: fake\ngrant: TEXT+SCORES\n")
    said = command.refused(f"model={model}", "methods=[taskres]")
    assert said.startswith("nothing can run: taskres needs ")


def test_a_storage_in_which_another_run_is_at_work_is_refused(command: Command) -> None:
    command.storage.mkdir()
    with alone(command.storage):
        assert command.refused().startswith("another `farebox run` is running in storage=")


@pytest.mark.parametrize("verb", ["leaderboard", "ledger", "sync", "ui"])
def test_what_reads_a_sweep_says_when_there_is_none(command: Command, verb: str) -> None:
    assert command.refused(verb=verb).startswith("no sweep at ")


def test_plan_refuses_what_run_refuses(command: Command) -> None:
    cli.main(["plan", *command.words])
    command.capsys.readouterr()
    assert "asked of account 'the sweep'" in command.refused("budget.sweep.requests=10", verb="plan")
    assert not command.storage.exists()


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [0, 4, 11], ids=["train", "val", "test"])
@pytest.mark.parametrize("broken", [b"no image at all", GOOD[:-30], b""], ids=["text", "cut short", "empty"])
def test_an_unreadable_image_is_refused(command: Command, tmp_path: Path, row: int, broken: bytes) -> None:
    card = data(tmp_path, [broken if i == row else GOOD for i in range(12)])
    said = command.refused(f"datasets=[{card}]", "shots=[2]", "seeds=[1]")
    assert said.startswith(f"data set 'own': row {row} of {tmp_path}/own.parquet is not a readable image (")


def test_a_split_that_is_not_there_is_refused(command: Command, tmp_path: Path) -> None:
    card = data(tmp_path, splits=("val",) * 8 + ("test",) * 4, train=0, val=8)
    assert command.refused(f"datasets=[{card}]") == "data set 'own' has no train split (its splits: test, val)"
    card = data(tmp_path, splits=("train",) * 8 + ("val",) * 4, train=8, test=0)
    assert "test images" in command.refused(f"datasets=[{card}]")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"sha256": "0" * 64}, "the card says 000000000000: restore the file"),
        ({"path": "/nowhere/own.parquet"}, "no data file at /nowhere/own.parquet: reinstall, or set `path`"),
        ({"classes": 3}, "data set 'own': its card says 3 classes"),
        ({"test": 5}, "data set 'own': its card says 5 test images"),
        ({"augment": "flip"}, "own: augment: no choice named 'flip'"),
        ({"template": "a photo"}, "own: template 'a photo': expected one {}"),
        ({"colour": "red"}, "no key named 'colour'"),
    ],
)
def test_a_card_that_is_wrong_is_refused(command: Command, tmp_path: Path, change: dict[str, Any], line: str) -> None:
    assert line in command.refused(f"datasets=[{data(tmp_path, **change)}]")


def test_a_data_file_of_another_make_is_refused(command: Command, tmp_path: Path) -> None:
    card = data(tmp_path)
    path = tmp_path / "own.parquet"
    for write, line in (
        (lambda: path.write_bytes(b"PAR1 is not all"), "is not a readable Parquet file"),
        (lambda: pq.write_table(pa.table({"picture": [GOOD]}), path), "lacks image and label and split: expected"),
        (lambda: pq.write_table(pq.read_table(path).replace_schema_metadata(None), path), "lacks "),
    ):
        write()
        fields = OmegaConf.load(card)
        fields.sha256 = file_sha256(path)
        OmegaConf.save(fields, card)
        assert line in command.refused(f"datasets=[{card}]")


def test_weights_that_are_not_there_are_refused(command: Command, tmp_path: Path) -> None:
    model = tmp_path / "own_model.yaml"
    model.write_text("kind: open_clip\narch: ViT-B-32-quickgelu\nweights: /nowhere/weights.pt\n")
    assert "'/nowhere/weights.pt' is neither a file nor an open_clip tag" in command.refused(f"model={model}")
    (tmp_path / "weights.pt").write_bytes(b"not weights")
    model.write_text(
        f"kind: open_clip\narch: ViT-B-32-quickgelu\nweights: {tmp_path}/weights.pt\nweights_sha256: '{0:064}'\n"
    )
    assert "does not have the digest that its card states" in command.refused(f"model={model}")
    torch.save({f"text_model.encoder.{n}": torch.zeros(1) for n in range(9)}, tmp_path / "weights.pt")
    model.write_text(f"kind: open_clip\narch: ViT-B-32-quickgelu\nweights: {tmp_path}/weights.pt\n")
    assert "none of its 9 keys (text_model.encoder.0" in command.refused(f"model={model}")
    model.write_text("kind: open_clip\narch: ViT-B-33\nweights: openai\n")
    assert "open_clip has no architecture 'ViT-B-33'" in command.refused(f"model={model}")
    model.write_text("kind: magic\n")
    assert "no choice named 'magic' (known: embedded, fake, http, open_clip)" in command.refused(f"model={model}")


# --- in a process of its own ----------------------------------------------------------------------------------------


def test_the_real_command_says_one_line(tmp_path: Path) -> None:
    done = farebox("run", "sweep=smoke", f"storage={tmp_path}/s", "methods=[crafft]", expect=2)
    assert done.stdout == ""
    assert done.stderr.startswith("farebox: no method named 'crafft'; did you mean 'craft'?")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_weights_that_cannot_be_read_are_refused_before_ray_starts_and_nothing_is_made(
    tmp_path: Path, card: Path
) -> None:
    (tmp_path / "weights.pt").write_bytes(b"not weights")
    model = tmp_path / "own_model.yaml"
    model.write_text(f"kind: open_clip\narch: RN50-quickgelu\nweights: {tmp_path}/weights.pt\n")
    words = ("sweep=smoke", f"storage={tmp_path}/s", f"datasets=[{card}]", f"model={model}", "replicas=1")
    done = farebox("run", *words, expect=2)
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("farebox: ")
    assert "/weights.pt': it is damaged or no PyTorch file" in done.stderr
    assert not (tmp_path / "s").exists()
