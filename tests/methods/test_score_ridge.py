"""`score_ridge` and `sim` against ridge regression by loops, written from the paper's equation."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.nn.functional import normalize

from methods._imagenet_names import IMAGENET_NAMES
from methods._ridge import Ridge
from methods._temperature import fitted_temperature
from methods._toy_box import ToyBox
from methods._toy_task import fit, toy_task
from methods.base import Access, Method, Remaining
from methods.score_ridge import ScoreRidge
from methods.sim import SiM

SCORES = Access.TEXT | Access.SCORES


def cosines(images: object, prompts: list[str]) -> np.ndarray:
    towers = ToyBox(SCORES).towers
    f = towers.image_features(images.pixels_BX).double().numpy()  # type: ignore[attr-defined]
    t = normalize(torch.stack([towers._sentence(p) for p in prompts]), dim=-1).double().numpy()
    return np.array([[row @ text for text in t] for row in f])


def regression(l: np.ndarray, labels: np.ndarray, ridge: float) -> np.ndarray:  # noqa: E741
    return np.linalg.inv(l.T @ l + ridge * np.eye(l.shape[1])) @ l.T @ np.eye(5)[labels]


def left_out(l: np.ndarray, labels: np.ndarray, ridge: float) -> np.ndarray:  # noqa: E741
    others = [np.arange(len(l)) != n for n in range(len(l))]
    return np.array([l[n] @ regression(l[kept], labels[kept], ridge) for n, kept in enumerate(others)])


def nll(factor: float, logits: np.ndarray, labels: np.ndarray) -> float:
    scaled = factor * logits
    return float(np.mean([np.log(np.exp(row - row[y]).sum()) for row, y in zip(scaled, labels, strict=True)]))


def prompts_of(method: Method) -> list[str]:
    names, templates = toy_task()[0].classes.names, toy_task()[0].classes.templates
    if isinstance(method, SiM):
        return [f"a photo of a {name}." for name in IMAGENET_NAMES]
    return [template.format(name) for template in templates for name in names]


@pytest.mark.parametrize(
    ("method", "shots"), [(ScoreRidge(), 4), (ScoreRidge(), 2), (SiM(), 4)], ids=["4 shots", "2 shots", "sim"]
)
def test_the_logits_are_the_ridge_regression_times_the_temperature(method: Method, shots: int) -> None:
    task, test = toy_task(shots=shots)
    prompts, labels = prompts_of(method), task.train.labels.numpy()
    train = cosines(task.train.images, prompts)
    box = ToyBox(SCORES)
    fit(method, task, box)
    got = method.predict(test.images, ToyBox(SCORES)).numpy()
    expected = cosines(test.images, prompts) @ regression(train, labels, 0.1)
    temperature = method.notes["temperature"]
    np.testing.assert_allclose(got / temperature, expected, rtol=2e-4, atol=2e-5)  # the box gives float32 scores
    assert method.trainable_params == len(prompts) * 5 + 1


def test_sim_is_billed_for_its_generic_prompts_and_never_sends_a_class_name() -> None:
    task, test = toy_task(shots=2)
    box = ToyBox(SCORES, Remaining(requests=1, images=10))
    fit(method := SiM(), task, box)
    assert (box.bill.requests, box.bill.images, box.bill.prompts, box.bill.outputs) == (1, 10, 1000, 10_000)
    assert len(IMAGENET_NAMES) == 1000 and IMAGENET_NAMES[0] == "tench" and IMAGENET_NAMES[-1] == "toilet paper"
    assert method.predict(test.images, ToyBox(SCORES)).shape == (100, 5)


def test_score_ridge_asks_for_as_many_templates_as_the_allotment_pays() -> None:
    task, test = toy_task()
    for allotment, templates in ((Remaining(), 3), (Remaining(requests=2), 2), (Remaining(images=59), 2)):
        method, box = ScoreRidge(), ToyBox(SCORES, allotment)
        fit(method, task, box)
        assert (box.bill.requests, box.bill.images, box.bill.prompts) == (templates, 20 * templates, 5 * templates)
        prediction = ToyBox(SCORES)
        method.predict(test.images, prediction)
        assert prediction.bill.requests == method.notes["templates"] == templates


@pytest.mark.parametrize(("n", "q"), [(40, 7), (20, 30)], ids=["more images", "more prompts"])
def test_the_temperature_minimizes_the_loss_of_images_that_are_left_out(n: int, q: int) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 5
    l = rng.normal(size=(n, q)) * 0.15  # noqa: E741
    l[:, :5] += 0.4 * np.eye(5)[labels]
    ridge = Ridge.fit(torch.from_numpy(l), torch.from_numpy(labels), 5, 0.5)
    np.testing.assert_allclose(ridge.weight_QC.numpy(), regression(l, labels, 0.5), rtol=1e-4, atol=1e-6)
    logits = left_out(l, labels, 0.5)
    best = minimize_scalar(nll, bounds=(1, 100), args=(logits, labels), method="bounded", options={"xatol": 1e-6}).x
    assert 1.1 < best < 90
    assert ridge.temperature == pytest.approx(best, rel=1e-4)


def test_a_temperature_stays_within_its_limits() -> None:
    right, labels = torch.eye(5), torch.arange(5)
    assert fitted_temperature(right, labels) == pytest.approx(100)
    assert fitted_temperature(-right, labels) == pytest.approx(1)
