"""BlackVIP's coordinator: a network that makes an image's prompt from a code of the image. A part, not a method.

The decoder takes 32 * g * g numbers, the code of the image and a learned trigger, as [32, g, g] to a prompt
[3, 32 g, 32 g] by transposed convolutions. For images of side S, g = ceil(S / 32), and the prompt is averaged to S if S
is no multiple of 32. The release has g = 7 (S = 224), a code of 768 numbers and a trigger of 800; other sides have a
trigger of the same share.
Shapes: B images, S their side, g side of the decoder's input, Z width of the code, d parameters.
Cost: none, on the client. At S = 224, 15 million multiplications for each image and parameter vector.
Paper: Oh et al., arXiv:2303.14773, as in its released trainers/visual_prompters.py.
"""

from __future__ import annotations

import math

from methods._torch import F, Tensor, torch

BLOCKS = ((32, 64, 64), (64, 64, 32), (32, 32, 32), (32, 32, 16))
"""Channels in, channels after the 2x2 transposed convolution of each channel alone, and after the 1x1 convolution."""
CONVOLUTIONS = ((3, 32, 32), (32, 32, 64), (64, 64, 64), (64, 64, 128), (128, 128, 32))
"""Channels in, channels after the 3x3 convolution, channels after the 2x2 convolution of stride 2."""
MOMENTUM = 0.1
"""Weight of a batch in the running statistics."""
TRIGGER_SHARE = 800 / 1568
"""Share of the trigger in the decoder's input."""


def grid_side(size: int) -> int:
    """Return g for images of this side."""
    return math.ceil(size / 32)


def trigger_width(size: int) -> int:
    """Return the width of the trigger for images of this side; the code has the rest of 32 g^2."""
    return round(TRIGGER_SHARE * 32 * grid_side(size) ** 2)


def uniform(shape: tuple[int, ...], fan_in: int, generator: torch.Generator) -> Tensor:
    """Return torch's initial weights of a convolution: uniform on +-1 / sqrt(fan_in)."""
    return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(fan_in)


def upsampled(x_BCHW: Tensor, weight_CO22: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Return the transposed convolution [B, O, 2H, 2W] of kernel 2 and stride 2, as a matrix product for each pixel."""
    weight = weight_CO22.flatten(1).T.unsqueeze(-1).unsqueeze(-1)
    bias = None if bias_O is None else bias_O.repeat_interleave(4)
    return F.pixel_shuffle(F.conv2d(x_BCHW, weight, bias), 2)


class BatchStatistics:
    """Running mean and variance of a batch normalization."""

    def __init__(self, width: int) -> None:
        self.mean, self.variance = torch.zeros(width), torch.ones(width)

    def __call__(self, x: Tensor, updates: int, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Normalize by the batch's statistics and move the running ones `updates` times; 0: by the running ones."""
        momentum = 1 - (1 - MOMENTUM) ** updates
        return F.batch_norm(x, self.mean, self.variance, weight, bias, training=updates > 0, momentum=momentum)


class Decoder:
    """Makes prompts from codes, with a parameter vector [d] that is given to each call."""

    def __init__(self, size: int, trigger: int) -> None:
        self.size, self.side, self.trigger = size, grid_side(size), trigger
        self.shapes: list[tuple[int, ...]] = [(trigger,)]
        for n_in, n_up, n_out in BLOCKS:
            self.shapes += [(n_in, n_up // n_in, 2, 2), (n_up,), (n_up, n_out), (n_out,), (n_out,)]
        self.shapes.append((BLOCKS[-1][-1], 3, 2, 2))
        self.statistics = [BatchStatistics(n_out) for *_, n_out in BLOCKS]

    def initial(self, generator: torch.Generator) -> Tensor:
        """Return initial parameters [d]: the trigger uniform on [0, 0.1], torch's default for the rest."""
        parts = [0.1 * torch.rand(self.trigger, generator=generator)]
        for n_in, n_up, n_out in BLOCKS:
            fan_in = n_up // n_in * 4
            parts += [uniform((n_in * fan_in,), fan_in, generator), uniform((n_up,), fan_in, generator)]
            parts += [uniform((n_up * n_out,), n_out, generator), torch.ones(n_out), torch.zeros(n_out)]
        return torch.cat([*parts, uniform((BLOCKS[-1][-1] * 12,), 12, generator)])

    def __call__(self, w_d: Tensor, code_BZ: Tensor, training: bool) -> Tensor:
        """Return prompts [B, 3, S, S]. In training, batch statistics normalize, and the running ones are updated."""
        pieces = torch.split(w_d, [math.prod(shape) for shape in self.shapes])
        trigger, *weights = (piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True))
        x = torch.cat([code_BZ, trigger.expand(len(code_BZ), -1)], dim=1)
        x = x.view(len(code_BZ), 32, self.side, self.side)
        for k, statistics in enumerate(self.statistics):
            up, up_bias, mix, scale, shift = weights[5 * k : 5 * k + 5]
            # The two convolutions in one: nothing but a bias is between them.
            both = torch.einsum("crij,cro->coij", up, mix.view(*up.shape[:2], -1))
            x = F.gelu(statistics(upsampled(x, both, up_bias @ mix), int(training), scale, shift))
        x = upsampled(x, weights[-1])
        return x if x.shape[-1] == self.size else F.adaptive_avg_pool2d(x, self.size)

    def tensors(self) -> dict[str, Tensor]:
        """Return the running statistics."""
        return {f"decoder_{k}_{name}": t for k, part in enumerate(self.statistics) for name, t in vars(part).items()}


class ThumbnailEncoder:
    """A fixed random projection of 8x8 thumbnails to Z numbers."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        self.projection_XZ = torch.randn(3 * 8 * 8, width, generator=generator) / math.sqrt(3 * 8 * 8)

    def __call__(self, x_B3SS: Tensor, updates: int) -> Tensor:
        """Return the codes [B, Z] of normalized images."""
        return F.adaptive_avg_pool2d(x_B3SS, 8).flatten(1) @ self.projection_XZ

    def tensors(self) -> dict[str, Tensor]:
        """Return the projection."""
        return {"projection_XZ": self.projection_XZ}


class RandomEncoder:
    """The release's small network of five pairs of convolutions, which keeps its random weights: codes [32, g, g]."""

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self.side, self.statistics = 32 * grid_side(size), [BatchStatistics(n_out) for *_, n_out in CONVOLUTIONS]
        self.weights: list[tuple[Tensor, Tensor, Tensor]] = []
        for n_in, n_mid, n_out in CONVOLUTIONS:
            wide, bias = (uniform(shape, 9 * n_in, generator) for shape in ((n_mid, n_in, 3, 3), (n_mid,)))
            self.weights.append((wide, bias, uniform((n_out, n_mid, 2, 2), 4 * n_mid, generator)))

    def __call__(self, x_B3SS: Tensor, updates: int) -> Tensor:
        """Return the codes [B, Z] of normalized images; the running statistics are updated so many times."""
        x = x_B3SS if x_B3SS.shape[-1] == self.side else F.interpolate(x_B3SS, self.side, mode="bilinear")
        for (wide, bias, halving), statistics in zip(self.weights, self.statistics, strict=True):
            x = F.conv2d(F.conv2d(x, wide, bias, padding=1), halving, stride=2)
            x = F.gelu(statistics(x, updates))
        return x.flatten(1)

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights and the running statistics."""
        layers = [{"wide": w, "bias": b, "halving": h} for w, b, h in self.weights]
        for layer, statistics in zip(layers, self.statistics, strict=True):
            layer.update(vars(statistics))
        return {f"encoder_{k}_{name}": tensor for k, layer in enumerate(layers) for name, tensor in layer.items()}
