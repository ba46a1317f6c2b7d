"""RLA against a plain loop written from the paper."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from methods._toy_box import ToyBox
from methods._toy_task import fit, toy_task
from methods.base import Access, Remaining
from methods.rla import RegularizedLinearAdapter

GRANT = Access.TEXT | Access.FEATURES


def build(**settings: Any) -> RegularizedLinearAdapter:
    return RegularizedLinearAdapter(RegularizedLinearAdapter.Config(**settings))


def plain_loop(*, epochs: int, lr: float, penalty: float, views: int, fresh: bool) -> np.ndarray:
    """W by a loop in numpy, with the gradient and Adam written out."""
    task, _ = toy_task()
    towers, images = ToyBox(GRANT).towers, task.train.images
    t = towers.text_features(task.classes.prompts())[0].double().numpy()
    y = task.train.labels.numpy()
    n, d = len(y), t.shape[1]
    w, mean, square = np.eye(d), np.zeros((d, d)), np.zeros((d, d))
    for epoch in range(epochs):
        v = epoch % views
        pixels: Any = images.views(1, seed=v + 1) if fresh else images.views(views)[v * n : (v + 1) * n]
        f = towers.image_features(pixels.pixels_BX).double().numpy()
        h = f @ w.T
        length = np.linalg.norm(h, axis=1, keepdims=True)
        q = h / length
        z = 20.0 * q @ t.T
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        upstream = 20.0 * (p - np.eye(len(t))[y]) @ t / n  # with respect to q
        upstream = (upstream - q * (q * upstream).sum(1, keepdims=True)) / length  # with respect to h
        gradient = upstream.T @ f + 2 * penalty * (w - np.eye(d))
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        rate = lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
        root = np.sqrt(square / (1 - 0.999 ** (epoch + 1)))
        w = w - rate * mean / (1 - 0.9 ** (epoch + 1)) / (root + 1e-4)
    return w


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("penalty", [None, 2.0])
def test_the_map_is_that_of_the_plain_loop(penalty: float | None, fresh: bool) -> None:
    task, _ = toy_task(shots=4, views=3, fresh_views=fresh)
    method = build(epochs=8, lr=1e-2, penalty=penalty)
    assert fit(method, task, ToyBox(GRANT)) == 8
    expected = plain_loop(epochs=8, lr=1e-2, penalty=penalty or 1 / 4, views=8 if fresh else 3, fresh=fresh)
    assert np.abs(expected - np.eye(16)).max() > 1e-2
    np.testing.assert_allclose(method.map_DD.detach().numpy(), expected, rtol=1e-3, atol=1e-5)


def test_the_start_is_zero_shot() -> None:
    task, test = toy_task()
    method, box = build(), ToyBox(GRANT)
    method.begin(task, box, np.random.default_rng(0))
    torch.testing.assert_close(method.predict(test.images, box), box.scores(test.images, task.classes.prompts())[0])


def test_the_map_learned_on_some_classes_is_applied_to_others() -> None:
    task, test = toy_task()
    method, box = build(epochs=20, lr=1e-2), ToyBox(GRANT)
    fit(method, task, box)
    new = replace(task.classes, names=("fox", "gnu", "hen"))
    f, t = box.image_features(test.images), box.text_features(new.prompts())[0]
    mapped = f @ method.map_DD.detach().T
    expected = 20.0 * mapped @ t.T / mapped.norm(dim=1, keepdim=True)
    torch.testing.assert_close(method.predict(test.images, box, new), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("shots", "penalty"), [(1, 1.0), (4, 0.25), (16, 0.0625)])
def test_the_penalty_is_one_over_the_shots(shots: int, penalty: float) -> None:
    method = build()
    method.begin(toy_task(shots=shots)[0], ToyBox(GRANT), np.random.default_rng(0))
    assert method.notes["penalty"] == penalty


@pytest.mark.parametrize(("images", "fresh", "bought"), [(60, False, 3), (59, False, 2), (20, False, 1), (59, True, 2)])
def test_a_smaller_allotment_buys_fewer_views_and_runs_every_epoch(images: int, fresh: bool, bought: int) -> None:
    method, box = build(epochs=9), ToyBox(GRANT, Remaining(images=images))
    assert fit(method, toy_task(shots=4, fresh_views=fresh)[0], box) == 9
    assert method.notes["views"] == bought
    assert (box.bill.requests, box.bill.images) == (1 + (bought if fresh else 1), 20 * bought)


def test_a_larger_penalty_keeps_the_map_nearer_to_the_identity() -> None:
    distances = []
    for penalty in (0.0, 0.25, 10.0):
        method = build(penalty=penalty, lr=1e-2, epochs=60)
        fit(method, toy_task()[0], ToyBox(GRANT))
        distances.append(float((method.map_DD.detach() - torch.eye(16)).norm()))
    assert distances == sorted(distances, reverse=True) and distances[0] > 2 * distances[2]
