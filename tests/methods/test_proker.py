"""`proker` against kernel regression in numpy, written from the paper's equations."""

from dataclasses import replace

import numpy as np
import pytest

from methods._toy_box import ToyBox
from methods._toy_task import SHAPES, fit, toy_task
from methods.base import Access, FewShotTask, LabelledImages, Remaining
from methods.proker import ProKeR
from tests.methods.test_score_ridge import nll

FEATURES = Access.TEXT | Access.FEATURES


def features(images: object) -> np.ndarray:
    return ToyBox(FEATURES).towers.image_features(images.pixels_BX).double().numpy()  # type: ignore[attr-defined]


def text(task: FewShotTask) -> np.ndarray:
    return ToyBox(FEATURES).towers.text_features(task.classes.prompts())[0].double().numpy()


def regression(x: np.ndarray, y: np.ndarray, t: np.ndarray, f: np.ndarray, beta: float, ridge: float) -> np.ndarray:
    """Logits of the features f: one linear system, no decomposition."""
    kernel = np.exp(-beta * (1 - x @ x.T))
    a = np.linalg.solve(kernel / ridge + np.eye(len(x)), np.eye(5)[y] - x @ t.T)
    return f @ t.T + np.exp(-beta * (1 - f @ x.T)) @ a


def without_val(task: FewShotTask) -> FewShotTask:
    return replace(task, val=LabelledImages(task.val.images[:0], task.val.labels[:0]))


@pytest.mark.parametrize(("shots", "views"), [(4, 2), (1, 3), (8, 0)])
def test_proker_is_its_formula_at_the_first_best_of_the_grid(shots: int, views: int) -> None:
    task, test = toy_task(shots=shots, views=views)
    v = max(1, views)
    x, y = features(task.train.images.views(v) if views else task.train.images), np.tile(task.train.labels.numpy(), v)
    val, labels = features(task.val.images), task.val.labels.numpy()
    best, chosen = -1.0, (0.0, 0.0)
    for beta in np.linspace(0.1, 10, 4):
        for ridge in np.linspace(0.001, 10, 5):
            accuracy = (regression(x, y, text(task), val, beta, ridge).argmax(1) == labels).mean()
            if accuracy > best:
                best, chosen = accuracy, (beta, ridge)
    method = ProKeR(ProKeR.Config(n_betas=4, n_ridges=5))
    assert fit(method, task, ToyBox(FEATURES)) == 4
    assert (method.notes["beta"], method.notes["ridge"]) == pytest.approx(chosen)
    expected = regression(x, y, text(task), features(test.images), *chosen)
    got = method.predict(test.images, ToyBox(FEATURES)).numpy() / method.temperature
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_the_temperature_is_the_best_for_images_left_out_with_their_views() -> None:
    task, _ = toy_task(shots=3, views=2)
    method = ProKeR(ProKeR.Config(search=False, beta=4.0, ridge=0.5))
    fit(method, task, ToyBox(FEATURES))
    x, y = features(task.train.images.views(2)), np.tile(task.train.labels.numpy(), 2)
    images, rows = np.tile(np.arange(15), 2), []
    for n in range(30):
        kept = images != images[n]
        rows.append(regression(x[kept], y[kept], text(task), x[n : n + 1], 4.0, 0.5)[0])
    losses = [nll(factor, np.array(rows), y) for factor in (0.98, 1.0, 1.02) * np.array(method.temperature)]
    assert 1.05 < method.temperature < 95
    assert losses[1] < losses[0] and losses[1] < losses[2]


def test_the_default_grid_and_the_constants_are_the_papers() -> None:
    config = ProKeR.Config()
    assert config.search and (config.n_betas, config.n_ridges) == (20, 100)
    assert (config.beta_min, config.beta_max, config.ridge_min, config.ridge_max) == (0.1, 10.0, 0.001, 10.0)
    for shots, constants in ((1, (3.0, 0.05)), (3, (2.6, 0.05)), (8, (1.66, 0.07)), (16, (1.7, 0.1))):
        method = ProKeR()
        fit(method, without_val(toy_task(shots=shots)[0]), ToyBox(FEATURES))
        assert (method.beta, method.ridge) == constants


@pytest.mark.parametrize(
    ("images", "views", "searched"), [(220, 10, 20), (219, 9, 20), (40, 1, 20), (39, 1, 0), (20, 1, 0)]
)
def test_the_allotment_pays_for_validation_then_for_views(images: int, views: int, searched: int) -> None:
    task, _ = toy_task(views=10)
    method, box = ProKeR(ProKeR.Config(n_betas=1)), ToyBox(FEATURES, Remaining(images=images))
    fit(method, task, box)
    assert (method.notes["views"], method.notes["searched_on_val"]) == (views, searched)
    assert (box.bill.requests, box.bill.images) == (3 if searched else 2, 20 * views + searched)


@pytest.mark.parametrize(
    ("n_train", "views", "search"),
    [(800, 10, True), (801, 9, True), (4001, 1, True), (8000, 1, True), (8001, 1, False)],
)
def test_views_are_cut_to_8000_rows_and_beyond_there_is_no_search(n_train: int, views: int, search: bool) -> None:
    plan = ProKeR().plan(replace(SHAPES[1], n_train=n_train), Remaining())
    assert (plan.views, plan.search) == (views, search)


def test_without_a_search_no_validation_image_is_paid() -> None:
    box = ToyBox(FEATURES)
    fit(ProKeR(ProKeR.Config(search=False)), toy_task(views=2)[0], box)
    assert (box.bill.requests, box.bill.images) == (2, 40)
