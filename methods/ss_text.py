"""SS-Text: class weights in closed form, the text features plus the images' features. No validation and no training.

What is learned: W [C, D]; C * D numbers.
Shapes: B images in a call, C classes, D feature width, N training images, n_c of them of class c.
Cost: 1 request (C prompts) for the text features; 1 request and N image rows for the training features. It cannot be
cut.
Prediction: 1 request, B image rows a call.
Paper: Silva-Rodriguez et al., Full Conformal Adaptation of Medical Vision-Language Models (IPMI 2025). SS-Text+, for
training images that are not balanced: Silva-Rodriguez et al., arXiv:2506.17500 (MICCAI 2025); released jusiro/SS-Text:

    W_c = scale * sum of the features of class c / (N lambda_c) + t_c        (1)
    logits(f) = scale * cos(f, W)        (2)

SS-Text: lambda_c = 1 / N. SS-Text+: lambda_c = 1 / n_c, and then

    W_c <- W_c - normalize(2 W_c - mean over classes of W)        (3)

Departures from the released code:
1. The code keeps lambda_c at 0.001 or more, against division by zero. Here a class without images keeps its text
   feature without that limit; the two differ where 1 / lambda_c exceeds 1,000 images.
2. Features have unit length, as the endpoint returns them, and one template is used, the data set's.
"""

from __future__ import annotations

import numpy as np

from methods._torch import F, Tensor, torch
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


@method(name="ss_text", access=Access.TEXT | Access.FEATURES, paper="arXiv:2506.17500", uses_views=False)
class SSText(Method):
    """Text features plus the sum of each class's image features, in closed form."""

    def plan(self, shape: TaskShape, remaining: Remaining) -> Plan:
        text = Bill.text_features(1, shape.n_classes, shape.feature_dim)
        return Plan(bill=text + Bill.image_features(shape.n_train, shape.feature_dim))

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: Plan) -> None:
        self.scale, labels_N = box.logit_scale, task.train.labels
        text_CD = box.text_features(task.classes.prompts())[0]
        features_ND = box.image_features(task.train.images)
        sum_CD = torch.zeros_like(text_CD).index_add(0, labels_N, features_ND)
        self.weight_CD = self.weight(text_CD, sum_CD, torch.bincount(labels_N, minlength=len(text_CD)))
        self.trainable_params = self.weight_CD.numel()

    def weight(self, text_CD: Tensor, sum_CD: Tensor, count_C: Tensor) -> Tensor:
        """Return W [C, D] (1)."""
        return self.scale * sum_CD + text_CD  # N lambda_c = 1

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        return self.scale * box.image_features(images) @ F.normalize(self.weight_CD, dim=-1).T  # (2)


@method(name="ss_text_plus", access=Access.TEXT | Access.FEATURES, paper="arXiv:2506.17500", uses_views=False)
class SSTextPlus(SSText):
    """SS-Text with a weight of the text for each class by its number of images, and a repulsion of the classes."""

    def weight(self, text_CD: Tensor, sum_CD: Tensor, count_C: Tensor) -> Tensor:
        """Return W [C, D] (1), moved by (3)."""
        share_C1 = (count_C / count_C.sum()).unsqueeze(1)  # 1 / (N lambda_c)
        weight_CD = self.scale * share_C1 * sum_CD + text_CD
        return weight_CD - F.normalize(2 * weight_CD - weight_CD.mean(0), dim=-1)
