"""Random appearance for pre-training pictures: place, size, turn, colours, contrast, blur. No mirroring."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tools.embedded.settings import MEAN, SIZE, STD


def normalise(images: torch.Tensor) -> torch.Tensor:
    """RGB in [0, 1], [B, 3, 64, 64], as the model expects it."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images - mean) / std


def _uniform(count: int, low: float, high: float) -> torch.Tensor:
    return low + (high - low) * torch.rand(count, 1, 1, 1)


def _chance(count: int, probability: float) -> torch.Tensor:
    return torch.rand(count, 1, 1, 1) < probability


def augment(pixels: torch.Tensor, glyph: torch.Tensor) -> torch.Tensor:
    """RGBA uint8 [B, 64, 64, 4] to normalised RGB; ``glyph`` marks pictures whose colour is free."""
    count = len(pixels)
    images = pixels.permute(0, 3, 1, 2).float() / 255
    images = torch.cat([images[:, :3] * images[:, 3:], images[:, 3:]], 1)  # premultiplied, to resample well
    images = _moved(images)
    colour, alpha = images[:, :3], images[:, 3:]
    ink = 0.6 * torch.rand(count, 3, 1, 1) * _chance(count, 0.4)  # else black
    colour = torch.where(glyph.view(-1, 1, 1, 1), ink * alpha, colour)
    ground = torch.where(_chance(count, 0.6), torch.ones(count, 3, 1, 1), 0.55 + 0.45 * torch.rand(count, 3, 1, 1))
    flat = colour + ground * (1 - alpha)
    flat = torch.where(_chance(count, 0.2), flat.mean(1, keepdim=True).expand_as(flat), flat)
    flat = torch.where(_chance(count, 0.1), 1 - flat, flat)
    flat = torch.where(_chance(count, 0.1), _coarse(flat, 4), torch.where(_chance(count, 0.1), _coarse(flat, 2), flat))
    flat = (flat - 0.5) * _uniform(count, 0.7, 1.2) + 0.5 + _uniform(count, -0.05, 0.05)
    return normalise(flat.clamp(0, 1))


def _moved(images: torch.Tensor) -> torch.Tensor:
    """Turned up to 0.2 rad, scaled 0.72 to 1.12, stretched up to 10 %, shifted up to an eighth of the half side."""
    count = len(images)
    turn = (torch.rand(count) - 0.5) * 0.4
    size = 1 / (0.72 + 0.4 * torch.rand(count))
    stretch = 1 + (torch.rand(count) - 0.5) * 0.2
    shift = (torch.rand(count, 2) - 0.5) * 0.25
    top = torch.stack([size * stretch * turn.cos(), -size * turn.sin(), shift[:, 0]], 1)
    bottom = torch.stack([size * turn.sin(), size / stretch * turn.cos(), shift[:, 1]], 1)
    grid = F.affine_grid(torch.stack([top, bottom], 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _coarse(images: torch.Tensor, factor: int) -> torch.Tensor:
    """The picture at a lower resolution, drawn back at full size."""
    return F.interpolate(F.avg_pool2d(images, factor), size=(SIZE, SIZE), mode="bilinear", align_corners=False)
