"""Each adapter against a server of its format, and responses that do not fit it."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.remote.adapter import OtherModel, WrongAnswer
from pipeline.remote.adapters import adapter_of
from tests.support.peer import peer_card
from tests.support.service import png

LABELS = ("a red circle", "stripes", "a dog")
URL = "http://127.0.0.1:9"


def unit(n: int, width: int = 16) -> np.ndarray:
    rows = np.random.default_rng(1).normal(size=(n, width)).astype(np.float32)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


def embedded(rows: np.ndarray, **more: Any) -> dict[str, Any]:
    data = [{"index": i, "embedding": row.tolist()} for i, row in enumerate(rows)]
    return {"model": "toy", "data": data, **more}


def test_embeddings_are_sent_as_data_uris_and_read_in_any_order(tmp_path: Path) -> None:
    adapter = adapter_of(peer_card(tmp_path, URL))
    call, rows = adapter.image_features([png(1), png(2), png(3)]), unit(3)
    assert call.body is not None and call.body["modality"] == "image" and call.body["model"] == "toy"
    assert call.body["input"][0].startswith("data:image/png;base64,")
    answer = embedded(rows, usage={"total_tokens": 12})
    answer["data"] = answer["data"][::-1]
    assert np.allclose(call.parse(answer), rows, atol=1e-7)
    assert (adapter.tokens(answer), adapter.tokens([]), adapter.tokens({"usage": {"total_tokens": True}})) == (12, 0, 0)
    binary = {"data": [{"embedding": base64.b64encode((3 * rows[0]).tobytes()).decode()}]}
    assert np.allclose(adapter.image_features([png(1)]).parse(binary), rows[:1], atol=1e-6), "unit length"


@pytest.mark.parametrize(
    ("answer", "names"),
    [
        ([], "no usable 'data'"),
        ({"data": "x"}, "no usable 'data'"),
        (embedded(unit(1)), "1 items, 2 were asked for"),
        (embedded(unit(2, 8)), "8 numbers, 16 were expected"),
        ({"data": [{"index": 0, "embedding": [1.0] * 16}] * 2}, "indices"),
        ({"data": [{"embedding": ["a"] * 16}] * 2}, "cannot be read"),
        ({"data": [{"embedding": "no base64!"}] * 2}, "cannot be read"),
        ({"data": [{"embedding": [float("nan")] * 16}] * 2}, "NaN or infinite"),
        ({"data": [{"embedding": [0.0] * 16}] * 2}, "length 0"),
        ({"data": [None, None]}, "no usable 'embedding'"),
    ],
)
def test_embeddings_that_do_not_fit_are_named(tmp_path: Path, answer: Any, names: str) -> None:
    call = adapter_of(peer_card(tmp_path, URL)).text_features([LABELS[:2]])
    with pytest.raises(WrongAnswer, match=names):
        call.parse(answer)


def test_another_models_answer_is_named_and_a_version_of_the_model_is_not(tmp_path: Path) -> None:
    call = adapter_of(peer_card(tmp_path, URL)).text_features([LABELS])
    call.parse(embedded(unit(3)) | {"model": "toy-v2"})
    with pytest.raises(OtherModel, match="'nope' answered, the card expects toy"):
        call.parse(embedded(unit(3)) | {"model": "nope"})


def test_sorted_labels_become_log_probabilities_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    call = adapter_of(peer_card(tmp_path, URL, "hf_zero_shot")).scores([png(1)], LABELS)
    assert call.body is not None
    assert call.body["parameters"] == {"candidate_labels": list(LABELS), "hypothesis_template": "{}"}
    p = {"stripes": 0.7, "a dog": 0.3, "a red circle": 0.0}
    (row,) = call.parse([{"label": label, "score": score} for label, score in p.items()])
    assert np.isfinite(row).all() and row[0] < -80
    assert np.allclose(row[1:], np.log([0.7, 0.3]))


@pytest.mark.parametrize(
    ("answer", "names"),
    [
        ({"error": "loading"}, "no list of labels"),
        ([{"label": "stripes", "score": 1.0}], "no score for 2 labels"),
        ([{"label": label, "score": 1.5} for label in LABELS], "outside 0 to 1"),
        ([{"label": label, "score": "much"} for label in LABELS], "no usable 'score'"),
        ([{"label": label, "score": True} for label in LABELS], "no usable 'score'"),
    ],
)
def test_labels_that_do_not_fit_are_named(tmp_path: Path, answer: Any, names: str) -> None:
    call = adapter_of(peer_card(tmp_path, URL, "hf_zero_shot")).scores([png(1)], LABELS)
    with pytest.raises(WrongAnswer, match=names):
        call.parse(answer)


def test_a_classifier_that_tells_the_best_label_only_suffices_for_labels(tmp_path: Path) -> None:
    best = {"data": [{"index": 0, "prediction": "stripes", "score": 0.9}]}
    card = peer_card(tmp_path, URL, "jina_classify", grant="TEXT+LABELS")
    assert adapter_of(card).scores([png(1)], LABELS).parse(best).tolist() == [[-np.inf, 0, -np.inf]]
    with pytest.raises(WrongAnswer, match="'predictions'"):
        adapter_of(peer_card(tmp_path, URL, "jina_classify")).scores([png(1)], LABELS).parse(best)
    with pytest.raises(WrongAnswer, match="not asked for: 'cat'"):
        best["data"][0]["prediction"] = "cat"
        adapter_of(card).scores([png(1)], LABELS).parse(best)


def test_tensors_of_the_open_inference_protocol(tmp_path: Path) -> None:
    call, rows = adapter_of(peer_card(tmp_path, URL, "oip_v2")).text_features([LABELS]), unit(3)
    assert call.path == "/v2/models/a%20text/infer" and call.body is not None
    assert call.body["inputs"][0]["datatype"] == "BYTES" and call.body["inputs"][0]["shape"] == [3]
    tensor = {"name": "embedding", "datatype": "FP32", "shape": [3, 16], "data": rows.ravel().tolist()}
    assert np.allclose(call.parse({"outputs": [tensor]}), rows, atol=1e-7)
    for wrong in ({"shape": [16, 3]}, {"datatype": "FP16"}, {"name": "other"}):
        with pytest.raises(WrongAnswer, match="no FP32 tensor"):
            call.parse({"outputs": [tensor | wrong]})
    with pytest.raises(OtherModel):
        call.parse({"model_name": "other", "outputs": [tensor]})


def info(**changes: Any) -> dict[str, Any]:
    rule = {"transform": "resize32-bicubic-shortest-(0.5, 0.5, 0.5)-(0.5, 0.5, 0.5)", "image_size": 32}
    same = {
        "protocol": 1,
        "model": "toy",
        "identity": "toy/1",
        "logit_scale": 20.0,
        "text_norm": 1.0,
        "feature_dim": 16,
    }
    return same | {"grant": "TEXT+FEATURES", "precision": "fp32"} | rule | changes


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"protocol": 2}, "version 2"),
        ({"grant": "TEXT+SCORES"}, "grant: TEXT\\+SCORES in the card"),
        ({"image_size": 64}, "image: {size: 64} in the card"),
        ({"feature_dim": 32}, "feature_dim: 32 in the card"),
        ({"logit_scale": 100.0}, "logit_scale: 100.0 in the card"),
        ({"transform": "resize32-bilinear-shortest-x"}, "resize_mode"),
        ({"logit_scale": None}, "no usable 'logit_scale'"),
    ],
)
def test_a_farebox_server_whose_constants_differ_from_the_card_is_named(
    tmp_path: Path, changes: dict[str, Any], names: str
) -> None:
    adapter = adapter_of(peer_card(tmp_path, URL, "farebox"))
    introduction = adapter.introduction()
    assert introduction is not None
    introduction.parse(info())
    with pytest.raises(WrongAnswer, match=names):
        introduction.parse(info(**changes))
    with pytest.raises(OtherModel, match="'toy/2' answers, 'toy/1' answered before"):
        introduction.parse(info(identity="toy/2"))


def test_float32_of_a_farebox_server_keep_their_bits(tmp_path: Path) -> None:
    adapter = adapter_of(peer_card(tmp_path, URL, "farebox"))
    rows = unit(6).reshape(2, 3, 16)
    data = base64.b64encode(rows.astype("<f4").tobytes()).decode()
    call = adapter.text_features([LABELS, LABELS])
    answer = {"identity": "toy/1", "shape": [2, 3, 16], "dtype": "float32", "data": data}
    assert np.array_equal(call.parse(answer), rows.reshape(6, 16))
    with pytest.raises(WrongAnswer, match="expected float32"):
        call.parse(answer | {"shape": [3, 2, 16]})
    scores = adapter_of(peer_card(tmp_path, URL, "farebox", grant="TEXT+LABELS"))
    told = np.array([[[0, -np.inf, -np.inf]]], "<f4")
    call = scores.scores([png(1)], LABELS)
    assert call.body is not None and call.body["answer"] == "labels"
    answer = {
        "identity": "x",
        "shape": [1, 1, 3],
        "dtype": "float32",
        "data": base64.b64encode(told.tobytes()).decode(),
    }
    assert np.array_equal(call.parse(answer), told[0])
