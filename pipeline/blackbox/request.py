"""Requests to the endpoint and its responses: what client, pools, replicas and endpoint exchange.

A request is checked, priced and digested from its shapes and its content alone, without a model.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

from methods._answers import bill_of
from methods.base import TOP_K, Access, Bill, Lora, LowRank, Prompts, SoftPrompts, TextPrompts
from pipeline.budget import NOTHING_SENT, HttpBill
from pipeline.cards import FULL_ANSWERS, Answers
from pipeline.data.images import Images
from pipeline.data.made_images import MadeImages
from pipeline.errors import EndpointRefused
from pipeline.ledger.records import Charge

Kind = Literal["scores", "image_features", "text_features", "text_gradients", "lora_gradients"]
"""The calls that are charged."""

REMOTE = "http "
"""Begins the device of a remote endpoint."""
ACCESS: dict[Kind, Access] = {
    "scores": Access.SCORES,
    "image_features": Access.FEATURES,
    "text_features": Access.FEATURES,
    "text_gradients": Access.GRADIENTS,
    "lora_gradients": Access.LORA,
}
"""Access that a call of each kind needs, besides the access to its form of prompts. `scores` may ask for less."""


@dataclass(frozen=True, eq=False)
class LoraStep:
    """What `lora_gradients` takes besides images, prompts and the change."""

    labels_B: Tensor
    """int64."""
    dropout: float
    seed: int


@dataclass(frozen=True)
class Request:
    """A call, or one block of its images. All blocks carry the charge of the whole call, so it is charged once."""

    kind: Kind
    images: Images | MadeImages | None
    prompts: Prompts | None
    charge: Charge
    upstream_PCD: Tensor | None = None
    """Gradient in the text features, for `text_gradients`."""
    answer: Access = Access.SCORES
    """Of `scores`: SCORES, TOPK or LABELS (see `methods._answers.reduced`)."""
    answers: Answers = FULL_ANSWERS
    """How detailed and exact the answers of this endpoint are."""
    lora: Lora | None = None
    """The change of the model, for `lora_gradients`; `scores` may have one."""
    step: LoraStep | None = None
    """For `lora_gradients`."""


@dataclass(frozen=True)
class Response:
    """The values of a request, and what the endpoint computed for them, which does not change the bill."""

    values: np.ndarray
    """float32, in the shape of the request's kind."""
    computed_images: int = 0
    computed_prompts: int = 0
    cache_hits: int = 0
    """Images whose features were stored or cached."""
    status: str = "charged"
    """Status of the ledger's receipt."""
    load: int = 0
    """Requests that the replica still has to answer."""
    http: HttpBill = NOTHING_SENT
    """What was sent for this request to a remote endpoint, in this run and in earlier ones."""


class ModelInfo(NamedTuple):
    """Constants of a model; reading them is free."""

    identity: str
    logit_scale: float
    text_norm: float
    """Mean length of the text tower's output: the card's value, or else measured when the model is loaded."""
    token_dim: int
    feature_dim: int
    image_size: int
    """Side of the model's input in pixels."""
    grant: Access
    precision: str
    transform: str
    device: str
    """cpu, the name of the GPU, or `REMOTE` and the host of a remote endpoint."""
    lora_shapes: tuple[tuple[int, int], ...] = ()
    """See `BlackBox.lora_shapes`."""

    @property
    def remote(self) -> bool:
        """Whether the model answers over HTTP."""
        return self.device.startswith(REMOTE)


def access_of(
    kind: Kind,
    images: Images | MadeImages | None,
    prompts: Prompts | None,
    answer: Access = Access.SCORES,
    lora: Lora | None = None,
) -> Access:
    """Return the access that a call needs."""
    needed = answer if kind == "scores" else ACCESS[kind]
    if lora is not None:
        needed |= Access.LORA
    if isinstance(images, MadeImages):
        needed |= Access.PIXELS
    if prompts is None:
        return needed
    return needed | (Access.SOFT if isinstance(prompts, SoftPrompts) else Access.TEXT)


def price(
    kind: Kind,
    images: Images | MadeImages | None,
    prompts: Prompts | None,
    feature_dim: int,
    answer: Access = Access.SCORES,
    k: int = TOP_K,
) -> Bill:
    """Return the bill of a call, computed from its shapes (docs/budget.md).

    Raises:
        EndpointRefused: see `check_shapes`.
    """
    check_shapes(images, prompts)
    if kind == "image_features":
        assert images is not None
        return Bill.image_features(len(images), feature_dim)
    assert prompts is not None
    p, c = prompt_counts(prompts)
    if kind in ("text_features", "text_gradients"):
        return Bill.text_features(p, c, feature_dim)
    assert images is not None
    if kind == "lora_gradients":
        return Bill.lora_gradients(len(images), c)
    if isinstance(images, MadeImages):
        p = max(p, images.n_sets)
    return bill_of(answer, p, len(images), c, k)


def check_shapes(images: Images | MadeImages | None, prompts: Prompts | None) -> None:
    """Raise EndpointRefused for a request without images or prompts, and for sets whose sizes or numbers differ."""
    if images is not None and len(images) == 0:
        raise EndpointRefused("the request has no images")
    if isinstance(prompts, SoftPrompts):
        shape = tuple(prompts.ctx_PLE.shape)
        if len(shape) != 3 or shape[0] == 0 or not prompts.classnames:
            raise EndpointRefused(f"context of shape {shape} for {len(prompts.classnames)} classes, expected [P, L, E]")
    elif prompts is not None:
        sizes = sorted({len(texts) for texts in prompts.texts})
        if len(sizes) != 1 or sizes[0] == 0:
            raise EndpointRefused(f"prompt sets of {sizes} prompts, expected one prompt for each class in every set")
    if isinstance(images, MadeImages):
        n_sets = images.n_sets
        if n_sets == 0:
            raise EndpointRefused("the request has no images")
        if prompts is not None and 1 not in (n_sets, p := prompt_counts(prompts)[0]) and n_sets != p:
            raise EndpointRefused(
                f"{n_sets} sets of images and {p} prompt sets, expected equal numbers, or one of either"
            )


def prompt_counts(prompts: Prompts) -> tuple[int, int]:
    """Return (P, C): the number of prompt sets and the number of prompts in each."""
    if isinstance(prompts, SoftPrompts):
        return len(prompts.ctx_PLE), len(prompts.classnames)
    return len(prompts.texts), len(prompts.texts[0])


def call_digest(
    kind: Kind,
    images: Images | MadeImages | None,
    prompts: Prompts | None,
    upstream_PCD: Tensor | None = None,
    answer: Access = Access.SCORES,
    answers: Answers = FULL_ANSWERS,
    lora: Lora | None = None,
    step: LoraStep | None = None,
) -> str:
    """Return the digest of a whole call, 32 hex digits. Calls with equal digests ask for the same values."""
    name = kind if answer is Access.SCORES else f"{kind} as {answer.label}"
    name += f" ({answers.text})" if answers != FULL_ANSWERS else ""
    content = f"{name}/{images.digest if images else ''}/{prompts_digest(prompts) if prompts else ''}"
    h = hashlib.sha256(content.encode())
    if upstream_PCD is not None:
        h.update(upstream_PCD.numpy().tobytes())
    if lora is not None:
        h.update(repr((lora.scale, [tuple(factor.shape) for factor in lora.factors])).encode())
        for factor in lora.factors:
            h.update(factor.numpy().tobytes())
    if step is not None:
        h.update(repr((step.dropout, step.seed)).encode() + step.labels_B.numpy().tobytes())
    return h.hexdigest()[:32]


def plain_prompts(prompts: Prompts) -> Prompts:
    """Return prompts as plain values, contexts contiguous and without a gradient.

    A subclass could change them between pricing and sending. Raises TypeError for another type.
    """
    if isinstance(prompts, SoftPrompts):
        return SoftPrompts(_plain(prompts.ctx_PLE), tuple(prompts.classnames), str(prompts.suffix))
    if isinstance(prompts, TextPrompts):
        return TextPrompts(tuple(tuple(map(str, texts)) for texts in prompts.texts))
    raise TypeError(f"expected TextPrompts or SoftPrompts, got {type(prompts).__name__}")


def plain_lora(lora: Lora | None) -> Lora | None:
    """Return the same of a change of the model. Raises TypeError for another type."""
    if lora is None:
        return None
    if not isinstance(lora, Lora):
        raise TypeError(f"expected Lora, got {type(lora).__name__}")
    image_a, image_b, text_a, text_b = map(_plain, lora.factors)
    return Lora(LowRank(image_a, image_b), LowRank(text_a, text_b), float(lora.scale))


def _plain(values: Tensor) -> Tensor:
    return values.detach().as_subclass(Tensor).float().contiguous()


def prompts_digest(prompts: Prompts) -> str:
    """Return the SHA-256 of prompt sets, exact to the bit of soft contexts."""
    if isinstance(prompts, SoftPrompts):
        ctx = np.ascontiguousarray(prompts.ctx_PLE.detach().numpy(), dtype="<f4")
        h = hashlib.sha256(repr((ctx.shape, prompts.classnames, prompts.suffix)).encode())
        h.update(ctx.tobytes())
        return h.hexdigest()
    return hashlib.sha256(repr(prompts.texts).encode()).hexdigest()
