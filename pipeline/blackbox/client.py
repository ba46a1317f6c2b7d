"""The metered black box: the only way from a method to the endpoint.

It numbers the calls, prices them, keeps the trial's logical bill by phase, enforces the declared access and the
allotment before anything is sent, and hands tensors over. Its state is part of the trial's checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from methods._finite import first_non_finite
from methods.base import Access, Bill, ImageSet, Prompts, Remaining, SoftPrompts
from pipeline.blackbox.endpoint import Kind, ModelInfo, Request, Response, access_of, price, prompts_digest
from pipeline.budget import BUDGETED_PHASES, Charge, Limits, Phase, paid
from pipeline.data.images import Images, as_images
from pipeline.errors import AccessDenied, BudgetExceeded, MethodError, NonFiniteError

BLOCK_BYTES = 64 * 2**20
"""Largest answer that crosses the boundary in one piece."""


class Pool(Protocol):
    """Something that answers requests: Ray replicas (pool.py), or one endpoint in this process."""

    @property
    def info(self) -> ModelInfo:
        """The model's constants."""
        ...

    def send(self, request: Request) -> Response:
        """The answer, paid. Raises an error of ours."""
        ...

    def embed_text(self, text: str) -> np.ndarray:
        """[L, E], free of charge."""
        ...


@dataclass
class Meter:
    """What a trial has asked so far: the next call's number, the logical bill by phase, and physical counts."""

    call: int = 0
    bills: dict[Phase, Bill] = field(default_factory=lambda: {phase: Bill() for phase in Phase})
    computed_images: int = 0
    computed_prompts: int = 0
    cache_hits: int = 0

    @property
    def paid(self) -> Bill:
        """What the allotment pays for: adapt and validate."""
        return paid(self.bills)


class MeteredBox:
    """A BlackBox (see methods.base) for one trial."""

    def __init__(
        self, pool: Pool, storage: str, trial: str, access: Access, allotment: Limits, meter: Meter | None = None
    ) -> None:
        self.pool, self.storage, self.trial, self.access, self.allotment = pool, storage, trial, access, allotment
        self.meter = meter or Meter()
        self.phase = Phase.ADAPT
        info = pool.info
        self.logit_scale, self.token_dim, self.feature_dim = info.logit_scale, info.token_dim, info.feature_dim

    @property
    def remaining(self) -> Remaining:
        """What is left of the allotment, from the logical bill, so that a resumed trial plans as it did before."""
        return self.allotment.remaining(self.meter.paid)

    def scores(self, images: ImageSet, prompts: Prompts) -> Tensor:
        """[P, B, C]"""
        blocks = [block for _, block in self.score_blocks(images, prompts)]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)

    def score_blocks(self, images: ImageSet, prompts: Prompts) -> Iterator[tuple[slice, Tensor]]:
        """(rows, [P, rows, C]) blocks of one call."""
        whole, prompts = as_images(images), _plain(prompts)
        charge = self._charge("scores", whole, prompts)
        for rows in _blocks(len(whole), charge.bill.prompts):
            yield rows, self._send(Request("scores", whole[rows], prompts, charge), first=rows.start == 0)

    def image_features(self, images: ImageSet) -> Tensor:
        """[B, D]"""
        whole = as_images(images)
        charge = self._charge("image_features", whole, None)
        features_BD = torch.empty(len(whole), self.feature_dim)
        for rows in _blocks(len(whole), self.feature_dim):
            features_BD[rows] = self._send(Request("image_features", whole[rows], None, charge), first=rows.start == 0)
        return features_BD

    def text_features(self, prompts: Prompts) -> Tensor:
        """[P, C, D]"""
        prompts = _plain(prompts)
        return self._send(Request("text_features", None, prompts, self._charge("text_features", None, prompts)))

    def text_gradients(self, prompts: SoftPrompts, upstream_PCD: Tensor) -> Tensor:
        """[P, L, E]; white box."""
        plain, upstream_PCD = _plain(prompts), upstream_PCD.detach().float().contiguous()
        charge = self._charge("text_gradients", None, plain, upstream_PCD)
        return self._send(Request("text_gradients", None, plain, charge, upstream_PCD))

    def embed_text(self, text: str) -> Tensor:
        """[L, E], free of charge."""
        if not self.access.covers(Access.SOFT):
            raise AccessDenied(f"embed_text needs SOFT, the method declares {self.access.label}")
        return torch.from_numpy(self.pool.embed_text(text).copy())

    def _charge(
        self, kind: Kind, images: Images | None, prompts: Prompts | None, upstream_PCD: Tensor | None = None
    ) -> Charge:
        """Price the call and check it against declared access and allotment; nothing is sent when either says no."""
        bill = price(kind, images, prompts, self.feature_dim)
        phase = self.phase
        if phase is Phase.ADAPT and images is not None and images.split == "val":
            phase = Phase.VALIDATE
        needs = access_of(kind, prompts)
        if not self.access.covers(needs):
            raise AccessDenied(f"{kind} needs {needs.label}, the method declares {self.access.label}")
        if phase in BUDGETED_PHASES:
            self._afford(bill)
        content = f"{kind}/{images.digest if images else ''}/{prompts_digest(prompts) if prompts else ''}"
        h = hashlib.sha256(content.encode())
        if upstream_PCD is not None:
            h.update(upstream_PCD.numpy().tobytes())
        digest = h.hexdigest()[:32]
        return Charge(self.storage, self.trial, self.meter.call, digest, phase, bill)

    def _afford(self, bill: Bill) -> None:
        spent = self.meter.paid
        unit = self.allotment.exceeded_unit(spent, bill)
        if unit:
            numbers = (getattr(of, unit) for of in (bill, spent, self.allotment))
            raise BudgetExceeded(f"trial {self.trial}", unit, *numbers)

    def _send(self, request: Request, first: bool = True) -> Tensor:
        answer = self.pool.send(request)
        if first:  # a call of several blocks is billed once, when its first block has been answered
            charge = request.charge
            self.meter.call += 1
            self.meter.bills[charge.phase] += charge.bill
            if answer.status == "diverged":
                self.meter.bills[Phase.REPLAY] += charge.bill
        self.meter.computed_images += answer.computed_images
        self.meter.computed_prompts += answer.computed_prompts
        self.meter.cache_hits += answer.cache_hits
        values = torch.from_numpy(np.array(answer.values, dtype=np.float32))
        if (bad := first_non_finite(values)) is not None:
            raise NonFiniteError(f"{request.kind}: the answer holds NaN or infinity, first at {_place(request, bad)}")
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


def _blocks(n: int, numbers: int) -> Iterator[slice]:
    """The rows of an answer with so many numbers in each of n rows, cut by its shape alone."""
    size = max(1, BLOCK_BYTES // (4 * numbers))
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _place(request: Request, index: tuple[int, ...]) -> str:
    """The prompt set and the image of an element of an answer."""
    image = {"scores": 1, "image_features": 0}.get(request.kind)
    places = [] if request.prompts is None else [f"prompt set {index[0] + 1}"]
    if image is not None and request.images is not None:
        places.append(request.images.where(index[image]))
    return ", ".join(places)


def _plain(prompts: Prompts) -> Prompts:
    """Soft prompts as float32 values without a gradient: what can cross the boundary."""
    if isinstance(prompts, SoftPrompts):
        return SoftPrompts(prompts.ctx_PLE.detach().float().contiguous(), prompts.classnames, prompts.suffix)
    return prompts
