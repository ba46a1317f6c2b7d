"""A service of `farebox serve` in a thread of this process, and plain calls of it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from pipeline.commands.serve import parse_options
from pipeline.serve.server import Server
from tests.support.patience import patience

OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@contextlib.contextmanager
def serving(*words: str) -> Iterator[str]:
    """Serve with these words until the block ends; give the address."""
    server, ready = Server(parse_options(["port=0", *words])), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(lambda _: ready.set())))
    thread.start()
    try:
        assert ready.wait(patience(60)), "the service did not start"
        yield server.url
    finally:
        server.stop()
        thread.join(patience(30))
        assert not thread.is_alive()


def fake_card(url: str, *more: str) -> str:
    """The card of a served `model=fake` whose images cost money, with further lines."""
    facts = ("image: {size: 32}", "feature_dim: 16", "logit_scale: 20.0", "text_norm: 1.0")
    price = "price: {usd_per_image: 0.001, as_of: 2026-11-01}"
    lines = ("kind: http", f"url: {url}", "adapter: farebox", "grant: TEXT+FEATURES", *facts, price, *more)
    return "".join(f"{line}\n" for line in lines)


def call(url: str, body: Any = None, headers: Mapping[str, str] | None = None) -> tuple[int, Any, Mapping[str, str]]:
    """Send a request (POST with a body) and return status, JSON and headers."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})})
    try:
        with OPENER.open(request, timeout=patience(60)) as response:
            return response.status, json.loads(response.read()), response.headers
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), error.headers


def png(seed: int, size: int = 64) -> bytes:
    """Return an image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def encoded(*images: bytes) -> list[str]:
    """Return images as a request contains them."""
    return [base64.b64encode(data).decode() for data in images]


def values(record: Mapping[str, Any]) -> np.ndarray:
    """Return the values of a response."""
    assert record["dtype"] == "float32"
    return np.frombuffer(base64.b64decode(record["data"]), "<f4").reshape(record["shape"])
