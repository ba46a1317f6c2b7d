"""A toy few-shot task, and functions that run a method on it."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from methods._toy import ToyTowers
from methods._toy_box import ToyBox, ToyImages
from methods._toy_local import ToyLocal
from methods.base import (
    Access,
    Bill,
    BlackBox,
    Classes,
    FewShotTask,
    ImageSet,
    LabelledImages,
    Method,
    Remaining,
    TaskShape,
)

ALLOTMENT = Remaining(requests=150, images=15_000)
"""Pays for several steps of every method on the toy task."""
LONG_ALLOTMENT = Remaining(requests=400, images=40_000)
"""Pays for a fit that learns the toy task."""
TOY_NAMES = ("ant", "bee", "cat", "dog", "elk")


def seed_everything(seed: int) -> None:
    """Seed the global generators of torch, numpy and Python."""
    for seed_generator in (torch.manual_seed, np.random.seed, random.seed):
        seed_generator(seed)


def toy_task(shots: int = 4, views: int = 3, fresh_views: bool = False) -> tuple[FewShotTask, LabelledImages]:
    """Return a five-class task on `ToyTowers`, on which zero-shot makes errors, and its test set (20 per class)."""
    towers = ToyTowers()

    def draw(n: int, seed: int, split: str) -> LabelledImages:
        pixels = torch.cat([towers.pixels_of(name, n, seed + 100 * c) for c, name in enumerate(TOY_NAMES)])
        return LabelledImages(ToyImages(pixels, split), torch.arange(len(TOY_NAMES)).repeat_interleave(n))

    task = FewShotTask(
        dataset="toy",
        classes=Classes(TOY_NAMES, "a photo of a {}.", ("a photo of a {}.", "the {}.", "art of a {}.")),
        shots=shots,
        train=draw(shots, 1, "train"),
        val=draw(min(shots, 4), 2, "val"),
        views=views,
        fresh_views=fresh_views,
        local=ToyLocal(),
    )
    return task, draw(20, 3, "test")


def fit(method: Method, task: FewShotTask, box: BlackBox, seed: int = 0) -> int:
    """Start the method and step until it is finished. Return the number of steps.

    Only a method that declares `uses_local` is given the local model.
    """
    task = task if method.info.uses_local else replace(task, local=None)
    method.begin(task, box, np.random.default_rng(seed))
    steps = 1
    while method.step(box):
        steps += 1
    return steps


def fitted(method: Method, task: FewShotTask, allotment: Remaining = ALLOTMENT, seed: int = 0) -> ToyBox:
    """Fit the method within an allotment. Return the box with its bill."""
    box = ToyBox(method.info.access, allotment)
    fit(method, task, box, seed)
    assert method.info.uses_text_norm or not box.reads_text_norm, "box.text_norm is read: declare uses_text_norm"
    for images in (task.train.images, task.val.images):
        _check_arrays(method, images)
    return box


def predict(method: Method, images: ImageSet, *classes: Classes) -> Tensor:
    """Return the logits [B, C] by the method itself, under the rules for prediction."""
    box = ToyBox(method.info.access)
    ensembles = (toy_task()[0].classes, *classes)
    with box.predicting(images, max(1, *(len(c.templates) for c in ensembles))):
        logits = method.predict(images, box, *classes)
    _check_arrays(method, images)
    return logits


def _check_arrays(method: Method, images: ImageSet) -> None:
    assert isinstance(images, ToyImages)
    assert method.info.access.covers(Access.PIXELS) or not images.arrays, "images.array is read: declare access PIXELS"


def logits_of(method: Method, images: ImageSet, *classes: Classes) -> Tensor:
    """Return the logits [B, C] by a copy of the method, as a trial does."""
    return predict(copy.deepcopy(method), images, *classes)


def result(
    method: Method, task: FewShotTask, images: ImageSet, allotment: Remaining = ALLOTMENT, seed: int = 0
) -> tuple[Tensor, Bill]:
    """Fit the method. Return its logits [B, C] for these images, and the bill of the fit."""
    box = fitted(method, task, allotment, seed)
    return logits_of(method, images), box.bill


def zero_shot(task: FewShotTask, images: ImageSet) -> Tensor:
    """Return the scores [B, C] with the template of the task."""
    return ToyBox(Access.TEXT | Access.SCORES).scores(images, task.classes.prompts())[0]


def check_bill(method: Method, task: FewShotTask, requests: float, images: float) -> None:
    """Fit with so many requests and images more than the least that the method needs.

    Raises AssertionError if the fit exceeds the allotment or is not charged what was planned.
    """
    shape = TaskShape.of(task, ToyTowers.D)
    least = method.bill(shape, Remaining(0, 0))
    allotment = Remaining(least.requests + requests, least.images + images)
    planned = method.bill(shape, allotment)
    assert fitted(method, task, allotment).bill == planned, (shape, allotment)


def check_logits(logits: Tensor, n_images: int, n_classes: int) -> None:
    """Raise AssertionError unless the logits are a finite float32 tensor of this shape."""
    assert logits.shape == (n_images, n_classes)
    assert logits.dtype == torch.float32 and torch.isfinite(logits).all()


class PlainImages(ToyImages):
    """Images that refuse to be augmented."""

    def views(self, n: int, seed: int = 0) -> NoReturn:
        raise AssertionError("the method uses augmented views of the images")


def plain_only(task: FewShotTask) -> FewShotTask:
    """Return the task with training images that refuse to be augmented."""
    images = task.train.images
    assert isinstance(images, ToyImages)
    return replace(task, train=task.train._replace(images=PlainImages(images.pixels_BX, images.split)))


_LARGE = TaskShape(
    n_classes=10, n_train=160, n_val=40, shots=16, views=10, fresh_views=False, n_templates=7, feature_dim=192
)
_TOY = TaskShape.of(toy_task()[0], ToyTowers.D)
SHAPES = (_TOY, _LARGE, replace(_TOY, fresh_views=True), replace(_LARGE, fresh_views=True))
"""Shapes of the toy task and of a larger one, with fixed and with fresh views."""
