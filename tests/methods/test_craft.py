"""CraFT's two losses, its bill and its flags, against values worked out by hand."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div

from methods._refiner import Refiner
from methods._toy_box import ToyBox
from methods._toy_task import fit, toy_task
from methods.base import Remaining, TaskShape
from methods.bbt import BBT
from methods.craft import CraFT, fitness
from methods.craft_ablations import CraFTSequential


def shape(n_train: int = 160, shots: int = 16) -> TaskShape:
    return TaskShape(
        n_classes=10,
        n_train=n_train,
        n_val=40,
        shots=shots,
        views=10,
        fresh_views=False,
        n_templates=1,
        feature_dim=192,
    )


# Two classes. raw has odds 3:1 for class 0, refined 1:1; label 0.
#   CE(raw, 0)          = ln(4/3)
#   KL(refined || raw)  = 1/2 ln((1/2)/(3/4)) + 1/2 ln((1/2)/(1/4))  = 1/2 ln(4/3)
#   KL(raw || refined)  = 3/4 ln((3/4)/(1/2)) + 1/4 ln((1/4)/(1/2))  = ln 2 - (entropy of 3/4, 1/4)
RAW, REFINED, LABEL = torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([0])
REFINED_RAW = 0.5 * math.log(4 / 3)
RAW_REFINED = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)


def test_fitness_is_the_raw_loss_and_refined_against_raw() -> None:
    got = fitness(RAW[None], REFINED[None], LABEL, kl_weight=0.1)
    assert got.shape == (1,)
    assert got.item() == pytest.approx(math.log(4 / 3) + 0.1 * REFINED_RAW, abs=1e-6)
    assert abs(REFINED_RAW - RAW_REFINED) > 0.01  # the two directions are told apart by these numbers


def test_refiner_loss_is_the_refined_loss_and_raw_against_refined() -> None:
    refiner = Refiner(2, Refiner.Config(hidden=3), torch.Generator().manual_seed(0))
    with torch.no_grad():
        for weight in refiner.weights():
            weight.zero_()
        refiner.b2_C.copy_(torch.tensor([-math.log(3.0), 0.0]))  # refined = raw + b2 = (0, 0)
    torch.testing.assert_close(refiner.refine(RAW), REFINED)
    assert refiner.loss(RAW, LABEL).item() == pytest.approx(math.log(2) + 0.1 * RAW_REFINED, abs=1e-6)


def test_both_losses_average_over_images_as_torchs_batchmean_does() -> None:
    g = torch.Generator().manual_seed(0)
    raw, refined = torch.randn(3, 7, 5, generator=g), torch.randn(3, 7, 5, generator=g)
    labels = torch.arange(7) % 5
    for p in range(3):
        kl = kl_div(raw[p].log_softmax(1), refined[p].softmax(1), reduction="batchmean")
        wanted = torch.nn.functional.cross_entropy(raw[p], labels) + 0.3 * kl
        torch.testing.assert_close(fitness(raw, refined, labels, 0.3)[p], wanted)


def test_fitness_over_blocks_of_images_is_the_fitness_over_all() -> None:
    task, _ = toy_task()  # ToyBox answers in two blocks
    method, box = CraFT(), ToyBox(CraFT.info.access, Remaining(requests=82))
    method.begin(task, box, np.random.default_rng(0))
    ctx_PLE = method.search.ask()
    got_P = method._fitness(box, ctx_PLE)
    raw_PNC = box.scores(task.train.images.views(1), task.classes.soft(ctx_PLE))
    wanted_P = fitness(raw_PNC, method.refiner.refine(raw_PNC), task.train.labels, 0.1)
    torch.testing.assert_close(got_P, wanted_P)


@pytest.mark.parametrize(
    ("remaining", "shots", "generations"),
    [
        (Remaining(requests=8000), 16, 195),
        (Remaining(requests=8000), 1, 195),
        (Remaining(), 16, 200),
        (Remaining(), 4, 100),
        (Remaining(), 1, 50),
        (Remaining(images=41 * 160 * 9), 16, 9),
        (Remaining(requests=40), 16, 0),
    ],
)
def test_generations_and_bill(remaining: Remaining, shots: int, generations: int) -> None:
    bill = CraFT().bill(shape(shots=shots), remaining)
    assert bill.requests == 41 * generations
    assert bill.images == 41 * 160 * generations
    assert bill.prompts == 41 * 10 * generations
    assert bill.outputs == 41 * 160 * 10 * generations


def test_the_refiners_kl_term_ends_with_the_first_fraction_of_the_candidates() -> None:
    def epochs_with_kl(fraction: float, generations: int) -> list[int]:
        method = CraFT(CraFT.Config(kl_fraction=fraction))
        method.generations = generations
        return [epoch for epoch in range(generations) if method._has_kl_term(epoch)]

    assert epochs_with_kl(0.25, 200) == list(range(50))
    assert epochs_with_kl(1.0, 10) == list(range(10))
    assert epochs_with_kl(0.25, 10) == [0, 1]  # 40 * (epoch + 1) <= 100


def test_a_generation_is_one_population_call_and_one_call_of_the_present_prompt() -> None:
    task, _ = toy_task()
    method, box = CraFT(), ToyBox(CraFT.info.access, Remaining(requests=100))
    assert fit(method, task, box) == 2
    assert box.calls == ["scores", "scores"] * 2
    assert box.bill.requests == 82


def test_prompt_from_extra_population_averages_an_unscored_population() -> None:
    task, _ = toy_task()
    contexts = {}
    for flag in (False, True):
        method = CraFT(CraFT.Config(prompt_from_extra_population=flag, intrinsic_dim=30))
        box = ToyBox(CraFT.info.access, Remaining(requests=82))
        method.begin(task, box, np.random.default_rng(4))
        method.step(box)
        contexts[flag] = method.ctx_LE
        mean_LE = method.search.mean()
        assert torch.equal(method.ctx_LE, mean_LE) is not flag
        if flag:  # repeat the search by hand: the same first population, then a second one, averaged
            again = CraFT(CraFT.Config(intrinsic_dim=30))
            again.begin(task, ToyBox(CraFT.info.access, Remaining(requests=82)), np.random.default_rng(4))
            again.search.tell(again._fitness(box, again.search.ask()))
            z_PK = torch.tensor(np.stack(again.search.evolution.es.ask()), dtype=torch.float32)
            moved_LE = (z_PK @ again.search.a_KF).mean(0).view_as(method.ctx_LE)
            torch.testing.assert_close(method.ctx_LE, again.search.p0_LE + moved_LE)
    assert not torch.equal(contexts[False], contexts[True])


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    "allotment", [Remaining(400, 40_000), Remaining(60), Remaining(images=3_000), Remaining(requests=30)]
)
def test_without_collaboration_the_search_is_bbts_and_the_refiner_comes_after(
    fresh: bool, allotment: Remaining
) -> None:
    task, _ = toy_task(fresh_views=fresh)
    apart, box = CraFTSequential(CraFTSequential.Config(intrinsic_dim=20)), ToyBox(CraFT.info.access, allotment)
    predicted = apart.bill(TaskShape.of(task, box.feature_dim), allotment)
    fit(apart, task, box)
    assert box.bill == predicted and min(box.remaining) >= 0
    bbt = BBT(BBT.Config(intrinsic_dim=20, generations=apart.generations or 1))
    if apart.generations:
        fit(bbt, task, ToyBox(BBT.info.access))
        assert torch.equal(apart.ctx_LE, bbt.ctx_LE), "the refiner has no say in the search"
        views = apart.generations if fresh else min(3, apart.generations)
        assert box.calls == ["scores"] * (apart.generations + views)
