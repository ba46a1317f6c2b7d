"""A tuned method: its search and its fit share one allotment, and nothing but the plan and the scores decides."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from methods.base import (
    Access,
    Bill,
    BlackBox,
    Classes,
    FewShotTask,
    ImageSet,
    Method,
    MethodInfo,
    Plan,
    Remaining,
    TaskShape,
)
from pipeline.blackbox.client import MeteredBox
from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.local_pool import LocalPool
from pipeline.blackbox.request import Request, Response
from pipeline.budget import BUDGETED_PHASES, Limits, Phase, total
from pipeline.commands.plan import plan_table
from pipeline.config.compose import compose
from pipeline.config.method_choice import MethodChoice, method_choice
from pipeline.config.tuning import Tuning
from pipeline.errors import ConfigError
from pipeline.ledger.ledger import Ledger
from pipeline.trials.estimate import estimate
from pipeline.trials.plan import TrialSpec
from pipeline.trials.trial import few_shot_task, run_trial
from pipeline.trials.tuning import Attempt, Scored, Search, candidates, one_pass, rounds
from tests.support.lab import STORAGE, Lab, outcome, plain_bill

SMALL: dict[str, dict[str, Any]] = {
    "bbt": {"popsize": 4, "intrinsic_dim": 6},
    "craft": {"popsize": 4, "intrinsic_dim": 6, "hidden": 8},
    "zip": {"n_directions": 2, "batch_size": 8, "n_ctx": 2, "intrinsic_dim": 8, "rank": 2},
    "taskres": {"epochs": 2},
    "logit_head": {"epochs": 2},
}
"""Settings that make a fit quick."""
SPACES: dict[str, dict[str, list[Any]]] = {
    "bbt": {"sigma": [0.1, 1.0], "popsize": [3, 4, 7]},
    "craft": {"sigma": [0.1, 1.0], "kl_weight": [0.0, 0.1, 1.0]},
    "zip": {"lr": [0.01, 0.1], "n_ctx": [0, 2], "n_directions": [1, 2, 3]},
    "taskres": {"alpha": [0.5, 2.0, 5.0], "lr": [0.002, 0.02]},
    "logit_head": {"kl_weight": [0.0, 0.1, 1.0], "hidden": [4, 8]},
}


def tuned(lab: Lab, method: str, *words: str, **tune: Any) -> TrialSpec:
    """The trial of a tuned method with small settings."""
    file = {"method": method, "config": SMALL[method], "tune": {"space": SPACES[method], **tune}}
    return lab.spec("mine", f"variants={json.dumps({'mine': file})}", *words)


def plain(lab: Lab, method: str, *words: str) -> TrialSpec:
    """The trial of the same method without a search."""
    return lab.spec(method, f"method.{method}={json.dumps(SMALL[method])}", *words)


# --- what is tried -------------------------------------------------------------------------------------------------


def test_a_grid_is_tried_in_order_after_the_methods_own_settings() -> None:
    space = (("a", (1, 2)), ("b", (3, 4)))
    inside = candidates(Tuning(space, "grid", 4, 0.5), {"a": 2, "b": 3}, seed=1)
    assert [tuple(one.values()) for one in inside] == [(2, 3), (1, 3), (1, 4), (2, 4)]
    outside = candidates(Tuning(space, "grid", 5, 0.5), {"a": 9, "b": 3}, seed=1)
    assert [tuple(one.values()) for one in outside] == [(9, 3), (1, 3), (1, 4), (2, 3), (2, 4)]


@settings(deadline=None)
@given(trials=st.integers(1, 13), seed=st.integers(0, 99), own=st.integers(1, 5))
def test_a_random_draw_has_distinct_settings_of_the_space_and_depends_on_the_seed_alone(
    trials: int, seed: int, own: int
) -> None:
    space = (("a", (1, 2, 3, 4)), ("b", (1, 2, 3)))
    assume(trials <= 12 or own == 5)  # 5 is not in the space
    tuning = Tuning(space, "random", trials, 0.5)
    tried = candidates(tuning, {"a": own, "b": 1, "c": 7}, seed)
    assert tried == candidates(tuning, {"a": own, "b": 1, "c": 7}, seed)
    assert tried[0] == {"a": own, "b": 1} and len(tried) == trials
    assert len({tuple(one.values()) for one in tried}) == trials
    assert all(one["a"] in space[0][1] and one["b"] in space[1][1] for one in tried[1:])


def test_a_space_may_have_more_settings_than_memory() -> None:
    space = tuple((f"s{i}", tuple(range(10))) for i in range(15))
    assert len(candidates(Tuning(space, "random", 4, 0.5), {f"s{i}": 0 for i in range(15)}, seed=1)) == 4


def test_halving_halves_until_two_are_left() -> None:
    counts = {n: rounds(Tuning((("a", (1,)),), "halving", n, 0.5)) for n in (1, 2, 3, 4, 5, 8, 9)}
    assert counts == {1: (1,), 2: (2,), 3: (3,), 4: (4, 2), 5: (5, 2), 8: (8, 4, 2), 9: (9, 4, 2)}
    assert rounds(Tuning((("a", (1,)),), "random", 8, 0.5)) == (8,)


def test_the_survivors_of_a_round_get_twice_the_money(lab: Lab) -> None:
    spec = tuned(lab, "logit_head", "budget.requests=480", sampler="halving", trials=6)
    search = Search(spec.choice, TaskShape.of(few_shot_task(spec), 16), spec.allotment, 1)
    assert search.rounds == (6, 3)
    spent = search.one_pass.requests
    limits = [search.limits(Attempt(0, n_round), Bill()).requests for n_round in (0, 1)]
    assert [limit + spent for limit in limits if limit is not None] == [20, 40]  # 480 * 0.5 / 2 rounds / 6 and 3


# --- what is paid --------------------------------------------------------------------------------------------------


@st.composite
def cells(draw: st.DrawFn) -> tuple[str, list[str], dict[str, Any]]:
    """A method, overrides and a `tune`."""
    method = draw(st.sampled_from(sorted(SMALL)))
    requests, images = draw(st.sampled_from([(45, None), (75, 1200), (None, 1200)]))
    seed, shots = draw(st.integers(1, 4)), draw(st.sampled_from([1, 4]))
    words = [
        "eval_shift=false",
        f"seeds={seed}",
        f"shots={shots}",
        *(f"budget.{k}={v or 'null'}" for k, v in (("requests", requests), ("images", images))),
    ]
    sampler = draw(st.sampled_from(["grid", "random", "halving"]))
    share = draw(st.sampled_from([0.35, 0.5, 0.8]))
    trials = None if sampler == "grid" else draw(st.integers(1, 4))
    return method, words, {"sampler": sampler, "share": share, "trials": trials}


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(cell=cells())
def test_the_phases_add_up_to_a_bill_within_the_allotment(
    lab: Lab, cell: tuple[str, list[str], dict[str, Any]]
) -> None:
    method, words, tune = cell
    try:
        spec = tuned(lab, method, *words, **tune)
    except ConfigError as refused:
        assume("pays for no fit" not in str(refused))
        raise
    ledger = Ledger("sqlite://")
    ledger.open_account("ceiling", Limits())
    ledger.reserve(STORAGE, spec.account, ["ceiling"], spec.reserved)
    (row,) = run_trial(spec, LocalPool(lab.pool.endpoint, ledger), STORAGE, lab.store)
    bills = ledger.trial_bill(STORAGE, spec.account)
    assert row.status == "done"
    assert plain_bill(row) == total(bills[phase] for phase in BUDGETED_PHASES)
    assert (bills[Phase.TUNE].requests, bills[Phase.TUNE].images) == (row.tune_requests, row.tune_images)
    assert bills[Phase.REPLAY] == Bill()
    for unit in ("requests", "images"):
        paid, limit = getattr(row, unit), getattr(spec.allotment, unit)
        assert paid <= getattr(spec.predicted, unit)
        assert limit is None or getattr(spec.predicted, unit) <= limit
        assert limit is None or getattr(row, f"tune_{unit}") <= tune["share"] * limit
    tried = json.loads(row.notes)["candidates"]
    assert sum(one["requests"] for one in tried) == row.tune_requests
    assert sum(one["images"] for one in tried) == row.tune_images
    ledger.close()


PREDICT_OTHERWISE = (
    *("zero_shot_ensemble", "cbbt", "gda", "label_map_topk", "vote", "sim", "pixel_nn", "taskres", "zip", "vp_spsa"),
    "clip_lora",
)
"""Methods whose predictions make different calls."""


@pytest.mark.parametrize("method", PREDICT_OTHERWISE)
def test_a_prediction_costs_no_more_than_what_is_set_aside_for_it(lab: Lab, method: str) -> None:
    """The 60 test images, in place of validation images."""
    spec = lab.spec(method, "budget.requests=60", "budget.images=400")
    (row,) = lab.run(spec)
    shape = TaskShape.of(few_shot_task(spec), lab.pool.info.feature_dim)
    most = one_pass(spec.choice.info.access, replace(shape, n_val=row.n_test or 0))
    assert row.status == "done"
    assert row.evaluate_requests <= most.requests and row.evaluate_images <= most.images


# --- what is chosen ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(SMALL))
def test_one_trial_equals_the_plain_method_with_what_is_left(lab: Lab, method: str) -> None:
    (row,) = lab.run(tuned(lab, method, "budget.requests=61", "budget.images=1001", trials=1))
    left = (f"budget.requests={61 - row.tune_requests}", f"budget.images={1001 - row.tune_images}")
    (same,) = lab.run(plain(lab, method, *left))
    assert row.tune_requests > 0 and row.tune_trials == 1
    assert row.predictions_digest == same.predictions_digest
    for phase in ("adapt", "validate"):
        for unit in ("requests", "images", "prompts", "outputs"):
            assert getattr(row, f"{phase}_{unit}") == getattr(same, f"{phase}_{unit}")
    notes = json.loads(row.notes)
    assert notes.pop("candidates")[0]["settings"] == json.loads(row.chosen) and notes.pop("chooser_noise") == 0
    assert notes == json.loads(same.notes)


def test_the_chosen_settings_are_those_of_the_final_fit(lab: Lab) -> None:
    spec = tuned(lab, "bbt", "budget.requests=200", trials=5)
    (row,) = lab.run(spec)
    chosen = json.loads(row.chosen)
    tried = json.loads(row.notes)["candidates"]
    best = max(tried, key=lambda one: one["val_accuracy"])  # of equal ones, the first
    assert chosen == best["settings"] and row.tune_trials == len(tried) == 5
    assert tried[0]["settings"] == {"sigma": 1.0, "popsize": 4}, "the method's own ones"
    settings = [f"method.bbt={json.dumps(SMALL['bbt'] | chosen)}", f"budget.requests={200 - row.tune_requests}"]
    (same,) = lab.run(lab.spec("bbt", *settings))
    assert row.predictions_digest == same.predictions_digest


@dataclass(frozen=True, kw_only=True)
class Known:
    """Settings of a method whose validation accuracy is known."""

    sign: float = -1.0
    fails: bool = False


class Zero(Method):
    """Zero-shot scores times `sign`; `fails` raises as a diverged fit does."""

    Config = Known
    info = MethodInfo("zero", Method, Access.TEXT | Access.SCORES, "", 1, False, "")

    def plan(self, shape: TaskShape, remaining: Remaining) -> Plan:
        return Plan(bill=Bill.scores(1, shape.n_train, shape.n_classes))

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: Plan) -> None:
        self.prompts = task.classes.prompts()
        box.scores(task.train.images, self.prompts)
        if self.config.fails:
            raise FloatingPointError("loss in epoch 1 is nan")

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        return self.config.sign * box.scores(images, self.prompts)[0]


def zero_spec(lab: Lab, space: Mapping[str, tuple[Any, ...]], n: int, *words: str) -> TrialSpec:
    spec = lab.spec("zero_shot", "budget.requests=100", *words)
    tuning = Tuning(tuple(space.items()), "grid", n, 0.5)
    choice = MethodChoice("zero@tuned", replace(Zero.info, cls=Zero), (("fails", False), ("sign", -1.0)), tuning)
    shape = TaskShape.of(few_shot_task(spec), 16)
    predicted = Search(choice, shape, spec.allotment, spec.seed).bound("zero@tuned")
    return replace(spec, choice=choice, predicted=predicted, trial_id="zero")


def test_a_candidate_is_scored_on_the_validation_images_and_the_better_one_chosen(
    lab: Lab, tiny: Endpoint, tmp_path: Path
) -> None:
    lab = Lab(tmp_path / "tiny", tiny, lab.card)
    spec = zero_spec(lab, {"sign": (-1.0, 1.0)}, 2, "model=tiny")
    (row,) = lab.run(spec)
    task = few_shot_task(spec)
    lab.ledger.reserve("other", "t", ["ceiling"], Limits())
    box = MeteredBox(lab.pool, "other", "t", Access.TEXT | Access.SCORES, Limits())
    scores = box.scores(task.val.images, task.classes.prompts())[0]
    accuracies = [100 * float((sign * scores).argmax(1).eq(task.val.labels).double().mean()) for sign in (-1, 1)]
    assert accuracies[1] > accuracies[0]
    assert [one["val_accuracy"] for one in json.loads(row.notes)["candidates"]] == pytest.approx(accuracies, abs=1e-3)
    assert json.loads(row.chosen) == {"sign": 1.0}
    assert row.accuracy == lab.run(lab.spec("zero_shot", "model=tiny"))[0].accuracy
    lab.ledger.close()


def test_a_candidate_that_diverges_is_recorded_and_not_chosen(lab: Lab) -> None:
    (row,) = lab.run(zero_spec(lab, {"fails": (True, False)}, 2))
    own, failed = json.loads(row.notes)["candidates"]
    assert row.status == "done" and json.loads(row.chosen) == {"fails": False} and "error" not in own
    assert (failed["error"], failed["val_accuracy"]) == ("FloatingPointError: loss in epoch 1 is nan", 0)
    assert failed["requests"] == 1, "its fit is paid, a prediction was not made"


def test_a_trial_of_which_every_candidate_diverges_fails(lab: Lab) -> None:
    spec = zero_spec(lab, {"sign": (1.0,)}, 2)
    choice = replace(spec.choice, config=(("fails", True), ("sign", -1.0)))
    with pytest.raises(FloatingPointError, match="loss in epoch 1"):
        lab.run(replace(spec, choice=choice))


HITS = st.lists(st.booleans(), min_size=6, max_size=6).map(tuple)


@settings(deadline=None)
@given(data=st.data(), n=st.integers(1, 9), sampler=st.sampled_from(["random", "halving"]))
def test_the_order_in_which_candidates_finish_changes_nothing(data: st.DataObject, n: int, sampler: str) -> None:
    tuning = Tuning((("popsize", tuple(range(1, 21))),), sampler, n, 0.5)
    choice = MethodChoice("mine", method_choice("bbt", "icons", "default", {}).info, (("popsize", 40),), tuning)
    search = Search(choice, TaskShape(3, 12, 6, 4, 1, False, 1, 8), Limits(1000), seed=1)
    scored: list[Scored] = []
    while (attempt := search.next(scored)) is not None:
        scored.append(Scored(attempt, Bill(requests=1), data.draw(HITS)))
        some = data.draw(st.permutations(scored))
        assert search.next(some) == search.next(scored)
    assert len(scored) == sum(search.rounds)
    shuffled = data.draw(st.permutations(scored))
    assert (search.chosen(shuffled), search.noise(shuffled)) == (search.chosen(scored), search.noise(scored))
    last = [one for one in scored if one.attempt.round == len(search.rounds) - 1]
    assert max(sum(one.hits_M) for one in last) == sum(
        next(one.hits_M for one in last if one.attempt.candidate == search.chosen(scored))
    )


def test_the_choosers_noise_is_the_share_of_draws_that_choose_another(lab: Lab) -> None:
    spec = tuned(lab, "logit_head", "budget.requests=200", trials=3)
    search = Search(spec.choice, TaskShape.of(few_shot_task(spec), 16), spec.allotment, 1)

    def noise(*hits: tuple[bool, ...]) -> float:
        return search.noise([Scored(Attempt(i, 0), Bill(), one) for i, one in enumerate(hits)])

    right, wrong = (True,) * 4, (False,) * 4
    assert noise(right, wrong, wrong) == 0 and noise(wrong, right, wrong) == 0
    assert noise(right, right, right) == 0, "of equal ones, the first is chosen"
    # The second is chosen unless no draw of its only image is among the four, in which case all are equal.
    assert noise(wrong, (True, False, False, False), wrong) == pytest.approx(0.75**4, abs=0.04)


# --- what it may see -----------------------------------------------------------------------------------------------


class Watching(LocalPool):
    """A pool that notes phase and split of every image that is requested."""

    def send(self, request: Request) -> Response:
        if request.images is not None:
            self.seen.add((request.charge.phase, request.images.split))
        return super().send(request)


def test_no_test_image_is_in_reach_of_the_search(lab: Lab) -> None:
    pool = Watching(lab.pool.endpoint, lab.ledger)
    pool.seen = set()
    lab.pool = pool
    (row,) = lab.run(tuned(lab, "craft", "budget.requests=100", "curve=2", trials=3))
    splits = {phase: {split for p, split in pool.seen if p is phase} for phase in Phase}
    assert splits[Phase.TUNE] == {"train", "val"} and splits[Phase.ADAPT] == {"train"}
    assert splits[Phase.EVALUATE] == splits[Phase.CURVE] == {"test"} and not splits[Phase.VALIDATE]
    points = json.loads(row.curve)
    assert len(points) == 2 and points[0][0] > row.tune_requests and points[-1][0] == row.requests


def test_a_method_that_validates_itself_is_billed_to_tune_in_the_search(lab: Lab) -> None:
    file = {"method": "linear_probe", "tune": {"space": {"max_iter": [10, 1000]}}}
    words = ["budget.requests=40", f"variants={json.dumps({'mine': file})}"]
    (row,) = lab.run(lab.spec("mine", *words))
    assert row.validate_requests == 1 and row.tune_images >= 2 * (row.validate_images + row.adapt_images)


# --- killed and continued ------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What a kill -9 looks like from inside."""


class Dying(LocalPool):
    """A pool whose process dies once at each call: before it is charged, or after, with its answer lost."""

    def send(self, request: Request) -> Response:
        name = request.charge.id
        died, self.died = name in self.died, self.died | {name}
        if not died and self.before:
            raise Killed(name)
        response = super().send(request)
        if not died:
            raise Killed(name)
        return response


@pytest.mark.parametrize("checkpoint_s", [0.0, 1e6])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(("method", "sampler"), [("craft", "halving"), ("taskres", "random")])
def test_kills_in_the_search_change_nothing(
    lab: Lab, fake: Endpoint, tmp_path: Path, method: str, sampler: str, before: bool, checkpoint_s: float
) -> None:
    spec = tuned(lab, method, "budget.requests=130", sampler=sampler, trials=4)
    straight = Lab(tmp_path / "straight", fake, lab.card)
    wanted = straight.run(spec)
    pool = Dying(fake, lab.ledger)
    pool.died, pool.before = frozenset(), before
    lab.reserve(spec)
    rows, deaths = None, -1
    while rows is None:
        deaths += 1
        with contextlib.suppress(Killed):
            rows = run_trial(spec, pool, STORAGE, lab.store, checkpoint_s)
    lab.ledger.release(STORAGE, spec.account)
    assert deaths == len(straight.ledger.charges(STORAGE, spec.account))
    assert [outcome(row) for row in rows] == [outcome(row) for row in wanted]
    assert lab.bills(spec) == straight.bills(spec) and lab.bills(spec)[Phase.REPLAY] == Bill()
    straight.ledger.close()


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "tune", "message"),
    [
        (
            ["budget.requests=null"],
            {},
            "a search spends a share of the allotment: set budget.requests or budget.images",
        ),
        (["validation=none"], {}, "a search needs validation images: leave validation=none out"),
        (
            ["budget.requests=40"],
            {"trials": 5},
            "mine on small, 4 shots, 40 requests: a candidate gets 4 requests, with 3 requests and 60 images set aside "
            "for validation; the rest pays for no fit: raise the budget, or change method.mine.tune.trials (now 5) or "
            "method.mine.tune.share (now 0.5)",
        ),
        (
            ["budget.requests=22"],
            {"share": 0.9, "trials": 1},
            "its search may take 19 requests and 380 images; the rest",
        ),
        (["budget.requests=300", "budget.images=700"], {"trials": 5}, "a candidate gets 30 requests and 70 images"),
    ],
)
def test_a_search_that_cannot_be_paid_is_refused_in_the_plan(
    lab: Lab, words: list[str], tune: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        tuned(lab, "bbt", "budget.requests=300", *words, **tune)
    assert message in str(refused.value)


def test_a_tuned_trial_has_an_id_of_its_own_which_covers_its_search(lab: Lab) -> None:
    words = ("budget.requests=200",)
    ids = [
        plain(lab, "bbt", *words).trial_id,
        *(
            tuned(lab, "bbt", *words, trials=3, **tune).trial_id
            for tune in ({}, {"share": 0.4}, {"sampler": "halving"})
        ),
        tuned(lab, "bbt", *words, trials=4).trial_id,
    ]
    assert len(set(ids)) == len(ids)
    assert tuned(lab, "bbt", *words, trials=3, share=0.5).trial_id == ids[1]


def test_the_bill_of_a_tuned_method_is_called_a_bound(lab: Lab) -> None:
    file = {"method": "bbt", "tune": {"space": {"sigma": [0.1, 1.0]}}}
    plan = lab.plan("methods=[mine]", f"variants={json.dumps({'mine': file})}", "budget.requests=300")
    (note,) = plan.notes
    assert note == "mine: tries 2 settings (sampler random) with 0.5 of its allotment; its bill is an upper bound"


def test_a_sweep_plans_default_paper_and_tuned_where_the_paper_has_settings() -> None:
    planned = estimate(compose(["sweep=tuned", "datasets=icons,eurosat", "seeds=1", "methods=craft,craft@tuned"]))
    assert [(t.cell.dataset.name, t.cell.choice.name, t.cell.hparams) for t in planned.trials] == [
        ("icons", "craft", "default"),
        ("eurosat", "craft", "default"),
        ("eurosat", "craft", "paper"),
        ("icons", "craft@tuned", "default"),
        ("eurosat", "craft@tuned", "default"),
    ]
    assert "craft hparams=paper" in plan_table(planned)
    assert [record["hparams"] for record in planned.records()][1:3] == ["default", "paper"]
