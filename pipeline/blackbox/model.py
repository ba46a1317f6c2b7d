"""The frozen model behind an endpoint: open_clip's own loading code, and the toy. Only this module imports open_clip.

Every answer is a function of its request alone: image rows are computed in tiles of one fixed size (padded), prompt
sets in tiles cut by a rule that looks at the request only.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from methods._toy import ToyTowers
from methods.base import Access, Prompts, SoftPrompts
from pipeline.blackbox.text import SharedPrefixTower, fits
from pipeline.config import EMBEDDED, ModelCard
from pipeline.data.decode import ahead, cores, decode
from pipeline.data.images import Images, Preprocess
from pipeline.data.source import file_sha256
from pipeline.errors import ConfigError, DataError, EndpointRefused, did_you_mean

IMAGE_TILE = 32
"""Images in one forward, always: short tiles are padded, so that a row's value does not depend on its neighbours."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of weights and activations; norms stay in fp32, as open_clip keeps them."""

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


def identity(card: ModelCard) -> str:
    """What names the weights in trial ids and cache keys: a file's digest, or open_clip's own name and tag."""
    if card.kind == "fake":
        return "fake-1"
    _architecture(card)  # refuses an unknown one
    path = _checkpoint(card)
    return f"{card.arch}/{card.weights}" if path is None else f"{card.arch}/{file_sha256(path)}"


def feature_dim(card: ModelCard) -> int:
    """Width of the joint space, read from the architecture's config without loading weights."""
    if card.kind == "fake":
        return ToyTowers.D
    return int(_architecture(card)["embed_dim"])


def missing(card: ModelCard) -> tuple[str, str] | None:
    """What of a model is not on this machine, and where it is published; None when all is there. Fetches nothing."""
    if card.kind == "fake":
        return None
    import open_clip

    _architecture(card)
    if not has_tag(card):
        path = _weights_file(card)
        return None if path.is_file() else (f"no weights at {path}", card.source)
    known = open_clip.get_pretrained_cfg(card.arch, card.weights)
    if _cached(known):
        return None
    return "not in open_clip's cache; a run fetches them", known.get("url") or known["hf_hub"]


def _cached(known: dict[str, Any]) -> bool:
    """Whether open_clip has these weights: in its hub client's cache where it is told a hub, else in its own."""
    from huggingface_hub import try_to_load_from_cache
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    if "hf_hub" not in known:
        return (Path.home() / ".cache" / "clip" / Path(known["url"]).name).is_file()
    repo, _, file = known["hf_hub"].rpartition("/")
    names = [file] if file else [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]
    return any(isinstance(try_to_load_from_cache(repo, name), str) for name in names)


def load(card: ModelCard) -> Model:
    """The model of a card. ConfigError or DataError when it cannot be loaded, with what to do."""
    if card.kind == "fake":
        return FakeModel(card)
    return OpenClipModel(card)


class FakeModel:
    """`methods._toy` behind the endpoint: deterministic, needs no weights."""

    device = torch.device("cpu")
    transform = "grey8"

    def __init__(self, card: ModelCard) -> None:
        self.towers = ToyTowers()
        self.identity, self.grant = identity(card), card.access
        self.logit_scale = self.towers.logit_scale
        self.token_dim, self.feature_dim = self.towers.E, self.towers.D

    def encode_images(self, images: Images) -> Tensor:
        """[B, D]: a view adds noise drawn from its key."""
        return torch.cat([self.towers.image_features(self._pixels(images, i)[None]) for i in range(len(images))])

    def _pixels(self, images: Images, i: int) -> Tensor:
        grey = np.asarray(decode(images.bytes_of(i)).convert("L").resize((8, 8)), np.float32).ravel() / 255
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
        import open_clip

        _architecture(card)  # registers the embedded architecture, refuses an unknown one
        self.device, self.dtype = device_for(card), PRECISIONS[card.precision]
        checkpoint = _checkpoint(card)
        try:
            self.net = open_clip.create_model(
                card.arch, pretrained=str(checkpoint or card.weights), precision=card.precision, device=self.device
            )
        except Exception as error:  # RuntimeErrors of many kinds; a file whose pickle would run code is one of them
            raise DataError(f"model {card.name!r}: open_clip cannot load {card.weights!r}: {error}") from error
        self.net.eval().requires_grad_(False)
        self.identity, self.grant = identity(card), card.access
        self.logit_scale = float(self.net.logit_scale.exp())
        self.preprocess = _input_rule(card, open_clip.get_model_preprocess_cfg(self.net))
        self.transform = self.preprocess.name
        self.tokenizer: Any = (
            open_clip.SimpleTokenizer(
                bpe_path=str(EMBEDDED / f"{card.arch}_bpe.txt.gz"), context_length=self.net.context_length
            )
            if card.kind == "embedded"
            else open_clip.get_tokenizer(card.arch)
        )
        self.text = SharedPrefixTower(self.net, self.tokenizer) if fits(self.net, self.tokenizer) else None
        if self.text is None:
            self.grant = self.grant.closure() & ~(Access.SOFT | Access.GRADIENTS)
            log.warning("%s: its text tower takes whole strings only, so soft prompts are not granted", card.name)
        self.feature_dim = feature_dim(card)
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


def write_random_weights(arch: str, path: Path, seed: int = 0) -> None:
    """A checkpoint of weights that were never trained: what a bench loads where only shapes and time matter."""
    import open_clip

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.save(open_clip.CLIP(**open_clip.get_model_config(arch)).state_dict(), path)


def imagenet_names() -> tuple[str, ...]:
    """ImageNet's 1,000 class names as open_clip ships them."""
    import open_clip

    return tuple(open_clip.IMAGENET_CLASSNAMES)


def device_for(card: ModelCard) -> torch.device:
    """A GPU where this process sees one (Ray shows each replica its own), else the CPU."""
    if torch.cuda.is_available():
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32, on a GPU too
        return torch.device("cuda")
    if card.precision == "fp16":
        raise ConfigError(f"model {card.name!r}: precision fp16 needs a GPU, and none is seen here: take fp32 or bf16")
    return torch.device("cpu")


def _input_rule(card: ModelCard, config: dict[str, Any]) -> Preprocess:
    """The model's own transform, from open_clip's description of it."""
    sides = config["size"] if isinstance(config["size"], (list, tuple)) else [config["size"]]
    mode, kind = config.get("resize_mode", "shortest"), config.get("interpolation", "bicubic")
    if len(set(sides)) != 1 or mode not in ("shortest", "squash") or kind not in ("bicubic", "bilinear"):
        raise ConfigError(f"model {card.name!r}: images of size {sides}, {mode}, {kind} are not supported")
    return Preprocess(int(sides[0]), tuple(config["mean"]), tuple(config["std"]), mode, kind)


def _architecture(card: ModelCard) -> dict[str, Any]:
    import open_clip

    if card.kind not in ("embedded", "open_clip"):
        raise ConfigError(f"model {card.name!r}: kind {card.kind!r} is none of fake, embedded, open_clip")
    if card.precision not in PRECISIONS:
        raise ConfigError(f"model {card.name!r}: " + did_you_mean("precision", card.precision, PRECISIONS))
    if card.kind == "embedded" and card.arch not in open_clip.list_models():
        open_clip.add_model_config(EMBEDDED / f"{card.arch}.json")
    config = open_clip.get_model_config(card.arch)
    if config is None:
        known = ", ".join(n for n in open_clip.list_models() if n[:3].lower() == card.arch[:3].lower())
        raise ConfigError(f"model {card.name!r}: open_clip has no architecture {card.arch!r} (near: {known})")
    return cast(dict[str, Any], config)


def has_tag(card: ModelCard) -> bool:
    """Whether the weights are open_clip's own, by tag."""
    import open_clip

    return card.kind == "open_clip" and card.weights in open_clip.list_pretrained_tags_by_model(card.arch)


def _weights_file(card: ModelCard) -> Path:
    return EMBEDDED / card.weights if card.kind == "embedded" else Path(card.weights)


def _checkpoint(card: ModelCard) -> Path | None:
    """The local weights file, or None for an open_clip tag."""
    if has_tag(card):
        return None
    path = _weights_file(card)
    if not path.is_file():
        raise DataError(f"model {card.name!r}: {card.weights!r} is neither a file nor an open_clip tag of {card.arch}")
    if card.weights_sha256 and file_sha256(path) != card.weights_sha256:
        raise DataError(f"model {card.name!r}: {path} does not have the digest that its card states")
    return path
