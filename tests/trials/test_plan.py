"""The plan: ids name what a cell is and nothing else, bills are predicted exactly, and nothing unpayable starts."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from methods import all_methods
from methods.base import REGISTRY, Access, Bill, MethodInfo
from pipeline.blackbox.endpoint import Endpoint
from pipeline.budget import total
from pipeline.config.compose import compose
from pipeline.errors import BudgetExceeded, ConfigError, DataError
from pipeline.source_code import method_digest
from pipeline.trials import plan as planning
from pipeline.trials.estimate import estimate
from pipeline.trials.plan import TrialSpec, refuse_unpayable
from tests.support.lab import Lab, outcome, plain_bill

# --- trial ids -----------------------------------------------------------------------------------------------------


def ids(lab: Lab, *words: str) -> list[str]:
    return [trial.trial_id for trial in lab.plan("methods=[taskres]", *words).trials]


def test_an_id_does_not_depend_on_sweep_storage_or_order(lab: Lab, tmp_path: Path) -> None:
    (wanted,) = ids(lab)
    assert ids(lab) == [wanted]
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: fake\nbudget: {requests: 300}\n")
    for words in (
        [f"sweep={mine}"],
        [f"storage={tmp_path / 'elsewhere'}"],
        [
            "label=something",
            "checkpoint_s=1",
            "threads=2",
            "concurrency=3",
            "on_code_change=keep",
            "budget.sweep.requests=9999",
        ],
        ["method.taskres.alpha=0.5"],  # its default
        ["answers=logits"],
    ):
        assert ids(lab, *words) == [wanted], words
    assert wanted in ids(lab, "seeds=[3,2,1]", "shots=[2,4]", "methods=[zero_shot,taskres]", "budget.requests=[9,300]")


@pytest.mark.parametrize(
    "words",
    [
        ["seeds=2"],
        ["shots=2"],
        ["draw=imbalanced"],
        ["views=3"],
        ["views=fresh"],
        ["validation=none"],
        ["validation=full"],
        ["curve=2"],
        ["answers={noise: 0.1}"],
        ["answers={features: int8}"],
        ["budget.requests=301"],
        ["budget.requests=null"],
        ["budget.images=9999"],
        ["method.taskres.alpha=0.25"],
        ["methods=[logit_head]"],
        ["model=tiny"],
        ["datasets=[digits]"],
    ],
    ids=" ".join,
)
def test_every_part_of_a_cell_changes_the_id(lab: Lab, words: list[str]) -> None:
    assert ids(lab, *words) != ids(lab)


@pytest.mark.parametrize("line", ['template: "the {}"', 'templates: ["{}"]', "augment: crop"])
def test_the_text_of_a_data_card_changes_the_id(lab: Lab, tmp_path: Path, line: str) -> None:
    key = line.split(":")[0]
    kept = "".join(text for text in lab.card.read_text().splitlines(keepends=True) if not text.startswith((key, "-")))
    other = tmp_path / lab.card.name
    other.write_text(kept.replace("templates:\n", "") + line + "\n")
    assert ids(lab, f"datasets=[{other}]") != ids(lab)


def test_the_methods_version_the_precision_and_the_rules_change_the_id(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = set(ids(lab))
    half = tmp_path / "fake.yaml"
    half.write_text("kind: fake\nprecision: bf16\n")
    seen |= set(ids(lab, f"model={half}"))
    monkeypatch.setattr(planning, "_RULES", -1)
    seen |= set(ids(lab))
    info = REGISTRY["taskres"]
    monkeypatch.setitem(REGISTRY, "taskres", MethodInfo(*(99 if f == "version" else v for f, v in vars(info).items())))
    seen |= set(ids(lab))
    assert len(seen) == 4


def test_the_cards_text_norm_changes_the_ids_of_the_methods_that_use_it_and_of_no_others(
    lab: Lab, tmp_path: Path
) -> None:
    def ids_with(line: str) -> dict[str, str]:
        (tmp_path / "fake.yaml").write_text(f"kind: fake\ngrant: SOFT+PIXELS+FEATURES+GRADIENTS+LORA\n{line}\n")
        names = "methods=[" + ",".join(sorted(all_methods())) + "]"
        trials = lab.plan(names, f"model={tmp_path / 'fake.yaml'}", "shots=[4]", "seeds=[1]").trials
        return {trial.choice.name: trial.trial_id for trial in trials}

    silent, stated, other = ids_with(""), ids_with("text_norm: 4.33"), ids_with("text_norm: 9")
    assert set(silent) == set(all_methods())
    using = {name for name, info in all_methods().items() if info.uses_text_norm}
    assert using and {name for name in silent if silent[name] != stated[name]} == using
    assert {name for name in silent if stated[name] != other[name]} == using


def test_shift_sets_are_part_of_the_cell(lab: Lab) -> None:
    with_shift, without = (
        lab.plan("methods=[zero_shot]", "datasets=[icons]", f"eval_shift={s}") for s in ("true", "false")
    )
    assert [(t.kind, t.name) for t in with_shift.trials[0].eval_sets] == [
        ("source", "icons"),
        ("shift", "icons_outline"),
    ]
    assert [(t.kind, t.name) for t in without.trials[0].eval_sets] == [("source", "icons")]
    assert with_shift.trials[0].trial_id != without.trials[0].trial_id
    assert estimate(with_shift.config).records()[0]["test_sets"] == ["icons", "icons_outline"]
    listed = lab.plan("methods=[zero_shot]", "datasets=[icons]", "eval_shift=[icons_outline]")
    assert listed.trials[0].trial_id == with_shift.trials[0].trial_id, "however it was said"


# --- expansion -----------------------------------------------------------------------------------------------------


def test_a_sweep_is_every_combination_in_a_fixed_order(lab: Lab) -> None:
    trials = lab.plan("methods=[zero_shot,taskres]", "shots=[1,2]", "seeds=[1,2]", "budget.requests=[10,20]").trials
    assert len(trials) == len({t.trial_id for t in trials}) == 16
    assert [t.allotment.requests for t in trials] == [10] * 8 + [20] * 8
    assert [(t.choice.name, t.shots, t.seed) for t in trials[:8]] == [
        (m, k, s) for m in ("zero_shot", "taskres") for k in (1, 2) for s in (1, 2)
    ]
    assert trials[0].name == "zero_shot on small, 1 shots, seed 1, 10 requests"


def test_a_method_that_the_model_does_not_grant_is_listed_and_not_planned(lab: Lab, tmp_path: Path) -> None:
    scores_only = tmp_path / "closed.yaml"
    scores_only.write_text("kind: fake\ngrant: TEXT+SCORES\n")
    everything = f"methods=[{','.join(all_methods())}]"
    plan = lab.plan(everything, f"model={scores_only}")
    able = {n for n, info in all_methods().items() if (Access.TEXT | Access.SCORES).covers(info.access)}
    assert {t.choice.name for t in plan.trials} == able
    assert {"zero_shot", "logit_head", "pixel_nn"} <= able
    assert {name for name, _ in plan.unable} == set(all_methods()) - able
    assert dict(plan.unable)["craft"] == "needs SOFT+SCORES, closed grants TEXT+SCORES"
    with pytest.raises(ConfigError, match="nothing can run: craft needs SOFT"):
        lab.plan("methods=[craft]", f"model={scores_only}")


def test_an_impossible_draw_is_refused_before_any_request(lab: Lab) -> None:
    with pytest.raises(
        DataError, match=r"9 train images a class requested from 'small', but class '.*' has 8: set shots to 8"
    ):
        lab.plan("shots=[1,9]")


# --- predicted bills -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(all_methods()))
def test_the_predicted_bill_is_the_bill(lab: Lab, method: str) -> None:
    spec = lab.spec(method)
    (row,) = lab.run(spec)
    assert (row.status, row.error) == ("done", None)
    assert plain_bill(row) == spec.predicted == lab.paid(spec)
    assert row.requests <= 300 and row.replay_requests == 0
    assert row.evaluate_images % 60 == 0


@pytest.mark.parametrize("method", ["craft", "cbbt", "tip_adapter_f", "linear_probe"])
def test_the_predicted_bill_is_the_bill_with_fresh_views_few_images_and_no_validation(lab: Lab, method: str) -> None:
    words = ["views=fresh", "shots=1", "validation=none", "budget.requests=100", "budget.images=250"]
    spec = lab.spec(method, *words)
    (row,) = lab.run(spec)
    assert row.status == "done"
    assert plain_bill(row) == spec.predicted
    assert row.images <= 250 and row.validate_requests == 0


def test_predicting_a_bill_sends_no_request(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a plan must not compute")

    monkeypatch.setattr(Endpoint, "compute", refuse)
    plan = lab.plan(f"methods=[{','.join(all_methods())}]")
    assert plan.total.requests == sum(t.predicted.requests for t in plan.trials) > 0


def test_the_json_plan_has_the_bill_of_each_trial(lab: Lab) -> None:
    spec = lab.spec("taskres")
    (record,) = estimate(compose([*lab.words, "methods=[taskres]"])).records()
    assert record["trial_id"] == spec.trial_id
    assert record["predicted_requests"] == spec.predicted.requests and record["predicted_outputs"] > 0
    assert (record["method"], record["dataset"], record["budget_requests"]) == ("taskres", "small", 300)


# --- ceilings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ceiling", "account"), [("budget.sweep", "the sweep"), ("budget.global", "global budget 'team'")]
)
@pytest.mark.parametrize("unit", ["requests", "images"])
def test_a_sweep_that_the_ceiling_cannot_pay_is_refused_to_the_last_unit(
    lab: Lab, ceiling: str, account: str, unit: str
) -> None:
    words = ["methods=[taskres,logit_head]", "seeds=[1,2]", "budget.global.name=team"]
    needed = getattr(lab.plan(*words).total, unit)
    payable = lab.plan(*words, f"{ceiling}.{unit}={needed}")
    refuse_unpayable(payable.config, payable.total)
    short = lab.plan(*words, f"{ceiling}.{unit}={needed - 1}")
    with pytest.raises(BudgetExceeded) as refused:
        refuse_unpayable(short.config, short.total)
    error = refused.value
    assert (error.account, error.unit, error.asked, error.limit) == (account, unit, needed, needed - 1)
    refuse_unpayable(
        short.config, total(t.predicted for t in short.trials[:-1])
    )  # what is done already need not be paid again


def test_the_predicted_bill_is_reserved(lab: Lab) -> None:
    spec = lab.spec("taskres")
    lab.reserve(spec)
    (account,) = lab.ledger.accounts()
    assert account.reserved == Bill(spec.predicted.requests, spec.predicted.images)
    lab.ledger.release("lab", spec.account)


# --- the digest of a method's code ---------------------------------------------------------------------------------


def load(path: Path, monkeypatch: pytest.MonkeyPatch) -> MethodInfo:
    spec = importlib.util.spec_from_file_location("mine_of_this_test", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    spec.loader.exec_module(module)
    return MethodInfo(path.stem, module.Mine, Access.TEXT, "", 1, False, "")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder like methods/: `mine` imports `helper`, which imports `deeper`; `base` is the interface."""
    folder = tmp_path / "methods"
    folder.mkdir()
    for name in ("helper", "deeper", "base", "stranger"):
        (folder / f"{name}.py").write_text("X = 1\n")
    (folder / "helper.py").write_text("from methods import deeper\n")
    return folder


@pytest.mark.parametrize(
    "how",
    [
        "from methods.helper import X",
        "from methods import helper",
        "import methods.helper",
        "from . import helper",
        "from .helper import X",
    ],
)
def test_the_digest_covers_a_method_and_all_that_it_imports(
    package: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr("pipeline.source_code.ROOT", package.parent)
    mine = package / "mine.py"
    mine.write_text(f"import methods.base\n\n\nclass Mine:\n    def later(self):\n        {how}\n")
    info = load(mine, monkeypatch)
    fresh = method_digest.__wrapped__
    first = fresh(info)
    for part, counts in (("mine", True), ("helper", True), ("deeper", True), ("base", False), ("stranger", False)):
        before = (package / f"{part}.py").read_text()
        (package / f"{part}.py").write_text(before + "# changed\n")
        assert (fresh(info) != first) == counts, part
        (package / f"{part}.py").write_text(before)
    assert fresh(info) == first


def test_methods_of_other_files_have_other_digests() -> None:
    digests = {name: method_digest(info) for name, info in all_methods().items()}
    assert digests["zero_shot"] == digests["zero_shot_ensemble"], "one file"
    assert len(set(digests.values())) == len({info.cls.__module__ for info in all_methods().values()})


def test_a_rerun_by_other_code_has_the_same_trial_id_and_another_ledger_key(lab: Lab) -> None:
    spec = lab.spec("taskres")
    other = TrialSpec(**{**vars(spec), "method_digest": "0" * 16})
    assert spec.trial_id == other.trial_id and spec.account != other.account
    first, second = lab.run(spec), lab.run(other)
    a, b = outcome(first[0]), outcome(second[0])
    assert a.pop("method_digest") != b.pop("method_digest")
    assert a == b
    assert lab.paid(spec) == lab.paid(other) == spec.predicted


def test_a_data_set_under_two_names_is_reported(lab: Lab, tmp_path: Path) -> None:
    copy = tmp_path / "copy.yaml"
    copy.write_text(lab.card.read_text())
    plan = lab.plan("methods=[zero_shot]", f"datasets=[{lab.card},{copy}]")
    assert plan.notes == ("note: data sets 'small' and 'copy' have the same content under different names",)
    assert not lab.plan("methods=[zero_shot]").notes
