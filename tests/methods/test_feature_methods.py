"""Linear probe, Tip-Adapter (and -F), logit head and the pixel control against plain, independent computations."""

import itertools
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize, one_hot

from methods import all_methods
from methods._refiner import Refiner
from methods._toy_box import ToyBox, ToyImages
from methods._toy_task import fit, toy_task
from methods.base import Access, Classes, FewShotTask, LabelledImages, Remaining
from methods.linear_probe import LinearProbe, logistic_regression
from methods.logit_head import LogitHead
from methods.pixel_nn import PixelNearestNeighbour
from methods.tip_adapter import TipAdapter, TipAdapterF

FEATURES = Access.TEXT | Access.FEATURES
SCALE = 20.0


def features(images: object) -> torch.Tensor:
    return ToyBox(FEATURES).towers.image_features(images.pixels_BX)  # type: ignore[attr-defined]


def text(task: FewShotTask) -> torch.Tensor:
    return ToyBox(FEATURES).towers.text_features(task.classes.prompts())[0]


def without_val(task: FewShotTask) -> FewShotTask:
    return replace(task, val=LabelledImages(task.val.images[:0], task.val.labels[:0]))


# pixel_nn


def test_pixel_nn_is_the_label_of_the_nearest_thumbnail_and_asks_nothing() -> None:
    task, test = toy_task()
    method, box = PixelNearestNeighbour(), ToyBox(Access.TEXT, Remaining(0, 0))
    fit(method, task, box)
    logits = method.predict(test.images, box)
    train, query = task.train.images.pixels(16).double(), test.images.pixels(16).double()
    for row in range(0, len(query), 7):
        distance = [math.sqrt(((query[row] - t) ** 2).sum()) for t in train]
        nearest = task.train.labels[int(np.argmin(distance))]
        assert logits[row].argmax() == nearest
        assert logits[row].max().item() == pytest.approx(-min(distance), abs=1e-4)
    assert box.calls == []


def test_pixel_nn_gives_a_class_without_images_the_lowest_score() -> None:
    pixels = torch.stack([torch.zeros(64), torch.ones(64)])
    train = LabelledImages(ToyImages(pixels, "train"), torch.tensor([0, 2]))
    task = FewShotTask("toy", Classes(("a", "b", "c"), "a {}."), 1, train, train)
    method, box = PixelNearestNeighbour(), ToyBox(Access.TEXT)
    fit(method, task, box)
    assert method.predict(train.images, box).tolist() == [[0.0, -16.0, -16.0], [-16.0, -16.0, 0.0]]


# linear_probe


@pytest.mark.parametrize("c_reg", [100.0, 1.0, 1e-3])
def test_logistic_regression_is_at_the_minimum_of_its_objective(c_reg: float) -> None:
    task, _ = toy_task()
    x, y = features(task.train.images).double(), task.train.labels
    w = logistic_regression(x, y, 5, c_reg, 1000).requires_grad_()
    logits = x @ w[:-1] + w[-1]
    objective = torch.nn.functional.cross_entropy(logits, y, reduction="sum") + (w[:-1] ** 2).sum() / (2 * c_reg)
    (gradient,) = torch.autograd.grad(objective, w)
    assert gradient.abs().max() < 2e-3
    assert objective < len(y) * math.log(5)


def test_linear_probe_searches_as_coop_does() -> None:
    task, test = toy_task(shots=8)
    x, v = features(task.train.images), features(task.val.images).double()

    def val_accuracy(c: float) -> float:
        w = logistic_regression(x, task.train.labels, 5, c, 1000)
        return ((v @ w[:-1] + w[-1]).argmax(1) == task.val.labels).double().mean().item()

    coarse = [1e6, 1e4, 1e2, 1.0, 1e-2, 1e-4, 1e-6]
    peak = coarse[int(np.argmax([val_accuracy(c) for c in coarse]))]
    left, right = math.log10(peak) - 1, math.log10(peak) + 1
    final = math.nan
    for _ in range(8):
        if val_accuracy(10**left) < val_accuracy(10**right):
            final, left = right, (left + right) / 2
        else:
            final, right = left, (left + right) / 2
    method, box = LinearProbe(), ToyBox(FEATURES)
    fit(method, task, box)
    assert method.notes["c_reg"] == pytest.approx(10**final)
    w = logistic_regression(x, task.train.labels, 5, 10**final, 1000)
    expected = (features(test.images).double() @ w[:-1] + w[-1]).float()
    torch.testing.assert_close(method.predict(test.images, box), expected, rtol=1e-4, atol=1e-4)


def test_linear_probe_without_validation_images_or_the_means_for_them() -> None:
    task, _ = toy_task()
    for given, allotment in ((without_val(task), Remaining()), (task, Remaining(images=39)), (task, Remaining(1, 99))):
        method, box = LinearProbe(), ToyBox(FEATURES, allotment)
        fit(method, given, box)
        assert method.notes["c_reg"] == 1.0 and method.notes["searched_on_val"] == 0
        assert (box.bill.requests, box.bill.images) == (1, 20)


# tip_adapter


def tip_logits(f: torch.Tensor, keys: torch.Tensor, labels: torch.Tensor, t: torch.Tensor, a: float, b: float):  # type: ignore[no-untyped-def]
    affinity = torch.exp(-b + b * (f @ keys.T))
    return SCALE * f @ t.T + a * affinity @ one_hot(labels, len(t)).float()


def mean_keys(task: FewShotTask, views: int) -> torch.Tensor:
    bank = features(task.train.images.views(views)).view(views, len(task.train.labels), -1)
    return normalize(sum(bank[v] for v in range(views)) / views, dim=-1)  # type: ignore[call-overload]


def best_by_loops(task: FewShotTask, keys: torch.Tensor, betas: list[float], alphas: list[float]):  # type: ignore[no-untyped-def]
    f, best, chosen = features(task.val.images), -1.0, (math.nan, math.nan)
    for beta, alpha in itertools.product(betas, alphas):
        logits = tip_logits(f, keys, task.train.labels, text(task), alpha, beta)
        accuracy = (logits.argmax(1) == task.val.labels).float().mean().item()
        if accuracy > best:
            best, chosen = accuracy, (alpha, beta)
    return chosen


def test_tip_adapter_is_its_formula_at_the_first_best_of_the_grid() -> None:
    task, test = toy_task(views=3)
    method = TipAdapter(TipAdapter.Config(n_betas=6, n_alphas=5))
    box = ToyBox(FEATURES)
    fit(method, task, box)
    keys = mean_keys(task, 3)
    betas, alphas = [0.1 + i * 6.9 / 6 for i in range(6)], [0.1 + i * 2.9 / 5 for i in range(5)]
    alpha, beta = best_by_loops(task, keys, betas, alphas)
    assert (method.alpha, method.beta) == pytest.approx((alpha, beta))
    expected = tip_logits(features(test.images), keys, task.train.labels, text(task), alpha, beta)
    torch.testing.assert_close(method.predict(test.images, box), expected, rtol=1e-4, atol=1e-4)
    assert (box.bill.requests, box.bill.images) == (3 + 1, 3 * 20 + 20 + 100)  # the last 100: the prediction


def test_the_default_grid_is_the_papers() -> None:
    config = TipAdapter.Config()
    assert (config.n_betas, config.n_alphas, config.beta_max, config.alpha_max) == (200, 20, 7.0, 3.0)
    assert (config.init_beta, config.init_alpha) == (1.0, 1.17)


def test_tip_adapter_without_validation_keeps_the_first_alpha_and_beta() -> None:
    task, _ = toy_task(views=3)
    for given, allotment in ((without_val(task), Remaining()), (task, Remaining(images=39)), (task, Remaining(2, 999))):
        method, box = TipAdapter(), ToyBox(FEATURES, allotment)
        fit(method, given, box)
        assert (method.alpha, method.beta) == (1.17, 1.0)
        assert method.notes["searched_on_val"] == 0


@pytest.mark.parametrize(
    ("images", "views", "searched"), [(220, 10, 20), (219, 9, 20), (40, 1, 20), (39, 1, 0), (20, 1, 0)]
)
def test_tip_adapter_sets_validation_aside_then_buys_views(images: int, views: int, searched: int) -> None:
    task, _ = toy_task(views=10)
    method, box = TipAdapter(), ToyBox(FEATURES, Remaining(images=images))
    fit(method, task, box)
    assert (method.notes["views"], method.notes["searched_on_val"]) == (views, searched)


@pytest.mark.parametrize("fresh", [False, True])
def test_tip_adapter_f_trains_keys_as_a_plain_loop_and_keeps_the_last_epoch(fresh: bool) -> None:
    task, _ = toy_task(views=3, fresh_views=fresh)
    method = TipAdapterF(TipAdapterF.Config(epochs=5, batch_size=8, n_betas=4, n_alphas=4))
    assert fit(method, task, ToyBox(FEATURES), seed=4) == 5

    order = torch.Generator().manual_seed(int(np.random.default_rng(4).integers(2**63 - 1)))
    keys = mean_keys(task, 3).requires_grad_()
    bank = features(task.train.images.views(3)).view(3, 20, -1)
    adamw = torch.optim.AdamW([keys], lr=1e-3, eps=1e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adamw, 5 * 3)
    for epoch in range(5):
        f = features(task.train.images.views(1, seed=epoch + 1)) if fresh else bank[epoch % 3]
        permutation = torch.randperm(20, generator=order)
        for rows in (permutation[:8], permutation[8:16], permutation[16:]):
            logits = tip_logits(f[rows], keys, task.train.labels, text(task), 1.17, 1.0)
            adamw.zero_grad()
            torch.nn.functional.cross_entropy(logits, task.train.labels[rows]).backward()
            adamw.step()
            cosine.step()
    assert (keys - mean_keys(task, 3)).abs().max() > 1e-3
    torch.testing.assert_close(method.keys_ND.detach(), keys.detach(), rtol=1e-4, atol=1e-6)
    betas, alphas = [0.1 + i * 6.9 / 4 for i in range(4)], [0.1 + i * 2.9 / 4 for i in range(4)]
    assert (method.alpha, method.beta) == pytest.approx(best_by_loops(task, keys.detach(), betas, alphas))


# logit_head


def test_logit_head_trains_the_refiner_on_the_views_scores_in_turn() -> None:
    task, test = toy_task(views=3)
    method = LogitHead(LogitHead.Config(epochs=5, batch_size=8, hidden=16, kl_fraction=0.5))
    box = ToyBox(Access.TEXT | Access.SCORES)
    assert fit(method, task, box, seed=9) == 5
    assert (box.bill.requests, box.bill.images, box.calls) == (3, 60, ["scores"] * 3)

    generator = torch.Generator().manual_seed(int(np.random.default_rng(9).integers(2**63 - 1)))
    refiner = Refiner(5, Refiner.Config(hidden=16, batch_size=8), generator)
    bank = (SCALE * features(task.train.images.views(3)) @ text(task).T).view(3, 20, 5)
    for epoch in range(5):
        refiner.train_epoch(bank[epoch % 3], task.train.labels, generator, kl=epoch < 2.5)
    raw = SCALE * features(test.images) @ text(task).T
    torch.testing.assert_close(method.predict(test.images, box), refiner.refine(raw), rtol=1e-4, atol=1e-4)
    assert method.trainable_params == 2 * 5 * 16 + 16 + 5


@pytest.mark.parametrize(("views", "fresh", "asked"), [(0, False, 1), (10, False, 6), (2, False, 2), (10, True, 6)])
def test_logit_head_asks_once_for_each_view_that_an_epoch_needs(views: int, fresh: bool, asked: int) -> None:
    task, _ = toy_task(views=views, fresh_views=fresh)
    method, box = LogitHead(LogitHead.Config(epochs=6)), ToyBox(Access.TEXT | Access.SCORES)
    fit(method, task, box)
    assert (box.bill.requests, box.bill.images) == (asked, 20 * asked)


@pytest.mark.parametrize("name", ["logit_head", "taskres", "tip_adapter_f"])
def test_views_are_not_pickled_many_times_over(name: str) -> None:
    task, _ = toy_task(shots=16, views=10)
    info = all_methods()[name]
    method, box = info.cls(), ToyBox(info.access)
    method.begin(task, box, np.random.default_rng(0))
    for _ in range(10):
        method.step(box)
    stored = 4 * 10 * 80 * (5 if name == "logit_head" else box.feature_dim)
    assert len(pickle.dumps(method)) < 2 * stored + 200_000
