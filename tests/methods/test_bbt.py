"""CMA-ES and the prompt search: seeded by themselves, alike after a pickle, and finding what there is to find."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from methods._prompt_search import Evolution, PromptSearch, eigh, n_generations
from methods._toy_box import ToyBox
from methods._toy_task import toy_task
from methods.base import Bill, Remaining, TaskShape
from methods.bbt import BBT

TARGET = torch.linspace(-1, 1, 10)


def distance(z_PK: Tensor) -> Tensor:
    return ((z_PK - TARGET) ** 2).sum(-1)


def search(seed: int, dim: int = 10, bound: float = 5.0, sigma: float = 1.0) -> Evolution:
    return Evolution(dim, sigma=sigma, popsize=12, bound=bound, rng=np.random.default_rng(seed))


def test_it_reaches_the_optimum_of_a_sphere() -> None:
    es = search(0)
    for _ in range(150):
        es.tell(distance(es.ask()))
    assert distance(es.mean()) < 1e-6


def test_it_goes_on_when_its_own_tolerances_would_stop_it() -> None:
    es = search(0, sigma=1e-13)
    for _ in range(5):
        es.tell(torch.ones(12) + 0 * distance(es.ask()))
    assert es.es.stop()
    assert es.ask().shape == (12, 10)


def test_candidates_and_mean_stay_within_the_bound() -> None:
    es = search(1, bound=0.5)
    for _ in range(150):
        z_PK = es.ask()
        assert z_PK.abs().max() <= 0.5
        es.tell(distance(z_PK))
    assert es.mean().abs().max() <= 0.5
    torch.testing.assert_close(es.mean(), TARGET.clamp(-0.5, 0.5), atol=0.02, rtol=0)


def test_two_interleaved_searches_do_not_disturb_each_other_nor_numpy() -> None:
    def alone(seed: int) -> list[Tensor]:
        es, asked = search(seed), []
        for _ in range(8):
            asked.append(es.ask())
            es.tell(distance(asked[-1]))
        return asked

    np.random.seed(3)
    before = np.random.get_state()[1].copy()  # type: ignore[union-attr, index]
    a, b = search(5), search(6)
    together: tuple[list[Tensor], list[Tensor]] = ([], [])
    for _ in range(8):
        for es, asked in zip((a, b), together, strict=True):
            asked.append(es.ask())
            es.tell(distance(asked[-1]))
            np.random.rand()  # somebody else draws from the global generator in between
    np.random.seed(3)
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]
    for asked, seed in zip(together, (5, 6), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(asked, alone(seed), strict=True))


def test_making_and_asking_leave_numpys_global_generator_alone() -> None:
    before = pickle.dumps(np.random.get_state())
    es = search(0)
    es.tell(distance(es.ask()))
    es.mean_of_extra_population()
    assert pickle.dumps(np.random.get_state()) == before


@pytest.mark.parametrize("between_ask_and_tell", [False, True])
def test_a_pickled_search_continues_bit_for_bit_at_the_papers_width(between_ask_and_tell: bool) -> None:
    def loss(z_PK: Tensor) -> Tensor:
        return ((z_PK - 0.3) ** 2).sum(-1)

    straight = Evolution(512, sigma=1.0, popsize=40, bound=5.0, rng=np.random.default_rng(2))
    resumed = Evolution(512, sigma=1.0, popsize=40, bound=5.0, rng=np.random.default_rng(2))
    for _ in range(8):  # past two eigendecompositions
        x_PK, y_PK = straight.ask(), resumed.ask()
        assert torch.equal(x_PK, y_PK)
        if between_ask_and_tell:
            resumed = pickle.loads(pickle.dumps(resumed))
        straight.tell(loss(x_PK))
        resumed.tell(loss(y_PK))
        resumed = pickle.loads(pickle.dumps(resumed))
    assert torch.equal(straight.mean(), resumed.mean())
    assert straight.es.sm.last_update > 0


def test_step_size_adaptation_is_the_papers_at_any_width() -> None:
    # pycma 4.5 would take two-point adaptation from 300 dimensions on, which cannot ask twice
    es = Evolution(320, sigma=1.0, popsize=8, bound=0.0, rng=np.random.default_rng(0))
    assert type(es.es.adapt_sigma).__name__ == "CMAAdaptSigmaCSA"
    for _ in range(4):
        es.tell((es.ask() ** 2).sum(-1))
        es.mean_of_extra_population()


def test_eigendecomposition_gives_the_matrix_back() -> None:
    m = np.random.default_rng(0).standard_normal((6, 6))
    values, vectors = eigh(m + m.T)
    np.testing.assert_allclose(vectors @ np.diag(values) @ vectors.T, m + m.T, atol=1e-12)
    assert (np.diff(values) >= 0).all()


def test_a_candidate_is_the_start_plus_a_fixed_random_map_of_z() -> None:
    p0_LE = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    config = PromptSearch.Config(intrinsic_dim=50, popsize=6)
    prompts = PromptSearch(toy_task()[0].classes, lambda context: p0_LE, config, np.random.default_rng(0))
    assert torch.equal(prompts.mean(), p0_LE)  # z = 0 before the first generation
    assert abs(prompts.a_KF.std().item() - 0.2) < 0.01
    ctx_PLE = prompts.ask()
    z_PK = torch.tensor(np.stack(prompts.evolution.population), dtype=torch.float32)
    by_hand = p0_LE + torch.einsum("pk,kle->ple", z_PK, prompts.a_KF.view(50, 3, 8))
    torch.testing.assert_close(ctx_PLE, by_hand)


@pytest.mark.parametrize(
    ("shots", "remaining", "generations"),
    [
        (16, Remaining(requests=8000), 200),
        (1, Remaining(requests=8000), 200),
        (16, Remaining(), 200),
        (4, Remaining(), 100),
        (1, Remaining(), 50),
        (16, Remaining(requests=8000, images=40 * 160 * 7), 7),
        (16, Remaining(requests=39), 0),
    ],
)
def test_generations(shots: int, remaining: Remaining, generations: int) -> None:
    shape = TaskShape(
        n_classes=10, n_train=160, n_val=40, shots=shots, views=10, fresh_views=False, n_templates=1, feature_dim=192
    )
    bill = BBT().bill(shape, remaining)
    assert (bill.requests, bill.images) == (40 * generations, 40 * 160 * generations)


def test_generations_can_be_capped() -> None:
    config, shape = PromptSearch.Config(generations=3), TaskShape.of(toy_task()[0], 16)
    one = Bill.scores(config.popsize, shape.n_train, shape.n_classes)
    assert n_generations(config, shape, one, Remaining()) == 3
    assert n_generations(config, shape, one, Remaining(requests=81)) == 2


def test_the_start_is_the_template_or_one_with_a_context_or_the_papers() -> None:
    task, _ = toy_task()
    for template, flag, words, suffix in (
        ("one odd {} drawing.", False, "one odd", " drawing."),
        ("one odd {} drawing.", True, "a photo of a", "."),
        ("{} texture.", False, "the", "."),  # nothing before the name: the first of the ensemble that has words there
    ):
        task = replace(task, classes=replace(task.classes, template=template, templates=("{}", "the {}.")))
        method, box = BBT(BBT.Config(paper_init=flag)), ToyBox(BBT.info.access, Remaining(requests=0))
        method.begin(task, box, np.random.default_rng(0))
        assert torch.equal(method.ctx_LE, box.embed_text(words))
        assert method.search.classes.soft(method.ctx_LE[None]).suffix == suffix
