"""Trials on remote endpoints: paid once, recorded, repeated from the records, and shown in two bills."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import farebox
from methods.base import TextPrompts
from pipeline import cli
from pipeline.cli import main
from pipeline.config.compose import compose
from pipeline.errors import AccessDenied, ConfigError, EndpointRefused, EndpointStopped, FareboxError, StorageError
from pipeline.remote import asking, probe
from pipeline.remote.call_log import total_of
from pipeline.remote.http_client import Payer
from pipeline.remote.permission import refuse_unconfirmed
from pipeline.remote.records import Answers
from pipeline.results.store import ResultStore
from pipeline.trials.plan import make_plan
from tests.support.lab import run_here, small_data
from tests.support.peer import CARDS, KEY, Peer, peer, write_peer_card


@pytest.fixture
def served() -> Iterator[Peer]:
    with peer() as one:
        yield one


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data(tmp_path_factory.mktemp("data"))


class Sweep:
    """A small sweep on a peer, run in this process."""

    def __init__(self, folder: Path, data: Path, served: Peer, adapter: str = "openai_embeddings", **card: Any) -> None:
        self.folder, self.data = folder, data
        self.card = write_peer_card(folder, served.url, adapter, **card)

    def words(self, storage: str, *more: str) -> list[str]:
        words = ["sweep=smoke", f"storage={self.folder / storage}", f"model={self.card}", f"datasets=[{self.data}]"]
        return [*words, "views=2", "shots=4", "seeds=1", "methods=[zero_shot,score_ridge]", "eval_shift=false", *more]

    def run(self, storage: str = "one", *more: str) -> dict[str, dict[str, Any]]:
        run_here(*self.words(storage, *more))
        return self.rows(storage)

    def rows(self, storage: str) -> dict[str, dict[str, Any]]:
        return {row["method"]: row for row in ResultStore(self.folder / storage).read().to_pylist()}


def numbers(rows: dict[str, dict[str, Any]]) -> dict[str, tuple[Any, ...]]:
    """What must be equal however often a sweep is run."""
    keys = ("accuracy", "nll", "predictions_digest", "requests", "images", "prompts", "outputs", "status")
    return {method: tuple(row[key] for key in keys) for method, row in rows.items()}


PROBE_CALLS = {"openai_embeddings": 2, "oip_v2": 2, "hf_zero_shot": 4, "jina_classify": 1}


@pytest.mark.parametrize("adapter", [name for name in CARDS if name != "farebox"])
def test_a_sweep_is_paid_once_and_repeated_from_its_records(
    tmp_path: Path, data: Path, served: Peer, adapter: str
) -> None:
    sweep = Sweep(tmp_path, data, served, adapter)
    first = sweep.run("one")
    assert {row["status"] for row in first.values()} == {"done"}
    n_calls = len(served.calls)
    assert total_of(tmp_path / "one").calls == n_calls
    assert sum(row["http_calls"] for row in first.values()) == n_calls - PROBE_CALLS[adapter]
    again = sweep.run("two")
    offline = sweep.run("three", "offline=true")
    assert numbers(first) == numbers(again) == numbers(offline)
    assert len(served.calls) == n_calls, "nothing is asked twice"
    assert {row["http_calls"] for row in (*again.values(), *offline.values())} == {0}


def test_the_logical_bill_is_that_of_a_local_model(tmp_path: Path, data: Path, served: Peer) -> None:
    rows = Sweep(tmp_path, data, served).run("one")
    run_here(
        *(
            word.replace(f"model={tmp_path / 'peer.yaml'}", "model=fake")
            for word in Sweep(tmp_path, data, served).words("local")
        )
    )
    local = {row["method"]: row for row in ResultStore(tmp_path / "local").read().to_pylist()}
    for unit in ("requests", "images", "prompts", "outputs", "evaluate_requests", "evaluate_images"):
        assert {m: row[unit] for m, row in rows.items()} == {m: row[unit] for m, row in local.items()}, unit
    assert {row["http_calls"] for row in local.values()} == {0}


def test_two_hundred_faults_change_the_physical_bill_alone(tmp_path: Path, data: Path, served: Peer) -> None:
    single = {"images": 1, "texts": 1}
    clean = Sweep(tmp_path, data, served, batch=single).run("clean")
    n_calls = len(served.calls)
    (tmp_path / "faulty").mkdir()
    served.faults.extend([429, "drop", "fine", "truncate", 503, "not_json", "fine", 500, "drop", "fine"] * 29)
    retry = {"first_s": 0.002, "most_s": 0.02, "tries": 40}
    rows = Sweep(tmp_path / "faulty", data, served, batch=single, retry=retry).run("one")
    assert not served.faults and numbers(rows) == numbers(clean)
    bill = total_of(tmp_path / "faulty" / "one")
    assert bill.calls == len(served.calls) - n_calls == n_calls + bill.retries
    assert (bill.retries, bill.uncertain, bill.rate_limited) == (7 * 29, 3 * 29, 29)


def test_several_methods_that_ask_at_once_pay_for_an_image_once(tmp_path: Path, data: Path, served: Peer) -> None:
    card = write_peer_card(tmp_path, served.url, batch={"images": 4})
    words = (f"model={card}", f"storage={tmp_path / 's'}", "budget.requests=null")
    task = farebox.few_shot_task(f"datasets=[{data}]", *words, "shots=4", "seeds=1")
    with farebox.open_box(*words) as box:
        results: list[np.ndarray] = []
        endpoint = box.pool.endpoint  # type: ignore[attr-defined]
        threads = [
            threading.Thread(target=lambda: results.append(endpoint._image(task.train.images, Payer("s/t/0/d/"))[0]))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(results) == 8 and all(np.array_equal(results[0], other) for other in results)
    assert served.items() - 8 == 20, "the probes have four images and four words"


def test_a_run_that_fails_continues_where_it_stopped(tmp_path: Path, data: Path, served: Peer) -> None:
    sweep = Sweep(tmp_path, data, served, retry={"first_s": 0.01, "most_s": 0.02, "tries": 2}, batch={"images": 4})
    served.faults.extend(["fine"] * 4 + [503] * 1000)
    first = sweep.run("one")
    assert "failed" in {row["status"] for row in first.values()}
    assert "EndpointBusy" in str([row["error"] for row in first.values()])
    served.faults.clear()
    second = sweep.run("one")
    assert {row["status"] for row in second.values()} == {"done"}
    answered = [call["body"] for call in served.calls if call.get("answered") and call["body"]["modality"] == "image"]
    sent = [image for body in answered for image in body["input"]]
    assert len(sent) - len(set(sent)) == 4, "only the images of the probes are asked again"
    bill, n_probes = total_of(tmp_path / "one"), 2 * PROBE_CALLS["openai_embeddings"]
    assert sum(row["http_calls"] for row in second.values()) == bill.calls - n_probes, "those of the failed run too"
    assert sum(row["http_retries"] for row in second.values()) == bill.retries > 0
    clean = Sweep(tmp_path, data, served).run("other")
    assert numbers(second) == numbers(clean)


def test_a_server_that_never_answers_ends_the_run_after_one_series_of_tries(
    tmp_path: Path, data: Path, served: Peer
) -> None:
    sweep = Sweep(tmp_path, data, served, retry={"first_s": 0.01, "most_s": 0.02, "tries": 3})
    served.faults.extend([503] * 1000)
    with pytest.raises(EndpointStopped, match=r"did not answer in 3 tries: status 503.*the same command continues"):
        sweep.run("one")
    assert len(served.calls) == 3, "the other trials do not try again"
    served.faults.clear()
    assert {row["status"] for row in sweep.run("one").values()} == {"done"}


def test_a_server_that_refuses_the_first_calls_ends_the_run(tmp_path: Path, data: Path, served: Peer) -> None:
    """The adapter of the card is another one: no trial can be answered."""
    sweep = Sweep(tmp_path, data, served)
    served.faults.extend([422] * 1000)
    with pytest.raises(EndpointStopped, match=r"refuses a call of 4 images \(status 422"):
        sweep.run("one")
    assert len(served.calls) == 1, "the other trials send nothing"


def test_the_probes_keep_to_the_batch_of_the_card(tmp_path: Path, data: Path, served: Peer) -> None:
    served.most_images = 1
    rows = Sweep(tmp_path, data, served, batch={"images": 1, "texts": 1}).run("one")
    assert {row["status"] for row in rows.values()} == {"done"}
    assert {len(call["body"]["input"]) for call in served.calls} == {1}


def test_offline_names_what_is_missing_and_sends_nothing(tmp_path: Path, data: Path, served: Peer) -> None:
    sweep = Sweep(tmp_path, data, served, auth={"env": "NO_SUCH_KEY"})
    rows = sweep.run("one", "offline=true")
    assert served.calls == []
    for row in rows.values():
        assert row["status"] == "failed"
        assert re.search(r"offline: answers to \d+ of \d+ images are not recorded, the first is row", row["error"])


def test_a_damaged_record_is_asked_for_again_and_kept_aside(tmp_path: Path, data: Path, served: Peer) -> None:
    sweep = Sweep(tmp_path, data, served)
    first = sweep.run("one")
    n_items = served.items()
    file = max((tmp_path / "records").rglob("*.features"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    assert numbers(sweep.run("two")) == numbers(first)
    assert n_items < served.items() <= n_items + 16 + 8 and len(list((tmp_path / "records").rglob("*.damaged"))) == 1


def test_an_answer_that_cannot_be_read_back_is_not_paid_for_again(
    tmp_path: Path, data: Path, served: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Answers, "add", lambda *_: None)
    with pytest.raises(StorageError, match="20 recorded answers cannot be read again"):
        Sweep(tmp_path, data, served).run("one", "methods=[score_ridge]")
    assert served.items() == 8 + 20


def test_another_model_ends_the_run_by_name(tmp_path: Path, data: Path, served: Peer) -> None:
    sweep = Sweep(tmp_path, data, served)
    sweep.run("one", "methods=zero_shot")
    served.shift = 0.05
    with pytest.raises(
        EndpointStopped, match=r"another model: its answers to the probes differ by 0\.\d+ from the answers"
    ):
        sweep.run("two", "methods=score_ridge", "shots=8")


def test_a_model_that_is_replaced_during_a_run_is_noticed(
    tmp_path: Path, data: Path, served: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "PROBE_EVERY", 5)
    sweep = Sweep(tmp_path, data, served, batch={"images": 4}, rate={"at_once": 1})
    assert {row["status"] for row in sweep.run("one").values()} == {"done"}
    words = [call for call in served.calls if call["body"]["input"] == list(probe.WORDS)]
    n_others = len(served.calls) - PROBE_CALLS["openai_embeddings"] * len(words)
    assert len(words) == -(-n_others // 5) >= 4
    original = served.answer
    others = iter(range(10**6))

    def drifting(path: str, body: Any) -> Any:
        served.shift = 0.05 if next(others) > 5 else 0.0
        return original(path, body)

    monkeypatch.setattr(served, "answer", drifting)
    with pytest.raises(EndpointStopped, match="another model"):
        sweep.run("two", "shots=8", "records=" + str(tmp_path / "others"))


def test_a_card_that_states_the_fingerprint_is_compared_with_it(tmp_path: Path, data: Path, served: Peer) -> None:
    wrong = "A" * 43 + "="
    with pytest.raises(EndpointStopped, match=r"from identity\.probe of its card; it is .*") as stopped:
        Sweep(tmp_path, data, served, identity={"model": "toy", "probe": wrong}).run("one")
    right = str(stopped.value).rpartition(" ")[2]
    rows = Sweep(tmp_path, data, served, identity={"model": "toy", "probe": right}).run("two")
    assert {row["status"] for row in rows.values()} == {"done"}


def test_a_rejected_key_ends_the_run_and_the_key_is_in_no_file(
    tmp_path: Path, data: Path, served: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.expects_key = True
    monkeypatch.setenv("PEER_KEY", KEY[:-1])
    sweep = Sweep(tmp_path, data, served, auth={"env": "PEER_KEY"})
    with pytest.raises(EndpointStopped, match=r"rejects the key.*PEER_KEY"):
        sweep.run("one")
    assert len(served.calls) == 1
    monkeypatch.setenv("PEER_KEY", KEY)
    rows = sweep.run("one")
    assert {row["status"] for row in rows.values()} == {"done"}
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY[:-1].encode() not in path.read_bytes(), path


@pytest.mark.parametrize("key", [None, "", "two\nlines"])
def test_a_missing_key_is_named_before_anything_is_reserved(
    tmp_path: Path, data: Path, served: Peer, monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    monkeypatch.delenv("PEER_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("PEER_KEY", key)
    sweep = Sweep(tmp_path, data, served, auth={"env": "PEER_KEY"})
    make_plan(compose(sweep.words("one")))  # a plan needs none
    with pytest.raises(ConfigError, match="environment variable PEER_KEY"):
        sweep.run("one")
    assert served.calls == [] and not (tmp_path / "one" / "ledger.db").exists()
    monkeypatch.setenv("PEER_KEY", KEY)
    sweep.run("one")
    monkeypatch.delenv("PEER_KEY")
    sweep.run("one")  # a finished sweep needs none


def test_another_host_must_be_confirmed(tmp_path: Path, data: Path, served: Peer) -> None:
    sweep = Sweep(tmp_path, data, served, url="https://api.example/v1")
    for more in ((), ("offline=false",)):
        with pytest.raises(ConfigError, match=r"to api\.example, which may cost money: add --spend"):
            refuse_unconfirmed(compose(sweep.words("one", *more)))
    for allowed in ("spend=true", "budget.usd=1", "offline=true"):
        refuse_unconfirmed(compose(sweep.words("one", allowed)))


def test_the_command_asks_for_a_confirmation(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = write_peer_card(tmp_path, "https://api.example")
    words = [
        "run",
        f"model={card}",
        f"datasets=[{data}]",
        "sweep=smoke",
        f"storage={tmp_path / 's'}",
        "eval_shift=false",
    ]
    assert main([*words, "methods=zero_shot", "shots=4"]) == 2
    assert "to api.example, which may cost money: add --spend" in capsys.readouterr().err
    assert cli._parse(["run", "--spend", "shots=1"]).spend and not cli._parse(["run", "shots=1"]).spend


def test_a_batch_that_is_too_large_is_halved_once(tmp_path: Path, data: Path, served: Peer) -> None:
    served.most_images = 8
    sweep = Sweep(tmp_path, data, served, batch={"images": 16, "texts": 8})
    assert {row["status"] for row in sweep.run("one").values()} == {"done"}
    served.most_images = 4
    with_error = Sweep(tmp_path, data, served, identity={"model": "toy-2"}, batch={"images": 16})
    served.model = "toy-2"
    rows = with_error.run("two")
    assert all("TooLarge" in row["error"] and "the first is" in row["error"] for row in rows.values())


def test_small_bodies_are_halved_as_often_as_needed(tmp_path: Path, data: Path, served: Peer) -> None:
    sweep = Sweep(tmp_path, data, served, batch={"images": 64, "bytes": 6000})
    rows = sweep.run("one")
    assert {row["status"] for row in rows.values()} == {"done"}
    assert max(len(call["body"]["input"]) for call in served.calls) <= 16, "of 60 test images"


def test_permuted_responses_are_put_in_order(tmp_path: Path, data: Path, served: Peer) -> None:
    clean = Sweep(tmp_path, data, served).run("one")
    served.permuted = True
    (tmp_path / "permuted").mkdir()
    assert numbers(Sweep(tmp_path / "permuted", data, served).run("one")) == numbers(clean)


def test_what_a_card_does_not_allow_is_refused_before_it_is_charged(tmp_path: Path, served: Peer) -> None:
    card = write_peer_card(tmp_path, served.url, max_text=20)
    with farebox.open_box(f"model={card}", f"storage={tmp_path / 's'}", "budget.requests=10") as box:
        with pytest.raises(EndpointRefused, match="21 characters, max_text of the card allows 20"):
            box.text_features(TextPrompts((("x" * 21,),)))
        with pytest.raises(AccessDenied):
            box.embed_text("a")
        assert box.text_features(TextPrompts((("x" * 20, "stripes"),))).shape == (1, 2, 16)
        assert box.meter.paid.requests == 1 and box.meter.http.calls == 1
    assert sum(len(call["body"]["input"]) for call in served.calls) == 8 + 2


def test_a_prompt_that_the_server_would_cut_is_named_by_the_plan(tmp_path: Path, data: Path, served: Peer) -> None:
    sweep = Sweep(tmp_path, data, served, max_text=10)
    with pytest.raises(FareboxError, match="max_text of model 'peer' allows 10"):
        make_plan(compose(sweep.words("one")))
    assert served.calls == []


@pytest.mark.parametrize("grant", ["TEXT+LABELS", "TEXT+TOPK"])
def test_a_smaller_grant_lets_less_run(tmp_path: Path, data: Path, served: Peer, grant: str) -> None:
    sweep = Sweep(tmp_path, data, served, "jina_classify", grant=grant)
    plan = make_plan(compose(sweep.words("one", "methods=[vote,score_ridge,label_map_topk]")))
    assert {name for name, _ in plan.unable} >= {"score_ridge"}
    rows = sweep.run("one", "methods=[vote]")
    assert rows["vote"]["status"] == "done"
