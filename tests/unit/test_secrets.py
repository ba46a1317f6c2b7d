"""A password in a URL is in no message and no file, and no file that is read runs code of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.blackbox.ledger import Ledger
from pipeline.blackbox.model import OpenClipModel
from pipeline.checkpoint import Checkpoint
from pipeline.config import ModelCard
from pipeline.errors import DataError, LedgerError, TrackingError, masked
from pipeline.results import Store
from pipeline.tracking import Mirror


@pytest.mark.parametrize("url", ["postgresql://user:secret@host/db", "http://user:sec@ret/secret@host:5000"])
def test_the_password_of_a_url_is_left_out_and_the_rest_stays(url: str) -> None:
    text = masked(f"no {url}: try sqlite:////a/b.db")
    assert "sec" not in text
    assert "://user:***@host" in text and text.endswith("try sqlite:////a/b.db")
    assert masked("http://host:5000/a and me@example.com") == "http://host:5000/a and me@example.com"


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
        written = Store(tmp_path).write_traceback("id", "a trial", error).read_text()
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
    (tmp_path / "own").mkdir()
    own = Checkpoint(tmp_path / "own", "t")
    own.path.symlink_to(elsewhere.path)
    assert own.load() is None and not trace.exists()
    elsewhere.load()
    assert trace.exists(), "the checkpoint is harmful indeed"
