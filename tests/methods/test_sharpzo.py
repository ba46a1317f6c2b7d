"""SharpZO's two stages against a loop written from the paper, its published schedule, and its share of an allotment."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from methods._prompt_search import PromptSearch
from methods._toy import ToyTowers
from methods._toy_box import ToyBox
from methods._toy_task import TOY_NAMES, fit, toy_task
from methods.base import Remaining, SoftPrompts, TaskShape
from methods.sharpzo import SharpZO
from methods.testing import contract
from pipeline.config.method_choice import method_choice

SMALL = SharpZO.Config(intrinsic_dim=12, popsize=6)


class TestBothStages(contract("sharpzo")):  # type: ignore[misc]
    """The default settings take a step of stage 1 from 1,064 requests on: more than the contract's allotment."""

    def build(self) -> SharpZO:
        return SharpZO(SMALL)


def shape(n_train: int = 160) -> TaskShape:
    return TaskShape(
        n_classes=10,
        n_train=n_train,
        n_val=40,
        shots=16,
        views=10,
        fresh_views=False,
        n_templates=1,
        feature_dim=192,
    )


def started(config: SharpZO.Config, requests: float = math.inf, seed: int = 0) -> tuple[SharpZO, ToyBox]:
    method, box = SharpZO(config), ToyBox(SharpZO.info.access, Remaining(requests=requests))
    method.begin(toy_task()[0], box, np.random.default_rng(seed))
    return method, box


def toy_loss(ctx_LE: Tensor) -> Tensor:
    """Return the cross-entropy on view 0 of the toy training images, differentiable: no box, no method code."""
    towers, (task, _) = ToyTowers(), toy_task()
    text_CD = towers.text_features(SoftPrompts(ctx_LE.unsqueeze(0), TOY_NAMES))[0]
    x_ND = towers.image_features(task.train.images.views(1).pixels_BX)  # type: ignore[attr-defined]
    return cross_entropy(towers.logit_scale * x_ND @ text_CD.T, task.train.labels)


# --- the two stages --------------------------------------------------------------------------------------------------


class Loop:
    """Both stages in loops, one evaluation at a time. It shares only the random draws with the method."""

    def __init__(self, method: SharpZO, seed: int) -> None:
        self.c, classes = method.config, toy_task()[0].classes
        self.search = PromptSearch(classes, ToyTowers().embed_text, self.c, np.random.default_rng(seed))
        self.z, self.total = np.zeros(self.c.intrinsic_dim), np.zeros(self.c.intrinsic_dim)
        self.generator = torch.Generator()
        self.generator.set_state(method.generator.get_state())

    def f(self, z: np.ndarray) -> float:
        ctx = self.search.p0_LE.clone()
        for k in range(len(z)):
            ctx += float(z[k]) * self.search.a_KF[k].view_as(ctx)
        return float(toy_loss(ctx))

    def stage_1(self) -> None:
        g = np.zeros_like(self.z)
        for k in range(len(g)):
            e = np.eye(len(g))[k]
            g[k] = (self.f(self.z + 1e-3 * e) - self.f(self.z - 1e-3 * e)) / 2e-3
        if self.c.short_shift:  # the release takes `popsize` equal rows, divides by the norm of all, and averages
            rows = np.stack([g] * self.c.popsize)
            shift = (0.1 * rows / np.linalg.norm(rows)).mean(0)
        else:
            shift = 0.1 * g / np.linalg.norm(g)
        es = self.search.evolution.es
        population = es.ask()
        es.tell(population, [self.f(z + shift) for z in population])
        self.z = np.mean(es.ask(), axis=0) if self.c.prompt_from_extra_population else es.result.xfavorite
        self.total = g

    def stage_2(self) -> None:
        u = torch.randn(len(self.z), generator=self.generator).double().numpy()
        slope = (self.f(self.z + 1e-3 * u) - self.f(self.z - 1e-3 * u)) / 2e-3
        self.total = self.total + slope * u if self.c.accumulate else slope * u
        self.z = self.z - 1e-3 * self.total


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"short_shift": True},
        {"accumulate": True},
        {"prompt_from_extra_population": True},
        {"short_shift": True, "accumulate": True, "prompt_from_extra_population": True, "paper_init": True},
    ],
    ids=lambda flags: "+".join(flags) or "text",
)
def test_three_steps_of_each_stage_are_those_of_the_loop(flags: dict[str, bool]) -> None:
    config = replace(SMALL, generations=3, zo_steps=3, **flags)
    method, box = started(config, seed=5)
    loop = Loop(method, seed=5)
    for step in range(6):
        more = method.step(box)
        loop.stage_1() if step < 3 else loop.stage_2()
        wanted = torch.tensor(loop.z, dtype=torch.float32)
        torch.testing.assert_close(method.z_K, wanted, rtol=1e-3, atol=1e-4)
        assert more == (step < 5)
    assert not torch.equal(method.z_K, torch.zeros(12))
    ctx_LE = method.search.p0_LE + torch.einsum("k,kle->le", method.z_K, method.search.a_KF.view(12, 4, 8))
    torch.testing.assert_close(method.deployed()["ctx_LE"], ctx_LE)


def test_the_shift_is_40_rows_shorter_as_released() -> None:
    lengths = []
    for flag in (False, True):
        method, box = started(SharpZO.Config(intrinsic_dim=12, short_shift=flag, generations=1, zo_steps=0))
        sent: list[Tensor] = []
        losses = method._losses

        def recorded(box: ToyBox, z_PK: Tensor, losses=losses, sent=sent) -> Tensor:  # type: ignore[no-untyped-def]
            sent.append(z_PK)
            return losses(box, z_PK)

        method._losses = recorded  # type: ignore[method-assign,assignment]
        population = started(SharpZO.Config(intrinsic_dim=12, generations=1))[0].search.evolution.ask()
        method.step(box)
        shift_PK = sent[1] - population
        torch.testing.assert_close(shift_PK, shift_PK[:1].expand(40, -1), atol=1e-6, rtol=0)
        lengths.append(float(shift_PK[0].norm()))
    assert lengths == pytest.approx([0.1, 0.1 / 40**0.5], rel=1e-4)
    assert lengths[1] == pytest.approx(0.0158, abs=1e-4)


def test_the_coordinate_gradient_is_the_analytic_one() -> None:
    method, box = started(SMALL)
    z_K = torch.zeros(12, requires_grad=True)
    toy_loss(method.search.p0_LE + (z_K @ method.search.a_KF).view(4, 8)).backward()
    assert z_K.grad is not None
    torch.testing.assert_close(method._coordinate_gradient(box), z_K.grad, rtol=1e-2, atol=1e-3)


def test_fewer_directions_are_random_coordinates_of_the_gradient_scaled_up() -> None:
    full, box = started(SMALL)
    g_K = full._coordinate_gradient(box)
    few, box = started(replace(SMALL, n_directions=3))
    seen = set()
    for _ in range(20):
        before = box.bill.requests
        part_K = few._coordinate_gradient(box)
        rows = part_K.nonzero().flatten()
        assert box.bill.requests - before == 6 and len(rows) == 3
        torch.testing.assert_close(part_K[rows], 4 * g_K[rows], rtol=1e-3, atol=1e-3)
        seen |= set(rows.tolist())
    assert seen == set(range(12)), "other coordinates in each step"
    assert few.notes["directions"] == 3


def test_without_directions_stage_1_is_the_plain_search() -> None:
    method, box = started(replace(SMALL, n_directions=0, generations=2, zo_steps=0))
    search = PromptSearch(toy_task()[0].classes, box.embed_text, SMALL, np.random.default_rng(0))
    for _ in range(2):
        method.step(box)
        search.tell(torch.stack([toy_loss(ctx_LE) for ctx_LE in search.ask()]))
    torch.testing.assert_close(method.deployed()["ctx_LE"], search.mean(), rtol=1e-3, atol=1e-4)
    assert box.bill.requests == 2 * 6


def test_no_call_has_more_prompt_sets_than_a_population() -> None:
    method, box = started(SMALL)
    method.step(box)
    assert box.calls == ["scores"] * (4 + 1)  # 2 * 12 differences in calls of 6, then the population
    assert box.bill.requests == 30


# --- schedule --------------------------------------------------------------------------------------------------------


def test_the_published_schedule_is_506_200_requests() -> None:
    for allotment in (Remaining(), Remaining(requests=506_200)):
        plan = SharpZO().plan(shape(), allotment)
        assert (plan.cma_steps, plan.zo_steps) == (100, 199_900)
        assert plan.bill.requests == 100 * 1064 + 199_900 * 2 == 506_200
        assert plan.bill.images == 506_200 * 160 == 80_992_000  # EuroSAT
    assert SharpZO().bill(shape(752), Remaining()).images == 380_662_400  # DTD


@pytest.mark.parametrize(
    ("n_train", "remaining", "steps"),
    [
        (160, Remaining(requests=8000), (1, 3468)),
        (160, Remaining(images=256_000), (1, 268)),
        (256, Remaining(images=256_000), (0, 500)),  # 1,000 evaluations
        (160, Remaining(requests=1064), (1, 0)),
        (160, Remaining(requests=1063), (0, 531)),
        (160, Remaining(requests=10_133), (1, 4534)),
        (160, Remaining(requests=10_134), (2, 4003)),  # 21 % pay for two steps
        (160, Remaining(requests=506_199), (99, 199_900)),
        (160, Remaining(requests=1), (0, 0)),
    ],
)
def test_stage_1_gets_21_percent_and_at_least_one_step(
    n_train: int, remaining: Remaining, steps: tuple[int, int]
) -> None:
    plan = SharpZO().plan(shape(n_train), remaining)
    assert (plan.cma_steps, plan.zo_steps) == steps
    assert plan.bill.requests == 1064 * steps[0] + 2 * steps[1]
    assert plan.bill.images == n_train * plan.bill.requests


def test_fewer_directions_pay_for_more_steps_of_stage_1() -> None:
    plan = SharpZO(SharpZO.Config(n_directions=52)).plan(shape(), Remaining(requests=8000))
    assert (plan.cma_steps, plan.zo_steps) == (11, (8000 - 11 * 144) // 2)


def test_without_stage_1_stage_2_starts_at_the_template() -> None:
    method, box = started(SharpZO.Config(intrinsic_dim=20), requests=8)
    p0_LE = box.embed_text("a photo of a")
    assert (method.cma_steps, method.steps) == (0, 4)
    assert torch.equal(method.deployed()["ctx_LE"], p0_LE)
    fit(method, toy_task()[0], box)
    assert box.calls == ["scores"] * 4 and not torch.equal(method.deployed()["ctx_LE"], p0_LE)


def test_the_preset_as_released_sets_every_flag() -> None:
    choice = dict(method_choice("sharpzo_released", "dtd", "paper", {}).config)
    assert choice["short_shift"] and choice["accumulate"] and choice["paper_init"]
    assert choice["prompt_from_extra_population"] and choice["projection_std"] == 1.0
