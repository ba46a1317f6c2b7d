"""AReS: one pass over the endpoint labels the training images; what is learned and used afterwards runs on the client.

A linear head on a frozen local model learns the endpoint's class probabilities; then a frame of pixels around the
images and a map from the head's classes to the true ones are fitted with the true labels.
What is learned: a head [F, C] and [C], a frame P [3, S, S], a map M [C, C] and a temperature.
Shapes: B images in a call, C classes, F feature width and S input side of the local model, N training images.
Cost: 1 request for N image rows and C prompts; the local model is free of charge. There is no schedule to shorten.
Prediction: no request.
Paper: AReS, arXiv:2604.01474 (CVPR 2026), with the padding and BLM+ of its released src/prime_vlm.py and reprogram.py:

    q_n = softmax(s f_n t')                           the endpoint's probabilities, asked once        (1)
    min over head: mean_n KL(q_n || softmax(head(g(x_n))))          g: the local model, frozen        (2)
    z(x) = head(g(pad(small x) + mask * sigmoid(P)))                the mask is 0 under the image     (3)
    min over P: CE(z(x) M, y)      M: BLM+ of softmax(z), the k largest, before each epoch            (4)

(2): AdamW, cosine over all steps. (4): Adam; the rate falls to a tenth after 50 % and again after 72 % of the epochs.
The last epoch counts, as everywhere here, with the map that was estimated before it.

Departures from the released code:
1. The N training images serve both stages. The code's second stage loads the whole training split with its labels; its
   best epoch is the best on the test split, and its first stage keeps the epoch with the least loss on a test batch.
2. The features of the plain training images are computed once; the code encodes them anew in each epoch, with the local
   model in training mode.
3. k is at least 1. The code's int(0.15 C) is 0 below 7 classes.
4. The code has no temperature, and the map averages the logits. Ours is fitted on the training images at the end. It
   changes NLL and ECE and no predicted class.
5. float32; the code computes in float16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from methods._settings import number
from methods._temperature import fitted_temperature
from methods._torch import F, Tensor, torch
from methods._training import cosine_lr, descend, linear_init, shuffled_batches
from methods.base import (
    Access,
    Bill,
    BlackBox,
    Classes,
    FewShotTask,
    ImageSet,
    Method,
    Plan,
    Remaining,
    TaskShape,
    method,
    torch_generator,
)
from methods.label_map import bayesian_map

TILE = 64
"""Images in a forward without a gradient, to bound its memory."""


@method(name="ares", access=Access.TEXT | Access.SCORES, paper="arXiv:2604.01474", uses_views=False, uses_local=True)
class AReS(Method):
    """One pass over the endpoint teaches a local model, which is then reprogrammed with the true labels."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """The released settings."""

        head_lr: float = 1e-3
        """Learning rate of AdamW on the head, with torch's weight decay 0.01."""
        head_epochs: int = 100
        """Epochs on the endpoint's probabilities."""
        head_batch: int = 64
        """Images per step of the head."""
        lr: float = 0.01
        """Learning rate of Adam on the frame."""
        epochs: int = 200
        """Epochs on the true labels; 0 leaves the frame gray and estimates the map once."""
        batch_size: int = 256
        """Images per step of the frame."""
        image_share: float = number(4 / 7, at_most=1)
        """Side of the image within the frame: the code resizes to 128 of 224 pixels."""
        top_share: float = number(0.15, at_most=1)
        """Share of the classes that count in the map, at least one class."""

    config: Config

    def plan(self, shape: TaskShape, remaining: Remaining) -> Plan:
        return Plan(bill=Bill.scores(1, shape.n_train, shape.n_classes))

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: Plan) -> None:
        assert task.local is not None
        c, self.local = self.config, task.local
        self.images, self.labels_N, self.n_classes = task.train.images, task.train.labels, len(task.classes)
        self.generator = torch_generator(rng)
        q_NC = box.scores(self.images, task.classes.prompts())[0].softmax(-1)  # (1)
        self._train_head(self.local.features(self.images), q_NC)
        side = self.local.size
        self.small = max(1, round(c.image_share * side))
        self.before = (side - self.small + 1) // 2
        self.after = side - self.small - self.before
        self.frame_3SS = torch.zeros(3, side, side, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.frame_3SS], lr=c.lr)
        self.epoch = 0
        self.map_CC = self._estimated_map()
        self.temperature = 1.0
        self.trainable_params = self.weight_FC.numel() + self.bias_C.numel() + self.frame_3SS.numel() + 1
        self.notes.update(epochs=c.epochs, head_epochs=c.head_epochs, image_side=self.small, top_k=self._top_k)
        if not c.epochs:
            self._fit_temperature()

    def _train_head(self, x_NF: Tensor, q_NC: Tensor) -> None:
        """Fit the head to the endpoint's probabilities (2), from torch's initialization of a linear layer."""
        c, (n, f) = self.config, x_NF.shape
        head = weight_FC, bias_C = [linear_init(s, f, self.generator) for s in ((f, self.n_classes), (self.n_classes,))]
        optimizer = torch.optim.AdamW(head, lr=c.head_lr)
        total, step = c.head_epochs * -(-n // c.head_batch), 0
        for _ in range(c.head_epochs):
            for rows_B in shuffled_batches(n, c.head_batch, self.generator):
                optimizer.param_groups[0]["lr"] = cosine_lr(c.head_lr, step, total)
                log_p_BC = (x_NF[rows_B] @ weight_FC + bias_C).log_softmax(-1)
                loss = F.kl_div(log_p_BC, q_NC[rows_B], reduction="batchmean")
                descend(optimizer, loss, f"loss of the head in step {step + 1}")
                step += 1
        self.weight_FC, self.bias_C = weight_FC.detach(), bias_C.detach()

    @property
    def _top_k(self) -> int:
        return max(1, int(self.config.top_share * self.n_classes))

    def _small(self) -> Tensor:
        """Return the training images [N, 3, small, small]; read once in a process, and left out of pickles."""
        if "pixels_N3HH" not in vars(self):
            self.pixels_N3HH = self.local.pixels(self.images, self.small)
        return self.pixels_N3HH

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "pixels_N3HH"}

    def _head_logits(self, pixels_B3HH: Tensor) -> Tensor:
        """Return z [B, C] of small images within the frame (3)."""
        margins = (self.before, self.after, self.before, self.after)
        mask_3SS = F.pad(torch.zeros(3, self.small, self.small), margins, value=1.0)
        framed_B3SS = F.pad(pixels_B3HH, margins) + mask_3SS * self.frame_3SS.sigmoid()
        return self.local.encode(framed_B3SS) @ self.weight_FC + self.bias_C

    def _logits_of(self, pixels_B3HH: Tensor) -> Tensor:
        """Return z [B, C] of any number of small images, without a gradient."""
        with torch.no_grad():
            starts = range(0, len(pixels_B3HH), TILE)
            return torch.cat([self._head_logits(pixels_B3HH[start : start + TILE]) for start in starts])

    def _estimated_map(self) -> Tensor:
        """Return M [C, C] for the present frame."""
        p_NC = self._logits_of(self._small()).softmax(-1)
        best = p_NC.topk(self._top_k, dim=-1)
        u_NC = torch.zeros_like(p_NC).scatter(-1, best.indices, best.values)
        return bayesian_map(u_NC.T @ F.one_hot(self.labels_N, self.n_classes).float())

    def step(self, box: BlackBox) -> bool:
        """Run one epoch of the frame, with a new map."""
        c = self.config
        if self.epoch >= c.epochs:
            return False
        self.map_CC = self._estimated_map()
        milestones = int(0.5 * c.epochs), int(0.72 * c.epochs)
        self.optimizer.param_groups[0]["lr"] = c.lr * 0.1 ** sum(self.epoch >= m for m in milestones)
        for rows_B in shuffled_batches(len(self.labels_N), c.batch_size, self.generator):
            logits_BC = self._head_logits(self._small()[rows_B]) @ self.map_CC
            loss = F.cross_entropy(logits_BC, self.labels_N[rows_B])
            descend(self.optimizer, loss, f"loss in epoch {self.epoch + 1}")
        self.epoch += 1
        if self.epoch == c.epochs:
            self._fit_temperature()
        return self.epoch < c.epochs

    def _fit_temperature(self) -> None:
        self.temperature = fitted_temperature(self._logits_of(self._small()) @ self.map_CC, self.labels_N)
        self.notes["temperature"] = self.temperature

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        return self.temperature * self._logits_of(self.local.pixels(images, self.small)) @ self.map_CC

    def deployed(self) -> dict[str, Tensor]:
        return {"head": self.weight_FC, "bias": self.bias_C, "frame": self.frame_3SS.detach(), "map": self.map_CC}
