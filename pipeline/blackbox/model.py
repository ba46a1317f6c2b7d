"""The frozen model of an endpoint: an open_clip network, or the toy model.

Results depend on the request alone, to the bit: images are encoded in padded tiles of one size, prompts in tiles whose
boundaries depend on the request's shape only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, normalize

from methods._lora import Dropout, loss_and_gradients
from methods._toy import ToyTowers
from methods.base import Access, Lora, Prompts, SoftPrompts, TextPrompts
from pipeline.blackbox import architecture, lora
from pipeline.blackbox.architecture import PRECISIONS
from pipeline.blackbox.facts import TOY_TRANSFORM, describe, load_network, without_soft
from pipeline.blackbox.request import LoraStep
from pipeline.blackbox.text_tower import SharedPrefixTower, fits, too_long
from pipeline.blackbox.weights import check_finite
from pipeline.cards import ModelCard
from pipeline.data.decode import ahead, cores
from pipeline.data.images import Images, recoded
from pipeline.errors import ConfigError, EndpointRefused

IMAGE_TILE = 32
"""Images in every forward: short tiles are padded, so that features do not depend on the number of images."""

log = logging.getLogger(__name__)


class Model(Protocol):
    """Interface of a model. Features are L2-normalised float32."""

    device: torch.device
    """Device of the computation, and of the features of prompts."""
    identity: str
    logit_scale: float
    token_dim: int
    feature_dim: int
    image_size: int
    """Side of the input in pixels."""
    grant: Access
    transform: str
    lora_shapes: tuple[tuple[int, int], ...]
    """See `BlackBox.lora_shapes`."""

    def encode_images(self, images: Images, codec: str = "float") -> Tensor:
        """Return the features [B, D] of images, sent as `data.images.recoded` says, on the CPU."""
        ...

    def encode_pixels(self, pixels_B3SS: np.ndarray, codec: str = "float") -> Tensor:
        """Return the features [B, D] of 8-bit images at the size of the input, sent as `codec` says, on the CPU."""
        ...

    def encode_prompts(self, prompts: Prompts) -> Tensor:
        """Return the features [P, C, D] of prompts, on `device`."""
        ...

    def text_norms(self, prompts: Prompts) -> Tensor:
        """Return the lengths [P, C] of the text tower's outputs before normalisation, on the CPU."""
        ...

    def text_gradients(self, prompts: SoftPrompts, upstream_PCD: Tensor) -> Tensor:
        """Backpropagate a gradient [P, C, D] of the text features to the contexts [P, L, E]; on the CPU."""
        ...

    def merged(self, change: Lora) -> AbstractContextManager[None]:
        """Return a context in which the model is a changed one."""
        ...

    def lora_gradients(self, images: Images, prompts: TextPrompts, change: Lora, step: LoraStep) -> Tensor:
        """Return the loss of a changed model and the gradients in its factors, packed (`methods._lora`); on the CPU."""
        ...

    def embed_text(self, text: str) -> Tensor:
        """Return the token embeddings [L, E] of a text, without start and end tokens."""
        ...


def load(card: ModelCard) -> Model:
    """Load the model of a card. Raises ConfigError or DataError, with what to do, when it cannot be loaded."""
    if card.kind == "fake":
        return FakeModel(card)
    return OpenClipModel(card)


class FakeModel:
    """The toy model of `methods._toy`: deterministic, without weights."""

    device = torch.device("cpu")
    transform = TOY_TRANSFORM

    def __init__(self, card: ModelCard) -> None:
        self.towers = ToyTowers()
        self.identity, self.grant = describe(card).identity, card.access
        self.logit_scale = self.towers.logit_scale
        self.token_dim, self.feature_dim, self.image_size = self.towers.E, self.towers.D, self.towers.SIDE
        self.lora_shapes = self.towers.lora_shapes

    def encode_images(self, images: Images, codec: str = "float") -> Tensor:
        """Return the features [B, D]; a view adds noise that its key determines."""
        return torch.cat([self.towers.image_features(self._pixels(images, i, codec)[None]) for i in range(len(images))])

    def encode_pixels(self, pixels_B3SS: np.ndarray, codec: str = "float") -> Tensor:
        """See Model.encode_pixels."""
        made = [Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))) for pixels in pixels_B3SS]
        return torch.cat([self.towers.image_features(self._grey(image, codec)[None]) for image in made])

    def _pixels(self, images: Images, i: int, codec: str) -> Tensor:
        view = int(images.views_of[i])
        noise = 0.05 * self.towers.vector(images.key_of(i), self.towers.X) if view else 0
        return self._grey(images.decoded(i), codec) + noise

    def _grey(self, image: Image.Image, codec: str) -> Tensor:
        side = self.towers.SIDE
        grey = recoded(image.convert("L").resize((side, side)), codec)
        return torch.from_numpy(np.asarray(grey, np.float32).ravel() / 255)

    def encode_prompts(self, prompts: Prompts) -> Tensor:
        """Return the features [P, C, D] of prompts."""
        return self.towers.text_features(prompts)

    def text_norms(self, prompts: Prompts) -> Tensor:
        """See Model.text_norms."""
        return self.towers.text_outputs(prompts).norm(dim=-1)

    def text_gradients(self, prompts: SoftPrompts, upstream_PCD: Tensor) -> Tensor:
        """See Model.text_gradients."""
        return self.towers.text_gradients(prompts, upstream_PCD)

    def merged(self, change: Lora) -> AbstractContextManager[None]:
        """See Model.merged."""
        return self.towers.changed(change)

    def lora_gradients(self, images: Images, prompts: TextPrompts, change: Lora, step: LoraStep) -> Tensor:
        """See Model.lora_gradients."""
        pixels_BX = torch.stack([self._pixels(images, i, "float") for i in range(len(images))])
        dropout = Dropout.seeded(step.dropout, step.seed)
        return self.towers.lora_gradients(pixels_BX, step.labels_B, prompts, change, dropout)

    def embed_text(self, text: str) -> Tensor:
        """See Model.embed_text."""
        return self.towers.embed_text(text)


class OpenClipModel:
    """A model of open_clip: an architecture with a pretrained tag or a local file, or the embedded model."""

    def __init__(self, card: ModelCard) -> None:
        facts = describe(card)
        self.device, self.dtype = device_for(card), PRECISIONS[card.precision]
        self.net, self.preprocess = load_network(card, self.device)
        self.net.eval().requires_grad_(False)
        check_finite(card, self.net)
        self.identity, self.grant = facts.identity, facts.card.access
        self.logit_scale = float(self.net.logit_scale.exp())
        self.transform, self.image_size = self.preprocess.name, self.preprocess.size
        self.tokenizer: Any = architecture.tokenizer(card)
        self.text = SharedPrefixTower(self.net, self.tokenizer) if fits(self.net, self.tokenizer) else None
        if self.text is None:
            self.grant = without_soft(self.grant)
            log.warning("%s: its text tower takes prompts as strings only, so soft prompts are not granted", card.name)
        self.feature_dim = facts.feature_dim
        self.token_dim = self.text.token_dim if self.text else 0
        self.lora_shapes = () if lora.unsuited(self.net) or self.text is None else lora.shapes(self.net)

    def encode_images(self, images: Images, codec: str = "float") -> Tensor:
        """See Model.encode_images."""
        return self._encode(lambda i: self.preprocess.one(images, i, codec), len(images))

    def encode_pixels(self, pixels_B3SS: np.ndarray, codec: str = "float") -> Tensor:
        """See Model.encode_pixels."""

        def one(i: int) -> Tensor:
            rgb = np.ascontiguousarray(pixels_B3SS[i].transpose(1, 2, 0))
            return self.preprocess.normalised(np.asarray(recoded(Image.fromarray(rgb), codec)))

        return self._encode(one, len(pixels_B3SS))

    @torch.inference_mode()
    def _encode(self, one: Callable[[int], Tensor], n: int) -> Tensor:
        """Return the features [n, D] of images whose input pixels [3, size, size] `one` returns.

        The next tile is decoded while one is computed: by as many threads as torch has, or by all cores for a GPU.
        """
        decoders = cores() if self.device.type == "cuda" else torch.get_num_threads()
        pixels = ahead(one, n, decoders, IMAGE_TILE)
        rows: list[Tensor] = []
        while tile := list(islice(pixels, IMAGE_TILE)):
            rows.append(self._tile(tile))  # asynchronous on a GPU
            if len(rows) > 1:
                rows[-2] = rows[-2].cpu()  # waits for the previous tile
        return torch.cat([*rows[:-1], rows[-1].cpu()])

    def _tile(self, pixels: Sequence[Tensor]) -> Tensor:
        padded = torch.zeros(IMAGE_TILE, *pixels[0].shape, pin_memory=self.device.type == "cuda")
        for row, image in zip(padded.numpy(), pixels, strict=False):  # torch would use threads, which the decoders need
            row[:] = image.numpy()
        features_BD = self.net.encode_image(padded.to(self.device, non_blocking=True).to(self.dtype))
        return normalize(features_BD.float(), dim=-1)[: len(pixels)]

    @torch.inference_mode()
    def encode_prompts(self, prompts: Prompts) -> Tensor:
        """Return the features [P, C, D] of prompts."""
        return normalize(self._text_outputs(prompts), dim=-1)

    @torch.inference_mode()
    def text_norms(self, prompts: Prompts) -> Tensor:
        """See Model.text_norms."""
        return self._text_outputs(prompts).norm(dim=-1).cpu()

    def _text_outputs(self, prompts: Prompts) -> Tensor:
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
        return features.float()

    def text_gradients(self, prompts: SoftPrompts, upstream_PCD: Tensor) -> Tensor:
        """See Model.text_gradients."""
        if self.text is None:
            raise EndpointRefused("this model takes prompts as strings only")
        with torch.enable_grad():
            ctx_PLE = prompts.ctx_PLE.detach().clone().to(self.device).requires_grad_()
            features_PCD = self.text.encode(SoftPrompts(ctx_PLE, prompts.classnames, prompts.suffix))
            text_PCD = normalize(features_PCD.float(), dim=-1)
        return torch.autograd.grad(text_PCD, ctx_PLE, upstream_PCD.to(self.device))[0].float().cpu()

    def merged(self, change: Lora) -> AbstractContextManager[None]:
        """See Model.merged."""
        return lora.merged(self.net, change)

    def lora_gradients(self, images: Images, prompts: TextPrompts, change: Lora, step: LoraStep) -> Tensor:
        """See Model.lora_gradients."""
        assert self.text is not None
        text, pixels_B3SS = self.text, self.preprocess.pixels(images).to(self.device)
        dropout = Dropout.seeded(step.dropout, step.seed, self.device.type)

        def loss_of(changed: Lora) -> Tensor:
            # on a GPU the backward pass of the other kernels is not deterministic
            with lora.beside(self.net, changed, dropout), sdpa_kernel(SDPBackend.MATH):
                image_BD = normalize(self.net.encode_image(pixels_B3SS), dim=-1)
                text_CD = normalize(text.encode_whole(prompts.texts[0]), dim=-1)
            return cross_entropy(self.logit_scale * image_BD @ text_CD.T, step.labels_B.to(self.device))

        return loss_and_gradients(change, loss_of)

    def embed_text(self, text: str) -> Tensor:
        """See Model.embed_text."""
        if self.text is None:
            raise EndpointRefused("this model takes prompts as strings only")
        return self.text.embed(text).float().cpu()


def device_for(card: ModelCard) -> torch.device:
    """Return the GPU that this process sees (Ray assigns one to each replica), else the CPU."""
    if torch.cuda.is_available():
        torch.backends.cudnn.allow_tf32 = False  # fp32 must not be computed in TF32
        return torch.device("cuda")
    if card.precision == "fp16":
        raise ConfigError(f"model {card.name!r}: precision fp16 needs a GPU, and there is none here: use fp32 or bf16")
    return torch.device("cpu")
