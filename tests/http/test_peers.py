"""Sweeps against real HTTP peers: infinity-emb, a server of others, in an environment of its own (make test-http)."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError

import open_clip
import pytest

from pipeline.config.compose import compose
from pipeline.remote.call_log import total_of
from pipeline.results.row import ResultRow
from pipeline.results.store import ResultStore
from pipeline.sweep.in_process import run_all
from pipeline.trials.plan import make_plan
from tests.support.command import free_port
from tests.support.patience import patience
from tests.support.service import OPENER

pytestmark = [pytest.mark.http, pytest.mark.timeout(580)]
PEER = os.environ.get("FAREBOX_TEST_PEER", "")
"""The environment in which infinity-emb is installed."""
OPTIONS = {
    "HF_HUB_OFFLINE": "1",
    "INFINITY_BETTERTRANSFORMER": "false",
    "INFINITY_MODEL_WARMUP": "false",
    "INFINITY_ANONYMOUS_USAGE_STATS": "false",
}
CARD = """kind: http
url: {url}
adapter: openai_embeddings
grant: TEXT+FEATURES
identity: {{model: toy}}
image: {{size: 64}}
feature_dim: 32
logit_scale: 100.0
text_norm: 1.0
max_text: 200
price: {{usd_per_image: 0.0001, usd_per_1k_tokens: 0.001, tokens_per_image: 100, as_of: 2026-11-01}}
"""
BPE = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"


@pytest.fixture(scope="module")
def infinity(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an infinity-emb that serves a toy CLIP."""
    assert PEER, "set FAREBOX_TEST_PEER, or run make test-http"
    folder, port, env = tmp_path_factory.mktemp("peer"), free_port(), {**os.environ, **OPTIONS}
    script = Path(__file__).with_name("toy_clip.py")
    subprocess.run([f"{PEER}/bin/python", script, folder / "toy", BPE], env=env, check=True, timeout=patience())
    options = ("--model-id", str(folder / "toy"), "--served-model-name", "toy", "--engine", "torch", "--device", "cpu")
    command = [f"{PEER}/bin/infinity_emb", "v2", *options, "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log.txt").open("w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + patience()
        while True:
            assert server.poll() is None and time.monotonic() < until, (folder / "log.txt").read_text()[-3000:]
            try:
                OPENER.open(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except HTTPError as error:
                pytest.fail(f"status {error.code}: {(folder / 'log.txt').read_text()[-3000:]}")
            except OSError:
                time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def rows_of(storage: Path) -> list[ResultRow]:
    store = ResultStore(storage)
    trials = sorted(set(store.read()["trial_id"].to_pylist()))
    return sorted((row for trial in trials for row in store.rows_of(trial)), key=lambda row: (row.method, row.seed))


def run(folder: Path, card: Path, *words: str) -> list[ResultRow]:
    methods = "methods=[zero_shot,gda,score_ridge,taskres]"
    base = ("sweep=smoke", f"storage={folder}", f"model={folder.parent / 'toy.yaml'}", f"datasets=[{card}]", "shots=4")
    run_all(make_plan(compose([*base, "views=2", methods, *words])), lambda line: None)
    return rows_of(folder)


def test_a_sweep_runs_against_infinity_and_again_without_it(infinity: str, tmp_path: Path, card: Path) -> None:
    (tmp_path / "toy.yaml").write_text(CARD.format(url=f"{infinity}/embeddings"))
    first = run(tmp_path / "first", card, "seeds=1,2")
    assert [row.status for row in first] == ["done"] * 8
    sent = total_of(tmp_path / "first")
    assert sent.calls and sent.images and sent.texts and sent.tokens and not sent.uncertain
    again = run(tmp_path / "again", card, "seeds=1,2", "offline=true")
    assert total_of(tmp_path / "again").calls == 0
    assert [(r.trial_id, r.accuracy, r.requests) for r in again] == [
        (r.trial_id, r.accuracy, r.requests) for r in first
    ]
    assert [r.predictions_digest for r in again] == [r.predictions_digest for r in first]
