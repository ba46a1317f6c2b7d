"""Networks of local encoders: the embedded one, and those of timm.

A network maps normalised pixels [B, 3, size, size] to features [B, F].
"""

from __future__ import annotations

import difflib
from typing import Any, NamedTuple

from torch import Tensor, nn

from pipeline.data.images import Preprocess
from pipeline.errors import ConfigError

TINY = "tiny_conv"
STAGES = ((32, 5, 4), (96, 3, 2), (192, 3, 2))
"""Channels, side of the kernel and stride of the convolutions of `tiny_conv`."""
TINY_DIM = STAGES[-1][0]
TINY_INPUT = Preprocess(64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
"""Input of `tiny_conv`: 64 pixels, scaled to [-1, 1]."""


class Network(NamedTuple):
    """A network without weights, and what is needed to use it."""

    module: nn.Module
    preprocess: Preprocess
    feature_dim: int
    unused: tuple[str, ...] = ()
    """Prefixes of the keys of a weights file that belong to the classifier, which is left out."""


class TinyConv(nn.Module):
    """Three convolutions, each with batch normalisation and ReLU, the mean over positions, and a last normalisation."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for after, kernel, stride in STAGES:
            layers += [
                nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            ]
            before = after
        self.body, self.last = nn.Sequential(*layers), nn.BatchNorm1d(TINY_DIM, affine=False)

    def forward(self, x_B3SS: Tensor) -> Tensor:
        """Return the features [B, 192], each with variance 1 over the images of the training."""
        features: Tensor = self.last(self.body(x_B3SS).mean((2, 3)))
        return features


def build(arch: str) -> Network:
    """Build a network: `tiny_conv`, or a timm model by its name, without its classifier.

    Raises:
        ConfigError: timm has no model of this name, or its input is not a square RGB image.
    """
    if arch == TINY:
        return Network(TinyConv(), TINY_INPUT, TINY_DIM)
    import timm

    if not timm.is_model(arch):
        near = difflib.get_close_matches(arch, (TINY, *timm.list_models()), n=1)
        nearest = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"no arch named {arch[:80]!r}{nearest} (known: {TINY}, and timm's models without their tags)")
    module: Any = timm.create_model(arch, pretrained=False, num_classes=0)
    rule: dict[str, Any] = module.pretrained_cfg
    channels, height, width = rule["input_size"]
    if channels != 3 or height != width:
        raise ConfigError(f"arch {arch!r} takes inputs of shape {rule['input_size']}; expected a square RGB image")
    filter_ = "bilinear" if rule["interpolation"] == "bilinear" else "bicubic"
    preprocess = Preprocess(height, tuple(rule["mean"]), tuple(rule["std"]), filter=filter_)
    classifier = rule["classifier"]
    unused = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return Network(module, preprocess, module.num_features, unused)
