"""`farebox serve`: answers are those of a local model, wrong requests are named, faults are made as ordered."""

from __future__ import annotations

import http.client
import io
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image

from methods.base import Bill, TextPrompts
from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.feature_store import MemoryStore
from pipeline.blackbox.request import Kind, Request
from pipeline.budget import Phase
from pipeline.commands.subcommands import SERVE_KEYS
from pipeline.config.card_files import model_card
from pipeline.data.images import Images
from pipeline.data.source import Source
from pipeline.ledger.records import Charge
from pipeline.serve import wire
from pipeline.serve.faults import FaultOptions
from pipeline.serve.sent import sent_images
from tests.support.command import Running, farebox
from tests.support.service import call, encoded, png, serving, values

FREE = Charge("s", "t", 0, "d", Phase.EVALUATE, Bill())
SETS = (("a cat", "a dog", "a tree"), ("one cat", "one dog", "one tree"))


def local(endpoint: Endpoint, kind: Kind, images: list[bytes] | None, sets: object = SETS, **told: Any) -> np.ndarray:
    """What the model of this process answers."""
    prompts = None if kind == "image_features" else TextPrompts(tuple(sets))  # type: ignore[arg-type]
    if images is None:
        return endpoint.compute(Request(kind, None, prompts, FREE)).values
    with sent_images(images) as sent:
        return endpoint.compute(Request(kind, sent, prompts, FREE, **told)).values


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving("model=tiny") as address:
        yield address


@pytest.fixture(scope="module")
def toy() -> Iterator[str]:
    with serving("model=fake") as address:
        yield address


# --- answers -------------------------------------------------------------------------------------------------------


def test_info_states_the_model(url: str, tiny: Endpoint) -> None:
    status, info, _ = call(f"{url}/v1/info")
    assert status == 200
    assert info == {
        "protocol": 1,
        "model": "tiny",
        "identity": tiny.info.identity,
        "logit_scale": tiny.info.logit_scale,
        "text_norm": tiny.info.text_norm,
        "feature_dim": tiny.info.feature_dim,
        "grant": "TEXT+PIXELS+FEATURES",
        "precision": "fp32",
        "transform": tiny.info.transform,
        "image_size": 64,
    }


def test_answers_are_those_of_a_local_model_to_the_bit(url: str, tiny: Endpoint) -> None:
    images = [png(n) for n in range(5)]
    _, record, _ = call(f"{url}/v1/image_features", {"images": encoded(*images)})
    assert (record["identity"], record["shape"]) == (tiny.info.identity, [5, 192])
    assert np.array_equal(values(record), local(tiny, "image_features", images))
    _, record, _ = call(f"{url}/v1/text_features", {"prompts": SETS})
    assert np.array_equal(values(record), local(tiny, "text_features", None))
    for name, answer in wire.ANSWERS.items():
        body = {"images": encoded(*images), "prompts": SETS, "answer": name}
        _, record, _ = call(f"{url}/v1/scores", body)
        assert record["shape"] == [2, 5, 3]
        assert np.array_equal(values(record), local(tiny, "scores", images, answer=answer))


def test_a_view_that_is_sent_at_the_models_size_has_the_features_of_a_local_run(
    url: str, tiny: Endpoint, icons: Source
) -> None:
    plain = Images.plain(icons, "train", icons.rows_of("train")[:3], "crop_flip")
    for images in (plain, plain.views(2)):
        sent = list[bytes]()
        for i in range(len(images)):
            buffer = io.BytesIO()
            tiny.model.preprocess.image(images, i).save(buffer, "PNG")  # type: ignore[attr-defined]
            sent.append(buffer.getvalue())
        _, record, _ = call(f"{url}/v1/image_features", {"images": encoded(*sent)})
        assert np.array_equal(values(record), tiny.compute(Request("image_features", images, None, FREE)).values)


def test_the_features_of_an_image_do_not_depend_on_the_images_beside_it(url: str) -> None:
    first = png(100)
    rows = [
        values(call(f"{url}/v1/image_features", {"images": encoded(*others, first)})[1])[-1]
        for others in ([], [png(101)], [png(n) for n in range(102, 140)])
    ]
    assert np.array_equal(rows[0], rows[1]) and np.array_equal(rows[0], rows[2])


def test_embeddings_in_the_style_of_openai(url: str) -> None:
    texts = ["a cat", "a dog"]
    _, record, _ = call(f"{url}/v1/embeddings", {"model": "tiny", "input": texts})
    _, features, _ = call(f"{url}/v1/text_features", {"prompts": [texts]})
    assert [item["index"] for item in record["data"]] == [0, 1] and record["model"] == "tiny"
    assert np.array_equal(np.float32([item["embedding"] for item in record["data"]]), values(features)[0])
    assert record["usage"]["total_tokens"] == 8  # two words, start and end
    image = png(7)
    uri = f"data:image/png;base64,{encoded(image)[0]}"
    body = {"model": "tiny", "input": uri, "modality": "image", "encoding_format": "base64"}
    _, record, _ = call(f"{url}/v1/embeddings", body)
    _, features, _ = call(f"{url}/v1/image_features", {"images": encoded(image)})
    assert record["data"][0]["embedding"] == features["data"]


def test_images_of_any_size_and_kind_are_decoded(toy: str, fake: Endpoint) -> None:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png(1, 90))).save(buffer, "JPEG")
    images = [png(0, 33), buffer.getvalue()]
    _, record, _ = call(f"{toy}/v1/image_features", {"images": encoded(*images)})
    assert np.array_equal(values(record), local(fake, "image_features", images))
    assert call(f"{toy}/v1/info")[1]["image_size"] is None


def test_the_memory_store_keeps_the_rows_that_were_used_last() -> None:
    store = MemoryStore(3 * 4 * 2, 2)
    store.add(["a", "b", "c"], torch.arange(6.0).view(3, 2))
    assert store.read(["b", "a", "x"])[1] == [2]
    store.add(["d"], torch.ones(1, 2))
    rows, missing = store.read(["a", "b", "c", "d"])
    assert missing == [2] and rows[[0, 1, 3]].tolist() == [[0, 1], [2, 3], [1, 1]]


# --- wrong requests ------------------------------------------------------------------------------------------------

IMAGE = encoded(png(0, 16))[0]


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "says"),
    [
        ("image_features", b"{", 400, "invalid_json", "not JSON"),
        ("image_features", b"[" * 100_000, 400, "invalid_json", "not JSON"),
        ("image_features", [], 422, "invalid_request", "JSON object"),
        ("image_features", {}, 422, "invalid_request", "images: expected a list"),
        ("image_features", {"images": []}, 422, "invalid_request", "images: expected a list that is not empty"),
        ("image_features", {"images": [IMAGE, 1]}, 422, "invalid_request", "images[1]: expected a text"),
        ("image_features", {"images": [IMAGE, "%"]}, 400, "invalid_image", "images[1] is not base64"),
        ("image_features", {"images": [IMAGE, "abcd"]}, 400, "invalid_image", "images[1] is not a readable image"),
        ("image_features", {"images": [IMAGE] * 2049}, 422, "too_many", "2,049 items, at most 2,048"),
        ("image_features", {"images": [IMAGE], "model": "x"}, 422, "invalid_request", "no key named model"),
        ("text_features", {"prompts": [["a"], ["a", "b"]]}, 422, "invalid_request", "the same number of prompts"),
        ("text_features", {"prompts": [["a", " "]]}, 422, "invalid_request", "prompts[0][1]: expected a text"),
        ("text_features", {"prompts": ["a"]}, 422, "invalid_request", "prompts[0]: expected a list"),
        ("text_features", {"prompts": [["\ud800"]]}, 422, "invalid_request", "surrogate"),
        ("text_features", {"prompts": [["a"] * 100_000]}, 422, "too_many", "values"),
        ("text_features", {"prompts": [["a " * 200]]}, 422, "invalid_request", "tokens"),
        ("text_features", {"prompts": [["a" * 5000]]}, 422, "invalid_request", "5,000 characters"),
        ("scores", {"images": [IMAGE], "prompts": [["a"]], "answer": "best"}, 422, "invalid_request", "one of scores"),
        ("embeddings", {"model": "nope", "input": "a"}, 404, "model_not_found", "served: tiny"),
        ("embeddings", {"model": "tiny", "input": []}, 422, "invalid_request", "input"),
        ("embeddings", {"model": "tiny", "input": "a", "modality": "image"}, 422, "invalid_request", "data URI"),
        ("embeddings", {"model": "tiny", "input": "a", "dimensions": 3}, 422, "invalid_request", "dimensions"),
        ("nothing", {}, 404, "no_route", "/v1/nothing"),
    ],
)
def test_a_wrong_request_is_named(url: str, path: str, body: object, status: int, code: str, says: str) -> None:
    found, record, _ = call(f"{url}/v1/{path}", body)
    assert (found, record["error"]["code"]) == (status, code), record
    assert says.replace("named model", "named 'model'") in record["error"]["message"]
    assert set(record) == {"error"} and len(record["error"]["message"]) <= 300


def test_a_body_that_is_too_large_is_refused_before_it_is_read(url: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    connection.putrequest("POST", "/v1/image_features")
    connection.putheader("Content-Length", str(wire.MAX_BODY + 1))
    connection.endheaders()
    response = connection.getresponse()
    assert (response.status, json.loads(response.read())["error"]["code"]) == (413, "too_large")
    connection.close()


def test_a_body_without_a_length_is_refused_when_it_becomes_too_large(
    toy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "MAX_BODY", 1000)
    parts = (b"x" * 100 for _ in range(11))
    connection = http.client.HTTPConnection(urlsplit(toy).netloc, timeout=30)
    connection.request(
        "POST", "/v1/image_features", parts, encode_chunked=True, headers={"Transfer-Encoding": "chunked"}
    )
    assert connection.getresponse().status == 413
    connection.close()
    assert call(f"{toy}/v1/text_features", {"prompts": SETS})[0] == 200


def test_a_full_queue_answers_503(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.blackbox.replica_queue.MAX_QUEUED", 0)
    status, record, headers = call(f"{toy}/v1/text_features", {"prompts": SETS})
    assert (status, record["error"]["code"], headers["Retry-After"]) == (503, "busy", "1")


def test_a_model_gives_no_more_than_its_card_grants(tmp_path: Path) -> None:
    card = tmp_path / "small.yaml"
    card.write_text("kind: fake\ngrant: TEXT+SCORES\n")
    with serving(f"model={card}") as url:
        assert call(f"{url}/v1/info")[1]["grant"] == "TEXT+SCORES"
        assert call(f"{url}/v1/scores", {"images": [IMAGE], "prompts": SETS})[0] == 200
        status, record, _ = call(f"{url}/v1/image_features", {"images": [IMAGE]})
        assert (status, record["error"]["code"]) == (403, "access_denied")


@pytest.mark.parametrize(
    ("settings", "grant", "answer"),
    [
        ("{scores: probabilities, digits: 2}", "TEXT+PIXELS+SCORES", "scores"),
        ("topk", "TEXT+PIXELS+TOPK", "topk"),
        ("label", "TEXT+PIXELS+LABELS", "labels"),
        ("{features: int8}", "TEXT+PIXELS+FEATURES", "scores"),
    ],
)
def test_a_card_with_degraded_answers_is_served_with_them(
    tmp_path: Path, fake: Endpoint, settings: str, grant: str, answer: str
) -> None:
    path = tmp_path / "less.yaml"
    path.write_text(f"kind: fake\ngrant: SOFT+PIXELS+FEATURES\nanswers: {settings}\n")
    card, images = model_card(str(path)), [png(1), png(2)]
    with serving(f"model={path}") as url:
        info = call(f"{url}/v1/info")[1]
        assert info["grant"] == grant and info["identity"] == f"{fake.info.identity}; answers {card.answers.text}"
        _, record, _ = call(f"{url}/v1/scores", {"images": encoded(*images), "prompts": SETS, "answer": answer})
        told = {"answer": wire.ANSWERS[answer], "answers": card.answers}
        assert np.array_equal(values(record), local(fake, "scores", images, **told))
        status, record, _ = call(f"{url}/v1/image_features", {"images": encoded(*images)})
        assert status == (200 if "FEATURES" in grant else 403)
        if status == 200:
            assert np.array_equal(values(record), local(fake, "image_features", images, answers=card.answers))


# --- token, keys, counts -------------------------------------------------------------------------------------------


def test_a_token_is_required_by_every_route_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAREBOX_SERVE_TOKEN", "hunter2")
    with serving("model=fake") as url:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "hunter2"}):
            for path, body in (("info", None), ("count", None), ("text_features", {"prompts": SETS})):
                status, record, found = call(f"{url}/v1/{path}", body, headers)
                assert (status, record["error"]["code"]) == (401, "unauthorised")
                assert found["WWW-Authenticate"] == "Bearer" and "hunter2" not in json.dumps(record)
        right = {"Authorization": "Bearer hunter2"}
        assert call(f"{url}/v1/text_features", {"prompts": SETS}, right)[0] == 200
        assert call(f"{url}/v1/count", None, right)[1]["answered"] == {"text_features": 1, "texts": 6, "refused": 9}


def test_a_repeated_key_gets_the_same_answer_and_computes_nothing() -> None:
    with serving("model=fake", "fault.jitter=0.01") as url:
        body, key = {"prompts": SETS}, {"Idempotency-Key": "k1"}
        first, second = (call(f"{url}/v1/text_features", body, key)[1]["data"] for _ in range(2))
        other = call(f"{url}/v1/text_features", body, {"Idempotency-Key": "k2"})[1]["data"]
        assert first == second != other
        status, record, _ = call(f"{url}/v1/text_features", {"prompts": [["else"]]}, key)
        assert (status, record["error"]["code"]) == (422, "idempotency_key_reused")
        counts = call(f"{url}/v1/count")[1]["answered"]
        assert counts == {"text_features": 2, "texts": 12, "repeated": 1, "refused": 1}


def test_a_request_whose_key_is_being_computed_waits_for_its_answer() -> None:
    with serving("model=tiny", "fault.jitter=0.01") as url:
        body, answers = {"prompts": [[f"a {n}" for n in range(300)]]}, list[str]()

        def send() -> None:
            answers.append(call(f"{url}/v1/text_features", body, {"Idempotency-Key": "k"})[1]["data"])

        threads = [threading.Thread(target=send) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(answers) == 4 and len(set(answers)) == 1
        assert call(f"{url}/v1/count")[1]["answered"]["text_features"] == 1


def test_a_refused_request_does_not_use_up_its_key() -> None:
    with serving("model=fake") as url:
        broken, key = {"images": ["abcd"]}, {"Idempotency-Key": "k"}
        assert [call(f"{url}/v1/image_features", broken, key)[0] for _ in range(2)] == [400, 400]
        assert call(f"{url}/v1/image_features", {"images": [IMAGE]}, key)[0] == 200


def test_the_oldest_keys_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.serve.answers.MAX_KEYS", 2)
    with serving("model=fake") as url:
        for name in ("a", "b", "c", "c", "a"):
            assert call(f"{url}/v1/text_features", {"prompts": SETS}, {"Idempotency-Key": name})[0] == 200
        counts = call(f"{url}/v1/count")[1]["answered"]
        assert (counts["text_features"], counts["repeated"]) == (4, 1)


# --- faults --------------------------------------------------------------------------------------------------------


def outcomes(url: str, n: int) -> list[object]:
    """Statuses of n requests; the class of the error where the connection ended."""
    found = list[object]()
    for _ in range(n):
        try:
            found.append(call(f"{url}/v1/text_features", {"prompts": SETS})[0])
        except (OSError, http.client.HTTPException) as error:
            found.append(type(error).__name__)
    return found


@pytest.mark.parametrize(
    ("fault", "kind", "found"),
    [
        ("fault.every_429=3", "rate_limited", 429),
        ("fault.drop_every=3", "dropped", "RemoteDisconnected"),
        ("fault.truncate_every=3", "truncated", "IncompleteRead"),
    ],
)
def test_one_of_every_n_requests_is_faulty_and_which_follows_from_the_seed(
    fault: str, kind: str, found: object
) -> None:
    seen = []
    for seed in (1, 1, 2):
        with serving("model=fake", fault, f"fault.seed={seed}", "fault.after=2") as url:
            statuses = outcomes(url, 11)
            seen.append(statuses)
            assert statuses[:2] == [200, 200] and [statuses.count(x) for x in (found, 200)] == [3, 8]
            counts = call(f"{url}/v1/count")[1]
            assert counts["faults"] == {kind: 3}
            computed = 8 if found == 429 else 11  # a lost answer was computed, and a vendor would bill it
            assert counts["answered"]["text_features"] == computed
    assert seen[0] == seen[1]


def test_a_service_that_is_down_says_when_to_come_back() -> None:
    with serving("model=fake", "fault.down_every=4", "fault.down_s=0.5") as url:
        statuses = outcomes(url, 4)
        assert 503 in statuses
        assert call(f"{url}/v1/info")[2]["Retry-After"] == "1" and call(f"{url}/v1/count")[0] == 200
        time.sleep(0.6)
        assert call(f"{url}/v1/info")[0] == 200


def test_answers_can_be_wrong_on_purpose(fake: Endpoint) -> None:
    image = png(3, 16)
    body = {"images": encoded(image), "prompts": SETS}
    right = local(fake, "scores", [image])
    with serving("model=fake", "fault.permute_labels=true", "fault.model=other", "fault.after=1") as url:
        assert np.array_equal(values(call(f"{url}/v1/scores", body)[1]), right)
        _, record, _ = call(f"{url}/v1/scores", body)
        assert np.array_equal(values(record), np.roll(right, 1, axis=2))
        assert record["identity"] == f"{fake.info.identity} (other)" == call(f"{url}/v1/info")[1]["identity"]
    with serving("model=fake", "fault.jitter=1e-3") as url:
        noisy = [values(call(f"{url}/v1/scores", body)[1]) for _ in range(2)]
        assert not np.array_equal(*noisy) and np.allclose(noisy[0], right, atol=0.01)


def test_a_slow_service_answers_late() -> None:
    with serving("model=fake", "fault.slow_s=0.3") as url:
        began = time.monotonic()
        assert outcomes(url, 1) == [200]
        assert time.monotonic() - began > 0.3


def test_the_help_names_every_fault() -> None:
    assert all(f"fault.{f.name}" in SERVE_KEYS for f in fields(FaultOptions))


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "expected model=NAME"),
        (("tiny",), "'tiny': expected KEY=VALUE, as in farebox serve model=tiny"),
        (("model=tiyn",), "did you mean 'tiny'"),
        (("model=fake", "prot=1"), "did you mean 'port'"),
        (("model=fake", "fault.drop=1"), "did you mean 'fault.drop_every'"),
        (("model=fake", "port=70000"), "1 to 65535"),
        (("model=fake", "port=x"), "port=x: expected a whole number"),
        (("model=fake", "fault.slow_s=-1"), "0 or more"),
        (("model=fake", "fault.model=mine"), "other"),
        (("model=fake", "host=0.0.0.0"), "FAREBOX_SERVE_TOKEN"),
        (("model=fake", "host=no.such.host.invalid"), "FAREBOX_SERVE_TOKEN"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_2(
    words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.cli import main

    monkeypatch.delenv("FAREBOX_SERVE_TOKEN", raising=False)
    assert main(["serve", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and says in err and len(err) <= 301


def test_a_port_in_use_is_one_line_and_exit_2() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = farebox("serve", "model=fake", f"port={port}", expect=2)
    assert done.stdout == "" and done.stderr == f"farebox: port {port} is in use: name another, as port={port + 1}\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_prints_a_card_that_can_be_read_and_stops_cleanly(number: signal.Signals, tmp_path: Path) -> None:
    running = Running("serve", "model=tiny", "port=0")
    assert running.process.stdout is not None
    lines = list[str]()
    while not lines or not lines[-1].startswith("press Ctrl-C"):
        lines.append(running.process.stdout.readline())
        assert lines[-1], running.process.communicate()
    address = lines[0].split()[-1]
    assert call(f"{address}/v1/info")[0] == 200
    card = lines[lines.index("card for a client, as conf/model/my_api.yaml:\n") + 1 :]
    (tmp_path / "my_api.yaml").write_text("".join(line[2:] for line in card[: card.index("\n")]))
    read = model_card(str(tmp_path / "my_api.yaml"))
    assert read.http is not None and (read.http.url, read.http.image.size) == (address, 64)
    running.process.send_signal(number)
    code, out, err = running.end()
    assert (code, out, err) == (0, "stopped\n", "")
