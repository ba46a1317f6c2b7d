"""A toy local model, for the images of the toy task.

Shapes: B images in a call, S side of the input, F feature width, X = 8 * 8 pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from methods.base import ImageSet

PIXELS = 8
"""Side of a toy image."""


class ToyLocal:
    """Implements `LocalModel`: a fixed random map of the gray image and of its centre.

    By the centre it knows an image again that fills a part of its input only, as pretrained networks do.
    """

    size = 16
    feature_dim = 64

    def features(self, images: ImageSet) -> Tensor:
        """Return the features [B, F]."""
        return self.encode(self.pixels(images, self.size))

    def pixels(self, images: ImageSet, size: int) -> Tensor:
        """Return the gray pixels as RGB [B, 3, size, size]."""
        gray_B1 = images.pixels(PIXELS).view(-1, 1, PIXELS, PIXELS)
        return adaptive_avg_pool2d(gray_B1.expand(-1, 3, -1, -1), size)

    def encode(self, pixels_B3SS: Tensor) -> Tensor:
        """Return the features [B, F] of pixels; differentiable."""
        g = torch.Generator().manual_seed(7)
        weight_XF = torch.randn(PIXELS**2, self.feature_dim, generator=g) / PIXELS
        centred_BSS, edge = pixels_B3SS.mean(1) - 0.5, self.size // 4
        seen = centred_BSS, centred_BSS[:, edge:-edge, edge:-edge]
        x_BX = torch.stack([adaptive_avg_pool2d(part.unsqueeze(1), PIXELS).flatten(1) for part in seen]).sum(0)
        return 8 * x_BX @ weight_XF
