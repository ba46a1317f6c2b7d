"""TaskRes against an independent plain loop: same features, labels and batch order give the same residual."""

import math
import pickle

import numpy as np
import pytest
import torch

from methods._toy_box import ToyBox
from methods._toy_task import fit, toy_task
from methods.base import Access, Remaining, TaskShape
from methods.taskres import TaskRes
from methods.taskres_variants import TaskResEnhanced, TaskResImageSide, TaskResUnit

GRANT = Access.TEXT | Access.FEATURES
LENGTH = 4.33
"""`text_norm` of the toy model."""


def build(**settings: object) -> TaskRes:
    return TaskRes(TaskRes.Config(**settings))  # type: ignore[arg-type]


def plain_loop(
    *, seed: int, views: int, epochs: int, batch: int, alpha: float, fresh: bool = False, length: float = LENGTH
) -> torch.Tensor:
    """The residual on text features of this length, by a loop that shares no code with the method."""
    task, _ = toy_task()
    towers = ToyBox(GRANT).towers
    t = towers.text_features(task.classes.prompts())[0]
    pixels, y = task.train.images, task.train.labels
    n = len(y)
    order = torch.Generator().manual_seed(int(np.random.default_rng(seed).integers(2**63 - 1)))
    x = torch.zeros(t.shape, requires_grad=True)
    adam = torch.optim.Adam([x], lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=5e-4)
    for epoch in range(epochs):
        if fresh:
            rows = pixels.views(1, seed=1 + epoch % views).pixels_BX  # type: ignore[attr-defined]
        else:
            v = epoch % views
            rows = pixels.views(views).pixels_BX[v * n : (v + 1) * n]  # type: ignore[attr-defined]
        f = towers.image_features(rows)
        lr = 1e-5 if epoch == 0 else 2e-3 * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / epochs))
        adam.param_groups[0]["lr"] = lr
        permutation = torch.randperm(n, generator=order)
        n_batches = n // batch if n >= batch else 1
        for b in range(n_batches):
            picked = permutation[b * batch : (b + 1) * batch]
            offset = length * t + alpha * x
            cosine = f[picked] @ (offset / offset.norm(dim=1, keepdim=True)).T
            loss = -(20.0 * cosine).log_softmax(1)[torch.arange(len(picked)), y[picked]].mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
    return x.detach()


@pytest.mark.parametrize(("batch", "alpha", "fresh"), [(8, 0.5, False), (256, 1.0, False), (8, 0.5, True)])
def test_the_residual_is_that_of_the_plain_loop(batch: int, alpha: float, fresh: bool) -> None:
    task, _ = toy_task(views=3, fresh_views=fresh)
    method = build(batch_size=batch, epochs=7, alpha=alpha)
    steps = fit(method, task, ToyBox(GRANT), seed=11)
    assert steps == 7
    expected = plain_loop(seed=11, views=7 if fresh else 3, epochs=7, batch=batch, alpha=alpha, fresh=fresh)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(method.residual_XD.detach(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_taskres_unit_is_the_plain_loop_on_text_features_of_unit_length(alpha: float) -> None:
    task, _ = toy_task(views=3)
    method = TaskResUnit(TaskResUnit.Config(batch_size=8, epochs=7, alpha=alpha))
    fit(method, task, ToyBox(GRANT), seed=11)
    expected = plain_loop(seed=11, views=3, epochs=7, batch=8, alpha=alpha, length=1.0)
    torch.testing.assert_close(method.residual_XD.detach(), expected, rtol=1e-4, atol=1e-6)
    assert "text_norm" not in method.notes


def test_alpha_times_the_length_on_unit_text_is_alpha_on_text_of_that_length(monkeypatch: pytest.MonkeyPatch) -> None:
    task, test = toy_task(views=3)

    def logits(method: TaskRes) -> torch.Tensor:
        box = ToyBox(GRANT)
        fit(method, task, box, seed=3)
        return method.predict(test.images, box)

    unit = logits(TaskResUnit(TaskResUnit.Config(epochs=9)))
    assert not torch.allclose(logits(build(epochs=9)), unit, atol=1e-4)
    torch.testing.assert_close(logits(build(epochs=9, alpha=0.5 * LENGTH)), unit, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(ToyBox, "text_norm", 1.0)
    assert torch.equal(logits(build(epochs=9)), unit), "to the bit"


def test_logits_are_scaled_cosines_to_the_shifted_text() -> None:
    task, test = toy_task()
    method, box = build(epochs=5), ToyBox(GRANT)
    fit(method, task, box)
    t = LENGTH * box.towers.text_features(task.classes.prompts())[0] + 0.5 * method.residual_XD.detach()
    f = box.towers.image_features(test.images.pixels_BX)  # type: ignore[attr-defined]
    cosine = f @ t.T / (f.norm(dim=1, keepdim=True) * t.norm(dim=1))
    torch.testing.assert_close(method.predict(test.images, box), 20.0 * cosine, rtol=1e-4, atol=1e-4)


def test_learning_rate_of_single_epochs() -> None:
    method = build()
    method.n_epochs = 100
    assert method.learning_rate(0) == 1e-5
    assert method.learning_rate(1) == 2e-3
    assert method.learning_rate(51) == pytest.approx(1e-3)
    assert method.learning_rate(99) == pytest.approx(2e-3 * 0.5 * (1 + math.cos(math.pi * 98 / 100)))
    assert 0 < method.learning_rate(99) < 2e-6


def test_learning_rate_is_torchs_cosine_held_back_by_the_warm_up() -> None:
    """Dassl steps the cosine scheduler for the first time at the end of the first epoch after the warm-up."""
    method = build()
    method.n_epochs = 20
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20.0)
    rates = [1e-5]
    for _ in range(19):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    assert [method.learning_rate(e) for e in range(20)] == pytest.approx(rates)


@pytest.mark.parametrize(("shots", "epochs"), [(1, 100), (4, 100), (8, 200), (16, 200)])
def test_epochs_by_shots(shots: int, epochs: int) -> None:
    task, _ = toy_task(shots=shots, views=1)
    method = build()
    method.begin(task, ToyBox(GRANT), np.random.default_rng(0))
    assert method.notes["epochs"] == epochs


def test_the_start_is_zero_shot() -> None:
    task, test = toy_task()
    method, box = build(), ToyBox(GRANT | Access.SCORES)
    method.begin(task, box, np.random.default_rng(0))
    torch.testing.assert_close(method.predict(test.images, box), box.scores(test.images, task.classes.prompts())[0])


def test_an_unpickled_method_trains_its_own_residual() -> None:
    task, _ = toy_task()
    method, box = build(epochs=4), ToyBox(GRANT)
    method.begin(task, box, np.random.default_rng(0))
    method.step(box)
    again: TaskRes = pickle.loads(pickle.dumps(method))
    assert again.optimizer.param_groups[0]["params"][0] is again.residual_XD
    before = again.residual_XD.detach().clone()
    again.step(box)
    assert not torch.equal(before, again.residual_XD)


@pytest.mark.parametrize(
    ("allotment", "fresh", "views"),
    [
        (Remaining(images=1000), False, 10),
        (Remaining(images=199), False, 9),
        (Remaining(images=20), False, 1),
        (Remaining(requests=2), False, 10),
        (Remaining(requests=5), True, 4),
        (Remaining(requests=50, images=125), True, 6),
        (Remaining(), True, 100),
    ],
)
def test_views_are_cut_to_the_allotment_and_epochs_are_not(allotment: Remaining, fresh: bool, views: int) -> None:
    task, _ = toy_task(views=10, fresh_views=fresh)
    method, box = build(), ToyBox(GRANT, allotment)
    predicted = method.bill(TaskShape.of(task, box.feature_dim), allotment)
    assert fit(method, task, box) == 100
    assert method.notes["views"] == views
    assert box.bill == predicted
    assert box.bill.images == 20 * views


# --- the paper's own comparisons -----------------------------------------------------------------------------------


def test_alpha_of_zero_is_zero_shot_on_any_image() -> None:
    task, test = toy_task()
    method, box = build(epochs=5, alpha=0.0), ToyBox(GRANT | Access.SCORES)
    fit(method, task, box)
    assert method.classifier_rotation_deg() < 0.1
    torch.testing.assert_close(method.predict(test.images, box), box.scores(test.images, task.classes.prompts())[0])


def test_the_enhanced_base_is_a_map_of_the_text_features_that_is_learned_first_and_then_fixed() -> None:
    task, _ = toy_task(views=2)
    method, box = TaskResEnhanced(TaskResEnhanced.Config(base_epochs=3, epochs=2)), ToyBox(GRANT)
    method.begin(task, box, np.random.default_rng(5))
    t = box.towers.text_features(task.classes.prompts())[0]
    order = torch.Generator().manual_seed(int(np.random.default_rng(5).integers(2**63 - 1)))
    map_DD = torch.eye(t.shape[1], requires_grad=True)
    adam = torch.optim.Adam([map_DD], weight_decay=5e-4)
    for epoch in range(3):
        f = box.towers.image_features(
            task.train.images.views(2).pixels_BX
        )[  # type: ignore[attr-defined]
            (epoch % 2) * len(task.train.labels) :
        ][: len(task.train.labels)]
        adam.param_groups[0]["lr"] = (1e-5, 2e-4, 2e-4 * 0.5 * (1 + math.cos(math.pi / 3)))[epoch]
        picked = torch.randperm(len(f), generator=order)
        logits = 20.0 * f[picked] @ torch.nn.functional.normalize(t @ map_DD, dim=1).T
        adam.zero_grad()
        torch.nn.functional.cross_entropy(logits, task.train.labels[picked]).backward()
        adam.step()
        assert torch.count_nonzero(method.residual_XD) == 0
        method.step(box)
    mapped = torch.nn.functional.normalize(t @ map_DD, dim=1).detach()
    torch.testing.assert_close(method.base().detach(), mapped, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(mapped, t, atol=1e-4)
    while method.step(box):
        pass
    torch.testing.assert_close(method.base(), mapped, rtol=1e-4, atol=1e-6)
    assert torch.count_nonzero(method.residual_XD)
    shifted = LENGTH * mapped + 0.5 * method.residual_XD.detach()
    torch.testing.assert_close(method.classifier().detach(), torch.nn.functional.normalize(shifted, dim=1))
    assert method.trainable_params == t.shape[1] ** 2 + t.numel()


def test_the_image_residual_is_one_offset_for_all_images_and_leaves_the_classifier() -> None:
    task, test = toy_task()
    method, box = TaskResImageSide(TaskResImageSide.Config(epochs=6)), ToyBox(GRANT)
    fit(method, task, box)
    t = box.towers.text_features(task.classes.prompts())[0]
    assert torch.equal(method.classifier(), t) and method.trainable_params == t.shape[1]
    f = box.towers.image_features(test.images.pixels_BX) + 0.5 * method.residual_XD.detach()  # type: ignore[attr-defined]
    torch.testing.assert_close(method.predict(test.images, box), 20.0 * f @ t.T / f.norm(dim=1, keepdim=True))
    assert set(method.deployed()) == {"classifier_CD", "residual_XD"}
