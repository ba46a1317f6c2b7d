"""The metered black box: a method's only access to the endpoint.

It numbers and prices the calls, keeps the trial's bill by phase, enforces the declared access and the allotment before
a request is sent, and converts responses to tensors. Its meter is part of the trial's checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from methods._answers import answer_of
from methods._finite import first_non_finite
from methods._lora import unpacked
from methods.base import Access, Bill, ImageSet, Lora, PixelImages, Prompts, Remaining, SoftPrompts, TextPrompts
from pipeline.blackbox.request import (
    Kind,
    LoraStep,
    ModelInfo,
    Request,
    Response,
    access_of,
    call_digest,
    plain_lora,
    plain_prompts,
    price,
)
from pipeline.budget import BUDGETED_PHASES, NOTHING_SENT, HttpBill, Limits, Phase, paid
from pipeline.cards import FULL_ANSWERS, Answers
from pipeline.data.images import Images, as_images
from pipeline.data.made_images import MadeImages
from pipeline.errors import AccessDenied, BudgetExceeded, EndpointRefused, MethodError, NonFiniteError
from pipeline.ledger.records import Charge

BLOCK_BYTES = 64 * 2**20
"""Maximum size of a response, and of the pixels of a request; larger ones are sent in blocks of images."""


class Pool(Protocol):
    """Sends requests to an endpoint: `RayPool`, or `LocalPool` in this process."""

    @property
    def info(self) -> ModelInfo:
        """The model's constants."""
        ...

    def send(self, request: Request) -> Response:
        """Charge and compute a request. Raises a FareboxError."""
        ...

    def embed_text(self, text: str) -> np.ndarray:
        """Return the token embeddings [L, E] of a text; free."""
        ...


@dataclass
class Meter:
    """Counts of a trial: its calls, its bill by phase, and what the endpoint computed for them."""

    call: int = 0
    """Number of the next call."""
    bills: dict[Phase, Bill] = field(default_factory=lambda: {phase: Bill() for phase in Phase})
    computed_images: int = 0
    computed_prompts: int = 0
    cache_hits: int = 0
    http: HttpBill = NOTHING_SENT
    """What was sent to a remote endpoint."""

    @property
    def paid(self) -> Bill:
        """Bill of adapt and validate, which the allotment pays for."""
        return paid(self.bills)


class MeteredBox:
    """The BlackBox (see methods.base) of one trial."""

    def __init__(
        self,
        pool: Pool,
        storage: str,
        trial: str,
        access: Access,
        allotment: Limits,
        meter: Meter | None = None,
        answers: Answers = FULL_ANSWERS,
    ) -> None:
        self.pool, self.storage, self.trial, self.access, self.allotment = pool, storage, trial, access, allotment
        self.answers, self.top_k = answers, answers.k
        self.answer = answer_of(access)
        """What `scores` returns: no more than the method declares."""
        self.meter = meter or Meter()
        self.phase = Phase.ADAPT
        info = pool.info
        self.logit_scale, self.token_dim, self.feature_dim = info.logit_scale, info.token_dim, info.feature_dim
        self.image_size, self.lora_shapes = info.image_size, info.lora_shapes

    @property
    def remaining(self) -> Remaining:
        """What is left of the allotment, by the trial's own bill, so that a resumed trial plans as before."""
        return self.allotment.remaining(self.meter.paid)

    @property
    def text_norm(self) -> float:
        """Mean length of the text tower's output. Raises NonFiniteError if it is not a number above 0."""
        value = self.pool.info.text_norm
        if not 0 < value < math.inf:
            raise NonFiniteError(f"text_norm is {value}: the model's weights or its precision are unsuitable")
        return value

    def scores(self, images: ImageSet | PixelImages, prompts: Prompts, lora: Lora | None = None) -> Tensor:
        """Return the scores [P, B, C] of B images under P prompt sets, or the part of them that is declared."""
        blocks = [block for _, block in self.score_blocks(images, prompts, lora)]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)

    def score_blocks(
        self, images: ImageSet | PixelImages, prompts: Prompts, lora: Lora | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, scores [P, rows, C]) of one call, block by block."""
        whole = MadeImages.of(images) if isinstance(images, PixelImages) else as_images(images)
        prompts, lora, sent = plain_prompts(prompts), plain_lora(lora), getattr(whole, "row_bytes", 0)
        if sent > BLOCK_BYTES:
            raise EndpointRefused(f"one image in all sets has {sent:,} bytes, at most {BLOCK_BYTES:,}: send fewer sets")
        call = self._charged("scores", whole, prompts, lora=lora)
        for rows in _blocks(len(whole), call.charge.bill.prompts, sent):
            yield rows, self._send(replace(call, images=whole[rows]), first=rows.start == 0)

    def image_features(self, images: ImageSet) -> Tensor:
        """Return the features [B, D] of images."""
        whole = as_images(images)
        call = self._charged("image_features", whole, None)
        features_BD = torch.empty(len(whole), self.feature_dim)
        for rows in _blocks(len(whole), self.feature_dim):
            features_BD[rows] = self._send(replace(call, images=whole[rows]), first=rows.start == 0)
        return features_BD

    def text_features(self, prompts: Prompts) -> Tensor:
        """Return the features [P, C, D] of prompts."""
        return self._send(self._charged("text_features", None, plain_prompts(prompts)))

    def text_gradients(self, prompts: SoftPrompts, upstream_PCD: Tensor) -> Tensor:
        """Backpropagate a gradient [P, C, D] of the text features to the contexts [P, L, E]; white box."""
        upstream_PCD = upstream_PCD.detach().float().contiguous()
        return self._send(self._charged("text_gradients", None, plain_prompts(prompts), upstream_PCD))

    def lora_gradients(
        self, images: ImageSet, labels_B: Tensor, prompts: TextPrompts, lora: Lora, dropout: float, seed: int
    ) -> tuple[Tensor, ...]:
        """Return the loss of a changed model and its gradients in `lora.factors`; white box."""
        step = LoraStep(labels_B.detach().as_subclass(Tensor).clone(), float(dropout), int(seed))
        arguments = as_images(images), plain_prompts(prompts), None, plain_lora(lora), step
        return unpacked(self._send(self._charged("lora_gradients", *arguments)), lora)

    def embed_text(self, text: str) -> Tensor:
        """Return the token embeddings [L, E] of a text; free."""
        if not self.access.covers(Access.SOFT):
            raise AccessDenied(f"embed_text needs SOFT, the method declares {self.access.label}")
        return torch.from_numpy(self.pool.embed_text(text).copy())

    def _charged(
        self,
        kind: Kind,
        images: Images | MadeImages | None,
        prompts: Prompts | None,
        upstream_PCD: Tensor | None = None,
        lora: Lora | None = None,
        step: LoraStep | None = None,
    ) -> Request:
        """Price a call. Raises AccessDenied or BudgetExceeded where the declared access or the allotment forbids it."""
        answer = self.answer if kind == "scores" else Access.SCORES
        bill = price(kind, images, prompts, self.feature_dim, answer, self.answers.k)
        phase = self.phase
        if phase is Phase.ADAPT and images is not None and images.split == "val":
            phase = Phase.VALIDATE
        needed = access_of(kind, images, prompts, answer, lora)
        if not self.access.covers(needed):
            raise AccessDenied(f"{kind} needs {needed.label}, the method declares {self.access.label}")
        if phase in BUDGETED_PHASES:
            self._check_allotment(bill)
        digest = call_digest(kind, images, prompts, upstream_PCD, answer, self.answers, lora, step)
        charge = Charge(self.storage, self.trial, self.meter.call, digest, phase, bill)
        return Request(kind, images, prompts, charge, upstream_PCD, answer, self.answers, lora, step)

    def _check_allotment(self, bill: Bill) -> None:
        spent = self.meter.paid
        unit = self.allotment.exceeded_unit(spent, bill)
        if unit:
            numbers = (getattr(counts, unit) for counts in (bill, spent, self.allotment))
            raise BudgetExceeded(f"trial {self.trial}", unit, *numbers)

    def _send(self, request: Request, first: bool = True) -> Tensor:
        response = self.pool.send(request)
        if first:  # a call of several blocks is billed once, with the response to its first
            charge = request.charge
            self.meter.call += 1
            self.meter.bills[charge.phase] += charge.bill
            if response.status == "diverged":
                self.meter.bills[Phase.REPLAY] += charge.bill
        self.meter.computed_images += response.computed_images
        self.meter.computed_prompts += response.computed_prompts
        self.meter.cache_hits += response.cache_hits
        self.meter.http += response.http
        values = torch.from_numpy(np.array(response.values, dtype=np.float32))
        told = values if request.answer is Access.SCORES else values.masked_fill(values == -torch.inf, 0)
        if (bad := first_non_finite(told)) is not None:
            raise NonFiniteError(
                f"{request.kind}: the response has a value that is NaN or infinite, first at {_place(request, bad)}"
            )
        return values


def wrong_plan(method: str, predicted: Bill | None, spent: Bill, refused: BudgetExceeded) -> MethodError | None:
    """Return an error if the refused call needs more than the method's plan predicted: the budget is not at fault."""
    unit = refused.unit
    if predicted is None or getattr(spent, unit) + refused.asked <= getattr(predicted, unit):
        return None
    return MethodError(
        f"{method}: its plan predicted {getattr(predicted, unit):,} {unit} for the fit; {getattr(spent, unit):,} are "
        f"spent and the next call needs {refused.asked:,}"
    )


def _blocks(n: int, width: int, sent: int = 0) -> Iterator[slice]:
    """Split n rows into blocks, which depend on the shape alone: `width` float32 numbers come back, `sent` bytes go."""
    size = max(1, BLOCK_BYTES // max(4 * width, sent))
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _place(request: Request, index: tuple[int, ...]) -> str:
    """Name the prompt set and the image of an element of a response."""
    image = {"scores": 1, "image_features": 0}.get(request.kind)
    places = [] if request.prompts is None else [f"prompt set {index[0] + 1}"]
    if image is not None and request.images is not None:
        places.append(request.images.where(index[image]))
    return ", ".join(places)
