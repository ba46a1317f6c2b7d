"""CoOp, and the gradient that it is given: true, metered, the same bits again, and granted by name only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from methods._toy import ToyTowers
from methods._toy_box import ToyBox
from methods._toy_task import fit, toy_task
from methods.base import Access, Bill, BlackBox, SoftPrompts
from methods.coop import CoOp
from pipeline.blackbox import text_tower as text
from pipeline.blackbox.client import MeteredBox
from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.model import OpenClipModel
from pipeline.config.card_files import model_card
from pipeline.config.files import names
from pipeline.data.images import Images
from pipeline.data.source import Source
from tests.support.lab import Lab, box_over, outcome

NAMES = ("star", "house", "hand-drawn umbrella")
WHITE = Access.SOFT | Access.FEATURES | Access.GRADIENTS


@pytest.fixture
def white(tiny: Endpoint, tmp_path: Path) -> Iterator[MeteredBox]:
    """A metered white box over the embedded model."""
    with box_over(tiny, tmp_path, WHITE) as box:
        yield box


def loss_of(box: BlackBox, ctx_PLE: Tensor, images: Images, labels_B: Tensor) -> Tensor:
    text_CD = box.text_features(SoftPrompts(ctx_PLE, NAMES))[0]
    return cross_entropy(box.logit_scale * box.image_features(images) @ text_CD.T, labels_B)


def gradient_of(box: BlackBox, ctx_PLE: Tensor, images: Images, labels_B: Tensor) -> Tensor:
    text_PCD = box.text_features(SoftPrompts(ctx_PLE, NAMES)).requires_grad_()
    loss = cross_entropy(box.logit_scale * box.image_features(images) @ text_PCD[0].T, labels_B)
    (upstream,) = torch.autograd.grad(loss, text_PCD)
    return box.text_gradients(SoftPrompts(ctx_PLE, NAMES), upstream)


def test_the_gradient_is_that_of_finite_differences(white: MeteredBox, icons: Source) -> None:
    images = Images.plain(icons, "test", icons.rows_of("test")[:12], "crop")
    labels_B = torch.arange(12) % 3
    ctx_PLE = white.embed_text("an icon of a")[None]
    gradient = gradient_of(white, ctx_PLE, images, labels_B)
    assert gradient.shape == ctx_PLE.shape and gradient.dtype == torch.float32
    g = torch.Generator().manual_seed(0)
    for _ in range(6):
        direction = torch.randn(ctx_PLE.shape, generator=g)
        direction /= direction.norm()
        h = 1e-2
        up, down = (loss_of(white, ctx_PLE + sign * h * direction, images, labels_B) for sign in (1, -1))
        slope, expected = float(up - down) / (2 * h), float((gradient * direction).sum())
        assert slope == pytest.approx(expected, rel=0.02, abs=2e-3)


@pytest.mark.parametrize("name", ["fake", "tiny"])
def test_each_prompt_set_has_its_own_gradient_the_same_beside_others(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    endpoint: Endpoint = request.getfixturevalue(name)
    with box_over(endpoint, tmp_path, WHITE) as box:
        g = torch.Generator().manual_seed(1)
        ctx_PLE = 0.1 * torch.randn(3, 4, box.token_dim, generator=g)
        upstream = torch.randn(3, len(NAMES), box.feature_dim, generator=g)
        together = box.text_gradients(SoftPrompts(ctx_PLE, NAMES), upstream)
        again = box.text_gradients(SoftPrompts(ctx_PLE, NAMES), upstream)
        assert torch.equal(together, again)
        for p in range(3):
            alone = box.text_gradients(SoftPrompts(ctx_PLE[p : p + 1], NAMES), upstream[p : p + 1])
            torch.testing.assert_close(alone, together[p : p + 1], rtol=1e-4, atol=1e-5)
        assert box.meter.bills[box.phase] == Bill.text_features(3, len(NAMES), box.feature_dim) * 3
        assert not ctx_PLE.requires_grad


def test_a_large_request_is_differentiated_too(tiny: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model
    assert isinstance(model, OpenClipModel)
    g = torch.Generator().manual_seed(2)
    prompts = SoftPrompts(0.1 * torch.randn(1, 4, model.token_dim, generator=g), NAMES)
    upstream = torch.randn(1, len(NAMES), model.feature_dim, generator=g)
    small = model.text_gradients(prompts, upstream)
    monkeypatch.setattr(text, "SMALL", 0)  # every request is packed, which no gradient goes back through
    monkeypatch.setitem(text.TILE_TOKENS, "cpu", 9)
    torch.testing.assert_close(model.text_gradients(prompts, upstream), small, rtol=1e-4, atol=1e-5)


def test_gradients_are_granted_by_name_only() -> None:
    for name in names("model"):
        assert model_card(name).access.covers(WHITE), name
    assert not (Access.SOFT | Access.FEATURES).covers(Access.GRADIENTS)
    assert not Access.GRADIENTS.covers(Access.TEXT) and not Access.GRADIENTS.covers(Access.SCORES)


def plain_loop(config: CoOp.Config, seed: int) -> Tensor:
    """CoOp on the toy towers, by autograd through them: no box, torch's own schedulers."""
    task, _ = toy_task(shots=8, views=0)
    towers, rng = ToyTowers(), np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(int(rng.integers(2**63 - 1)))
    ctx_LE = (config.init_std * torch.randn(config.n_ctx, towers.E, generator=generator)).requires_grad_()
    optimizer = torch.optim.SGD([ctx_LE], lr=config.lr, momentum=0.9, weight_decay=5e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=float(config.epochs))  # type: ignore[arg-type]
    images: Any = task.train.images
    x_ND, labels_N = towers.image_features(images.pixels_BX), task.train.labels
    for epoch in range(config.epochs or 0):
        rate = optimizer.param_groups[0]["lr"]
        if epoch == 0:
            optimizer.param_groups[0]["lr"] = config.warmup_lr
        order = torch.randperm(len(labels_N), generator=generator)
        for start in range(0, len(labels_N) - config.batch_size + 1, config.batch_size):
            rows = order[start : start + config.batch_size]
            text_CD = towers.text_features(task.classes.soft(ctx_LE[None]))[0]
            loss = cross_entropy(towers.logit_scale * x_ND[rows] @ text_CD.T, labels_N[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if epoch == 0:
            optimizer.param_groups[0]["lr"] = rate
        else:
            cosine.step()
    return ctx_LE.detach()


@pytest.mark.parametrize("n_ctx", [4, 16])
def test_it_is_the_papers_loop(n_ctx: int) -> None:
    config = CoOp.Config(n_ctx=n_ctx, epochs=5, batch_size=16)
    method, (task, _) = CoOp(config), toy_task(shots=8, views=0)
    fit(method, task, ToyBox(WHITE), seed=3)
    torch.testing.assert_close(method.ctx_LE.detach(), plain_loop(config, seed=3), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("shots", "epochs"), [(1, 50), (2, 100), (4, 100), (8, 200), (16, 200)])
def test_epochs_are_those_of_the_shots(shots: int, epochs: int) -> None:
    method, (task, _) = CoOp(), toy_task(shots=shots)
    method.begin(task, ToyBox(WHITE), np.random.default_rng(0))
    assert method.notes == {"steps": epochs * max(1, 5 * shots // 32), "views": 3, "epochs": epochs}


def test_it_learns_and_starts_from_the_template_when_asked() -> None:
    method, (task, test) = CoOp(CoOp.Config(n_ctx=0)), toy_task(shots=8)
    box = ToyBox(WHITE)
    method.begin(task, box, np.random.default_rng(0))
    assert torch.equal(method.ctx_LE.detach(), box.embed_text("a photo of a"))
    before = method.predict(test.images, box)
    while method.step(box):
        pass
    after = method.predict(test.images, box)
    right = [float((logits.argmax(1) == test.labels).double().mean()) for logits in (before, after)]
    assert right[1] > right[0]


def test_a_trial_of_it_is_paid_as_predicted_and_says_that_it_is_white_box(lab: Lab) -> None:
    spec = lab.spec("coop", "method.coop.epochs=6")
    (row,) = lab.run(spec)
    assert row.status == "done" and row.access == "SOFT+FEATURES+GRADIENTS"
    assert lab.paid(spec) == spec.predicted
    assert outcome(row)["requests"] == 1 + 2 * 6
