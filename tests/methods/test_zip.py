"""ZIP's maps, gradient and steps against loops written from the paper, its published schedule, and its start."""

import ast
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import methods
from methods._fastfood import Fastfood, walsh_hadamard
from methods._spsa import directions, estimated_gradient
from methods._toy import ToyTowers
from methods._toy_box import ToyBox, ToyImages
from methods._toy_task import TOY_NAMES, fit, toy_task
from methods.base import FewShotTask, Remaining, SoftPrompts, TaskShape
from methods.testing import contract
from methods.zip import ZIP


class TestOneToken(contract("zip")):  # type: ignore[misc]
    def build(self) -> ZIP:
        return ZIP(ZIP.Config(n_ctx=1, intrinsic_dim=6, rank=2, n_directions=2, batch_size=8))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shape(n_train: int = 160, **changes: int) -> TaskShape:
    one = TaskShape(
        n_classes=10, n_train=160, n_val=40, shots=16, views=10, fresh_views=False, n_templates=1, feature_dim=192
    )
    return replace(one, n_train=n_train, **changes)


# --- Fastfood --------------------------------------------------------------------------------------------------------


def hadamard(width: int) -> Tensor:
    """Entry (i, j) is -1 to the number of ones that the binary numbers i and j share."""
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(width)] for i in range(width)])


@pytest.mark.parametrize("width", [1, 2, 8, 64])
def test_the_transform_is_the_hadamard_matrix(width: int) -> None:
    x = torch.randn(3, 2, width, generator=generator())
    torch.testing.assert_close(walsh_hadamard(x), x @ hadamard(width), rtol=1e-4, atol=1e-4)


def matrices(maps: Fastfood, q: int) -> Tensor:
    """Return the maps as matrices [L, E, q], from their outputs for the unit vectors."""
    n_maps = len(maps.signs_LW)
    return maps(torch.eye(q).unsqueeze(1).expand(q, n_maps, q)).permute(1, 2, 0)


def test_a_map_is_the_product_of_its_five_matrices_with_the_papers_scale() -> None:
    q, e, width = 5, 12, 16
    maps = Fastfood(3, q, e, generator())
    h = hadamard(width)
    for m, matrix_Eq in enumerate(matrices(maps, q)):
        signs, gains = torch.diag(maps.signs_LW[m]), torch.diag(maps.gains_LW[m])
        permutation = torch.eye(width)[maps.order_LW[m]]
        v = h @ gains @ permutation @ h @ signs
        scale = math.sqrt(width * float((maps.gains_LW[m] ** 2).sum())) * math.sqrt(e / width)
        torch.testing.assert_close(matrix_Eq, (v / scale)[:e, :q], rtol=1e-4, atol=1e-5)
    assert not torch.equal(maps.order_LW[0], maps.order_LW[1])
    assert set(maps.signs_LW.flatten().tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("n_outputs", [16, 12])
def test_with_constant_gains_a_map_is_orthogonal_up_to_its_scale(n_outputs: int) -> None:
    width = 16
    maps = Fastfood(2, width, n_outputs, generator())
    maps.gains_LW.fill_(1.7)
    for matrix_EW in matrices(maps, width):
        gram = matrix_EW @ matrix_EW.T  # the kept rows; with E = W also the Gram matrix of the columns
        torch.testing.assert_close(gram, torch.eye(n_outputs) * width / n_outputs, rtol=1e-4, atol=1e-4)


def test_a_map_keeps_the_length_on_average() -> None:
    maps = Fastfood(4000, 6, 12, generator())
    x = torch.randn(6, generator=generator(1))
    squared = maps(x.expand(4000, 6)).pow(2).sum(1)
    assert abs(squared.mean() / x.pow(2).sum() - 1) < 4 * squared.std() / x.pow(2).sum() / 4000**0.5


def test_a_map_is_as_wide_as_the_larger_of_its_two_sides() -> None:
    assert Fastfood(1, 62, 192, generator()).signs_LW.shape == (1, 256)
    assert Fastfood(1, 300, 192, generator()).signs_LW.shape == (1, 512)
    assert Fastfood(1, 62, 512, generator()).signs_LW.shape == (1, 512)


# --- the estimate ----------------------------------------------------------------------------------------------------


def test_the_mean_of_many_estimates_is_the_gradient_of_a_quadratic() -> None:
    d, n, c = 6, 20_000, 0.3
    a_dd = torch.randn(d, d, generator=generator(1))
    w_d, b_d = torch.randn(d, generator=generator(2)), torch.randn(d, generator=generator(3))

    def quadratic(w_Jd: Tensor) -> Tensor:
        return ((w_Jd @ a_dd) ** 2).sum(1) / 2 + w_Jd @ b_d

    p_nd = directions(n, d, generator(4))
    plus_n, minus_n = quadratic(w_d + c * p_nd), quadratic(w_d - c * p_nd)
    each = torch.stack(
        [estimated_gradient(plus_n[[i]], minus_n[[i]], p_nd[[i]], c) for i in range(n)]  # of one direction
    )
    wanted = a_dd @ a_dd.T @ w_d + b_d
    assert ((each.mean(0) - wanted).abs() < 4 * each.std(0) / n**0.5).all()  # central: no error from c
    assert (each[0] - wanted).norm() > 0.3 * wanted.norm()  # one estimate alone is far off


def test_entries_of_a_direction_keep_away_from_zero_and_have_both_signs() -> None:
    p = directions(200, 30, generator())
    assert p.abs().min() >= 0.5 and p.abs().max() <= 1
    assert abs(p.mean()) < 0.04 and abs(p.abs().mean() - 0.75) < 0.01


# --- the whole step --------------------------------------------------------------------------------------------------


class Oracle:
    """ZIP's step in numpy loops, in float64, from the paper: it shares only the random draws with the method."""

    def __init__(self, method: ZIP) -> None:
        u, sigma, v, h = method.w_d.double().split(method.sizes)
        r = len(sigma)
        self.u, self.sigma, self.v, self.h = u.reshape(-1, r), sigma, v.reshape(-1, r), h
        self.c0, self.maps = method.c0_LE.double(), matrices(method.fastfood, len(h)).double()

    def ctx(self, u: Tensor, sigma: Tensor, v: Tensor, h: Tensor) -> Tensor:
        rows = []
        for token in range(len(u)):
            low_rank = sum(u[token, k] * sigma[k] * v[:, k] for k in range(len(sigma)))
            rows.append(self.c0[token] + self.maps[token] @ (low_rank + h))
        return torch.stack(rows).float()

    def loss(self, parts: list[Tensor], images: ToyImages, labels: Tensor) -> float:
        towers = ToyTowers()
        text_CD = towers.text_features(SoftPrompts(self.ctx(*parts)[None], TOY_NAMES))[0]
        total = 0.0
        for x_D, label in zip(towers.image_features(images.pixels_BX), labels.tolist(), strict=True):
            logits = (towers.logit_scale * (text_CD @ x_D)).double()
            total += float(torch.logsumexp(logits, 0) - logits[label])
        return total / len(labels)

    def step(self, i: int, p_Jd: Tensor, images: ToyImages, labels: Tensor, max_norm: float) -> float:
        """Take step i and return the length of the gradient before clipping."""
        a_i, c_i = 0.01 / (i + 1) ** 0.4, 0.01 / i**0.1
        parts = [self.u, self.sigma, self.v, self.h]
        gradient = [torch.zeros_like(part) for part in parts]
        for p_d in p_Jd.double():
            pieces, at = [], 0
            for part in parts:
                pieces.append(p_d[at : at + part.numel()].view_as(part))
                at += part.numel()
            up = self.loss([x + c_i * p for x, p in zip(parts, pieces, strict=True)], images, labels)
            down = self.loss([x - c_i * p for x, p in zip(parts, pieces, strict=True)], images, labels)
            for g, p in zip(gradient, pieces, strict=True):
                g += (up - down) / (2 * c_i) / p / len(p_Jd)
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradient))
        shrink = max_norm / norm if norm >= max_norm else 1.0
        self.u, self.sigma, self.v, self.h = (x - a_i * shrink * g for x, g in zip(parts, gradient, strict=True))
        return norm


@pytest.mark.parametrize("fresh", [False, True])
def test_four_steps_are_those_of_the_loop(fresh: bool) -> None:
    task, _ = toy_task(fresh_views=fresh)
    method = ZIP(ZIP.Config(n_ctx=2, intrinsic_dim=12, rank=2, batch_size=8))
    box = ToyBox(ZIP.info.access, Remaining(requests=40))
    method.begin(task, box, np.random.default_rng(3))
    oracle, images = Oracle(method), task.train.images
    state = torch.Generator()
    state.set_state(method.generator.get_state())
    clipped, order = [], Tensor()
    for i in range(1, 5):
        p_Jd = directions(5, len(method.w_d), state)
        epoch, batch = divmod(i - 1, 2)  # 20 images: two batches of 8, the last 4 are dropped
        if batch == 0:
            order = torch.randperm(20, generator=state)
        rows_B = order[8 * batch : 8 * batch + 8]
        view = images.views(1, seed=epoch + 1 if fresh else 0)[rows_B]
        d = len(method.w_d)
        clipped.append(oracle.step(i, p_Jd, view, task.train.labels[rows_B], math.sqrt(d)) >= math.sqrt(d))  # type: ignore[arg-type]
        method.step(box)
        wanted = torch.cat([x.flatten() for x in (oracle.u, oracle.sigma, oracle.v, oracle.h)])
        torch.testing.assert_close(method.w_d.double(), wanted, rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(
            method.deployed()["ctx_LE"], oracle.ctx(oracle.u, oracle.sigma, oracle.v, oracle.h), rtol=1e-3, atol=2e-5
        )
    assert box.calls == ["scores"] * 4


def test_a_long_gradient_is_clipped_to_the_root_of_its_length() -> None:
    task, _ = toy_task()
    method, box = ZIP(), ToyBox(ZIP.info.access, Remaining(requests=10))
    method.begin(task, box, np.random.default_rng(0))
    box.towers.logit_scale, before = 20_000.0, method.w_d
    box.logit_scale = 20_000.0
    method.step(box)
    moved = (method.w_d - before).norm() / (0.01 / 2**0.4)
    assert moved == pytest.approx(math.sqrt(417), rel=1e-3)


# --- schedule and start ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_train", "remaining", "steps"),
    [
        (160, Remaining(), 500),
        (160, Remaining(requests=8000), 500),
        (16_000, Remaining(requests=5000, images=640_000), 500),
        (160, Remaining(images=256_000), 200),
        (256, Remaining(images=256_000), 200),
        (160, Remaining(requests=57), 5),
        (160, Remaining(requests=9), 0),
        (160, Remaining(images=1279), 0),
        (20, Remaining(), 500),  # fewer images than one batch
    ],
)
def test_steps_and_bill(n_train: int, remaining: Remaining, steps: int) -> None:
    bill, batch = ZIP().bill(shape(n_train), remaining), min(128, n_train)
    assert (bill.requests, bill.images) == (10 * steps, 10 * batch * steps)
    assert (bill.prompts, bill.outputs) == (100 * steps, 100 * batch * steps)


def test_the_papers_count_is_one_call_a_batch_forward() -> None:
    method = ZIP()
    fit(method, toy_task()[0], ToyBox(ZIP.info.access, Remaining(requests=75)))
    assert method.paper_queries == 70 and method.notes["steps"] == 7


def odd_task() -> FewShotTask:
    task = toy_task()[0]
    return replace(task, classes=replace(task.classes, template="one odd {} drawing."))


def test_it_learns_417_numbers_and_starts_at_random_vectors_on_every_data_set() -> None:
    method = ZIP()
    method.begin(odd_task(), ToyBox(ZIP.info.access), np.random.default_rng(0))
    assert method.classes.soft(method.c0_LE[None]).suffix == "." and method.notes["start"] == "random"
    ctx_LE = method.deployed()["ctx_LE"]
    assert method.trainable_params == 417 and torch.equal(ctx_LE, method.c0_LE)
    assert ctx_LE.shape == (8, ToyTowers.E) and 0.01 < ctx_LE.std() < 0.03


def test_it_can_start_from_the_words_of_the_template() -> None:
    method, box = ZIP(ZIP.Config(n_ctx=0)), ToyBox(ZIP.info.access)
    method.begin(odd_task(), box, np.random.default_rng(0))
    assert torch.equal(method.deployed()["ctx_LE"], box.embed_text("one odd"))
    assert method.trainable_params == 2 * 5 + 5 + 250 * 5 + 250
    assert method.classes.soft(method.c0_LE[None]).suffix == " drawing."
    assert method.notes["start"] == "one odd {} drawing."


def test_the_module_named_zip_hides_no_builtin() -> None:
    # importing methods.zip sets the name `zip` in methods/__init__.py
    tree = ast.parse(Path(str(methods.__file__)).read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "zip"]
