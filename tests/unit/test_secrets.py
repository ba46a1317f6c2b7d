"""A password in a URL is in no message."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.blackbox.ledger import Ledger
from pipeline.errors import LedgerError, TrackingError, masked
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
