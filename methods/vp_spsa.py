"""Visual prompting by SPSA: a border that is added to every image, trained from scores alone.

What is learned: w, the border: a strip of `border` pixels on each side, 69,840 numbers for images of side 224.
Shapes: N training images, B images in a batch, C classes, S side of the model's input, d numbers learned, J directions,
P = 2 J image sets in a step.
Cost: a step sends P requests, P * B images, P * C prompts, P * B * C outputs; J = 5, B = min(128, N): 10 requests,
1,280 images. The published schedule of 16-shot EuroSAT is 5,000 steps: 50,000 requests, 6,400,000 images. The default
is 100 epochs. A smaller allotment pays for fewer steps of the same size. Without any steps, the images stay the plain
ones. Prediction: 1 request, each image once.
Paper: the black-box baseline of BlackVIP (arXiv:2303.14773), VP with SPSA-GC, as in its released trainers/vpour.py; the
border is that of Bahng et al., Exploring Visual Prompts for Adapting Large-Scale Models, arXiv:2203.17274. With s
CLIP's standard deviation of pixels, and steps as in blackvip.py (2) and (3), with a = 10 to 20:

    x' = clip(x + s w, 0, 1)  on the border, x' = x elsewhere      (1)

Departures from the released code:
1. The border starts at 0, so that training starts at the plain images. The release draws it from N(0, 1): `init_std`.
2. x' is clipped to the range of an image and sent with 8 bits a channel. The release clips nothing and passes floats.
3. For other sides than 224, the border has the same share of the side.
4. One fixed view of the training images; the release augments each batch anew: `views=fresh`.
"""

from __future__ import annotations

from dataclasses import dataclass

from methods._pixel_prompts import CLIP_STD, SPSAPrompt, per_channel
from methods._settings import number
from methods._torch import Tensor, torch
from methods.base import Access, method


@method(name="vp_spsa", access=Access.TEXT | Access.PIXELS | Access.SCORES, paper="arXiv:2303.14773")
class VPSPSA(SPSAPrompt):
    """A border that is added to every image and that SPSA trains."""

    @dataclass(frozen=True, kw_only=True)
    class Config(SPSAPrompt.Config):
        """The release's commonest settings; its table for each data set is used with hparams=paper."""

        lr: float = 10.0
        """a in a_i = a / (i + 1)^lr_decay, the step size."""
        momentum: float = number(0.3, at_most=1)
        """beta; 0 = plain SPSA."""
        border: int = 30
        """Width of the border for images of side 224; of others the same share."""
        init_std: float = 0.0
        """Standard deviation of the random initialization; 1 in the release."""

    config: Config

    def initial(self, size: int) -> Tensor:
        width = max(1, round(self.config.border * size / 224))
        self.on_border_SS = torch.ones(size, size, dtype=torch.bool)
        self.on_border_SS[width : size - width, width : size - width] = False
        n = 3 * int(self.on_border_SS.sum())
        return self.config.init_std * torch.randn(n, generator=self.generator)

    def made(self, w_d: Tensor, *read: Tensor, training: bool) -> Tensor:
        prompt_3SS = torch.zeros(3, self.size, self.size)
        prompt_3SS[:, self.on_border_SS] = w_d.view(3, -1)
        return (read[0] + per_channel(CLIP_STD) * prompt_3SS).clamp(0, 1)  # (1)
