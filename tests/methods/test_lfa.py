"""LFA against plain loops written from the paper."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from methods._toy_box import ToyBox
from methods._toy_task import fit, toy_task
from methods.base import Access, FewShotTask, Remaining
from methods.lfa import LFA, procrustes, ranking_loss

GRANT = Access.TEXT | Access.FEATURES


def build(**settings: Any) -> LFA:
    return LFA(LFA.Config(**settings))


def features(images: Any) -> np.ndarray:
    return ToyBox(GRANT).towers.image_features(images.pixels_BX).double().numpy()


def text(task: FewShotTask) -> np.ndarray:
    return ToyBox(GRANT).towers.text_features(task.classes.prompts())[0].double().numpy()


def orthogonal(x: np.ndarray, t: np.ndarray) -> np.ndarray:
    u, _, vh = np.linalg.svd(x.T @ t / len(x) + 1e-6 * np.eye(x.shape[1]))
    return u @ vh


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.default_rng(seed).integers(2**63 - 1)))


def loss_by_loops(q: torch.Tensor, y: list[int], t: torch.Tensor) -> torch.Tensor:
    terms = []
    for i in range(len(q)):
        distance = [(q[i] - t[c]).norm() for c in range(len(t))]
        for j in sorted(range(len(t)), key=lambda c: distance[c].item())[:3]:
            margin = (1 - t[j] @ t[y[i]]) / 4
            terms.append((distance[y[i]] + margin - distance[j]).clamp(min=0))
    return torch.stack(terms).mean()


def test_the_closed_form_is_orthogonal_and_no_rotation_aligns_better() -> None:
    task, _ = toy_task(shots=8)
    x, t = features(task.train.images), text(task)[task.train.labels.numpy()]
    w = procrustes(torch.tensor(x).float(), torch.tensor(t).float()).double().numpy()
    np.testing.assert_allclose(w.T @ w, np.eye(16), atol=1e-5)
    np.testing.assert_allclose(w, orthogonal(x, t), atol=1e-4)
    best, rng = np.linalg.norm(x @ w - t), np.random.default_rng(0)
    for _ in range(20):
        other = np.linalg.qr(w + 0.1 * rng.standard_normal((16, 16)))[0]
        other *= np.sign((other * w).sum(0))
        assert np.linalg.norm(x @ other - t) > best


def test_the_closed_form_is_the_identity_where_the_data_say_nothing() -> None:
    x = torch.eye(16)[:2]
    w = procrustes(x, x)
    torch.testing.assert_close(w, torch.eye(16), rtol=0, atol=1e-5)


def test_the_loss_is_the_formula_by_loops_with_its_gradient() -> None:
    g = torch.Generator().manual_seed(1)
    t = torch.nn.functional.normalize(torch.randn(6, 8, generator=g), dim=-1)
    y = torch.tensor([0, 1, 2, 3, 4, 5, 0])
    q = torch.nn.functional.normalize(torch.randn(7, 8, generator=g) + t[y], dim=-1).requires_grad_()
    loss, expected = ranking_loss(q, y, t, 3, 4.0), loss_by_loops(q, y.tolist(), t)
    torch.testing.assert_close(loss, expected)
    slope, slope_expected = (torch.autograd.grad(v, q)[0] for v in (loss, expected))
    assert slope.abs().max() > 0
    tangent, tangent_expected = (s - q * (s * q).sum(1, keepdim=True) for s in (slope, slope_expected))
    torch.testing.assert_close(tangent, tangent_expected, rtol=1e-4, atol=1e-5)


def test_the_loss_is_zero_where_the_own_class_is_nearest_by_the_margin() -> None:
    t = torch.eye(4)
    assert ranking_loss(t.clone(), torch.arange(4), t, 3, 4.0) == 0
    assert ranking_loss(t[:2].flip(0), torch.tensor([0, 1]), t[:2], 3, 4.0) > 0  # fewer classes than neighbours


def test_beta_is_the_first_best_of_the_cross_validation_by_loops() -> None:
    task, _ = toy_task(shots=4, views=2)
    method = build(steps=0)
    fit(method, task, ToyBox(GRANT), seed=5)
    y, t = task.train.labels.numpy(), text(task)
    x, g, n = features(task.train.images.views(2)[:20]), generator(5), 20
    orders = [torch.randperm(n, generator=g).numpy() for _ in range(3)]
    best, chosen = -1.0, math.nan
    for i in range(25):
        beta, accuracies = i / 24, []
        for order in orders:
            test, rest = order[:4], order[4:]
            w = (1 - beta) * orthogonal(x[rest], t[y[rest]]) + beta * np.eye(16)
            accuracies.append(((x[test] @ w @ t.T).argmax(1) == y[test]).mean())
        if np.mean(accuracies) > best + 1e-9:
            best, chosen = float(np.mean(accuracies)), beta
    assert method.beta == pytest.approx(chosen)


def plain_refinement(task: FewShotTask, views: int, steps: int, beta: float, seed: int) -> torch.Tensor:
    """W by torch's AdamW and scheduler, the loss by loops."""
    n, y = len(task.train.labels), task.train.labels.tolist()
    x, t = features(task.train.images.views(views)), text(task)
    start = (1 - beta) * orthogonal(x, t[np.array(y * views)]) + beta * np.eye(16)
    w, g = torch.tensor(start).float().requires_grad_(), generator(seed)
    adamw = torch.optim.AdamW([w], lr=5e-4, weight_decay=5e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adamw, steps, eta_min=1e-7)
    for _ in range(steps):
        v = int(torch.randint(views, (), generator=g))
        f = torch.tensor(x[v * n : (v + 1) * n]).float()
        noise, drop = torch.rand(2, generator=g)
        if noise < 0.5:
            f = f + 0.035 * torch.randn(f.shape, generator=g)
        if drop < 0.5:
            f = torch.where(torch.rand(f.shape, generator=g) < 0.05, 0.0, f / 0.95)
        q = f @ w
        loss = loss_by_loops(q / q.norm(dim=1, keepdim=True), y, torch.tensor(t).float())
        adamw.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adamw.step()
        cosine.step()
    return w.detach()


def test_the_refined_map_is_that_of_the_plain_loop() -> None:
    task, _ = toy_task(shots=2, views=3)
    method = build(steps=25, beta=0.5)
    assert fit(method, task, ToyBox(GRANT), seed=7) == 3
    expected = plain_refinement(task, 3, 25, 0.5, seed=7)
    torch.testing.assert_close(method.map_DD.detach(), expected, rtol=1e-3, atol=2e-5)
    unrefined = build(steps=0, beta=0.5)
    fit(unrefined, task, ToyBox(GRANT), seed=7)
    assert (unrefined.map_DD - expected).abs().max() > 1e-3


def test_the_map_is_applied_to_classes_that_it_was_not_fitted_on() -> None:
    task, test = toy_task()
    method, box = build(beta=0.9, steps=20), ToyBox(GRANT)
    fit(method, task, box)
    assert method.notes["beta"] == 0.9
    new = replace(task.classes, names=("fox", "gnu", "hen"))
    q, t = box.image_features(test.images) @ method.map_DD.detach(), box.text_features(new.prompts())[0]
    expected = 20.0 * q @ t.T / q.norm(dim=1, keepdim=True)
    torch.testing.assert_close(method.predict(test.images, box, new), expected, rtol=1e-4, atol=1e-4)


def test_beta_one_without_steps_is_zero_shot() -> None:
    task, test = toy_task()
    method, box = build(beta=1.0, steps=0), ToyBox(GRANT)
    fit(method, task, box)
    zero_shot = box.scores(test.images, task.classes.prompts())[0]
    torch.testing.assert_close(method.predict(test.images, box), zero_shot, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("offered", "images", "bought"), [(10, 999, 5), (3, 999, 3), (0, 999, 1), (10, 99, 4), (10, 20, 1)]
)
def test_five_views_are_bought_or_as_many_as_are_offered_and_paid(offered: int, images: int, bought: int) -> None:
    method, box = build(steps=0, beta=1.0), ToyBox(GRANT, Remaining(images=images))
    fit(method, toy_task(shots=4, views=offered)[0], box)
    assert method.notes["views"] == bought and (box.bill.requests, box.bill.images) == (2, 20 * bought)
