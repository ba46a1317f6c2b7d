"""ZS-LP and CLAP against an independent loop in numpy, whose gradients are written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from methods._toy_box import ToyBox
from methods._toy_task import fit, toy_task
from methods.base import Access, Remaining, TaskShape
from methods.clap import CLAP, ZeroShotLinearProbe

GRANT = Access.TEXT | Access.FEATURES
SCALE, LENGTH = 20.0, 4.33
"""Logit scale and `text_norm` of the toy model."""


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def plain_loop(*, penalty: bool, views: int, epochs: int, batch: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The weights and the lambdas, by loops over rows and classes that share no code with the methods."""
    task, _ = toy_task(views=views)
    towers = ToyBox(GRANT).towers
    t = LENGTH * towers.text_features(task.classes.prompts())[0].double().numpy()
    pixels = task.train.images.views(views).pixels_BX  # type: ignore[attr-defined]
    f = towers.image_features(pixels).double().numpy()
    n, c = len(task.train.labels), len(t)
    y = np.array([int(label) for _ in range(views) for label in task.train.labels])
    cosines = f @ (t / np.linalg.norm(t, axis=1, keepdims=True)).T
    lambdas = np.array([np.mean([softmax(SCALE * cosines[i : i + 1])[0, k] for i in range(len(y)) if y[i] == k])
                        for k in range(c)])  # fmt: skip
    w, velocity = t.copy(), np.zeros_like(t)
    order = torch.Generator().manual_seed(int(np.random.default_rng(seed).integers(2**63 - 1)))
    for epoch in range(epochs):
        rate = 1e-5 if epoch == 0 else 0.1 * (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2
        permutation = torch.randperm(len(y), generator=order).numpy()
        for b in range(max(1, n // batch)):
            rows = permutation[b * batch : (b + 1) * batch]
            gradient = np.zeros_like(w)
            for i in rows:
                lengths = np.linalg.norm(w, axis=1)
                p = softmax((SCALE * (w @ f[i]) / lengths)[None])[0]
                p[y[i]] -= 1
                for k in range(c):  # the derivative of a cosine
                    u = w[k] / lengths[k]
                    gradient[k] += SCALE * p[k] * (f[i] - (f[i] @ u) * u) / lengths[k] / len(rows)
            if penalty:
                for k in range(c):
                    gradient[k] += 2 * lambdas[k] * (w[k] - t[k]) / c
            velocity = 0.9 * velocity + gradient
            w = w - rate * velocity
    return w, lambdas


@pytest.mark.parametrize(("cls", "penalty"), [(ZeroShotLinearProbe, False), (CLAP, True)])
@pytest.mark.parametrize("batch", [8, 256])
def test_the_weights_are_those_of_the_plain_loop(cls: type[ZeroShotLinearProbe], penalty: bool, batch: int) -> None:
    task, _ = toy_task(views=3)
    method = cls(cls.Config(epochs=6, batch_size=batch))
    assert fit(method, task, ToyBox(GRANT), seed=4) == 6
    expected, lambdas = plain_loop(penalty=penalty, views=3, epochs=6, batch=batch, seed=4)
    start = method.text_CD.numpy()
    assert np.abs(expected - start).max() > 1e-2
    np.testing.assert_allclose(method.weight_CD.detach().numpy(), expected, rtol=1e-4, atol=1e-4)
    if isinstance(method, CLAP):
        np.testing.assert_allclose(method.lambda_C.numpy(), lambdas, rtol=1e-5)
        assert method.notes["mean_lambda"] == pytest.approx(lambdas.mean())


def test_an_epoch_has_as_many_steps_as_one_view_has_full_batches_and_at_least_one() -> None:
    for batch, steps in ((8, 2), (20, 1), (256, 1)):
        method, box = ZeroShotLinearProbe(ZeroShotLinearProbe.Config(batch_size=batch)), ToyBox(GRANT)
        method.begin(toy_task(views=3)[0], box, np.random.default_rng(0))
        assert method.n_batches == steps


@pytest.mark.parametrize("cls", [ZeroShotLinearProbe, CLAP])
def test_the_start_is_zero_shot(cls: type[ZeroShotLinearProbe]) -> None:
    task, test = toy_task()
    method, box = cls(), ToyBox(GRANT | Access.SCORES)
    method.begin(task, box, np.random.default_rng(0))
    torch.testing.assert_close(method.predict(test.images, box), box.scores(test.images, task.classes.prompts())[0])


def test_the_penalty_keeps_the_weights_nearer_to_the_text_features() -> None:
    distances = []
    for cls in (ZeroShotLinearProbe, CLAP):
        method = cls()
        fit(method, toy_task()[0], ToyBox(GRANT))
        distances.append(float((method.weight_CD.detach() - method.text_CD).norm()))
    assert distances[1] < 0.9 * distances[0]


def test_a_longer_text_feature_is_moved_as_by_a_smaller_rate_and_a_larger_penalty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Plain gradient descent on w = r u with rate a and penalty p is that on u with rate a / r^2 and penalty p r^2."""
    task, test = toy_task()

    def logits(r: float, lr: float) -> torch.Tensor:
        monkeypatch.setattr(ToyBox, "text_norm", r)
        method, box = CLAP(CLAP.Config(lr=lr, warmup_epochs=0, momentum=0.0, epochs=5)), ToyBox(GRANT)
        method.begin(task, box, np.random.default_rng(0))
        method.lambda_C = method.lambda_C / r**2
        while method.step(box):
            pass
        return method.predict(test.images, box)

    torch.testing.assert_close(logits(3.0, 0.9), logits(1.0, 0.1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("views", "fresh", "config", "allotment", "used"),
    [
        (10, False, None, Remaining(), 10),
        (10, False, 20, Remaining(), 20),
        (10, False, None, Remaining(images=199), 9),
        (10, False, None, Remaining(requests=2, images=5), 1),
        (1, True, None, Remaining(), 20),
        (0, False, 20, Remaining(), 1),
    ],
)
def test_views_are_cut_to_the_allotment(
    views: int, fresh: bool, config: int | None, allotment: Remaining, used: int
) -> None:
    task, _ = toy_task(views=views, fresh_views=fresh)
    method = ZeroShotLinearProbe(ZeroShotLinearProbe.Config(views=config, epochs=2))
    plan = method.plan(TaskShape.of(task, 16), allotment)
    assert plan.views == used and (plan.bill.requests, plan.bill.images) == (2, 20 * used)
    if allotment.images >= 20:
        box = ToyBox(GRANT, allotment)
        fit(method, task, box)
        assert box.bill == plan.bill and method.notes["views"] == used
