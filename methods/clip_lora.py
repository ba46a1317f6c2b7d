"""CLIP-LoRA: low-rank changes of both towers, trained by the true gradient. A white-box reference, not a competitor.

What is learned: A [3, r, W] and B [3, W, r] for the queries, keys and values of each of the n attention layers of a
tower of width W: 6 r n W numbers, 184,320 on ViT-B/16.
Shapes: B images in a batch, C classes, N training images, r rank, K shots.
Cost: a step is a forward and a backward pass: 1 request, 2 B images, 2 C prompts. An epoch has ceil(N / B) steps, the
last with the rest of the images. The published schedule is 500 K steps; 16-shot EuroSAT: 8,000 requests and 512,000
images. A smaller allotment pays for fewer steps of the same size, and the cosine is stretched over them. Without any
steps, the model stays as it is. Prediction: 1 request, each image once.
Paper: Zanella and Ben Ayed, Low-Rank Few-Shot Adaptation of Vision-Language Models, CVPR Workshops 2024,
arXiv:2405.18541, as in its released lora.py and loralib/layers.py:

    W' = W + alpha / sqrt(r) * B A        A uniform on +-1 / sqrt(W), B = 0       (1)
    min over A, B of CE(logit_scale * f(x) . t(prompt_c), y)                      (2)

by AdamW, learning rate from `lr` to `min_lr` in a cosine, with dropout on the input of A. The last step is kept.
The weights stay at the endpoint. The method holds A and B and receives their gradients (access LORA), which no ranked
method may request. Images and prompts are encoded anew in every call, so nothing is stored.

Departures from the released code:
1. The prompt is the data set's template, as for zero-shot. The release has "a photo of a {}." on every data set:
   `paper_init`.
2. The model's own logit scale; the release has 100. float32; the release computes in float16 (autocast).
3. Fixed views in turn; `views=fresh` restores a new view per epoch. The released crops keep 8 % of the image or more.
4. ResNets, which the release does not support: the layer of the image tower is its attention pool.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from methods._finite import finite
from methods._settings import number
from methods._torch import Tensor, torch
from methods._training import CLIP_TEMPLATE, cosine_lr, linear_init, shuffled_batches
from methods._views import epoch_view
from methods.base import (
    Access,
    Bill,
    BlackBox,
    Classes,
    FewShotTask,
    ImageSet,
    Lora,
    LowRank,
    Method,
    Plan,
    Remaining,
    TaskShape,
    method,
    torch_generator,
    with_templates,
)


@dataclass(frozen=True, kw_only=True)
class LoraPlan(Plan):
    """How much of the published schedule the allotment pays for."""

    steps: int


@method(name="clip_lora", access=Access.TEXT | Access.SCORES | Access.LORA, paper="arXiv:2405.18541", new_classes=True)
class CLIPLoRA(Method):
    """White-box reference: low-rank changes of the attention weights of both towers, trained by the true gradient."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The released settings, the same for every data set."""

        rank: int = 2
        """r: rank of a change."""
        alpha: float = 1.0
        """Scale of a change, times the square root of the rank."""
        dropout: float = number(0.25, at_most=1)
        """Share of the input of A that is set to zero in training."""
        lr: float = 2e-4
        """Learning rate of AdamW in the first step."""
        min_lr: float = 1e-6
        """Learning rate that the cosine ends at."""
        weight_decay: float = 0.01
        """AdamW's weight decay."""
        batch_size: int = 32
        """B: images per step; the last step of an epoch has the rest."""
        steps_per_shot: int = 500
        """Steps of the published schedule for each shot."""
        paper_init: bool = False
        """Start from "a photo of a {}." on every data set."""

    config: Config

    def plan(self, shape: TaskShape, remaining: Remaining) -> LoraPlan:
        n, c, size = shape.n_train, shape.n_classes, min(self.config.batch_size, shape.n_train)
        per_epoch = math.ceil(n / size)
        steps = min(self.config.steps_per_shot * shape.shots, remaining.requests)
        if not math.isinf(remaining.images):
            epochs, rest = divmod(int(remaining.images) // 2, n)
            steps = min(steps, epochs * per_epoch + rest // size)
        epochs, further = divmod(steps := int(steps), per_epoch)
        whole = Bill.lora_gradients(size, c) * (epochs * (per_epoch - 1) + further)
        last = Bill.lora_gradients(n - (per_epoch - 1) * size, c) * epochs
        return LoraPlan(bill=whole + last, steps=steps)

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: LoraPlan) -> None:
        c = self.config
        self.task, self.generator = task, torch_generator(rng)
        self.classes = with_templates(task.classes, CLIP_TEMPLATE) if c.paper_init else task.classes
        self.steps, self.done, self.epoch, self.batches = plan.steps, 0, -1, list[Tensor]()
        image, text = (self._initial(layers, width) for layers, width in box.lora_shapes)
        self.lora = Lora(image, text, c.alpha / math.sqrt(c.rank))  # (1)
        self.optimizer = torch.optim.AdamW(self.lora.factors, lr=c.lr, weight_decay=c.weight_decay)
        self.trainable_params = sum(factor.numel() for factor in self.lora.factors)
        self.notes |= {"steps": plan.steps, "published_steps": c.steps_per_shot * task.shots}

    def _initial(self, layers: int, width: int) -> LowRank:
        a_n3rW = linear_init((layers, 3, self.config.rank, width), width, self.generator)
        return LowRank(a_n3rW, torch.zeros(layers, 3, width, self.config.rank, requires_grad=True))

    def step(self, box: BlackBox) -> bool:
        """Run one step of AdamW on one batch."""
        if self.done == self.steps:
            return False
        c, labels_N = self.config, self.task.train.labels
        if not self.batches:
            self.batches = list(shuffled_batches(len(labels_N), c.batch_size, self.generator))
            self.epoch += 1
        rows_B = self.batches.pop(0)
        images, seed = epoch_view(self.task, self.epoch)[rows_B], torch.randint(2**62, (), generator=self.generator)
        loss, *gradients = box.lora_gradients(  # (2)
            images, labels_N[rows_B], self.classes.prompts(), self.lora, c.dropout, int(seed)
        )
        finite(loss, f"loss in step {self.done + 1}")
        for factor, gradient in zip(self.lora.factors, gradients, strict=True):
            factor.grad = gradient
        self.optimizer.param_groups[0]["lr"] = c.min_lr + cosine_lr(c.lr - c.min_lr, self.done, self.steps)
        self.optimizer.step()
        self.done += 1
        return self.done < self.steps

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        prompts = with_templates(classes or self.classes, self.classes.template).prompts()
        return box.scores(images, prompts, self.lora if self.steps else None)[0]

    def deployed(self) -> dict[str, Tensor]:
        names = ("image_a_n3rW", "image_b_n3Wr", "text_a_n3rW", "text_b_n3Wr")
        return {name: factor.detach() for name, factor in zip(names, self.lora.factors, strict=True)}
