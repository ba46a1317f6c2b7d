"""The endpoint: a frozen model that answers requests, with its feature store and caches.

It knows nothing of budgets: the replica queue and `LocalPool` charge the ledger.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from methods._finite import first_non_finite
from methods.base import Access, Lora, Prompts, SoftPrompts, TextPrompts
from pipeline.blackbox import answers, lora, text_norm
from pipeline.blackbox import model as models
from pipeline.blackbox.feature_store import FeatureStore, MemoryStore
from pipeline.blackbox.lru_cache import LRUCache
from pipeline.blackbox.request import (
    Kind,
    ModelInfo,
    Request,
    Response,
    access_of,
    check_shapes,
    prompt_counts,
    prompts_digest,
)
from pipeline.blackbox.stored_images import ImageRows, read_or_encode
from pipeline.cards import FULL_ANSWERS, ModelCard
from pipeline.data.images import Images
from pipeline.data.made_images import MadeImages
from pipeline.errors import AccessDenied, EndpointRefused, NonFiniteError
from pipeline.source_code import image_feature_digest

IMAGE_BYTES = 256 * 2**20
"""Capacity of the cache of image features, on the model's device."""
TEXT_BYTES = 2**30
"""Capacity of the cache of prompt features, and the most that one call may take: six times 40 prompt sets of 1,000
classes at D = 1024."""
MEMORY_BYTES = 2**28
"""Capacity of a feature store in memory."""


class Endpoint:
    """A model with its feature store and caches. One thread at a time may call it.

    `features` is the folder of the store; without one, features are kept in memory.
    """

    def __init__(self, card: ModelCard, features: Path | None) -> None:
        self.model = models.load(card)
        self.precision = card.precision
        self.text_norm = card.text_norm or text_norm.measure(self.model).value
        producer = [self.model.identity, card.precision, self.model.transform, f"code {image_feature_digest()}"]
        if self.model.device.type != "cpu":
            producer.append(self.model.device.type)  # its features differ in the last bits from those of a CPU
        self._producer = producer
        self.forget(features)

    def forget(self, features: Path | None) -> None:
        """Empty the caches, and store features in this folder, so that images and prompts are encoded again."""
        self._features, self._stores = features, dict[str, FeatureStore | MemoryStore]()
        self._images, self._texts = LRUCache[ImageRows](IMAGE_BYTES), LRUCache[Tensor](TEXT_BYTES)
        self.store()  # a folder that cannot be used fails here

    def store(self, codec: str = "float") -> FeatureStore | MemoryStore:
        """Return the store of the features of images that are sent in this way (see `data.images.recoded`)."""
        if codec not in self._stores:
            name = " ".join([*self._producer, *([codec] if codec != "float" else [])])
            width, folder = self.model.feature_dim, self._features
            self._stores[codec] = (
                MemoryStore(MEMORY_BYTES, width) if folder is None else FeatureStore(folder, name, width)
            )
        return self._stores[codec]

    @property
    def info(self) -> ModelInfo:
        """The model's constants."""
        m = self.model
        return ModelInfo(
            identity=m.identity,
            logit_scale=m.logit_scale,
            text_norm=self.text_norm,
            token_dim=m.token_dim,
            feature_dim=m.feature_dim,
            image_size=m.image_size,
            grant=m.grant,
            precision=self.precision,
            transform=m.transform,
            device=torch.cuda.get_device_name(m.device) if m.device.type == "cuda" else m.device.type,
            lora_shapes=m.lora_shapes if Access.LORA in m.grant else (),
        )

    def check(self, request: Request) -> None:
        """Validate a request before it is charged or computed.

        Raises:
            AccessDenied: the model does not grant the access that the request needs.
            EndpointRefused: a shape is wrong, a value is not finite, or there are too many prompts.
        """
        needed = access_of(request.kind, request.images, request.prompts, request.answer, request.lora)
        granted = request.answers.granted(self.model.grant)
        if not granted.covers(needed):
            how = f" with answers {request.answers.text}" if request.answers != FULL_ANSWERS else ""
            raise AccessDenied(f"the call needs {needed.label}, the model grants {granted.label}{how}")
        check_shapes(request.images, request.prompts)
        if isinstance(request.images, MadeImages):
            check_pixels(request.kind, request.images.pixels_PB3SS, self.model.image_size)
        prompts = request.prompts
        if isinstance(prompts, SoftPrompts):
            shape = tuple(prompts.ctx_PLE.shape)
            if shape[2] != self.model.token_dim:
                raise EndpointRefused(f"context of shape {shape}, expected [P, L, {self.model.token_dim}]")
            if (bad := first_non_finite(prompts.ctx_PLE)) is not None:
                raise EndpointRefused(f"the context has a value that is not finite (prompt set {bad[0] + 1})")
        if request.kind == "text_gradients":
            self._check_upstream(prompts, request.upstream_PCD)
        if request.lora is not None:
            lora.check(request, self.model.lora_shapes)
        if prompts is not None:
            check_prompt_count(prompts, self.model.feature_dim)

    def _check_upstream(self, prompts: Prompts | None, upstream_PCD: Tensor | None) -> None:
        if not isinstance(prompts, SoftPrompts):
            raise EndpointRefused("text_gradients takes soft prompts only")
        expected = (*prompt_counts(prompts), self.model.feature_dim)
        shape = None if upstream_PCD is None else tuple(upstream_PCD.shape)
        if upstream_PCD is None or shape != expected:
            raise EndpointRefused(f"a gradient in the text features of shape {shape}, expected {expected}")
        if (bad := first_non_finite(upstream_PCD)) is not None:
            raise EndpointRefused(
                f"the gradient in the text features has a value that is not finite (prompt set {bad[0] + 1})"
            )

    def compute(self, request: Request) -> Response:
        """Return the response to a checked request. Equal requests give equal bits, whatever was computed before.

        Raises:
            NonFiniteError: the model returned a value that is NaN or infinite. The call must then be refunded.
        """
        if request.lora is not None:
            return self._changed(request, request.lora)
        if request.kind == "text_features":
            assert request.prompts is not None
            text_PCD, n_prompts = self._text(request.prompts)
            told = answers.told_features(text_PCD, request, self.model.logit_scale)
            return Response(told.cpu().numpy(), computed_prompts=n_prompts)
        if request.kind == "text_gradients":
            assert isinstance(request.prompts, SoftPrompts) and request.upstream_PCD is not None
            p, c = prompt_counts(request.prompts)
            gradients_PLE = self.model.text_gradients(request.prompts, request.upstream_PCD)
            check_finite(request.kind, gradients_PLE, request.prompts)
            return Response(gradients_PLE.numpy(), computed_prompts=p * c)
        assert request.images is not None
        codec = request.answers.images
        if isinstance(request.images, MadeImages):
            image_PBD = self._made(request.images, codec)
            n_images, hits = image_PBD.shape[0] * image_PBD.shape[1], 0
        else:
            image_BD, n_images = self._image(request.images, codec, request.charge.id)
            image_PBD, hits = image_BD.unsqueeze(0), len(request.images) - n_images
        if request.kind == "image_features":
            told = answers.told_features(image_BD, request, self.model.logit_scale)
            return Response(told.cpu().numpy(), computed_images=n_images, cache_hits=hits)
        assert request.prompts is not None
        text_PCD, n_prompts = self._text(request.prompts)
        scores_PBC = paired_scores(image_PBD, text_PCD, self.model.logit_scale)
        if request.answer is not Access.SCORES:
            check_finite("scores", scores_PBC, request.prompts)  # the client could not see it in the answer
        told = answers.told_scores(scores_PBC, request)
        return Response(told.cpu().numpy(), n_images, n_prompts, hits)

    def embed_text(self, text: str) -> np.ndarray:
        """Return the token embeddings [L, E] of a text; free. Raises AccessDenied where SOFT is not granted."""
        if not self.model.grant.covers(Access.SOFT):
            raise AccessDenied(f"embed_text needs SOFT, the model grants {self.model.grant.label}")
        return self.model.embed_text(text).numpy()

    def _changed(self, request: Request, change: Lora) -> Response:
        """Return the response of a changed model. Images and prompts are encoded anew, and nothing is stored."""
        images, prompts, step = request.images, request.prompts, request.step
        assert isinstance(images, Images) and prompts is not None
        p, c = prompt_counts(prompts)
        if step is not None:
            assert isinstance(prompts, TextPrompts)
            packed = self.model.lora_gradients(images, prompts, change, step)
            if first_non_finite(packed) is not None:
                raise NonFiniteError(f"lora_gradients: the loss or a gradient is {_CAUSE}")
            return Response(packed.numpy(), computed_images=2 * len(images), computed_prompts=2 * c)
        with self.model.merged(change):
            image_BD, text_PCD = self.model.encode_images(images), self.model.encode_prompts(prompts)
        scores_PBC = cosine_scores(image_BD.to(self.model.device), text_PCD, self.model.logit_scale)
        check_finite("scores", scores_PBC, prompts)
        return Response(answers.told_scores(scores_PBC, request).cpu().numpy(), len(images), p * c)

    def _made(self, images: MadeImages, codec: str) -> Tensor:
        """Return the features [P, B, D] of images that a client made, on the model's device. They are not stored."""
        p, b = images.pixels_PB3SS.shape[:2]
        features = self.model.encode_pixels(images.pixels_PB3SS.reshape(p * b, *images.pixels_PB3SS.shape[2:]), codec)
        if (bad := first_non_finite(features)) is not None:
            raise NonFiniteError(f"scores: {images.where(bad[0])} has a feature that is {_CAUSE}")
        return features.view(p, b, -1).to(self.model.device)

    def _image(self, images: Images, codec: str, charge_id: str) -> tuple[Tensor, int]:
        """Return the features [B, D] on the model's device, and how many images were encoded for this charge.

        The number is the same when the call is repeated after a kill, so every stored image is counted once.
        """
        digest, call = f"{images.digest} {codec}", hashlib.sha256(charge_id.encode()).hexdigest()[:16]
        rows = self._images.get(digest)
        if rows is None:
            encode = partial(self._encode, images, codec)
            rows = read_or_encode(images.keys, self.store(codec), encode, call, self.model.device)
            self._images.put(digest, rows)
        return rows.features_BD, rows.calls[call]

    def _encode(self, images: Images, codec: str, rows: list[int]) -> Tensor:
        encoded = self.model.encode_images(images[rows], codec)
        if (bad := first_non_finite(encoded)) is not None:
            raise NonFiniteError(f"image_features: {images.where(rows[bad[0]])} has a feature that is {_CAUSE}")
        return encoded

    def _text(self, prompts: Prompts) -> tuple[Tensor, int]:
        """Return the features [P, C, D] on the model's device, and how many prompts were encoded for them."""
        digest = prompts_digest(prompts)
        features = self._texts.get(digest)
        if features is not None:
            return features, 0
        features = self.model.encode_prompts(prompts)
        check_finite("text_features", features, prompts)
        self._texts.put(digest, features)
        return features, features.shape[0] * features.shape[1]


def cosine_scores(image_BD: Tensor, text_PCD: Tensor, logit_scale: float) -> Tensor:
    """Return the scores [P, B, C] of unit features."""
    p, c, d = text_PCD.shape
    flat = (image_BD @ text_PCD.reshape(p * c, d).T).mul_(logit_scale)
    return flat.view(-1, p, c).transpose(0, 1).contiguous()


def paired_scores(image_PBD: Tensor, text_PCD: Tensor, logit_scale: float) -> Tensor:
    """Return the scores [P, B, C] of P sets of images, each under its prompt set, or of one of either."""
    if len(image_PBD) == 1:
        return cosine_scores(image_PBD[0], text_PCD, logit_scale)
    pairs = zip(image_PBD, text_PCD.expand(len(image_PBD), *text_PCD.shape[1:]), strict=True)
    return torch.stack([image_BD @ text_CD.T for image_BD, text_CD in pairs]).mul_(logit_scale)


_CAUSE = "NaN or infinite: the model's weights or its precision are unsuitable"


def check_pixels(kind: Kind, pixels_PB3SS: np.ndarray, size: int) -> None:
    """Raise EndpointRefused for images that a client made, if the call takes none or their shape or type is wrong."""
    if kind != "scores":
        raise EndpointRefused(f"{kind} takes the task's images only: send images that you made to scores")
    shape = pixels_PB3SS.shape
    if pixels_PB3SS.dtype != np.uint8 or len(shape) != 5 or shape[2:] != (3, size, size):
        raise EndpointRefused(
            f"pixels {shape} of {pixels_PB3SS.dtype}, expected uint8 [P, B, 3, {size}, {size}] (box.image_size)"
        )


def check_prompt_count(prompts: Prompts, feature_dim: int) -> None:
    """Raise EndpointRefused if the features of these prompts are too many for one call."""
    (p, c), limit = prompt_counts(prompts), TEXT_BYTES // (4 * max(1, feature_dim))
    if p * c > limit:
        raise EndpointRefused(
            f"{p:,} prompt sets of {c:,} prompts exceed the {limit:,} prompts of a call: send fewer sets"
        )


def check_finite(kind: Kind, values: Tensor, prompts: Prompts) -> None:
    """Check values [P, ...] of prompts.

    Raises:
        NonFiniteError: one is NaN or infinite. The message names the prompt set, and for text features the class.
    """
    if (bad := first_non_finite(values)) is None:
        return
    p, c = bad[0], bad[1]
    n_sets, _ = prompt_counts(prompts)
    where = f"prompt set {p + 1} of {n_sets}"
    if kind == "text_features":
        name = prompts.classnames[c] if isinstance(prompts, SoftPrompts) else prompts.texts[p][c]
        where += f", {name[:60]!r},"
    raise NonFiniteError(f"{kind}: {where} has a value that is {_CAUSE}")
