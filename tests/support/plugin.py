"""A small method as a user would write it, for tests of plug-ins."""

MEAN_METHOD = '''"""Nearest class mean, mixed with the text feature."""
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from methods.base import (
    Access, Bill, BlackBox, Classes, FewShotTask, ImageSet, Method, Plan, Remaining, TaskShape, method,
)


@method(name="feature_mean", access=Access.TEXT | Access.FEATURES, paper="arXiv:1703.05175", new_classes=False)
class FeatureMean(Method):
    """The nearest class mean, mixed with the class's text feature."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        mix: float = 0.5

    def plan(self, shape: TaskShape, remaining: Remaining) -> Plan:
        c, n, d = shape.n_classes, shape.n_train, shape.feature_dim
        return Plan(bill=Bill.text_features(1, c, d) + Bill.image_features(n, d))

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: Plan) -> None:
        text_CD = box.text_features(task.classes.prompts())[0]
        x_ND = box.image_features(task.train.images)
        mean_CD = normalize(one_hot(task.train.labels, len(task.classes)).T.float() @ x_ND, dim=-1)
        self.weights_CD = normalize((1 - self.config.mix) * text_CD + self.config.mix * mean_CD, dim=-1)

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        return box.logit_scale * box.image_features(images) @ self.weights_CD.T
'''
"""Source text of a file that registers the method `feature_mean`."""
