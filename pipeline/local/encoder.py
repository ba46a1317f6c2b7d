"""A frozen pretrained encoder on the client, built from its card. No request is sent, and nothing is billed.

The file's SHA-256 and keys are verified when a run is planned, before anything is spent, and again in each process that
loads it. Only safetensors files are read: they hold numbers and no code.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from methods.base import ImageSet
from pipeline.cards import LocalCard
from pipeline.data.images import Preprocess, as_images
from pipeline.errors import ConfigError, DataError
from pipeline.local import networks
from pipeline.local.facts import LocalFacts

TILE = 32
"""Images in every forward: a short tile is padded, so that features do not depend on the number of images."""


class Encoder:
    """Implements `methods.base.LocalModel` for images by reference.

    Raises:
        ConfigError: the card's `arch` is unknown, or the weights do not fit it.
        DataError: the weights file is missing or has another SHA-256 than the card.
    """

    def __init__(self, card: LocalCard) -> None:
        try:
            with torch.random.fork_rng(devices=[]):  # a network is built with random weights
                network = networks.build(card.arch)
        except ConfigError as error:
            raise ConfigError(f"local model {card.name!r}: {error}") from error
        self.net, self.preprocess, self.feature_dim = network.module, network.preprocess, network.feature_dim
        _fill(card, network)
        self.net.eval().requires_grad_(False)
        self.size = self.preprocess.size
        self._mean, self._std = (torch.tensor(v).view(1, 3, 1, 1) for v in (self.preprocess.mean, self.preprocess.std))

    def features(self, images: ImageSet) -> Tensor:
        """Return the features [B, F] of images or views, without a gradient."""
        whole, rows = as_images(images), []
        with torch.no_grad():
            for start in range(0, len(whole), TILE):
                tile = self.preprocess.pixels(whole[start : start + TILE])
                padded = torch.zeros(TILE, *tile.shape[1:])
                padded[: len(tile)] = tile
                rows.append(self.net(padded)[: len(tile)].float())
        return torch.cat(rows) if rows else torch.empty(0, self.feature_dim)

    def pixels(self, images: ImageSet, size: int) -> Tensor:
        """Return the images or views as RGB [B, 3, size, size] in [0, 1], resized by the model's rule."""
        whole, rule = as_images(images), Preprocess(size, mode=self.preprocess.mode, filter=self.preprocess.filter)
        return rule.pixels(whole) if len(whole) else torch.empty(0, 3, size, size)

    def encode(self, pixels_B3SS: Tensor) -> Tensor:
        """Return the features [B, F] of pixels in [0, 1], with their gradient."""
        features: Tensor = self.net((pixels_B3SS - self._mean) / self._std).float()
        return features


@lru_cache(maxsize=1)
def open_encoder(card: LocalCard) -> Encoder:
    """Return the encoder of a card; it is loaded once in a process."""
    return Encoder(card)


@lru_cache(maxsize=1)
def describe(card: LocalCard) -> LocalFacts:
    """Verify and load a local model. Raises as `Encoder` does."""
    encoder = open_encoder(card)
    identity = f"{card.arch}/{card.sha256}/{encoder.preprocess.name}"
    params = sum(p.numel() for p in encoder.net.parameters())
    note = f"local model {card.name}: {card.arch}, {params:,} parameters, trained on {card.trained_on} ({card.licence})"
    return LocalFacts(card, hashlib.sha256(identity.encode()).hexdigest()[:16], params, note)


def _fill(card: LocalCard, network: networks.Network) -> None:
    """Read the weights of a card into a network."""
    where = f"local model {card.name!r}"
    path = card.file
    if not path.is_file():
        raise DataError(f"{where}: there is no weights file {path}: correct `weights` in its card")
    data = _verified(where, path, card.sha256)
    try:
        weights = load(data)
    except SafetensorError as error:
        raise ConfigError(f"{where}: {path.name} is no safetensors file ({error}): convert it first") from error
    del data
    kept = {k: v for k, v in weights.items() if k.split(".")[0] not in network.unused}
    try:
        result = network.module.load_state_dict(kept, strict=False)
    except RuntimeError as error:  # a shape differs
        raise ConfigError(f"{where}: its weights do not fit arch {card.arch!r}: {_first(error)}") from error
    missing = [k for k in result.missing_keys if not k.endswith("num_batches_tracked")]
    if missing or result.unexpected_keys:
        what = f"no {missing[0]}" if missing else f"{result.unexpected_keys[0]}, which the network has not"
        raise ConfigError(f"{where}: its weights do not fit arch {card.arch!r}: the file has {what}")
    if bad := [name for name, value in network.module.state_dict().items() if not torch.isfinite(value).all()]:
        raise ConfigError(f"{where}: {bad[0]} in {path.name} has a value that is NaN or infinite: get another file")


def _verified(where: str, path: Path, sha256: str) -> bytes:
    """Read a file once and verify it, so that what is parsed is what was verified."""
    data = path.read_bytes()
    actual = hashlib.sha256(data).hexdigest()
    if actual != sha256:
        raise DataError(
            f"{where}: {path} has SHA-256 {actual[:16]}..., its card {sha256[:16]}...: correct the card or the file"
        )
    return data


def _first(error: Exception) -> str:
    """Return the first line of torch's message that names a tensor."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line[:120] for line in lines if line.startswith("size mismatch")), lines[0][:120])
