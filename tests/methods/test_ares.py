"""`ares` against torch's own layers and schedulers, written from the paper's equations, and what it may ask."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from methods._toy_box import ToyBox
from methods._toy_local import ToyLocal
from methods._toy_task import fit, fitted, logits_of, toy_task
from methods.ares import AReS
from methods.base import Access, Bill, FewShotTask, torch_generator
from tests.methods.test_score_ridge import nll

SETTINGS = {"epochs": 25, "head_epochs": 12, "batch_size": 9, "head_batch": 7}
"""Batches that do not divide the 20 training images."""


def worked_out(task: FewShotTask, test: Tensor, seed: int = 0) -> Tensor:
    """Logits of test pixels without temperature, by torch's Linear, AdamW, Adam and schedulers."""
    local, g = ToyLocal(), torch_generator(np.random.default_rng(seed))
    n, c, small, before = len(task.train.labels), 5, 9, 4
    scores = ToyBox(Access.TEXT | Access.SCORES).scores(task.train.images, task.classes.prompts())[0]
    head = nn.Linear(local.feature_dim, c)
    bound = 1 / local.feature_dim**0.5
    with torch.no_grad():
        head.weight.copy_((torch.rand(local.feature_dim, c, generator=g) * 2 * bound - bound).T)
        head.bias.copy_(torch.rand(c, generator=g) * 2 * bound - bound)
    x = local.features(task.train.images)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12 * 3)
    for _ in range(12):
        for rows in torch.randperm(n, generator=g).split(7):
            q, p = scores[rows].softmax(1), head(x[rows]).softmax(1)
            loss = (q * (q.log() - p.log())).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cosine.step()
    program = torch.zeros(3, 16, 16, requires_grad=True)

    def network(pixels: Tensor) -> Tensor:
        image = torch.zeros(len(pixels), 3, 16, 16)
        image[:, :, before : before + small, before : before + small] = pixels
        mask = torch.ones(3, 16, 16)
        mask[:, before : before + small, before : before + small] = 0
        return head(local.encode(image + torch.sigmoid(program) * mask))

    pixels = local.pixels(task.train.images, small)
    adam = torch.optim.Adam([program], lr=0.01)
    steps = torch.optim.lr_scheduler.MultiStepLR(adam, [12, 18], gamma=0.1)
    matrix = torch.zeros(c, c)
    for _ in range(25):
        matrix = torch.zeros(c, c)
        for p, y in zip(network(pixels).softmax(1).detach(), task.train.labels.tolist(), strict=True):
            matrix[p.argmax(), y] += p.max()  # int(0.15 * 5) = 0 classes, and one at least
        matrix = matrix / (matrix.sum(1, keepdim=True) + 1)
        matrix = matrix / matrix.sum(0).clamp(min=1e-12)
        for rows in torch.randperm(n, generator=g).split(9):
            loss = F.cross_entropy(network(pixels[rows]) @ matrix, task.train.labels[rows])
            adam.zero_grad()
            loss.backward()
            adam.step()
        steps.step()
    return (network(test) @ matrix).detach()


def test_the_logits_are_those_of_the_equations() -> None:
    task, test = toy_task()
    method = AReS(AReS.Config(**SETTINGS))  # type: ignore[arg-type]
    fit(method, task, ToyBox(method.info.access))
    got = method.predict(test.images, ToyBox(method.info.access)) / method.temperature
    expected = worked_out(task, ToyLocal().pixels(test.images, 9))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    logits = worked_out(task, ToyLocal().pixels(task.train.images, 9)).numpy()
    losses = [nll(f * method.temperature, logits, task.train.labels.numpy()) for f in (0.98, 1.0, 1.02)]
    assert losses[1] == min(losses) or method.temperature in (1.0, 100.0)


def test_it_asks_the_training_images_once_and_nothing_afterwards() -> None:
    task, test = toy_task()
    box = fitted(method := AReS(), task)
    assert (box.calls, box.bill) == (["scores"], Bill.scores(1, 20, 5))
    predicting = ToyBox(method.info.access)
    method.predict(test.images, predicting)
    assert predicting.bill == Bill()


def test_what_the_endpoint_says_matters_and_the_true_labels_do() -> None:
    task, test = toy_task()
    fit(before := AReS(), task, ToyBox(before.info.access))
    for other in (
        replace(task, classes=replace(task.classes, names=task.classes.names[::-1])),
        replace(task, train=task.train._replace(labels=task.train.labels.flip(0))),
    ):
        fit(method := AReS(), other, ToyBox(method.info.access))
        assert not torch.equal(logits_of(method, test.images), logits_of(before, test.images))


def test_a_pickle_holds_no_training_pixels() -> None:
    fitted(method := AReS(), toy_task()[0])
    assert "pixels_N3HH" in vars(method) and "pixels_N3HH" not in vars(pickle.loads(pickle.dumps(method)))


def test_without_epochs_the_frame_stays_gray_and_the_map_is_estimated_once() -> None:
    fitted(method := AReS(AReS.Config(epochs=0)), toy_task()[0])
    assert not method.frame_3SS.any() and method.map_CC.sum(0).max() <= 1 + 1e-6 and method.temperature >= 1
