"""A password in a URL is in no message and no file, and no file that is read runs code of its own."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from pipeline.blackbox.model import OpenClipModel
from pipeline.cards import ModelCard
from pipeline.cli import main
from pipeline.config.compose import compose
from pipeline.errors import DataError, LedgerError, TrackingError, masked
from pipeline.ledger.ledger import Ledger
from pipeline.results.store import ResultStore
from pipeline.results.tracking import Mirror
from pipeline.trials.checkpoint import Checkpoint


@pytest.mark.parametrize("url", ["postgresql://user:secret@host/db", "http://user:sec@ret/secret@host:5000"])
def test_the_password_of_a_url_is_left_out_and_the_rest_stays(url: str) -> None:
    text = masked(f"no {url}: try sqlite:////a/b.db")
    assert "sec" not in text
    assert "://user:***@host" in text and text.endswith("try sqlite:////a/b.db")
    assert masked("http://host:5000/a and me@example.com") == "http://host:5000/a and me@example.com"


def test_a_password_in_a_query_is_left_out_too() -> None:
    assert masked("postgresql://host/db?user=me&password=hunter2&sslmode=on") == (
        "postgresql://host/db?user=me&password=***&sslmode=on"
    )


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (("run", "mlflow=http://me:hunter2@host"), "mlflow='${oc.env:FAREBOX_MLFLOW}'"),
        (("plan", "budget.global.url=postgresql://:hunter2@h/d"), "budget.global.url='${oc.env:FAREBOX_LEDGER_URL}'"),
        (("ledger", "budget={global: {url: 'postgresql://me:hunter2@h/d'}}"), "'${oc.env:FAREBOX_URL}' in its place"),
        (("budget", "show", "url=postgresql://h/d?password=hunter2"), "'${oc.env:FAREBOX_URL}' in its place"),
        (
            ("ui", "--mlflow=http://me:hunter2@host"),
            "'${oc.env:FAREBOX_URL}' in its place",
        ),
        (("bench", "http://me:hunter2@host"), "'${oc.env:FAREBOX_URL}' in its place"),
    ],
)
def test_a_password_on_the_command_line_is_refused_and_not_repeated(
    words: tuple[str, ...], remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and len(err) <= 300
    assert "hunter2" not in err and remedy in err


def test_the_remedy_for_a_typed_password_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAREBOX_MLFLOW", "http://me:hunter2@host")
    monkeypatch.setenv("FAREBOX_LEDGER_URL", "postgresql://me:hunter2@host/db")
    config = compose(["mlflow=${oc.env:FAREBOX_MLFLOW}", "budget.global.url=${oc.env:FAREBOX_LEDGER_URL}"])
    assert (config.mlflow, config.ledger_url) == ("http://me:hunter2@host", "postgresql://me:hunter2@host/db")


def test_an_error_that_nothing_handles_is_one_line_and_a_file_without_the_password(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken() -> None:
        raise ZeroDivisionError("at http://me:hunter2@host\nsecond line")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("pipeline.commands.catalog.methods", broken)
    assert main(["methods"]) == 4
    err = capsys.readouterr().err
    (file,) = tmp_path.iterdir()
    assert err.count("\n") == 1 and "ZeroDivisionError: at http://me:***@host" in err and str(file) in err
    assert "in broken" in file.read_text() and "hunter2" not in err + file.read_text()
    assert file.stat().st_mode & 0o077 == 0


def test_a_module_that_cannot_be_imported_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def incomplete() -> None:
        importlib.import_module("pipeline.not_there")

    monkeypatch.setattr("pipeline.commands.catalog.methods", incomplete)
    assert main(["methods"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "pipeline.not_there" in err and "pip install" in err


def test_neither_ledger_nor_mlflow_tells_a_password(tmp_path: Path) -> None:
    url = "postgresql+nosuchdriver://user:secret@127.0.0.1:1/db"
    with pytest.raises(LedgerError) as of_ledger:
        Ledger(url)
    with pytest.raises(TrackingError) as of_mlflow:
        Mirror(url, tmp_path, "x")
    assert "secret" not in str(of_ledger.value) + str(of_mlflow.value)


def test_a_traceback_is_kept_without_the_password(tmp_path: Path) -> None:
    try:
        raise ConnectionError("cannot reach postgresql://user:hunter2@host/db")
    except ConnectionError as error:
        written = ResultStore(tmp_path).write_traceback("id", "a trial", error).read_text()
    assert "ConnectionError" in written and "postgresql://user:***@host" in written and "hunter2" not in written


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_weights_that_would_run_code_are_refused_by_name_and_run_nothing(tmp_path: Path) -> None:
    trace, weights = tmp_path / "it_ran", tmp_path / "weights.pt"
    torch.save({"state_dict": {"a": Harmful(trace)}}, weights)
    card = ModelCard(name="own", kind="open_clip", arch="RN50", weights=str(weights))
    with pytest.raises(DataError, match=r"/weights.pt': it holds objects of getattr, which may run code"):
        OpenClipModel(card)
    assert not trace.exists()
    torch.load(weights, weights_only=False)
    assert trace.exists(), "the file is harmful indeed"


def test_a_checkpoint_that_is_a_link_to_elsewhere_is_not_loaded(tmp_path: Path) -> None:
    elsewhere, trace = Checkpoint(tmp_path / "elsewhere", "t"), tmp_path / "it_ran"
    elsewhere.save(Harmful(trace))
    (tmp_path / "own" / "checkpoints").mkdir(parents=True)
    own = Checkpoint(tmp_path / "own", "t")
    own.path.symlink_to(elsewhere.path)
    assert own.load() is None and not trace.exists()
    elsewhere.load()
    assert trace.exists(), "the checkpoint is harmful indeed"
