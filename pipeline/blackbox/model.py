"""The frozen model behind an endpoint: an open_clip network, and the toy.

Every answer is a function of its request alone: image rows are computed in tiles of one fixed size (padded), prompt
sets in tiles cut by a rule that looks at the request only.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from methods.base import Access, Prompts, SoftPrompts
from methods.toy import ToyTowers
from pipeline.blackbox import architecture
from pipeline.blackbox.architecture import PRECISIONS
from pipeline.blackbox.facts import TOY_TRANSFORM, describe, load_network, without_soft
from pipeline.blackbox.text_tower import SharedPrefixTower, fits, too_long
from pipeline.blackbox.weights import check_finite
from pipeline.cards import ModelCard
from pipeline.data.decode import ahead, cores
from pipeline.data.images import Images
from pipeline.errors import ConfigError, EndpointRefused

IMAGE_TILE = 32
"""Images in one forward, always: short tiles are padded, so that a row's value does not depend on its neighbours."""

log = logging.getLogger(__name__)


class Model(Protocol):
    """What an endpoint needs of a model. Features are L2-normalised float32."""

    device: torch.device
    """Where it computes, and where the features of prompts stay."""
    identity: str
    logit_scale: float
    token_dim: int
    feature_dim: int
    grant: Access
    transform: str

    def encode_images(self, images: Images) -> Tensor:
        """[B, D] on the CPU, where the store takes them"""
        ...

    def encode_prompts(self, prompts: Prompts) -> Tensor:
        """[P, C, D] on `device`"""
        ...

    def text_gradients(self, prompts: SoftPrompts, upstream_PCD: Tensor) -> Tensor:
        """[P, L, E] on the CPU: the way back through `encode_prompts`, for models that grant gradients"""
        ...

    def embed_text(self, text: str) -> Tensor:
        """[L, E], without start and end tokens"""
        ...


def load(card: ModelCard) -> Model:
    """The model of a card. ConfigError or DataError when it cannot be loaded, with what to do."""
    if card.kind == "fake":
        return FakeModel(card)
    return OpenClipModel(card)


class FakeModel:
    """`methods.toy` behind the endpoint: deterministic, needs no weights."""

    device = torch.device("cpu")
    transform = TOY_TRANSFORM

    def __init__(self, card: ModelCard) -> None:
        self.towers = ToyTowers()
        self.identity, self.grant = describe(card).identity, card.access
        self.logit_scale = self.towers.logit_scale
        self.token_dim, self.feature_dim = self.towers.E, self.towers.D

    def encode_images(self, images: Images) -> Tensor:
        """[B, D]: a view adds noise drawn from its key."""
        return torch.cat([self.towers.image_features(self._pixels(images, i)[None]) for i in range(len(images))])

    def _pixels(self, images: Images, i: int) -> Tensor:
        grey = np.asarray(images.decoded(i).convert("L").resize((8, 8)), np.float32).ravel() / 255
        view = int(images.views_of[i])
        return torch.from_numpy(grey) + (0.05 * self.towers.vector(images.key_of(i), 64) if view else 0)

    def encode_prompts(self, prompts: Prompts) -> Tensor:
        """[P, C, D]"""
        return self.towers.text_features(prompts)

    def text_gradients(self, prompts: SoftPrompts, upstream_PCD: Tensor) -> Tensor:
        """[P, L, E]"""
        return self.towers.text_gradients(prompts, upstream_PCD)

    def embed_text(self, text: str) -> Tensor:
        """[L, E]"""
        return self.towers.embed_text(text)


class OpenClipModel:
    """Any open_clip model: an architecture name with OpenAI or other weights, or the embedded one."""

    def __init__(self, card: ModelCard) -> None:
        facts = describe(card)
        self.device, self.dtype = device_for(card), PRECISIONS[card.precision]
        self.net, self.preprocess = load_network(card, self.device)
        self.net.eval().requires_grad_(False)
        check_finite(card, self.net)
        self.identity, self.grant = facts.identity, card.access
        self.logit_scale = float(self.net.logit_scale.exp())
        self.transform = self.preprocess.name
        self.tokenizer: Any = architecture.tokenizer(card)
        self.text = SharedPrefixTower(self.net, self.tokenizer) if fits(self.net, self.tokenizer) else None
        if self.text is None:
            self.grant = without_soft(self.grant)
            log.warning("%s: its text tower takes whole strings only, so soft prompts are not granted", card.name)
        self.feature_dim = facts.feature_dim
        self.token_dim = self.text.token_dim if self.text else 0

    @torch.inference_mode()
    def encode_images(self, images: Images) -> Tensor:
        """[B, D]. The next tile is decoded beside the present one: by as many threads as may compute, or, where a GPU
        computes and would wait for them, by all cores.
        """
        decoders = cores() if self.device.type == "cuda" else torch.get_num_threads()
        pixels = ahead(lambda i: self.preprocess.one(images, i), len(images), decoders, IMAGE_TILE)
        rows: list[Tensor] = []
        while tile := list(islice(pixels, IMAGE_TILE)):
            rows.append(self._tile(tile))  # on a GPU only set under way
            if len(rows) > 1:
                rows[-2] = rows[-2].cpu()  # waits for the tile before
        return torch.cat([*rows[:-1], rows[-1].cpu()])

    def _tile(self, pixels: Sequence[Tensor]) -> Tensor:
        padded = torch.zeros(IMAGE_TILE, *pixels[0].shape, pin_memory=self.device.type == "cuda")
        for row, image in zip(padded.numpy(), pixels, strict=False):  # torch would copy by threads, beside the decoders
            row[:] = image.numpy()
        features_BD = self.net.encode_image(padded.to(self.device, non_blocking=True).to(self.dtype))
        return normalize(features_BD.float(), dim=-1)[: len(pixels)]

    @torch.inference_mode()
    def encode_prompts(self, prompts: Prompts) -> Tensor:
        """[P, C, D]"""
        if self.text is not None:
            features = self.text.encode(prompts)
        elif isinstance(prompts, SoftPrompts):
            raise EndpointRefused("this model takes prompts as strings only")
        else:
            longest = max(architecture.prompt_lengths(self.tokenizer, [t for texts in prompts.texts for t in texts]))
            if longest > self.net.context_length:
                raise EndpointRefused(too_long(longest, self.net.context_length))
            features = torch.stack(
                [self.net.encode_text(self.tokenizer(list(t)).to(self.device)) for t in prompts.texts]
            )
        return normalize(features.float(), dim=-1)

    def text_gradients(self, prompts: SoftPrompts, upstream_PCD: Tensor) -> Tensor:
        """[P, L, E]"""
        if self.text is None:
            raise EndpointRefused("this model takes prompts as strings only")
        with torch.enable_grad():
            ctx_PLE = prompts.ctx_PLE.detach().clone().to(self.device).requires_grad_()
            features_PCD = self.text.encode(SoftPrompts(ctx_PLE, prompts.classnames, prompts.suffix))
            text_PCD = normalize(features_PCD.float(), dim=-1)
        return torch.autograd.grad(text_PCD, ctx_PLE, upstream_PCD.to(self.device))[0].float().cpu()

    def embed_text(self, text: str) -> Tensor:
        """[L, E]"""
        if self.text is None:
            raise EndpointRefused("this model takes prompts as strings only")
        return self.text.embed(text).float().cpu()


def device_for(card: ModelCard) -> torch.device:
    """A GPU where this process sees one (Ray shows each replica its own), else the CPU."""
    if torch.cuda.is_available():
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32, on a GPU too
        return torch.device("cuda")
    if card.precision == "fp16":
        raise ConfigError(f"model {card.name!r}: precision fp16 needs a GPU, and none is seen here: take fp32 or bf16")
    return torch.device("cpu")
