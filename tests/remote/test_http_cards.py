"""Cards of kind http: what is wrong in one is named before anything is sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cards import HTTP_GRANTS, MICRO, Price
from pipeline.config.card_files import model_card
from pipeline.errors import ConfigError
from pipeline.remote.adapters import ADAPTERS

GOOD: dict[str, Any] = {
    "kind": "http",
    "url": "https://api.example/v1/embeddings",
    "adapter": "openai_embeddings",
    "grant": "TEXT+FEATURES",
    "identity": {"model": "clip"},
    "feature_dim": 512,
    "logit_scale": 100,
    "max_text": 150,
    "image": {"size": 224},
}


def written(folder: Path, changes: dict[str, Any]) -> str:
    data = {key: value for key, value in (GOOD | changes).items() if value is not None}
    path = folder / "api.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


def test_a_good_card_has_defaults_and_one_identity(tmp_path: Path) -> None:
    card = model_card(written(tmp_path, {}))
    assert card.http is not None and card.access.label == "TEXT+FEATURES"
    assert (card.http.host, card.http.loopback, card.http.rate.at_once) == ("api.example", False, 4)
    assert card.http.model_identity.endswith("logit_scale 100.0") and "api.example" in card.http.source


def test_a_model_with_a_stated_fingerprint_is_the_same_at_another_address(tmp_path: Path) -> None:
    probe = {"identity": {"model": "clip", "probe": "A" * 43 + "="}}
    here, there = (
        model_card(written(tmp_path, probe | {"url": url})).http for url in ("https://a.example", "https://b.example")
    )
    assert here is not None and there is not None and here.source == there.source


@pytest.mark.parametrize("url", ["http://127.0.0.1:80/x", "http://localhost/x", "http://[::1]:5/", "https://h.example"])
def test_addresses_of_this_machine_need_no_encryption(tmp_path: Path, url: str) -> None:
    card = model_card(written(tmp_path, {"url": url}))
    assert card.http is not None and card.http.loopback == url.startswith("http:")


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"url": None}, "url: missing"),
        ({"url": "http://api.example/v1"}, "unencrypted"),
        ({"url": "http://127.0.0.1.example/v1"}, "unencrypted"),
        ({"url": "ftp://api.example"}, "expected an address"),
        ({"url": "https:///v1"}, "expected an address"),
        ({"url": "https://api.example:99999/"}, "Port"),
        ({"url": "https://me:hunter2@api.example/"}, "user name or a password"),
        ({"url": "https://api.example/v1?api_key=hunter2"}, "'api_key' looks like a key"),
        ({"adapter": "farebox", "url": "https://api.example/?model=a"}, "leave out '?'"),
        ({"kind": None}, "kind: missing: expected one of fake, embedded, open_clip, http"),
        ({"kind": "HTTP"}, "kind: no choice named 'HTTP' (known: embedded, fake, http, open_clip)"),
        ({"adapter": None}, "adapter: missing"),
        ({"adapter": "openai"}, "did you mean 'openai_embeddings'"),
        ({"grant": None}, "grant: missing"),
        ({"grant": "SOFT+FEATURES"}, "SOFT cannot be had"),
        ({"grant": "TEXT+FEATURES+GRADIENTS"}, "GRADIENTS cannot be had"),
        ({"grant": "TEXT+FEATURES+LORA"}, "LORA cannot be had"),
        ({"grant": "TEXT+PIXELS+FEATURES"}, "more than adapter openai_embeddings can give"),
        (
            {"adapter": "farebox", "grant": "TEXT+PIXELS+FEATURES", "image": {"size": 64, "format": "jpeg"}},
            "image.format: jpeg",
        ),
        ({"grant": "TEXT+WORDS"}, "unknown access"),
        ({"grant": "FEATURES"}, "expected TEXT and an answer"),
        ({"grant": "TEXT"}, "expected TEXT and an answer"),
        ({"adapter": "hf_zero_shot"}, "more than adapter hf_zero_shot can give"),
        ({"adapter": "jina_classify"}, "more than adapter jina_classify can give"),
        ({"adapter": "oip_v2"}, "tensors: only adapter oip_v2"),
        ({"tensors": {"image_model": "a", "text_model": "b"}}, "leave it out"),
        ({"adapter": "oip_v2", "tensors": {"image_model": "a"}}, "text_model: missing"),
        ({"feature_dim": None}, "feature_dim: missing"),
        ({"logit_scale": None}, "logit_scale: missing"),
        ({"logit_scale": 0}, "logit_scale: 0"),
        ({"logit_scale": -1}, "logit_scale: -1"),
        ({"max_text": None}, "max_text: missing"),
        ({"max_text": 0}, "max_text"),
        ({"identity": None}, "identity.model: missing"),
        ({"identity": {"model": "clip", "probe": "short"}}, "identity.probe"),
        ({"identity": {"name": "clip"}}, "no key named 'name'"),
        ({"image": None}, "image: missing"),
        ({"image": {}}, "size: missing"),
        ({"image": {"size": 0}}, "image.size"),
        ({"image": {"size": 224, "format": "webp"}}, "image.format"),
        ({"image": {"size": 224, "resize_mode": "pad"}}, "image.resize_mode"),
        ({"image": {"size": 224, "interpolation": "area"}}, "image.interpolation"),
        ({"image": 224}, "expected key: value lines"),
        ({"auth": "hunter2"}, "auth: found str, expected key: value lines"),
        ({"auth": {"header": "X-Api-Key"}}, "env: missing"),
        ({"auth": {"env": "sk-123"}}, "auth.env"),
        ({"auth": {"env": "KEY", "header": "Bad Header"}}, "auth.header"),
        ({"auth": {"env": "KEY", "header": "Content-Type"}}, "auth.header"),
        ({"auth": {"env": "KEY", "key": "hunter2"}}, "no key named 'key'"),
        ({"batch": {"images": 0}}, "batch.images"),
        ({"batch": {"bytes": "many"}}, "bytes"),
        ({"rate": {"at_once": 0}}, "rate.at_once"),
        ({"rate": {"at_once": 1000}}, "rate.at_once"),
        ({"rate": {"requests_per_minute": 0}}, "rate.requests_per_minute"),
        ({"rate": {"per_minute": 5}}, "no key named 'per_minute'"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"retry": {"on": [401]}}, "retry.on: 401"),
        ({"retry": {"on": [200]}}, "retry.on: 200"),
        ({"retry": {"on": [500, 500]}}, "listed twice"),
        ({"retry": {"first_s": 5, "most_s": 1}}, "first_s <= most_s"),
        ({"retry": {"tries": 0}}, "retry.tries"),
        ({"price": {"usd_per_image": 0.1}}, "as_of: missing"),
        ({"price": {"as_of": "2026-11-01"}}, "expected one of usd_per_request"),
        ({"price": {"usd_per_image": -0.1, "as_of": "2026-11-01"}}, "usd_per_image: -0.1"),
        ({"price": {"usd_per_image": 0.1, "as_of": "last week"}}, "price.as_of"),
        ({"price": {"usd_per_1k_tokens": 0.1, "as_of": "2026-11-01"}}, "tokens_per_image: missing"),
        ({"arch": "ViT-B-32"}, "no key named 'arch'"),
        ({"precision": "fp16"}, "no key named 'precision'"),
        ({"weight": "x"}, "no key named 'weight'"),
    ],
)
def test_a_card_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError) as refused:
        model_card(written(tmp_path, changes))
    line = str(refused.value)
    assert names in line and "\n" not in line and "hunter2" not in line
    assert len(line.replace(str(tmp_path), "")) <= 300


def test_keys_of_http_belong_to_no_other_kind(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("kind: fake\nurl: https://api.example\n")
    with pytest.raises(ConfigError, match="no key named 'url'"):
        model_card(str(path))


def test_every_adapter_has_a_greatest_grant() -> None:
    assert ADAPTERS.keys() == HTTP_GRANTS.keys()


def test_prices_are_rounded_up_to_whole_micro_dollars() -> None:
    price = Price(as_of="2026-11-01", usd_per_request=0.001, usd_per_image=0.1, usd_per_1k_tokens=0.02)
    assert price.micro_usd(1, 3, 0) == 301_000
    assert price.micro_usd(0, 0, 1) == 20
    assert Price(as_of="2026-11-01", usd_per_1k_tokens=0.00002).micro_usd(0, 0, 1) == 1
    assert price.micro_usd(1000, 0, 0) == MICRO
