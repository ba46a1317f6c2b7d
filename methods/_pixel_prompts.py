"""What the methods share that learn a change of the images: plan, batches, loss and prediction. A part, not a method.

Shapes: N training images, B images in a batch, C classes, S side of the model's input, d numbers learned, P image sets
in a step.
Cost: a step sends P sets of the B images of a batch, made with P parameter vectors, under the one prompt set of the
data set's template: P requests, P * B images, P * C prompts (the text is sent with each), P * B * C outputs. The
published schedule is `epochs` passes of max(1, N // B) steps; a smaller allotment pays for fewer steps of the same
size. Without any steps, the images stay the plain ones. Prediction: 1 request, each image once.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from methods._finite import finite
from methods._settings import number
from methods._spsa import TrainingBatches, directions, estimated_gradient
from methods._torch import Tensor, torch
from methods._training import mean_cross_entropy
from methods.base import (
    Bill,
    BlackBox,
    Classes,
    FewShotTask,
    ImageSet,
    Method,
    PixelImages,
    Plan,
    Remaining,
    TaskShape,
    eight_bits,
    torch_generator,
)

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of OpenAI's CLIP: the releases add prompts to pixels that are normalized by them."""


def per_channel(values: tuple[float, float, float]) -> Tensor:
    """Return one value for each channel, as [3, 1, 1]."""
    return torch.tensor(values).view(3, 1, 1)


@dataclass(frozen=True, kw_only=True)
class PixelPlan(Plan):
    """How much of the published schedule the allotment pays for."""

    steps: int
    published: int
    """Steps of the published schedule."""


class PixelPrompt(Method):
    """A change of the images by `made`, whose parameters a subclass learns in `step`."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Length of the schedule."""

        epochs: int = 100
        """Passes over the training images; the releases' 500 to 5,000 are set with hparams=paper."""
        batch_size: int = 128
        """B: images per step; a short last batch is dropped."""

    config: Config

    @abstractmethod
    def n_sets(self) -> int:
        """Return P."""

    @abstractmethod
    def initial(self, size: int) -> Tensor:
        """Return the initial parameters [d] for images of side `size`; draws from `self.generator`."""

    @abstractmethod
    def made(self, w_d: Tensor, *read: Tensor, training: bool) -> Tensor:
        """Return the images [B, 3, S, S] in [0, 1] that parameters make from what `read` returned."""

    def read(self, images: ImageSet, training: bool) -> tuple[Tensor, ...]:
        """Return what `made` needs of the images; by default the images at the size of the model's input."""
        return (images.array(self.size),)

    def losses_of(self, scores_PBC: Tensor, labels_B: Tensor) -> Tensor:
        """Return the loss [P] of each image set."""
        return mean_cross_entropy(scores_PBC, labels_B)

    def plan(self, shape: TaskShape, remaining: Remaining) -> PixelPlan:
        c = self.config
        one = Bill.scores(self.n_sets(), min(c.batch_size, shape.n_train), shape.n_classes)
        published, affordable = c.epochs * max(1, shape.n_train // c.batch_size), remaining.affords(one)
        steps = published if affordable is None else min(published, affordable)
        return PixelPlan(bill=one * steps, steps=steps, published=published)

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: PixelPlan) -> None:
        self.prompts, self.size = task.classes.prompts(), box.image_size
        self.generator, self.batches = torch_generator(rng), TrainingBatches(task, self.config.batch_size)
        self.steps, self.published, self.done = plan.steps, plan.published, 0
        self.w_d = self.initial(self.size)
        self.trainable_params = len(self.w_d)
        self.notes |= {"steps": plan.steps, "published_steps": plan.published, "image_size": self.size}

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        if not self.steps:
            return box.scores(images, self.prompts)[0]
        # One image at a time: a sum over a batch may round otherwise, and 8 bits would show it.
        singles = (self.read(images[[i]], training=False) for i in range(len(images)))
        pixels = torch.cat([eight_bits(self.made(self.w_d, *read, training=False)) for read in singles])
        return box.scores(PixelImages(images, pixels), self.prompts)[0]

    def deployed(self) -> dict[str, Tensor]:
        return {"w_d": self.w_d}

    def losses(self, box: BlackBox, w_Pd: Tensor) -> Tensor:
        """Return the losses [P] of the next batch, made with each parameter vector. Sends the requests of a step."""
        images, labels_B = self.batches.next(self.generator)
        read = self.read(images, training=True)
        pixels_PB3SS = torch.stack([eight_bits(self.made(w_d, *read, training=True)) for w_d in w_Pd])
        losses_P = self.losses_of(box.scores(PixelImages(images, pixels_PB3SS), self.prompts), labels_B)
        return finite(losses_P, f"loss in step {self.done + 1}")

    def step(self, box: BlackBox) -> bool:
        """Take one step along the estimated gradient of one batch."""
        if self.done == self.steps:
            return False
        self.update(box, self.done + 1)
        self.done += 1
        return self.done < self.steps

    def update(self, box: BlackBox, i: int) -> None:
        """Take step i = 1, 2, ..."""
        raise NotImplementedError


class SPSAPrompt(PixelPrompt):
    """A change of the images that SPSA-GC learns: two-sided estimates with Nesterov's momentum (blackvip.py)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PixelPrompt.Config):
        """Settings of SPSA-GC."""

        n_directions: int = 5
        """J: directions per step, each with two image sets."""
        lr: float = 0.01
        """a in a_i = a / (i + 1)^lr_decay, the step size."""
        lr_decay: float = 0.4
        """Exponent of the step size."""
        perturbation: float = number(0.01, above=0)
        """c in c_i = c / i^perturbation_decay, the length of a perturbation."""
        perturbation_decay: float = 0.1
        """Exponent of the perturbation."""
        momentum: float = number(0.9, at_most=1)
        """beta; 0 = plain SPSA."""

    config: Config

    def n_sets(self) -> int:
        return 2 * self.config.n_directions

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: PixelPlan) -> None:
        super().start(task, box, rng, plan)
        self.m_d = torch.zeros_like(self.w_d)

    def update(self, box: BlackBox, i: int) -> None:
        c = self.config
        a_i = c.lr / (i + 1) ** c.lr_decay
        c_i = c.perturbation / i**c.perturbation_decay
        p_Jd = directions(c.n_directions, len(self.w_d), self.generator)
        pairs_Pd = torch.stack([self.w_d + c_i * p_Jd, self.w_d - c_i * p_Jd], dim=1).flatten(0, 1)
        plus_J, minus_J = self.losses(box, pairs_Pd).view(-1, 2).unbind(1)

        g_d = estimated_gradient(plus_J, minus_J, p_Jd, c_i)
        self.m_d = c.momentum * self.m_d + g_d
        self.w_d = self.w_d - a_i * (g_d + c.momentum * self.m_d)
