"""`ss_text` and `ss_text_plus` against loops over images and classes, written from the paper's equations."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from methods._toy_box import ToyBox
from methods._toy_task import fit, toy_task
from methods.base import Access, FewShotTask, LabelledImages, Remaining
from methods.ss_text import SSText, SSTextPlus

FEATURES = Access.TEXT | Access.FEATURES
SCALE = 20.0


def features(images: object) -> np.ndarray:
    return ToyBox(FEATURES).towers.image_features(images.pixels_BX).double().numpy()  # type: ignore[attr-defined]


def expected(task: FewShotTask, queries: np.ndarray, plus: bool) -> np.ndarray:
    t = ToyBox(FEATURES).towers.text_features(task.classes.prompts())[0].double().numpy()
    x, y = features(task.train.images), task.train.labels.numpy()
    w = t.copy()
    for c in range(5):
        n_c = int((y == c).sum())
        if n_c:
            lam = 1 / n_c if plus else 1 / len(x)
            w[c] += SCALE * sum(f for f, label in zip(x, y, strict=True) if label == c) / (len(x) * lam)
    if plus:
        delta = 2 * w - w.mean(0)
        w = w - delta / np.linalg.norm(delta, axis=1, keepdims=True)
    return np.array([[SCALE * q @ w_c / np.linalg.norm(q) / np.linalg.norm(w_c) for w_c in w] for q in queries])


@pytest.mark.parametrize("plus", [False, True], ids=["ss_text", "ss_text_plus"])
@pytest.mark.parametrize("dropped", [[], [0, 1, 2, 4], [8, 9, 10, 11]], ids=["balanced", "unbalanced", "no images"])
def test_the_logits_are_the_closed_form(dropped: list[int], plus: bool) -> None:
    task, test = toy_task(shots=4)
    kept = [i for i in range(20) if i not in dropped]
    task = replace(task, train=LabelledImages(task.train.images[kept], task.train.labels[kept]))
    method, box = (SSTextPlus() if plus else SSText()), ToyBox(FEATURES, Remaining(2, len(kept)))
    fit(method, task, box)
    assert (box.bill.requests, box.bill.images, box.bill.prompts) == (2, len(kept), 5)
    got = method.predict(test.images, ToyBox(FEATURES)).numpy()
    np.testing.assert_allclose(got, expected(task, features(test.images), plus), rtol=1e-5, atol=1e-4)


def test_the_order_of_the_training_images_does_not_matter() -> None:
    task, test = toy_task(shots=4)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    shuffled = replace(task, train=LabelledImages(task.train.images[order], task.train.labels[order]))
    logits = []
    for given in (task, shuffled):
        fit(method := SSTextPlus(), given, ToyBox(FEATURES))
        logits.append(method.predict(test.images, ToyBox(FEATURES)))
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-4)
