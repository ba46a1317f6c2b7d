"""`gda` against a computation in numpy, written from the paper's equations."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from methods._toy_box import ToyBox
from methods._toy_task import fit, toy_task
from methods.base import Access, FewShotTask, LabelledImages, Remaining
from methods.gda import GDA

FEATURES = Access.TEXT | Access.FEATURES
SCALE, D = 20.0, 16
ALPHAS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)


def features(images: object) -> np.ndarray:
    return ToyBox(FEATURES).towers.image_features(images.pixels_BX).double().numpy()  # type: ignore[attr-defined]


def text(classes: object) -> np.ndarray:
    return ToyBox(FEATURES).towers.text_features(classes.prompts())[0].double().numpy()  # type: ignore[attr-defined]


def rows_of(task: FewShotTask, views: int) -> tuple[np.ndarray, np.ndarray]:
    images = task.train.images.views(views) if task.views else task.train.images
    return features(images), np.tile(task.train.labels.numpy(), views if task.views else 1)


def gaussian(x: np.ndarray, y: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """f w_c + b_c for every query and class, with a loop over rows and classes."""
    some = {c: x[y == c].mean(0) for c in set(y.tolist())}
    mu = np.array([some.get(c, np.mean(list(some.values()), axis=0)) for c in range(5)])
    s = sum(np.outer(f - mu[c], f - mu[c]) for f, c in zip(x, y, strict=True)) / (len(x) - 1)
    a = D * np.linalg.pinv((len(x) - 1) * s + np.trace(s) * np.eye(D))
    return np.array([[q @ a @ mu[c] - np.log(5) - mu[c] @ a @ mu[c] / 2 for c in range(5)] for q in queries])


def first_best(task: FewShotTask, x: np.ndarray, y: np.ndarray) -> float:
    v, labels, best, chosen = features(task.val.images), task.val.labels.numpy(), -1.0, float("nan")
    for alpha in ALPHAS:
        logits = SCALE * v @ text(task.classes).T + alpha * gaussian(x, y, v)
        if (accuracy := (logits.argmax(1) == labels).mean()) > best:
            best, chosen = accuracy, alpha
    return chosen


def without(task: FewShotTask, rows: list[int]) -> FewShotTask:
    kept = [i for i in range(len(task.train.labels)) if i not in rows]
    return replace(task, train=LabelledImages(task.train.images[kept], task.train.labels[kept]))


def fitted(task: FewShotTask, **config: object) -> GDA:
    method = GDA(GDA.Config(**config))  # type: ignore[arg-type]
    fit(method, task, ToyBox(FEATURES))
    return method


@pytest.mark.parametrize(
    ("shots", "views", "dropped"),
    [(8, 3, []), (8, 0, []), (16, 1, []), (1, 2, []), (4, 3, [0, 1, 5]), (3, 0, [0, 1, 4]), (4, 2, [4, 5, 6, 7, 8])],
    ids=["views", "no views", "one view", "fewer rows than features", "unequal classes", "one image", "no image"],
)
def test_gda_is_its_formula_at_the_first_best_alpha(shots: int, views: int, dropped: list[int]) -> None:
    task, test = toy_task(shots=shots, views=views)
    task = without(task, dropped)
    x, y = rows_of(task, views)
    method = fitted(task)
    alpha = first_best(task, x, y)
    assert method.alpha == method.notes["alpha"] == alpha
    f = features(test.images)
    expected = SCALE * f @ text(task.classes).T + alpha * gaussian(x, y, f)
    got = method.predict(test.images, ToyBox(FEATURES)).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-5)  # float32 keeps 7 digits
    parts = method._parts(torch.from_numpy(f), method.text_CD, method.mean_CD, method.inverse_DD)
    np.testing.assert_allclose(parts[1].numpy(), gaussian(x, y, f), rtol=1e-6, atol=1e-6)


def test_the_deployed_tensors_are_the_classifier() -> None:
    task, test = toy_task(shots=8)
    method = fitted(task)
    deployed, f = method.deployed(), torch.from_numpy(features(test.images)).float()
    logits = method.predict(test.images, ToyBox(FEATURES))
    linear = f @ deployed["weight_CD"].T + deployed["bias_C"] - method.alpha * np.log(5)
    torch.testing.assert_close(linear, logits, rtol=1e-4, atol=1e-3)


def test_the_order_of_the_training_images_does_not_matter() -> None:
    task, test = toy_task(shots=8, views=0)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    shuffled = replace(task, train=LabelledImages(task.train.images[order], task.train.labels[order]))
    one, other = (fitted(t).predict(test.images, ToyBox(FEATURES)) for t in (task, shuffled))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-5)


def test_rows_beyond_one_block_are_counted() -> None:
    task, test = toy_task(shots=16, views=110)  # 8,800 rows: two blocks
    x, y = rows_of(task, 110)
    method = fitted(replace(task, val=LabelledImages(task.val.images[:0], task.val.labels[:0])))
    f = features(test.images)[:5]
    expected = SCALE * f @ text(task.classes).T + 0.1 * gaussian(x, y, f)
    np.testing.assert_allclose(method.predict(test.images[:5], ToyBox(FEATURES)).numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("images", "views", "searched"), [(220, 10, 20), (219, 9, 20), (40, 1, 20), (39, 1, 0), (20, 1, 0)]
)
def test_the_allotment_pays_for_validation_then_for_views(images: int, views: int, searched: int) -> None:
    task, _ = toy_task(views=10)
    method, box = GDA(), ToyBox(FEATURES, Remaining(images=images))
    fit(method, task, box)
    assert (method.notes["views"], method.notes["searched_on_val"]) == (views, searched)
    assert (box.bill.requests, box.bill.images) == (3 if searched else 2, 20 * views + searched)
    assert searched or method.alpha == 0.1


# new classes


def new_logits(task: FewShotTask, x: np.ndarray, names: tuple[str, ...], f: np.ndarray, alpha: float) -> np.ndarray:
    t = text(replace(task.classes, names=names))
    means, inverses = [], []
    for w in t:
        near = x[np.argsort(-(x @ w))[:64]]
        means.append(np.concatenate([near, np.tile(w, (16, 1))]).mean(0))
        cov = (near - w).T @ (near - w) / 63
        inverses.append(D * np.linalg.pinv(63 * cov + np.trace(cov) * np.eye(D)))
    a = np.mean(inverses, axis=0)
    gauss = [[q @ a @ m - np.log(len(t)) - m @ a @ m / 2 for m in means] for q in f]
    return SCALE * f @ t.T + alpha * np.array(gauss)


@pytest.mark.parametrize("names", [("fox", "gnu", "hen"), ("ant", "fox")])
def test_new_classes_are_gaussians_around_the_rows_nearest_to_their_text(names: tuple[str, ...]) -> None:
    task, test = toy_task(shots=16, views=2)
    method, f = fitted(task), features(test.images)
    got = method.predict(test.images, ToyBox(FEATURES), replace(task.classes, names=names)).numpy()
    expected = new_logits(task, rows_of(task, 2)[0], names, f, method.alpha)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)


def test_fitted_classes_under_base_to_new_have_the_mean_covariance_without_shrinkage() -> None:
    task, test = toy_task(shots=8, views=3)
    x, y = rows_of(task, 3)
    method, f = fitted(task, base_to_new=True), features(test.images)
    mu = np.array([x[y == c].mean(0) for c in range(5)])
    a = np.linalg.pinv(np.mean([np.cov(x[y == c].T) for c in range(5)], axis=0))
    gauss = f @ a @ mu.T - np.log(5) - np.einsum("cd,de,ce->c", mu, a, mu) / 2
    expected = SCALE * f @ text(task.classes).T + method.alpha * gauss
    np.testing.assert_allclose(method.predict(test.images, ToyBox(FEATURES)).numpy(), expected, rtol=1e-5, atol=1e-4)
