"""The endpoint: a frozen model behind a call boundary. It answers requests; who pays is decided around it.

`Endpoint` is a plain class. Charging and computing meet in the Ray replica (pool.py) and, without Ray, in `LocalPool`
(local.py).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from methods.base import Access, Bill, Prompts, SoftPrompts
from methods.finite import first_non_finite
from pipeline.blackbox import model as models
from pipeline.blackbox.feature_store import FeatureStore
from pipeline.budget import Charge
from pipeline.cards import ModelCard
from pipeline.data.images import Images
from pipeline.errors import AccessDenied, EndpointRefused, NonFiniteError
from pipeline.source_code import image_feature_digest

Kind = Literal["scores", "image_features", "text_features", "text_gradients"]

IMAGE_BYTES = 256 * 2**20
"""Image features that a replica keeps for the next calls, on its device."""
TEXT_BYTES = 2**30
"""Prompt features that it keeps, and the most that one call may take: six times 40 prompt sets of 1,000 classes at
D = 1024."""
STORED_AT_ONCE = 1024
"""New images that are encoded before they are stored: what a killed replica loses at most."""

NEEDS = {
    "scores": Access.SCORES,
    "image_features": Access.FEATURES,
    "text_features": Access.FEATURES,
    "text_gradients": Access.GRADIENTS,
}


def access_of(kind: Kind, prompts: Prompts | None) -> Access:
    """The access that such a call takes."""
    if prompts is None:
        return NEEDS[kind]
    return NEEDS[kind] | (Access.SOFT if isinstance(prompts, SoftPrompts) else Access.TEXT)


@dataclass(frozen=True)
class Request:
    """One call, or one block of image rows of it: `charge` is the whole call's, so that blocks are charged once."""

    kind: Kind
    images: Images | None
    prompts: Prompts | None
    charge: Charge
    upstream_PCD: Tensor | None = None
    """What `text_gradients` sends back through the text features."""


@dataclass(frozen=True)
class Response:
    """What came back, with what the endpoint really computed for it (which never changes the bill)."""

    values: np.ndarray
    computed_images: int = 0
    computed_prompts: int = 0
    cache_hits: int = 0
    status: str = "charged"
    """How it was paid: what the ledger's receipt says."""
    load: int = 0
    """Requests that were left at the replica when this answer left it."""


class ModelInfo(NamedTuple):
    """Constants of a model, free of charge."""

    identity: str
    logit_scale: float
    token_dim: int
    feature_dim: int
    grant: Access
    precision: str
    transform: str
    device: str
    """cpu, or the GPU's name"""


@dataclass
class LRUCache:
    """The last tensors by digest, `limit` bytes of them: what the next call asks again is not computed again."""

    limit: int
    held: int = 0
    items: OrderedDict[str, Tensor] = field(default_factory=OrderedDict)

    def get(self, key: str) -> Tensor | None:
        """Return the value of a key, or None, and mark it as the latest used."""
        if key in self.items:
            self.items.move_to_end(key)
        return self.items.get(key)

    def put(self, key: str, value: Tensor) -> None:
        """Store a value; remove the least recently used ones beyond the capacity in bytes."""
        self.items[key] = value
        self.held += value.nbytes
        while self.held > self.limit:
            self.held -= self.items.popitem(last=False)[1].nbytes


class Endpoint:
    """A model, its feature store, and what it grants."""

    def __init__(self, card: ModelCard, features: Path) -> None:
        self.model = models.load(card)
        self.precision = card.precision
        made_by = [self.model.identity, card.precision, self.model.transform, f"code {image_feature_digest()}"]
        if self.model.device.type != "cpu":
            made_by.append(self.model.device.type)  # the last bits are its own: they must not reach a run on the CPU
        self.store = FeatureStore(features, " ".join(made_by), self.model.feature_dim)
        self._images, self._texts = LRUCache(IMAGE_BYTES), LRUCache(TEXT_BYTES)

    @property
    def info(self) -> ModelInfo:
        """The model's constants."""
        m = self.model
        return ModelInfo(
            identity=m.identity,
            logit_scale=m.logit_scale,
            token_dim=m.token_dim,
            feature_dim=m.feature_dim,
            grant=m.grant,
            precision=self.precision,
            transform=m.transform,
            device=torch.cuda.get_device_name(m.device) if m.device.type == "cuda" else m.device.type,
        )

    def check(self, request: Request) -> None:
        """Refuse what cannot or may not be answered, before anything is charged or computed."""
        needs = access_of(request.kind, request.prompts)
        if not self.model.grant.covers(needs):
            raise AccessDenied(f"{needs.label} asked, the model grants {self.model.grant.label}")
        check_shapes(request.images, request.prompts)
        prompts = request.prompts
        if isinstance(prompts, SoftPrompts):
            shape = tuple(prompts.ctx_PLE.shape)
            if shape[2] != self.model.token_dim:
                raise EndpointRefused(f"context of shape {shape}, expected [P, L, {self.model.token_dim}]")
            if (bad := first_non_finite(prompts.ctx_PLE)) is not None:
                raise EndpointRefused(f"the context holds values that are not finite (prompt set {bad[0] + 1})")
        if request.kind == "text_gradients":
            self._check_upstream(prompts, request.upstream_PCD)
        if prompts is not None:
            (p, c), most = prompt_counts(prompts), TEXT_BYTES // (4 * self.model.feature_dim)
            if p * c > most:
                raise EndpointRefused(f"{p:,} sets of {c:,} prompts, a call may hold {most:,} prompts: ask fewer sets")

    def _check_upstream(self, prompts: Prompts | None, upstream_PCD: Tensor | None) -> None:
        if not isinstance(prompts, SoftPrompts):
            raise EndpointRefused("gradients in the context are asked of soft prompts only")
        wanted = (*prompt_counts(prompts), self.model.feature_dim)
        if upstream_PCD is None or tuple(upstream_PCD.shape) != wanted:
            found = None if upstream_PCD is None else tuple(upstream_PCD.shape)
            raise EndpointRefused(f"a gradient in the text features of shape {found}, expected {wanted}")
        if (bad := first_non_finite(upstream_PCD)) is not None:
            raise EndpointRefused(
                f"the gradient in the text features holds values that are not finite (prompt set {bad[0] + 1})"
            )

    def compute(self, request: Request) -> Response:
        """The answer; the same request gives the same bits, whatever was asked before or beside it.

        Raises:
            NonFiniteError: the model gave a value that is NaN or infinite. Nothing is answered, so nothing is billed.
        """
        if request.kind == "text_features":
            assert request.prompts is not None
            text_PCD, made = self._text(request.prompts)
            return Response(text_PCD.cpu().numpy(), computed_prompts=made)
        if request.kind == "text_gradients":
            assert isinstance(request.prompts, SoftPrompts) and request.upstream_PCD is not None
            p, c = prompt_counts(request.prompts)
            gradients_PLE = self.model.text_gradients(request.prompts, request.upstream_PCD)
            check_finite(request.kind, gradients_PLE, request.prompts)
            return Response(gradients_PLE.numpy(), computed_prompts=p * c)
        assert request.images is not None
        image_BD, computed = self._image(request.images)
        hits = len(request.images) - computed
        if request.kind == "image_features":
            return Response(image_BD.cpu().numpy(), computed_images=computed, cache_hits=hits)
        assert request.prompts is not None
        text_PCD, made = self._text(request.prompts)
        p, c, d = text_PCD.shape
        flat = (image_BD @ text_PCD.reshape(p * c, d).T).mul_(self.model.logit_scale)
        scores_PBC = flat.view(-1, p, c).transpose(0, 1).contiguous()
        return Response(scores_PBC.cpu().numpy(), computed, made, hits)

    def embed_text(self, text: str) -> np.ndarray:
        """[L, E], free of charge."""
        if not self.model.grant.covers(Access.SOFT):
            raise AccessDenied(f"embed_text needs SOFT, the model grants {self.model.grant.label}")
        return self.model.embed_text(text).numpy()

    def _image(self, images: Images) -> tuple[Tensor, int]:
        digest = images.digest
        features = self._images.get(digest)
        if features is not None:
            return features, 0
        keys = images.keys
        features, missing = self.store.read(keys)
        first: dict[str, int] = {}
        for i in missing:
            first.setdefault(keys[i], i)
        new = list(first.values())
        for start in range(0, len(new), STORED_AT_ONCE):
            part = new[start : start + STORED_AT_ONCE]
            made = self.model.encode_images(images[part])
            if (bad := first_non_finite(made)) is not None:
                raise NonFiniteError(f"image_features: {images.where(part[bad[0]])} has a feature that is {_OF_MODEL}")
            self.store.add([keys[i] for i in part], made)
            features[part] = made
        features[missing] = features[[first[keys[i]] for i in missing]]
        features = features.to(self.model.device)
        self._images.put(digest, features)
        return features, len(new)

    def _text(self, prompts: Prompts) -> tuple[Tensor, int]:
        digest = prompts_digest(prompts)
        features = self._texts.get(digest)
        if features is not None:
            return features, 0
        features = self.model.encode_prompts(prompts)
        check_finite("text_features", features, prompts)
        self._texts.put(digest, features)
        return features, features.shape[0] * features.shape[1]


_OF_MODEL = "NaN or infinite: the model's weights or its precision are unsuitable"


def check_finite(kind: Kind, values: Tensor, prompts: Prompts) -> None:
    """Raise NonFiniteError, naming the prompt set and the class, for values [P, ...] that are not finite."""
    if (bad := first_non_finite(values)) is None:
        return
    p, c = bad[0], bad[1]
    n_sets, _ = prompt_counts(prompts)
    where = f"prompt set {p + 1} of {n_sets}"
    if kind == "text_features":
        name = prompts.classnames[c] if isinstance(prompts, SoftPrompts) else prompts.texts[p][c]
        where += f", {name[:60]!r},"
    raise NonFiniteError(f"{kind}: {where} has a value that is {_OF_MODEL}")


def prompts_digest(prompts: Prompts) -> str:
    """Digest of prompt sets, exact to the bit."""
    if isinstance(prompts, SoftPrompts):
        ctx = np.ascontiguousarray(prompts.ctx_PLE.detach().numpy(), dtype="<f4")
        h = hashlib.sha256(repr((ctx.shape, prompts.classnames, prompts.suffix)).encode())
        h.update(ctx.tobytes())
        return h.hexdigest()
    return hashlib.sha256(repr(prompts.texts).encode()).hexdigest()


def check_shapes(images: Images | None, prompts: Prompts | None) -> None:
    """Raise EndpointRefused for a request about nothing, and for prompt sets of different sizes."""
    if images is not None and len(images) == 0:
        raise EndpointRefused("a request about no images")
    if isinstance(prompts, SoftPrompts):
        shape = tuple(prompts.ctx_PLE.shape)
        if len(shape) != 3 or shape[0] == 0 or not prompts.classnames:
            raise EndpointRefused(f"context of shape {shape} for {len(prompts.classnames)} classes, expected [P, L, E]")
    elif prompts is not None:
        sizes = sorted({len(texts) for texts in prompts.texts})
        if len(sizes) != 1 or sizes[0] == 0:
            raise EndpointRefused(f"prompt sets of {sizes} prompts: all must hold as many, one for each class")


def prompt_counts(prompts: Prompts) -> tuple[int, int]:
    """P prompt sets of C prompts."""
    if isinstance(prompts, SoftPrompts):
        return len(prompts.ctx_PLE), len(prompts.classnames)
    return len(prompts.texts), len(prompts.texts[0])


def price(kind: Kind, images: Images | None, prompts: Prompts | None, feature_dim: int) -> Bill:
    """The bill of a call, from its shapes alone (docs/budget.md)."""
    check_shapes(images, prompts)
    if kind == "image_features":
        assert images is not None
        return Bill.image_features(len(images), feature_dim)
    assert prompts is not None
    p, c = prompt_counts(prompts)
    if kind in ("text_features", "text_gradients"):
        return Bill.text_features(p, c, feature_dim)
    assert images is not None
    return Bill.scores(p, len(images), c)
