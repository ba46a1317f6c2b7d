"""`label_map`, `label_map_topk` and `vote` against counts by loops, written from the paper's equations."""

from dataclasses import replace

import numpy as np
import pytest

from methods._toy_box import ToyBox
from methods._toy_task import fit, toy_task
from methods.base import Access, Bill, FewShotTask, LabelledImages, Method, Remaining
from methods.label_map import LabelMap, LabelMapTopK, Vote
from tests.methods.test_score_ridge import nll


def named(images: object, task: FewShotTask, templates: int, k: int) -> np.ndarray:
    """u of every image: from all scores, template by template, by a loop over images and classes."""
    scores = ToyBox(Access.TEXT | Access.SCORES).scores(images, task.classes.ensemble()).double().numpy()  # type: ignore[arg-type]
    u = np.zeros((scores.shape[1], templates * 5))
    for t in range(templates):
        for b, row in enumerate(scores[t]):
            p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
            for c in sorted(range(5), key=lambda c: -row[c])[:k]:
                u[b, 5 * t + c] = 1.0 if k == 1 else p[c]
    return u


def counted(u: np.ndarray, labels: np.ndarray) -> np.ndarray:
    m = np.zeros((u.shape[1], 5))
    for row, y in zip(u, labels, strict=True):
        m[:, y] += row
    m = np.array([row / (row.sum() + 1) for row in m])
    return np.array([m[:, c] / m[:, c].sum() if m[:, c].sum() else m[:, c] for c in range(5)]).T


@pytest.mark.parametrize(("method", "k"), [(LabelMap(), 1), (LabelMapTopK(), 5)], ids=["labels", "top-k"])
@pytest.mark.parametrize("dropped", [[], [8, 9, 10, 11]], ids=["all classes", "no images of a class"])
def test_the_logits_are_the_counted_map(method: Method, k: int, dropped: list[int]) -> None:
    task, test = toy_task(shots=4)
    kept = [i for i in range(20) if i not in dropped]
    task = replace(task, train=LabelledImages(task.train.images[kept], task.train.labels[kept]))
    fit(method, task, ToyBox(method.info.access))
    u, labels = named(task.train.images, task, 3, k), task.train.labels.numpy()
    got = method.predict(test.images, ToyBox(method.info.access)).numpy() / method.notes["temperature"]
    np.testing.assert_allclose(got, named(test.images, task, 3, k) @ counted(u, labels), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("method", "k"), [(LabelMap(), 1), (LabelMapTopK(), 5)], ids=["labels", "top-k"])
def test_the_temperature_is_the_best_for_images_that_the_map_has_not_counted(method: Method, k: int) -> None:
    task, _ = toy_task(shots=4)
    fit(method, task, ToyBox(method.info.access))
    u, labels = named(task.train.images, task, 3, k), task.train.labels.numpy()
    others = [np.arange(20) != n for n in range(20)]
    logits = np.array([u[n] @ counted(u[kept], labels[kept]) for n, kept in enumerate(others)])
    losses = [nll(factor * method.temperature, logits, labels) for factor in (0.98, 1.0, 1.02)]  # type: ignore[attr-defined]
    assert 1.05 < method.temperature < 95  # type: ignore[attr-defined]
    assert losses[1] < losses[0] and losses[1] < losses[2]


def test_vote_counts_the_templates_that_name_a_class_and_fits_nothing() -> None:
    task, test = toy_task()
    box = ToyBox(Access.TEXT | Access.LABELS, Remaining(0, 0))
    fit(method := Vote(), task, box)
    assert box.bill == Bill()
    prediction = ToyBox(Access.TEXT | Access.LABELS)
    got = method.predict(test.images, prediction).numpy()
    np.testing.assert_array_equal(got, named(test.images, task, 3, 1).reshape(-1, 3, 5).sum(1))
    assert prediction.bill == Bill.labels(3, 100, 5)


def test_templates_are_cut_to_the_allotment() -> None:
    task, _ = toy_task()
    for method, bill in ((LabelMap(), Bill.labels(2, 20, 5)), (LabelMapTopK(), Bill.top_k(2, 20, 5))):
        box = ToyBox(method.info.access, Remaining(requests=2))
        fit(method, task, box)
        assert box.bill == bill and method.notes["templates"] == 2
