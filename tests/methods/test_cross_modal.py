"""The cross-modal linear probe against single runs with torch's optimizer, written from the paper."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from methods._parallel_runs import ParallelRuns
from methods._toy_box import ToyBox
from methods._toy_task import fit, toy_task
from methods.base import Access, FewShotTask, LabelledImages, Remaining
from methods.cross_modal import CrossModal

GRANT = Access.TEXT | Access.FEATURES
SCALE = 20.0


def build(**settings: Any) -> CrossModal:
    return CrossModal(CrossModal.Config(**settings))


def features(images: Any) -> Tensor:
    return ToyBox(GRANT).towers.image_features(images.pixels_BX)


def without_val(task: FewShotTask) -> FewShotTask:
    return replace(task, val=LabelledImages(task.val.images[:0], task.val.labels[:0]))


def batches(n: int, size: int, generator: torch.Generator, pending: list[list[int]]) -> list[int]:
    """The next whole batch of endless shuffled epochs."""
    if not pending:
        order = torch.randperm(n, generator=generator).tolist()
        pending += [order[i : i + size] for i in range(0, n - size + 1, size)]
    return pending.pop(0)


def generators(seed: int) -> Iterator[torch.Generator]:
    rng = np.random.default_rng(seed)
    while True:
        yield torch.Generator().manual_seed(int(rng.integers(2**63 - 1)))


def single_run(
    task: FewShotTask, start: Tensor, lr: float, decay: float, size: int, steps: int, generator: torch.Generator
) -> list[Tensor]:
    """W after each step of one run, by autograd and torch's AdamW."""
    texts = ToyBox(GRANT).towers.text_features(task.classes.prompts())[0]
    images, labels = features(task.train.images.views(2)), task.train.labels.repeat(2)
    weight = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([weight], lr=lr, weight_decay=decay)
    image_batches: list[list[int]] = []
    text_batches: list[list[int]] = []
    history = []
    for i in range(steps):
        rows = batches(len(images), size // 2, generator, image_batches)
        classes = batches(len(texts), size // 2, generator, text_batches)
        warm = 1e-5 if i == 0 else lr * i / 50
        rate = warm if i < 50 else lr * (1 + math.cos(math.pi * (i - 50) / steps)) / 2
        optimizer.param_groups[0]["lr"] = rate
        x, y = torch.cat([images[rows], texts[classes]]), torch.cat([labels[rows], torch.tensor(classes)])
        loss = cross_entropy(SCALE * x @ weight.T, y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        history.append(weight.detach().clone())
    return history


def random_start(generator: torch.Generator) -> Tensor:
    return (torch.rand(5, 16, generator=generator) * 2 - 1) / 4


def test_parallel_adamw_is_torchs_for_every_run() -> None:
    g = torch.Generator().manual_seed(3)
    start, lrs, decays = torch.randn(4, 6, generator=g), [1e-2, 1e-3, 1e-1], [0.0, 0.5, 0.01]
    runs = ParallelRuns([0, 1, 2], lrs, decays, start, 8)
    weights = [start.clone().requires_grad_() for _ in lrs]
    optimizers = [torch.optim.AdamW([w], lr=lr, weight_decay=d) for w, lr, d in zip(weights, lrs, decays, strict=True)]
    for _ in range(30):
        x, y = torch.randn(8, 6, generator=g), torch.randint(4, (8,), generator=g)
        runs.train(x, y, SCALE, runs.lr_R11)
        for weight, optimizer in zip(weights, optimizers, strict=True):
            optimizer.zero_grad()
            cross_entropy(SCALE * x @ weight.T, y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    for r, weight in enumerate(weights):
        assert (weight - start).abs().max() > 1e-2
        torch.testing.assert_close(runs.weight_RCD[r], weight.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(runs.products(x)[:, r], x @ weight.detach().T, rtol=1e-4, atol=1e-4)


def test_the_first_best_of_all_runs_and_steps_is_kept() -> None:
    task, test = toy_task(shots=2)
    settings: dict[str, Any] = {"lrs": (1e-3, 1e-2), "weight_decays": (0.0, 0.1), "batch_sizes": (2, 8)}
    method, box = build(steps=120, eval_every=20, **settings), ToyBox(GRANT)
    assert fit(method, task, box, seed=4) == 6
    given = generators(4)
    start = random_start(next(given))
    sequences = {size: next(given).get_state() for size in (2, 8)}
    v, y, best = features(task.val.images), task.val.labels, (-1.0, 0.0, 0.0, 0, 0)
    chosen = start
    for lr, decay, size in itertools.product((1e-3, 1e-2), (0.0, 0.1), (2, 8)):
        generator = torch.Generator()
        generator.set_state(sequences[size])
        history = single_run(task, start, lr, decay, size, 120, generator)
        for step in range(20, 121, 20):
            accuracy = ((v @ history[step - 1].T).argmax(1) == y).double().mean().item()
            if accuracy > best[0]:
                best, chosen = (accuracy, lr, decay, size, step), history[step - 1]
    notes = method.notes
    assert (notes["lr"], notes["weight_decay"], notes["batch_size"], notes["step"]) == best[1:]
    assert notes["runs"] == 8 and notes["searched_on_val"] == 10
    torch.testing.assert_close(method.weight_CD, chosen, rtol=1e-3, atol=1e-5)
    expected = SCALE * features(test.images) @ chosen.T
    torch.testing.assert_close(method.predict(test.images, box), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("allotment", [Remaining(images=39), Remaining(2, 999)])
def test_one_run_is_made_when_validation_cannot_be_paid(allotment: Remaining) -> None:
    task, _ = toy_task(shots=4)
    method, box = build(steps=20), ToyBox(GRANT, allotment)
    fit(method, task, box, seed=2)
    assert (method.notes["runs"], method.notes["searched_on_val"], method.notes["step"]) == (1, 0, 20)
    assert (method.notes["lr"], method.notes["weight_decay"], method.notes["batch_size"]) == (1e-3, 0.01, 8)
    assert box.bill.requests == 2 and box.bill.images == 20 * int(str(method.notes["views"]))


def test_the_only_run_without_validation_ends_with_its_last_weights() -> None:
    task = without_val(toy_task(shots=4)[0])
    method = build(steps=90)
    fit(method, task, ToyBox(GRANT), seed=6)
    given = generators(6)
    history = single_run(task, random_start(next(given)), 1e-3, 0.01, 8, 90, next(given))
    torch.testing.assert_close(method.weight_CD, history[-1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("images", "views", "searched"), [(60, 2, 20), (59, 1, 20), (40, 1, 20), (39, 1, 0)])
def test_validation_is_paid_before_the_second_view(images: int, views: int, searched: int) -> None:
    method, box = build(steps=1), ToyBox(GRANT, Remaining(images=images))
    fit(method, toy_task(shots=4)[0], box)
    assert (method.notes["views"], method.notes["searched_on_val"]) == (views, searched)
    assert box.bill.images == 20 * views + searched


@pytest.mark.parametrize(
    ("ensemble", "shots", "sizes"), [(False, 16, [8]), (True, 16, [8, 28]), (True, 1, [8]), (False, 1, [8])]
)
def test_a_batch_size_is_left_out_unless_its_half_is_less_than_the_texts_and_images(
    ensemble: bool, shots: int, sizes: list[int]
) -> None:
    method = build(steps=1, ensemble=ensemble, batch_sizes=(8, 28, 30))  # 5 texts, or 15; 10 image rows at 1 shot
    fit(method, toy_task(shots=shots)[0], ToyBox(GRANT))
    assert [2 * group.half for group in method.groups] == sizes and method.notes["runs"] == 6 * len(sizes)


def test_the_smallest_batch_size_is_kept_when_all_are_too_large() -> None:
    method = build(steps=30, batch_sizes=(64, 16))
    fit(method, toy_task(shots=4)[0], ToyBox(GRANT))
    (group,) = method.groups
    x, labels = group.next_batch(method.images, method.texts, method.generators[0])
    assert len(x) == 8 + 5 and sorted(labels[8:].tolist()) == [0, 1, 2, 3, 4]


def test_a_batch_is_half_images_half_texts_and_an_epoch_uses_each_once() -> None:
    method, task = build(), toy_task(shots=4)[0]
    method.begin(task, ToyBox(GRANT), np.random.default_rng(0))
    group, seen = method.groups[0], []
    for _ in range(10):
        x, labels = group.next_batch(method.images, method.texts, method.generators[0])
        assert x.shape == (8, 16)
        seen += x[:4].tolist()
        torch.testing.assert_close(x[4:], method.text_CD[labels[4:]])
    assert sorted(seen) == sorted(method.images[0].tolist())


def test_every_text_of_the_ensemble_is_a_training_example() -> None:
    task, _ = toy_task()
    method, box = build(steps=1, ensemble=True), ToyBox(GRANT)
    method.begin(task, box, np.random.default_rng(0))
    t = box.towers.text_features(task.classes.ensemble())
    for k, (x, label) in enumerate(zip(*method.texts, strict=True)):
        assert torch.equal(x, t[k // 5, k % 5]) and label == k % 5
    mean = t.mean(0)
    torch.testing.assert_close(method.text_CD, mean / mean.norm(dim=1, keepdim=True))
    assert box.bill.requests == 3 + 2


def test_text_init_starts_from_zero_shot_and_wise_ft_is_the_mean_with_it() -> None:
    task, test = toy_task()
    method, box = build(text_init=True), ToyBox(GRANT)
    method.begin(task, box, np.random.default_rng(0))
    zero_shot = box.scores(test.images, task.classes.prompts())[0]
    torch.testing.assert_close(method.predict(test.images, box), zero_shot, rtol=1e-4, atol=1e-4)
    plain, mixed = build(steps=100), build(steps=100, wise_ft=True)
    for either in (plain, mixed):
        fit(either, task, ToyBox(GRANT))
    expected = (plain.predict(test.images, box) + zero_shot) / 2
    torch.testing.assert_close(mixed.predict(test.images, box), expected, rtol=1e-4, atol=1e-4)


def test_an_unpickled_method_trains_on_as_before() -> None:
    task, _ = toy_task()
    whole, parts = build(steps=60, eval_every=20), build(steps=60, eval_every=20)
    box = ToyBox(GRANT)
    fit(whole, task, box)
    parts.begin(task, box, np.random.default_rng(0))
    running = True
    while running:
        parts = pickle.loads(pickle.dumps(parts))
        running = parts.step(box)
    assert torch.equal(parts.groups[0].weight_RCD, whole.groups[0].weight_RCD) and parts.notes == whole.notes


def test_weights_that_are_not_finite_are_an_error() -> None:
    method, box = build(), ToyBox(GRANT)
    method.begin(toy_task()[0], box, np.random.default_rng(0))
    method.groups[0].weight_RCD[0, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="a weight before step 101 is nan"):
        method.step(box)
