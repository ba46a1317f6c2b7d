"""Read and check the keys of a model's card that only `kind: http` has. Nothing is sent."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import re
from collections.abc import Mapping
from datetime import date
from typing import Any, TypeVar, get_args, get_type_hints
from urllib.parse import parse_qsl, urlsplit

from methods.base import Access
from pipeline.cards import HTTP_GRANTS, Auth, HttpCard, Price, Retry, SentImage, is_loopback
from pipeline.config import typed_values
from pipeline.config import values as checks
from pipeline.errors import ConfigError, did_you_mean

T = TypeVar("T")

HTTP_KEYS = frozenset(f.name for f in dataclasses.fields(HttpCard))
UNUSED_KEYS = frozenset(
    {"arch", "weights", "weights_sha256", "precision", "mean", "std", "interpolation", "resize_mode", "quick_gelu"}
)
"""Keys of other models, which a server decides."""
MOST_AT_ONCE = 64
"""Greatest `rate.at_once`: a replica accepts as many requests."""
LARGEST_IMAGE = 4096
PRICES = ("usd_per_request", "usd_per_image", "usd_per_1k_tokens")
PROBE_BYTES = 32
"""Bytes of a fingerprint: 16 numbers of two bytes."""
_NOT_RETRIED = (400, 401, 402, 403, 404, 413, 422)
_SECRET = re.compile(r"key|token|secret|passw|signature|^sig$", re.IGNORECASE)
_OWN_HEADERS = (
    "host",
    "content-type",
    "content-length",
    "transfer-encoding",
    "connection",
    "idempotency-key",
    "accept",
)


def http_card(where: str, data: Mapping[str, Any], others: Mapping[str, Any]) -> HttpCard:
    """Return the keys of `kind: http` with their types.

    Args:
        where: file of the card, for messages.
        data: the keys that only this kind has.
        others: the card's other keys.

    Raises:
        ConfigError: a key is unknown or missing, or a value cannot be used. The message names the key.
    """
    card = _nested(HttpCard, where, data)
    _check_url(f"{where}: url", card.url)
    checks.one_of(f"{where}: adapter", card.adapter, tuple(HTTP_GRANTS))
    if card.adapter in ("farebox", "oip_v2") and urlsplit(card.url).query:
        raise ConfigError(
            f"{where}: url: {card.url!r}: adapter {card.adapter} appends its paths: leave out '?' and the rest"
        )
    grant = _grant(where, card.adapter, others)
    _check_auth(f"{where}: auth", card.auth)
    _check_image(f"{where}: image", card.image, grant)
    _check_model(where, card, grant)
    for key in ("images", "texts", "bytes"):
        checks.whole(f"{where}: batch.{key}", getattr(card.batch, key))
    for key in ("requests_per_minute", "images_per_minute", "tokens_per_minute"):
        checks.limit(f"{where}: rate.{key}", getattr(card.rate, key))
    if not 1 <= card.rate.at_once <= MOST_AT_ONCE:
        raise ConfigError(f"{where}: rate.at_once: {card.rate.at_once}: expected a number from 1 to {MOST_AT_ONCE}")
    if card.timeout_s <= 0:
        raise ConfigError(f"{where}: timeout_s: {card.timeout_s:g}: expected a number of seconds above 0")
    _check_retry(f"{where}: retry", card.retry)
    if card.price is not None:
        _check_price(f"{where}: price", card.price, data["price"])
    return card


def _nested(cls: type[T], where: str, data: Any) -> T:
    """Return a dataclass of a mapping; fields that are dataclasses themselves have a mapping too."""
    if not isinstance(data, Mapping):
        # without the value: it may be the key of auth
        raise ConfigError(f"{where}: found {type(data).__name__}, expected key: value lines")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints, values = get_type_hints(cls), dict[str, Any]()
    for key, value in data.items():
        if key not in fields:
            raise ConfigError(f"{where}: " + did_you_mean("key", str(key), fields))
        options = [hint for hint in (hints[key], *get_args(hints[key])) if dataclasses.is_dataclass(hint)]
        if options and not (value is None and type(None) in get_args(hints[key])):
            values[key] = _nested(options[0], f"{where}: {key}", value)  # type: ignore[arg-type]
        else:
            values[key] = typed_values.of_type(f"{where}: {key}", value, hints[key])
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING
        if required and values.get(name) in (None, ""):
            raise ConfigError(f"{where}: {name}: missing: kind http needs it (docs/remote.md)")
    return cls(**values)


def _check_url(key: str, url: str) -> None:
    try:
        parts, port = urlsplit(url), urlsplit(url).port
    except ValueError as error:
        raise ConfigError(f"{key}: {url!r}: {error}") from error
    if "@" in parts.netloc:
        raise ConfigError(f"{key}: it has a user name or a password: put the key into an environment variable (auth)")
    if secret := next((name for name, _ in parse_qsl(parts.query, keep_blank_values=True) if _SECRET.search(name)), ""):
        raise ConfigError(
            f"{key}: its parameter {secret!r} looks like a key: put it into an environment variable (auth)"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.fragment or port == 0 or " " in url:
        raise ConfigError(f"{key}: {url!r}: expected an address as https://host/path")
    if parts.scheme == "http" and not is_loopback(parts.hostname):
        raise ConfigError(
            f"{key}: {url!r} would be sent unencrypted: expected https, or http to 127.0.0.1 or localhost"
        )


def _grant(where: str, adapter: str, others: Mapping[str, Any]) -> Access:
    if others.get("grant") is None:
        raise ConfigError(f"{where}: grant: missing: kind http needs it, as in grant: {HTTP_GRANTS[adapter]}")
    try:
        grant, most = Access.parse(str(others["grant"])), Access.parse(HTTP_GRANTS[adapter])
    except ValueError as error:
        raise ConfigError(f"{where}: grant: {error}") from None
    for flag in (Access.SOFT, Access.GRADIENTS, Access.LORA):
        if flag in grant:
            raise ConfigError(f"{where}: grant: {flag.name} cannot be had over HTTP: expected {HTTP_GRANTS[adapter]}")
    if not most.covers(grant):
        raise ConfigError(
            f"{where}: grant: {grant.label} is more than adapter {adapter} can give: expected at most {most.label}"
        )
    if Access.TEXT not in grant or Access.LABELS not in grant.closure():
        raise ConfigError(f"{where}: grant: {grant.label}: expected TEXT and an answer, as in {most.label}")
    return grant


def _check_auth(key: str, auth: Auth | None) -> None:
    if auth is None:
        return
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", auth.env):
        raise ConfigError(f"{key}.env: expected the name of an environment variable, as FAREBOX_API_KEY; never the key")
    if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", auth.header) or auth.header.lower() in _OWN_HEADERS:
        raise ConfigError(
            f"{key}.header: {auth.header!r}: expected the name of a header, as Authorization or X-Api-Key"
        )
    if not auth.prefix.isascii():
        raise ConfigError(f"{key}.prefix: {auth.prefix!r}: expected ASCII, as in prefix: 'Bearer '")


def _check_image(key: str, image: SentImage, grant: Access) -> None:
    if not 1 <= image.size <= LARGEST_IMAGE:
        raise ConfigError(
            f"{key}.size: {image.size}: expected the side of the model's input, 1 to {LARGEST_IMAGE} pixels"
        )
    checks.one_of(f"{key}.format", image.format, ("png", "jpeg"))
    if Access.PIXELS in grant and image.format != "png":
        raise ConfigError(f"{key}.format: {image.format}: a grant with PIXELS needs png, which keeps every pixel")
    checks.one_of(f"{key}.resize_mode", image.resize_mode, ("shortest", "squash"))
    checks.one_of(f"{key}.interpolation", image.interpolation, ("bicubic", "bilinear"))


def _check_model(where: str, card: HttpCard, grant: Access) -> None:
    """Check what the plan must know of the model, since it asks nothing."""
    if Access.FEATURES in grant and card.feature_dim < 1:
        raise ConfigError(f"{where}: feature_dim: missing: a grant with FEATURES needs the width of the features")
    if card.logit_scale <= 0:
        raise ConfigError(f"{where}: logit_scale: {card.logit_scale:g}: expected a number above 0, as 100 for CLIP")
    if card.max_text is None and card.adapter != "farebox":
        raise ConfigError(f"{where}: max_text: missing: servers cut long prompts silently: state the most characters")
    if card.max_text is not None:
        checks.whole(f"{where}: max_text", card.max_text)
    if card.adapter in ("openai_embeddings", "jina_classify") and not card.identity.model:
        raise ConfigError(f"{where}: identity.model: missing: adapter {card.adapter} sends the model's name")
    if (card.tensors is None) == (card.adapter == "oip_v2"):
        problem = "leave it out" if card.tensors else "missing: it names the server's models and tensors"
        raise ConfigError(f"{where}: tensors: only adapter oip_v2 has them: {problem}")
    if card.identity.probe:
        try:
            n_bytes = len(base64.b64decode(card.identity.probe, validate=True))
        except binascii.Error:
            n_bytes = 0
        if n_bytes != PROBE_BYTES:
            raise ConfigError(f"{where}: identity.probe: expected the fingerprint that a run prints, or nothing")


def _check_retry(key: str, retry: Retry) -> None:
    for status in retry.on:
        if not 400 <= status <= 599 or status in _NOT_RETRIED:
            raise ConfigError(f"{key}.on: {status}: expected statuses from 400 to 599 that a second try can change")
    if len(set(retry.on)) < len(retry.on):
        raise ConfigError(f"{key}.on: {list(retry.on)}: a status is listed twice")
    if not 0 < retry.first_s <= retry.most_s:
        raise ConfigError(f"{key}: first_s {retry.first_s:g}, most_s {retry.most_s:g}: expected 0 < first_s <= most_s")
    checks.whole(f"{key}.tries", retry.tries)


def _check_price(key: str, price: Price, stated: Mapping[str, Any]) -> None:
    if not any(name in stated for name in PRICES):
        raise ConfigError(f"{key}: expected one of {', '.join(PRICES)} (0 for what is free)")
    for name in PRICES:
        if getattr(price, name) < 0:
            raise ConfigError(f"{key}.{name}: {getattr(price, name):g}: expected 0 or more US dollars")
    try:
        date.fromisoformat(price.as_of)
    except ValueError as error:
        raise ConfigError(f"{key}.as_of: {price.as_of!r}: expected the date of the prices, as 2026-11-01") from error
    if price.usd_per_1k_tokens and not price.tokens_per_image:
        raise ConfigError(f"{key}.tokens_per_image: missing: without it no upper bound of an image's price is known")
