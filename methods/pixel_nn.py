"""Nearest neighbor on 16x16 gray thumbnails: a control that sends no request to the black box.

What is learned: nothing; the training thumbnails are stored. Where its accuracy is high, the data set is solved by
pixel matching and says little about the methods on the leaderboard.
Shapes: B images in a call, C classes, N training images, X = 16 * 16 pixels.
Cost: no request, neither to fit nor to predict: thumbnails are read on the client.
Paper: Cover and Hart, Nearest neighbor pattern classification, IEEE Trans. Inf. Theory 13 (1967), with k = 1:

    logit_c(x) = -min over training images i of class c of ||x - x_i||        (1)

Departures: none. The logits are negative distances, so their softmax is not calibrated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from methods._torch import Tensor, torch
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
)


@method(name="pixel_nn", access=Access.TEXT, paper="doi:10.1109/TIT.1967.1053964", uses_views=False)
class PixelNearestNeighbour(Method):
    """The class of the nearest training thumbnail, without any request: a control, not a competitor."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Size of the thumbnails."""

        size: int = 16
        """Side of the square gray thumbnail in pixels."""

    config: Config

    def plan(self, shape: TaskShape, remaining: Remaining) -> Plan:
        return Plan(bill=Bill())

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: Plan) -> None:
        self.thumbnails_NX = task.train.images.pixels(self.config.size)
        self.labels_N = task.train.labels
        self.n_classes = len(task.classes)

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        x_BX = images.pixels(self.config.size)
        # ||a||^2 - 2ab + ||b||^2 would be faster, but its rounding depends on the other rows of the batch.
        distance_BN = torch.cdist(x_BX, self.thumbnails_NX, compute_mode="donot_use_mm_for_euclid_dist")
        farthest = float(self.config.size)  # largest distance in [0, 1]^X, for classes without training images
        logits_BC = torch.full((len(x_BX), self.n_classes), -farthest)
        return logits_BC.scatter_reduce(1, self.labels_N.expand(len(x_BX), -1), -distance_BN, "amax")  # (1)
