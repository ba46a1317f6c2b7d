"""A server of other people's APIs, as far as the adapters need them: the toy model in a thread, with faults."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from aiohttp import web
from PIL import Image

from methods._toy import ToyTowers
from methods.base import TextPrompts
from pipeline.cards import ModelCard
from pipeline.config.card_files import model_card
from tests.support.patience import patience

KEY = "sk-very-secret-0123456789"
"""The key that a peer expects, if any."""


class Peer:
    """A server with the endpoints of all adapters but farebox, which `farebox serve` itself plays.

    `faults` holds one entry for each coming request, after which all requests are answered: a status, or one of drop,
    truncate, not_json, huge, redirect, slow and fine.
    """

    def __init__(self) -> None:
        self.towers = ToyTowers()
        self.faults: deque[int | str] = deque()
        self.headers: dict[str, str] = {}
        """Headers of the faulty responses."""
        self.calls: list[dict[str, Any]] = []
        """Body, headers and path of each request, in order of arrival."""
        self.model = "toy"
        self.most_images = 10**9
        self.permuted = False
        self.expects_key = False
        self.repeats_key = False
        """Whether the messages of faulty statuses repeat the header of the key."""
        self.shift = 0.0
        """Added to the features: another model."""
        self.url = ""

    def items(self) -> int:
        """Number of images and texts that were sent, the probes apart."""
        return sum(self.size(call) for call in self.calls)

    @staticmethod
    def size(call: dict[str, Any]) -> int:
        body = call["body"]
        if "inputs" in body:
            return len(body["inputs"][0]["data"]) if isinstance(body["inputs"], list) else 1
        return len(body["input"])

    def image(self, data: str) -> np.ndarray:
        """Feature [D] of a base64-encoded image."""
        picture = Image.open(io.BytesIO(base64.b64decode(data.rpartition(",")[2])))
        grey = np.asarray(picture.convert("L").resize((8, 8)), np.float32).ravel() / 255
        feature = self.towers.image_features(torch.from_numpy(grey)[None])[0].numpy()
        return np.asarray(feature + self.shift * np.arange(len(feature)), np.float32)

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Features [n, D] of texts."""
        return np.asarray(self.towers.text_features(TextPrompts((tuple(texts),)))[0].numpy())

    def probabilities(self, image: str, labels: Sequence[str]) -> np.ndarray:
        logits = 20 * self.image(image) @ self.texts(labels).T
        weights = np.exp(logits - logits.max())
        return np.asarray(weights / weights.sum())

    def answer(self, path: str, body: Any) -> Any:
        """The JSON of a response."""
        if path == "/v1/embeddings":
            rows = self.texts(body["input"]) if body["modality"] == "text" else [self.image(i) for i in body["input"]]
            data = [
                {"index": i, "embedding": base64.b64encode(np.asarray(row, "<f4").tobytes()).decode()}
                for i, row in enumerate(rows)
            ]
            data = data[::-1] if self.permuted else data
            return {"model": self.model, "data": data, "usage": {"total_tokens": 7 * len(data)}}
        if path == "/hf":
            labels = body["parameters"]["candidate_labels"]
            told = zip(labels, self.probabilities(body["inputs"], labels).tolist(), strict=True)
            return [{"label": label, "score": score} for label, score in sorted(told, key=lambda pair: -pair[1])]
        if path == "/v1/classify":
            return {
                "data": [self._classified(i, item["image"], body["labels"]) for i, item in enumerate(body["input"])]
            }
        (tensor,) = body["inputs"]
        rows = self.texts(tensor["data"]) if "text" in path else np.stack([self.image(i) for i in tensor["data"]])
        output = {"name": body["outputs"][0]["name"], "datatype": "FP32", "shape": list(rows.shape)}
        return {"model_name": path.split("/")[3], "outputs": [output | {"data": rows.ravel().tolist()}]}

    def _classified(self, index: int, image: str, labels: list[str]) -> dict[str, Any]:
        p = self.probabilities(image, labels).tolist()
        told = [{"label": label, "score": score} for label, score in zip(labels, p, strict=True)]
        best = max(told, key=lambda item: item["score"])
        return {"index": index, "prediction": best["label"], "score": best["score"], "predictions": told}

    async def handle(self, request: web.Request) -> web.StreamResponse:
        data = await request.read()
        body = json.loads(data)
        self.calls.append({"path": request.path, "headers": dict(request.headers), "body": body})
        if self.expects_key and request.headers.get("Authorization") != f"Bearer {KEY}":
            said = f"wrong key {request.headers.get('Authorization')}"
            return web.json_response({"error": {"message": said}}, status=401)
        fault = self.faults.popleft() if self.faults else "fine"
        if isinstance(fault, int):
            said = f"fault {fault} {{x}}" + f" {request.headers.get('Authorization')}" * self.repeats_key
            return web.json_response({"error": {"message": said}}, status=fault, headers=self.headers)
        if "input" in body and len(body["input"]) > self.most_images:
            return web.json_response({"detail": "too many"}, status=413)
        if fault == "drop":
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        if fault == "redirect":
            return web.Response(status=307, headers={"Location": "https://elsewhere.example/v1"})
        if fault == "huge":
            return web.Response(body=b" " * 2**23, content_type="application/json")
        if fault == "not_json":
            return web.Response(body=b'{"data": [', content_type="application/json")
        if fault == "slow":
            await asyncio.sleep(1.0)
        content = json.dumps(self.answer(request.path, body)).encode()
        self.calls[-1]["answered"] = fault == "fine"
        if fault == "truncate":
            response = web.StreamResponse(headers={"Content-Length": str(len(content))})
            await response.prepare(request)
            await response.write(content[: len(content) // 2])
            assert request.transport is not None
            request.transport.close()
            return response
        return web.Response(body=content, content_type="application/json")


@contextlib.contextmanager
def peer() -> Iterator[Peer]:
    """Serve a peer in a thread until the block ends."""
    served, loop, ready = Peer(), asyncio.new_event_loop(), threading.Event()

    async def start() -> web.AppRunner:
        application = web.Application(client_max_size=2**26)
        application.router.add_post("/{path:.*}", served.handle)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        served.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        return runner

    def serve() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(patience(30))
    try:
        yield served
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(patience(30))


EMBEDDINGS: dict[str, Any] = {
    "kind": "http",
    "adapter": "openai_embeddings",
    "grant": "TEXT+FEATURES",
    "identity": {"model": "toy"},
    "feature_dim": ToyTowers.D,
    "logit_scale": 20.0,
    "max_text": 200,
    "image": {"size": 32},
    "batch": {"images": 16, "texts": 8},
    "retry": {"first_s": 0.01, "most_s": 2, "tries": 4},
    "timeout_s": 20,
}
"""A card of a peer's embeddings, without its URL."""
CARDS: dict[str, dict[str, Any]] = {
    "openai_embeddings": {"path": "/v1/embeddings"},
    "hf_zero_shot": {"path": "/hf", "grant": "TEXT+SCORES", "feature_dim": 0},
    "jina_classify": {"path": "/v1/classify", "grant": "TEXT+SCORES", "feature_dim": 0},
    "farebox": {"path": "", "max_text": None},
    "oip_v2": {"path": "", "tensors": {"image_model": "an image", "text_model": "a text"}},
}
"""What differs in the card of each adapter."""


def write_peer_card(folder: Path, address: str, adapter: str = "openai_embeddings", **changes: Any) -> Path:
    """Write the card of a peer; return its path."""
    own = dict(CARDS[adapter])
    data = EMBEDDINGS | {"adapter": adapter, "url": address + own.pop("path")} | own | changes
    path = folder / "peer.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in data.items() if value is not None}))
    return path


def peer_card(folder: Path, address: str, adapter: str = "openai_embeddings", **changes: Any) -> ModelCard:
    """Return the card of a peer."""
    return model_card(str(write_peer_card(folder, address, adapter, **changes)))
