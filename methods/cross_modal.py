"""Cross-modal linear probe: a linear classifier trained on image features and on the class texts as further shots.

What is learned: W [C, D], a row for each class, without a bias; C * D numbers.
Shapes: B images in a call, C classes, D feature width, N training images, M validation images, V views, T templates.
Cost: 1 request (C prompts) for the text features, T requests with `ensemble`; 1 request, V * N image rows for V = 2
fixed views; 1 request, M image rows for the validation features. The twelve runs query nothing more. The allotment pays
for the validation images first, then for the views, at least 1. If not even one view fits beside the validation images,
or there are none, a single run is made, with `default_lr` and `default_weight_decay`, and its last W is used.
Prediction: 1 request, B image rows a call.
Paper: Lin et al., Multimodality Helps Unimodality: Cross-Modal Few-Shot Learning with Multimodal Models,
arXiv:2301.06267 (CVPR 2023):

    loss = CE over half a batch of (image feature, label) and half a batch of (text feature, class)        (1)
    logits(x) = scale * x W'        W at random, as in the released linear_probe.sh (`text_init`: W = t)        (2)

by AdamW; the rate rises from 1e-5 in 50 steps, then follows a cosine. Twelve runs: lr 1e-3, 1e-4 x weight decay 0,
0.01, 1e-4 x batch size 8, 32. Every 100 steps each W is scored on the validation images. The first best over the runs,
in this order, and their steps is used (`wise_ft`: its mean with t). As in the released code, a batch size is left out
unless its half is less than the number of texts and that of image rows, and a short last batch of an epoch is dropped.

Departures from the paper and its released code:
1. 3,200 steps instead of 12,800, with the cosine over as many (`steps`).
2. Two augmented views in place of the centre crop and its mirror image.
3. If no batch size is left, the smallest is used with all texts or all images in each step. The release stops.
4. The runs start from the same W and see the same batches (one sequence for each batch size).
5. W is scored after steps 100, 200, ..., the last. The release scores it after steps 1, 101, 201, ...
6. `box.logit_scale` replaces a hard-coded 100 (they agree for OpenAI's CLIP).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

from methods._finite import finite
from methods._parallel_runs import ParallelRuns
from methods._settings import number
from methods._torch import F, Tensor, torch
from methods._training import cosine_lr
from methods._views import ValidationPlan, plan_validation, training_views
from methods.base import (
    Access,
    Bill,
    BlackBox,
    Classes,
    FewShotTask,
    ImageSet,
    Method,
    Remaining,
    TaskShape,
    method,
    torch_generator,
)


@method(name="cross_modal", access=Access.TEXT | Access.FEATURES, paper="arXiv:2301.06267")
class CrossModal(Method):
    """A linear classifier trained on image features and class texts, the best of twelve runs on validation images."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The released settings of the linear probe."""

        steps: int = 3200
        """Steps of each run; the paper: 12,800."""
        lrs: tuple[float, ...] = (1e-3, 1e-4)
        """Learning rates of the runs."""
        weight_decays: tuple[float, ...] = (0.0, 0.01, 1e-4)
        """AdamW's weight decays of the runs."""
        batch_sizes: tuple[int, ...] = (8, 32)
        """Batch sizes of the runs; half of a batch are texts."""
        default_lr: float = 1e-3
        """Learning rate of the only run without validation images."""
        default_weight_decay: float = 0.01
        """Weight decay of the only run without validation images."""
        warmup_steps: int = number(50, at_least=0)
        """Steps before the cosine starts."""
        warmup_lr: float = 1e-5
        """Learning rate of the first step."""
        eval_every: int = 100
        """Steps between two evaluations on the validation images."""
        text_init: bool = False
        """Start from the text features instead of random weights."""
        ensemble: bool = False
        """Train on one text of a class for each of the T templates of the ensemble."""
        wise_ft: bool = False
        """Use the mean of W and t (WiSE-FT)."""

    config: Config

    def plan(self, shape: TaskShape, remaining: Remaining) -> ValidationPlan:
        templates = shape.n_templates if self.config.ensemble else 1
        text = Bill.text_features(templates, shape.n_classes, shape.feature_dim)
        return plan_validation(shape, remaining, text, min(2, max(1, shape.views)))

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: ValidationPlan) -> None:
        c, n_classes = self.config, len(task.classes)
        text_TCD = box.text_features(task.classes.ensemble() if c.ensemble else task.classes.prompts())
        features_ND = box.image_features(training_views(task, plan.views))
        self.images = (features_ND, task.train.labels.repeat(plan.views))
        self.texts = (text_TCD.flatten(0, 1), torch.arange(n_classes).repeat(len(text_TCD)))
        self.val = (box.image_features(task.val.images), task.val.labels) if plan.search else None
        self.text_CD, self.scale, self.done = F.normalize(text_TCD.mean(0), dim=-1), box.logit_scale, 0

        uniform_CD = torch.rand(self.text_CD.shape, generator=torch_generator(rng)) * 2 - 1
        self.weight_CD = self.text_CD if c.text_init else uniform_CD * box.feature_dim**-0.5  # (2)
        least = min(len(self.texts[0]), len(features_ND))
        sizes = [size for size in c.batch_sizes if size // 2 < least] or [min(c.batch_sizes)]
        one = (c.default_lr, c.default_weight_decay, sizes[0])
        self.grid = list(product(c.lrs, c.weight_decays, sizes)) if plan.search else [one]
        self.groups, self.generators = list[ParallelRuns](), list[torch.Generator]()
        for size in dict.fromkeys(run[2] for run in self.grid):
            numbers = [i for i, run in enumerate(self.grid) if run[2] == size]
            lrs, decays = ([self.grid[i][part] for i in numbers] for part in (0, 1))
            self.groups.append(ParallelRuns(numbers, lrs, decays, self.weight_CD, size))
            self.generators.append(torch_generator(rng))
        self.best = (-1.0, 0)
        self.trainable_params = self.weight_CD.numel()
        self.notes.update(views=plan.views, runs=len(self.grid), searched_on_val=len(task.val.labels) * plan.search)

    def step(self, box: BlackBox) -> bool:
        """Run the steps of all runs up to the next evaluation, with that evaluation."""
        n = min(self.config.eval_every, self.config.steps - self.done)
        for group, generator in zip(self.groups, self.generators, strict=True):
            for i in range(self.done, self.done + n):
                batch = group.next_batch(self.images, self.texts, generator)
                group.train(*batch, self.scale, self.learning_rates(group.lr_R11, i))
            finite(group.weight_RCD, f"a weight before step {self.done + n + 1}")
        self.done += n
        for group in self.groups:
            self._keep_best(group)
        return self.done < self.config.steps

    def learning_rates(self, lr_R11: Tensor, step: int) -> Tensor:
        """Return the rates of one step: a linear warm-up, then a cosine over as many steps as a run has."""
        warmup = self.config.warmup_steps
        if step >= warmup:
            return lr_R11 * cosine_lr(1.0, step - warmup, self.config.steps)
        return lr_R11 * (step / warmup) if step else torch.full_like(lr_R11, self.config.warmup_lr)

    def classifier(self) -> Tensor:
        """Return the weights [C, D] that `predict` uses."""
        return (self.weight_CD + self.text_CD) / 2 if self.config.wise_ft else self.weight_CD

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        return self.scale * box.image_features(images) @ self.classifier().T

    def deployed(self) -> dict[str, Tensor]:
        return {"classifier_CD": self.classifier()}

    def _keep_best(self, group: ParallelRuns) -> None:
        """Keep the weights of a run that is better than the best, or as good and earlier in the grid."""
        accuracies = [0.0] * len(group.numbers)
        if self.val is not None:
            hits_MR = group.products(self.val[0]).argmax(-1) == self.val[1][:, None]
            accuracies = hits_MR.double().mean(0).tolist()
        for r, (i, accuracy) in enumerate(zip(group.numbers, accuracies, strict=True)):
            if self.val is None or (accuracy, -i) > self.best:
                self.best, self.weight_CD = (accuracy, -i), group.weight_RCD[r].clone()
                lr, decay, size = self.grid[i]
                self.notes.update(lr=lr, weight_decay=decay, batch_size=size, step=self.done)
