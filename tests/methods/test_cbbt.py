"""CBBT's estimate against the analytic gradient, its published schedule, its scaling rule and its adapter."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from methods._spsa import one_sided_gradient, sphere_directions
from methods._toy import ToyTowers
from methods._toy_box import ToyBox
from methods._toy_task import TOY_NAMES, fit, toy_task
from methods.base import Remaining, SoftPrompts, TaskShape
from methods.cbbt import CBBT
from methods.cbbt_prompt import CBBTPrompt


def shape(n_train: int = 160, fresh: bool = False, views: int = 10) -> TaskShape:
    return TaskShape(
        n_classes=10,
        n_train=n_train,
        n_val=40,
        shots=16,
        views=views,
        fresh_views=fresh,
        n_templates=1,
        feature_dim=192,
    )


def toy_loss(ctx_PLE: Tensor) -> Tensor:
    """Cross-entropy [P] on the toy training images, differentiable: no box, no method code."""
    towers, (task, _) = ToyTowers(), toy_task()
    text_PCD = towers.text_features(SoftPrompts(ctx_PLE, TOY_NAMES))
    x_BD = towers.image_features(task.train.images.pixels_BX)  # type: ignore[attr-defined]
    logits_PBC = towers.logit_scale * x_BD @ text_PCD.transpose(1, 2)
    return torch.stack([cross_entropy(logits_BC, task.train.labels) for logits_BC in logits_PBC])


def analytic(ctx_LE: Tensor, learned: int) -> Tensor:
    tokens = ctx_LE[-learned:].clone().requires_grad_()
    toy_loss(torch.cat([ctx_LE[:-learned], tokens]).unsqueeze(0)).sum().backward()
    assert tokens.grad is not None
    return tokens.grad


def estimate(ctx_LE: Tensor, learned: int, q: int, h: float, seed: int) -> Tensor:
    tokens = ctx_LE[-learned:]
    u = sphere_directions(q, tokens.numel(), torch.Generator().manual_seed(seed)).view(q, *tokens.shape)
    steps = torch.cat([torch.zeros_like(u[:1]), h * u])
    ctx_PLE = torch.cat([ctx_LE[:-learned].expand(q + 1, -1, -1), tokens + steps], dim=1)
    losses = toy_loss(ctx_PLE)
    return one_sided_gradient(losses[1:], losses[0], u.flatten(1), h).view_as(tokens)


@pytest.mark.parametrize("learned", [1, 4])
def test_the_estimate_points_along_the_analytic_gradient(learned: int) -> None:
    ctx_LE = ToyTowers().embed_text("a photo of a")
    true, got = analytic(ctx_LE, learned), estimate(ctx_LE, learned, q=1000, h=0.01, seed=0)
    assert cosine_similarity(true.flatten(), got.flatten(), dim=0) > 0.95
    assert 0.8 < got.norm() / true.norm() < 1.2


def test_the_mean_of_many_small_estimates_is_the_gradient() -> None:
    ctx_LE = ToyTowers().embed_text("a photo of a")
    true = analytic(ctx_LE, 1)
    few = torch.stack([estimate(ctx_LE, 1, q=4, h=0.002, seed=s) for s in range(400)])
    error, sd = (few.mean(0) - true).abs(), few.std(0) / 20
    assert (error < 4 * sd + 0.01 * true.norm()).all()  # without the factor d = 8 it would be off by 7/8 of itself
    assert few.std(0).norm() > 0.3 * true.norm()  # and one estimate alone is far off


def test_the_estimate_of_a_linear_function_along_the_axes_is_exact() -> None:
    slope = torch.tensor([[1.0, -2.0, 3.0]])
    axes = torch.eye(3).view(3, 1, 3)
    losses = torch.cat([torch.tensor([5.0]), 5.0 + 0.1 * (axes * slope).sum((1, 2))])
    torch.testing.assert_close(one_sided_gradient(losses[1:], losses[0], axes.flatten(1), 0.1), slope[0])


def test_directions_are_of_unit_length_and_balanced() -> None:
    u = sphere_directions(4000, 6, torch.Generator().manual_seed(0))
    torch.testing.assert_close(u.norm(dim=1), torch.ones(4000))
    torch.testing.assert_close(u.T @ u / 4000, torch.eye(6) / 6, atol=0.02, rtol=0)


def test_without_a_limit_it_is_the_published_schedule() -> None:
    bill = CBBTPrompt().bill(shape(), Remaining())
    assert bill.requests == 150 * 5 * 257 == 192_750
    assert bill.images == 192_750 * 32
    assert CBBTPrompt().bill(shape(), Remaining(requests=192_750)).requests == 192_750
    assert CBBTPrompt().bill(shape(752), Remaining()).requests == 150 * 23 * 257  # DTD: a batch of 16 is left out
    assert CBBTPrompt().bill(shape(20), Remaining()).images == 150 * 257 * 20  # fewer images than one batch


@pytest.mark.parametrize(
    ("remaining", "steps_and_directions"),
    [
        (Remaining(requests=192_749), (749, 256)),
        (Remaining(requests=8000), (150, 52)),
        (Remaining(images=8000 * 32), (150, 52)),
        (Remaining(requests=1000), (166, 5)),
        (Remaining(requests=60), (12, 4)),
        (Remaining(requests=5), (1, 4)),
        (Remaining(requests=1), (0, 0)),
    ],
)
def test_the_scaling_rule(remaining: Remaining, steps_and_directions: tuple[int, int]) -> None:
    plan = CBBTPrompt().plan(shape(), remaining)
    assert (plan.steps, plan.directions) == steps_and_directions


def test_the_adapters_bill() -> None:
    bill = CBBT().bill(shape(), Remaining())
    assert bill.requests == 192_751
    assert bill.images == 10 * 160
    fresh = CBBT().bill(shape(fresh=True), Remaining())
    assert (fresh.requests, fresh.images) == (192_750 + 150, 150 * 160)
    assert CBBT().bill(shape(views=0), Remaining()).images == 160
    assert CBBT().bill(shape(), Remaining(images=500)).images == 3 * 160


def rates(steps: int, config: CBBTPrompt.Config | None = None) -> list[float]:
    method = CBBTPrompt(config)
    method.steps, seen = steps, []
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1.0)
    for method.done in range(steps):
        method._adam_step(optimizer)
        seen.append(optimizer.param_groups[0]["lr"])
    return seen


def test_learning_rates_are_dassls_cosine_after_one_constant_epoch() -> None:
    seen = rates(750)
    assert seen[:5] == [1e-5] * 5
    assert seen[5:10] == [0.002] * 5
    for epoch in (2, 75, 149):  # cosine over all 150 epochs, counted from the end of the warm-up
        wanted = 0.001 * (1 + math.cos(math.pi * (epoch - 1) / 150))
        assert seen[5 * epoch : 5 * epoch + 5] == pytest.approx([wanted] * 5)
    assert rates(150) == pytest.approx(seen[::5])


def test_the_step_clips_and_moves_only_the_learned_tokens() -> None:
    task, _ = toy_task()
    method, box = CBBTPrompt(CBBTPrompt.Config(max_grad_norm=1e-3)), ToyBox(CBBTPrompt.info.access, Remaining(100))
    method.begin(task, box, np.random.default_rng(0))
    start_LE = box.embed_text("a photo of a")
    assert torch.equal(method.deployed()["ctx_LE"], start_LE)
    method.step(box)
    assert method.learned_TE.grad is not None
    assert method.learned_TE.grad.norm() == pytest.approx(1e-3, rel=1e-3)
    moved = (method.deployed()["ctx_LE"] - start_LE).abs().sum(1)
    assert (moved[:3] == 0).all() and moved[3] > 0


@pytest.mark.parametrize(("flag", "words"), [(False, "a photo of a"), (True, "a")])
def test_the_papers_start_is_one_token(flag: bool, words: str) -> None:
    method, box = CBBTPrompt(CBBTPrompt.Config(paper_init=flag)), ToyBox(CBBTPrompt.info.access, Remaining(0))
    method.begin(toy_task()[0], box, np.random.default_rng(0))
    assert torch.equal(method.deployed()["ctx_LE"], box.embed_text(words))
    assert method.trainable_params == ToyTowers.E and method.h == 1 / ToyTowers.E


def test_the_adapter_is_clip_adapters_and_its_gradient_is_the_true_one() -> None:
    task, _ = toy_task()
    method = CBBT(CBBT.Config(adapter_start_epoch=0))
    box = ToyBox(CBBT.info.access, Remaining(requests=60))
    method.begin(task, box, np.random.default_rng(0))
    w1, w2 = (w.detach().clone().requires_grad_() for w in (method.adapter.w1_DH, method.adapter.w2_HD))
    assert w1.shape == (16, 4) and method.trainable_params == 8 + 2 * 16 * 4
    text_CD = ToyTowers().text_features(task.classes.soft(box.embed_text("a photo of a").unsqueeze(0)))[0]
    method.step(box)

    x_ND = ToyTowers().image_features(task.train.images.views(1).pixels_BX)  # type: ignore[attr-defined]
    mixed = 0.2 * torch.relu(torch.relu(x_ND @ w1) @ w2) + 0.8 * x_ND
    cross_entropy(20.0 * normalize(mixed, dim=1) @ text_CD.T, task.train.labels).backward()
    torch.testing.assert_close(method.adapter.w1_DH.grad, w1.grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(method.adapter.w2_HD.grad, w2.grad, rtol=1e-3, atol=1e-5)


def test_the_adapter_joins_at_its_epoch_and_is_never_used_untrained() -> None:
    task, _ = toy_task()
    late, box = CBBT(CBBT.Config(adapter_start_epoch=150)), ToyBox(CBBT.info.access, Remaining(requests=60))
    fit(late, task, box)
    assert not late.adapter_joined
    usual, box = CBBT(), ToyBox(CBBT.info.access, Remaining(requests=400))
    fit(usual, task, box)
    assert usual.adapter_joined
    steps_with_adapter = usual.adapter.optimizer.state[usual.adapter.w1_DH]["step"]
    assert steps_with_adapter == sum(s * 150 // usual.steps >= 10 for s in range(usual.steps))


def test_without_directions_the_prompt_stays_and_the_adapter_learns_alone() -> None:
    task, _ = toy_task()
    method = CBBT(CBBT.Config(n_directions=0, min_directions=0, epochs=20, lr=0.05))
    box = ToyBox(CBBT.info.access)
    steps = fit(method, task, box)
    start = box.embed_text(method.classes.context)
    assert torch.equal(method.deployed()["ctx_LE"], start)
    assert method.adapter_joined and method.trainable_params == 2 * method.adapter.w1_DH.numel()
    assert box.bill.requests == steps + 1
