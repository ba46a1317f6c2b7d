"""The service behind the HTTP interface: a model's answers, and counts of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from methods.base import Access, Bill, Prompts, TextPrompts
from pipeline.blackbox import architecture
from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.model import OpenClipModel
from pipeline.blackbox.replica_queue import ReplicaQueue
from pipeline.blackbox.request import Kind, Request, Response
from pipeline.budget import Phase
from pipeline.cards import FULL_ANSWERS, ModelCard
from pipeline.data.images import Images, Preprocess
from pipeline.errors import AccessDenied, DataError, EndpointBusy, EndpointRefused, FareboxError, shortened, unwrap
from pipeline.ledger.records import Charge, Receipt
from pipeline.serve import wire
from pipeline.serve.faults import Faults
from pipeline.serve.sent import sent_images
from pipeline.serve.wire import ServiceError

PROTOCOL = 1
"""Version of the protocol `farebox`."""
RETRY_AFTER_S = 1
"""Seconds after which a client may try again when the queue is full."""
_UNBILLED = Charge("serve", "request", 0, "", Phase.ADAPT, Bill())


async def _accept(charges: list[Charge]) -> list[Receipt]:
    """Accept every charge: the client's ledger pays."""
    return [Receipt(charge.id, "charged") for charge in charges]


async def _refund_nothing(_: list[str]) -> None:
    """Do nothing: nothing was charged."""


class Service:
    """A model behind a queue. It is made and called in a running event loop.

    An answer depends on its request alone: images are encoded in the model's fixed tiles, prompts as in a sweep.
    """

    def __init__(self, name: str, faults: Faults, threads: int) -> None:
        self.name, self.faults = name, faults
        self.counts = Counter[str]()
        self._queue = ReplicaQueue(_accept, _refund_nothing, threads)

    async def load(self, card: ModelCard) -> None:
        """Load the model. Raises ConfigError or DataError."""
        self._answers = card.answers

        def make() -> Endpoint:
            self._endpoint = Endpoint(card, features=None)
            return self._endpoint

        await self._queue.start(make)
        unwrap(self._queue.loaded)

    @property
    def grant(self) -> Access:
        """The access that clients get: text prompts, and what the model's card grants of PIXELS and of outputs."""
        granted = self._answers.granted(self._endpoint.model.grant)
        outputs = (Access.FEATURES, Access.SCORES, Access.TOPK, Access.LABELS)
        return Access.TEXT | (granted & Access.PIXELS) | next(o for o in outputs if granted.covers(o))

    @property
    def _identity(self) -> str:
        """Identity of the model, and of what it answers in place of full answers."""
        degraded = "" if self._answers == FULL_ANSWERS else f"; answers {self._answers.text}"
        return self.faults.identity(self._endpoint.info.identity + degraded)

    @property
    def input_rule(self) -> Preprocess | None:
        """How the model makes pixels of images; None for the toy model, which takes images of any size."""
        model = self._endpoint.model
        return model.preprocess if isinstance(model, OpenClipModel) else None

    def info(self) -> dict[str, Any]:
        """Return the model's constants."""
        info, rule = self._endpoint.info, self.input_rule
        return {
            "protocol": PROTOCOL,
            "model": self.name,
            "identity": self._identity,
            "logit_scale": info.logit_scale,
            "text_norm": info.text_norm,
            "feature_dim": info.feature_dim,
            "grant": self.grant.label,
            "precision": info.precision,
            "transform": info.transform,
            "image_size": rule.size if rule else None,
        }

    async def image_features(self, body: dict[str, Any], number: int) -> dict[str, Any]:
        """Answer `POST /v1/image_features`: values [B, D]."""
        wire.check_keys(body, "images")
        images = wire.parse_images(body)
        wire.check_values(len(images), self._endpoint.info.feature_dim)
        response = await self._on_images("image_features", images, None)
        return self._encoded(response, number, None)

    async def text_features(self, body: dict[str, Any], number: int) -> dict[str, Any]:
        """Answer `POST /v1/text_features`: values [P, C, D]."""
        wire.check_keys(body, "prompts")
        response = await self._on_texts(wire.parse_prompts(body))
        return self._encoded(response, number, 1)

    async def scores(self, body: dict[str, Any], number: int) -> dict[str, Any]:
        """Answer `POST /v1/scores`: values [P, B, C]; -inf where top-k and labels tell nothing."""
        wire.check_keys(body, "images", "prompts", "answer")
        images, prompts, answer = wire.parse_images(body), wire.parse_prompts(body), wire.parse_answer(body)
        wire.check_values(len(prompts.texts), len(images), len(prompts.texts[0]))
        response = await self._on_images("scores", images, prompts, answer)
        self.counts["texts"] += sum(map(len, prompts.texts))
        return self._encoded(response, number, 2)

    async def embeddings(self, body: dict[str, Any], number: int) -> dict[str, Any]:
        """Answer `POST /v1/embeddings`, in the style of OpenAI."""
        asked = wire.parse_embeddings(body)
        if asked.model != self.name:
            raise ServiceError(404, "model_not_found", f"no model named {asked.model[:60]!r} (served: {self.name})")
        if asked.images:
            values = (await self._on_images("image_features", asked.images, None)).values
        else:
            values = (await self._on_texts(TextPrompts((asked.texts,)))).values[0]
        values = self.faults.values(values, number, 0 if asked.texts else None)
        tokens = self._tokens(asked.texts)
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": i, "embedding": wire.base64_of(v) if asked.as_base64 else v.tolist()}
                for i, v in enumerate(values)
            ],
            "model": self.faults.identity(self.name),
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    def _tokens(self, texts: Sequence[str]) -> int:
        """Return the number of tokens of texts, start and end included; of words for the toy model, which has none."""
        model = self._endpoint.model
        if isinstance(model, OpenClipModel):
            return sum(architecture.prompt_lengths(model.tokenizer, texts)) if texts else 0
        return sum(len(text.split()) for text in texts)

    async def _on_images(
        self, kind: Kind, images: Sequence[bytes], prompts: TextPrompts | None, answer: Access = Access.SCORES
    ) -> Response:
        with sent_images(images) as sent:
            response = await self._send(kind, sent, prompts, answer)
        self.counts["images"] += len(images)
        return response

    async def _on_texts(self, prompts: TextPrompts) -> Response:
        wire.check_values(len(prompts.texts), len(prompts.texts[0]), self._endpoint.info.feature_dim)
        response = await self._send("text_features", None, prompts)
        self.counts["texts"] += sum(map(len, prompts.texts))
        return response

    async def _send(
        self, kind: Kind, images: Images | None, prompts: Prompts | None, answer: Access = Access.SCORES
    ) -> Response:
        request = Request(kind, images, prompts, _UNBILLED, answer=answer, answers=self._answers)
        result = await self._queue.send(request)
        if isinstance(result, FareboxError):
            raise _service_error(result)
        return result

    def _encoded(self, response: Response, number: int, labelled_axis: int | None) -> dict[str, Any]:
        values = self.faults.values(response.values, number, labelled_axis)
        return wire.encode_values(self._identity, values)


def _service_error(error: FareboxError) -> ServiceError:
    """Return the status and the code of an error of the endpoint."""
    message = shortened(str(error))
    if isinstance(error, DataError):
        return ServiceError(400, "invalid_image", message)
    if isinstance(error, EndpointRefused):
        return wire.invalid(message)
    if isinstance(error, AccessDenied):
        return ServiceError(403, "access_denied", message)
    if isinstance(error, EndpointBusy):
        return ServiceError(503, "busy", message, RETRY_AFTER_S)
    return ServiceError(500, "not_computed", message)
