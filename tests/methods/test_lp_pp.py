"""LP++ against a plain numpy loop written from the paper."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from methods._toy_box import ToyBox
from methods._toy_task import fit, toy_task
from methods.base import Access, FewShotTask, LabelledImages, Remaining
from methods.lp_pp import LPPlusPlus

GRANT = Access.TEXT | Access.FEATURES


def features(images: Any) -> np.ndarray:
    return ToyBox(GRANT).towers.image_features(images.pixels_BX).double().numpy()


def without_val(task: FewShotTask) -> FewShotTask:
    return replace(task, val=LabelledImages(task.val.images[:0], task.val.labels[:0]))


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def plain_loop(task: FewShotTask, epochs: int, accumulate: bool) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(w, b, alpha) after each epoch."""
    f, y = features(task.train.images.views(1)), task.train.labels.numpy()
    t = ToyBox(GRANT).towers.text_features(task.classes.prompts())[0].double().numpy()
    n, c = len(f), len(t)
    w = np.stack([f[y == k].sum(0) for k in range(c)])
    b = np.zeros(c)
    alpha = np.full(c, 250 * np.mean([np.mean([f[i] @ t[k] for i in range(n) if y[i] == k]) for k in range(c)]))
    lr_w = 4 * n / np.linalg.eigvalsh(f.T @ f).max()
    lr_alpha = n / (4 * max(sum((f[i] @ t[k]) ** 2 for i in range(n)) for k in range(c)))
    speed_w, speed_b, total = np.zeros_like(w), np.zeros(c), np.zeros(c)
    history = []
    for epoch in range(1, epochs + 1):
        error = (softmax(f @ w.T + b + alpha * (f @ t.T)) - np.eye(c)[y]) / n
        gradient = (error * (f @ t.T)).sum(0)
        speed_w, speed_b = 0.9 * speed_w + error.T @ f, 0.9 * speed_b + error.sum(0)
        w, b = w - lr_w * speed_w, b - lr_w * speed_b
        total = total + gradient
        if epoch % 10 == 0:
            alpha = alpha - lr_alpha * (total if accumulate else gradient)
        history.append((w, b, alpha))
    return history


@pytest.mark.parametrize("accumulate", [True, False])
def test_every_epoch_is_that_of_the_plain_loop(accumulate: bool) -> None:
    task = without_val(toy_task(shots=4)[0])
    history = plain_loop(task, 35, accumulate)
    method = LPPlusPlus(LPPlusPlus.Config(epochs=35, accumulate_alpha_gradient=accumulate))
    box = ToyBox(GRANT)
    method.begin(task, box, np.random.default_rng(0))
    for done in (10, 20, 30, 35):
        assert method.step(box) == (done < 35)
        w, b, alpha = history[done - 1]
        for value, expected in ((method.weight_CD, w), (method.bias_C, b)):
            np.testing.assert_allclose(value.detach().numpy(), expected, rtol=1e-3, atol=1e-4)
        moved = method.alpha_C.double().numpy() - history[0][2]
        np.testing.assert_allclose(moved, alpha - history[0][2], rtol=1e-2, atol=2e-4)
    assert np.abs(history[-1][2] - history[0][2]).max() > 1e-3


def test_the_two_gradients_of_alpha_differ() -> None:
    task = without_val(toy_task(shots=4)[0])
    accumulated, fresh = (plain_loop(task, 30, accumulate)[-1][2] for accumulate in (True, False))
    assert np.abs(accumulated - fresh).max() > 0.1


def test_the_last_of_the_best_epochs_on_validation_is_kept() -> None:
    task, test = toy_task(shots=2)
    history = plain_loop(task, 300, True)
    t = ToyBox(GRANT).towers.text_features(task.classes.prompts())[0].double().numpy()
    v, y = features(task.val.images), task.val.labels.numpy()

    def logits(f: np.ndarray, w: np.ndarray, b: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        return f @ w.T + b + alpha * (f @ t.T)

    accuracies = [float((logits(v, *state).argmax(1) == y).mean()) for state in history]
    assert len(set(accuracies)) > 1
    last = max(e for e, accuracy in enumerate(accuracies) if accuracy == max(accuracies))
    method, box = LPPlusPlus(), ToyBox(GRANT)
    fit(method, task, box)
    assert method.notes == {"searched_on_val": len(y), "epoch": last + 1}
    expected = logits(features(test.images), *history[last])
    np.testing.assert_allclose(method.predict(test.images, box).numpy(), expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(("images", "requests", "searched"), [(40, 3, 20), (39, 3, 0), (40, 2, 0), (20, 2, 0)])
def test_the_epoch_is_chosen_only_when_validation_can_be_paid(images: int, requests: int, searched: int) -> None:
    task, _ = toy_task(shots=4)
    method, box = LPPlusPlus(), ToyBox(GRANT, Remaining(requests, images))
    fit(method, task, box)
    assert method.notes["searched_on_val"] == searched
    assert (box.bill.requests, box.bill.images) == (2 + (searched > 0), 20 + searched)
    assert searched or method.notes["epoch"] == 300


def test_an_unpickled_method_keeps_the_sum_of_gradients_and_the_momentum() -> None:
    task = without_val(toy_task(shots=4)[0])
    method, box = LPPlusPlus(LPPlusPlus.Config(epochs=30)), ToyBox(GRANT)
    method.begin(task, box, np.random.default_rng(0))
    while True:
        method = pickle.loads(pickle.dumps(method))
        if not method.step(box):
            break
    np.testing.assert_allclose(method.alpha_C.numpy(), plain_loop(task, 30, True)[-1][2], rtol=1e-3, atol=1e-4)


def test_a_diverging_loss_is_an_error() -> None:
    task, _ = toy_task()
    method, box = LPPlusPlus(), ToyBox(GRANT)
    method.begin(task, box, np.random.default_rng(0))
    method.text_CD = method.text_CD * torch.inf
    with pytest.raises(FloatingPointError, match="loss in epoch 1"):
        method.step(box)
