"""BAR: the image, made smaller, in a learned frame that a one-sided estimate of the gradient trains from scores alone.

What is learned: w [3, S, S], the frame; the part under the image has no effect, and is counted as in the release.
Shapes: N training images, B images in a batch, C classes, S side of the model's input, d = 3 S^2, J directions,
P = 1 + J image sets in a step.
Cost: a step sends P requests, P * B images, P * C prompts, P * B * C outputs; J = 5, B = min(128, N): 6 requests, 768
images. The published schedule of 16-shot EuroSAT is 5,000 steps: 30,000 requests, 3,840,000 images. The default is 100
epochs. A smaller allotment pays for fewer steps; the rates (2) are those of the whole schedule. Without any steps, the
images stay the plain ones. Prediction: 1 request, each image once.
Paper: Tsai et al., Transfer Learning without Knowing: Reprogramming Black-box Machine Learning Models with Scarce Data
and Limited Resources, ICML 2020, arXiv:2007.08714, as in BlackVIP's released trainers/reprogramming.py, which keeps the
classes of the data set and maps no labels. With M = 0 under the image and 1 elsewhere, x the image of side 194 / 224 S
in the center, i = 1, 2, ... the step of T, and g the one-sided estimate of `_spsa.py` (2) with c = 0.01:

    x' = x + M sigmoid(w)                                                (1)
    a_i = (a - a_min) (1 - min(i, 0.9 T) / 0.9 T)^0.9 + a_min            (2)
    loss = mean of -(1 - p_y)^2 log p_y,   w <- w - a_i g                (3)

Departures from the released code:
1. The perturbation c is 5 by default. The published 0.01 is spread over d numbers, which moves a pixel of side 224 by
   less than 1/100,000, and images are sent with 8 bits a channel; the release passes floats. With 5 it moves by about
   1/400. hparams=paper restores 0.01.
2. For other sides than 224, the image has the same share of the side.
3. One fixed view of the training images; the release augments each batch anew: `views=fresh`.
"""

from __future__ import annotations

from dataclasses import dataclass

from methods._pixel_prompts import PixelPrompt
from methods._settings import number
from methods._spsa import one_sided_gradient, sphere_directions
from methods._torch import Tensor, torch
from methods.base import Access, BlackBox, ImageSet, method


@method(name="bar", access=Access.TEXT | Access.PIXELS | Access.SCORES, paper="arXiv:2007.08714")
class BAR(PixelPrompt):
    """The image in a learned frame, trained by one-sided finite differences."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PixelPrompt.Config):
        """The settings of BlackVIP's release; its table for each data set is used with hparams=paper."""

        n_directions: int = 5
        """J: directions per step, each with one image set."""
        perturbation: float = number(5.0, above=0)
        """c: length of a perturbation; 0.01 in the release."""
        lr: float = 5.0
        """a: first step size."""
        min_lr: float = 0.1
        """a_min: last step size."""
        focal: float = 2.0
        """Exponent of the focal loss; 0 = cross-entropy."""
        image_side: int = 194
        """Side of the image in a frame of side 224; of others the same share."""

    config: Config

    def n_sets(self) -> int:
        return 1 + self.config.n_directions

    def initial(self, size: int) -> Tensor:
        half = round(self.config.image_side / 2 * size / 224)
        self.inner = slice(size // 2 - half, size // 2 + half)
        return torch.randn(3 * size * size, generator=self.generator)

    def read(self, images: ImageSet, training: bool) -> tuple[Tensor, ...]:
        return (images.array(self.inner.stop - self.inner.start),)

    def made(self, w_d: Tensor, *read: Tensor, training: bool) -> Tensor:
        made_B3SS = w_d.view(1, 3, self.size, self.size).sigmoid().repeat(len(read[0]), 1, 1, 1)
        made_B3SS[:, :, self.inner, self.inner] = read[0]  # (1)
        return made_B3SS

    def losses_of(self, scores_PBC: Tensor, labels_B: Tensor) -> Tensor:
        log_p_PB = scores_PBC.log_softmax(-1)[:, torch.arange(len(labels_B)), labels_B]
        return -((1 - log_p_PB.exp()) ** self.config.focal * log_p_PB).mean(-1)

    def update(self, box: BlackBox, i: int) -> None:
        c, decay_steps = self.config, 0.9 * self.published
        a_i = (c.lr - c.min_lr) * (1 - min(i, decay_steps) / decay_steps) ** 0.9 + c.min_lr  # (2)
        u_Jd = sphere_directions(c.n_directions, len(self.w_d), self.generator)
        losses_P = self.losses(box, torch.cat([self.w_d.unsqueeze(0), self.w_d + c.perturbation * u_Jd]))
        self.w_d = self.w_d - a_i * one_sided_gradient(losses_P[1:], losses_P[0], u_Jd, c.perturbation)  # (3)
