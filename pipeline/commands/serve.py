"""`farebox serve`: offer a model of this machine as an HTTP service."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from typing import Any, get_type_hints

from pipeline.config import typed_values
from pipeline.config import values as checks
from pipeline.config.card_files import model_card
from pipeline.config.plain_yaml import read_value
from pipeline.console import Echo
from pipeline.errors import ConfigError, did_you_mean
from pipeline.serve.faults import OTHER_IDENTITY, FaultOptions
from pipeline.serve.server import ServeOptions, Server, serve
from pipeline.serve.service import Service

TOKEN = "FAREBOX_SERVE_TOKEN"
"""Environment variable with the token that clients must send."""
FAULT = "fault."
"""Prefix of the keys of `FaultOptions`."""
PLACES = ("model", "host", "port", "threads")
EXAMPLE_SIZE = 64
"""Image size of the example card of the toy model, which takes images of any size."""


def serve_model(words: Sequence[str], echo: Echo) -> int:
    """Serve until SIGINT or SIGTERM; return the exit code 0.

    Raises:
        ConfigError, DataError: an option is wrong, the port is in use, or the model cannot be loaded.
    """
    server = Server(parse_options(words))

    def ready(service: Service) -> None:
        for line in announcement(server, service):
            echo(line)

    serve(server, ready)
    echo("stopped")
    return 0


def parse_options(words: Sequence[str]) -> ServeOptions:
    """Return the options of KEY=VALUE words. Raises ConfigError."""
    hints = get_type_hints(FaultOptions)
    known = (*PLACES, *(f"{FAULT}{name}" for name in hints))
    values = dict[str, Any]()
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"{word[:60]!r}: expected KEY=VALUE, as in farebox serve model=tiny")
        if key not in known:
            raise ConfigError(did_you_mean("key", key[:60], known))
        if key in values:
            raise ConfigError(f"{key} is given twice")
        values[key] = read_value(key, text)
    if "model" not in values:
        raise ConfigError("expected model=NAME, as in farebox serve model=tiny; see farebox models")
    port = checks.whole("port", values.get("port", 5000), 0)
    if port > 65535:
        raise ConfigError(f"port={port}: expected a number from 1 to 65535, or 0 for any free port")
    faults = {
        name: typed_values.of_type(f"{FAULT}{name}", values[f"{FAULT}{name}"], hint)
        for name, hint in hints.items()
        if f"{FAULT}{name}" in values
    }
    for name in ("down_s", "slow_s", "jitter"):
        if faults.get(name, 0) < 0:
            raise ConfigError(f"{FAULT}{name}={faults[name]}: expected 0 or more")
    checks.one_of(f"{FAULT}model", faults.get("model", ""), ("", OTHER_IDENTITY))
    return ServeOptions(
        card=model_card(checks.text("model", values["model"])),
        host=checks.text("host", values.get("host", "127.0.0.1")),
        port=port,
        token=os.environ.get(TOKEN) or None,
        threads=checks.whole("threads", values.get("threads", 1)),
        faults=FaultOptions(**faults),
    )


def announcement(server: Server, service: Service) -> list[str]:
    """Return the lines that a started service prints: address, model, an example card and an example call."""
    info, token = service.info(), server.options.token is not None
    header = f' -H "Authorization: Bearer ${TOKEN}"' if token else ""
    body = '{"prompts": [["a photo of a cat.", "a photo of a dog."]]}'
    call = f"curl{header} {server.url}/v1/text_features -d {shlex.quote(body)}"
    lines = [
        f"serving {info['model']} ({info['identity']}) at {server.url}",
        f"  grant {info['grant']}, {info['feature_dim']} features; {'clients need the token' if token else 'no token'}",
        "",
        "card for a client, as conf/model/my_api.yaml:",
        *(f"  {line}" for line in example_card(server, service)),
        "",
        f"try it: {call}",
    ]
    if server.options.faults != FaultOptions():
        lines.append("faults are made on purpose (fault.*): this service is for tests of clients")
    return [*lines, "press Ctrl-C to stop"]


def example_card(server: Server, service: Service) -> list[str]:
    """Return the lines of a client's card of this service."""
    info, rule = service.info(), service.input_rule
    size, mode, kind = (rule.size, rule.mode, rule.filter) if rule else (EXAMPLE_SIZE, "shortest", "bicubic")
    lines = [
        "kind: http",
        f"url: {server.url}",
        "adapter: farebox",
        f"grant: {info['grant']}",
        f"identity: {{model: {json.dumps(info['model'])}}}",
        f"image: {{size: {size}, resize_mode: {mode}, interpolation: {kind}}}",
    ]
    lines.append(f"logit_scale: {info['logit_scale']!r}")
    if "FEATURES" in info["grant"]:
        lines.append(f"feature_dim: {info['feature_dim']}")
    lines.append(f"text_norm: {info['text_norm']!r}")
    if server.options.token is not None:
        lines.append(f"auth: {{env: FAREBOX_API_KEY}}  # a variable with the value of {TOKEN}")
    return lines
