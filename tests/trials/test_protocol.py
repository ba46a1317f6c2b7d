"""Protocols: what a fit is given, what it is scored on, which images and classes those are; who reads test labels."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch

import pipeline
from methods import all_methods
from methods.base import Bill, FewShotTask, ImageSet, TaskShape
from pipeline.config.card_files import dataset_card
from pipeline.config.compose import compose
from pipeline.data.dataset import Dataset, source_of
from pipeline.data.source import Source
from pipeline.errors import ConfigError, DataError
from pipeline.trials import plan as planning
from pipeline.trials import protocol
from pipeline.trials.plan import make_plan
from pipeline.trials.protocol import within
from pipeline.trials.trial import few_shot_task
from tests.support.lab import Lab, plain_bill, write_card, write_source
from tests.support.synthetic import report_of

ABLE = sorted(name for name, info in all_methods().items() if info.new_classes)


# --- base to new ---------------------------------------------------------------------------------------------------


def halves(lab: Lab, method: str, *words: str) -> Any:
    return lab.spec(method, "protocol=base_to_new", *words)


def test_the_first_half_rounded_up_is_base_and_the_rest_is_new(lab: Lab) -> None:
    spec = halves(lab, "zero_shot")
    source = spec.dataset.source
    base, new = spec.eval_sets
    assert (base.name, new.name) == ("small:base", "small:new")
    assert base.classes.names + new.classes.names == source.classnames
    assert (len(base.classes), len(new.classes)) == (3, 2)
    assert (base.classes.template, new.classes.templates) == (spec.dataset.card.template, spec.dataset.card.templates)
    test = source.rows_of("test")
    assert base.rows.tolist() == [r for r in test if source.labels[r] < 3]
    assert new.rows.tolist() == [r for r in test if source.labels[r] >= 3]
    assert few_shot_task(spec).classes == base.classes


def test_the_shots_are_drawn_over_all_classes_before_half_of_them_is_kept(lab: Lab) -> None:
    everything, half = lab.spec("zero_shot"), halves(lab, "zero_shot")
    labels = half.dataset.source.labels
    for part in ("train", "val"):
        drawn = getattr(everything.split, part)
        assert getattr(half.split, part) == tuple(row for row in drawn if labels[row] < 3)
    task = few_shot_task(half)
    assert torch.bincount(task.train.labels).tolist() == [4, 4, 4] == torch.bincount(task.val.labels).tolist()
    assert half.split_digest != everything.split_digest and half.trial_id != everything.trial_id


def test_a_base_to_new_trial_is_one_fit_with_a_row_for_each_half(lab: Lab) -> None:
    spec = halves(lab, "cbbt_prompt")
    base, new = lab.run(spec)
    assert [(r.kind, r.test_set, r.n_test, r.n_classes) for r in (base, new)] == [
        ("base", "small:base", 36, 3),
        ("new", "small:new", 24, 2),
    ]
    assert base.status == new.status == "done"
    assert plain_bill(base) == plain_bill(new) == spec.predicted == lab.paid(spec)
    assert (base.evaluate_images, new.evaluate_images) == (36, 24) and base.evaluate_prompts == 3
    assert base.labels_used == 12 + 12 and base.split_digest == spec.split_digest
    for row in (base, new):
        kept = lab.store.read_predictions(row.trial_id, row.test_set, row.predictions_digest)
        assert set(kept.labels) == set(range(row.n_classes or 0)) and kept.logits_BC.shape == (
            row.n_test,
            row.n_classes,
        )
        assert row.accuracy == pytest.approx(100 * float((kept.predicted == kept.labels).mean()))


def test_zero_shot_on_each_half_is_zero_shot_on_all_with_the_other_columns_left_out(lab: Lab) -> None:
    (whole,), rows = lab.run(lab.spec("zero_shot")), lab.run(halves(lab, "zero_shot"))
    kept = lab.store.read_predictions(whole.trial_id, "small")
    for row, columns in zip(rows, (slice(0, 3), slice(3, 5)), strict=True):
        half = lab.store.read_predictions(row.trial_id, row.test_set)
        mine = np.isin(kept.image_keys, half.image_keys)
        np.testing.assert_allclose(half.logits_BC, kept.logits_BC[mine][:, columns], rtol=1e-4, atol=1e-4)
        assert half.labels.tolist() == (kept.labels[mine] - columns.start).tolist()


def test_methods_that_cannot_predict_new_classes_are_listed_with_the_reason(lab: Lab) -> None:
    for words in (["protocol=base_to_new"], ["transfer=[digits]"]):
        plan = lab.plan(f"methods=[{','.join(all_methods())}]", *words)
        assert {t.choice.name for t in plan.trials} == set(ABLE) >= {"zero_shot", "bbt", "cbbt_prompt", "cbbt"}
        reasons = dict(plan.unable)
        assert set(reasons) == set(all_methods()) - set(ABLE)
        asked = words[0].split("=[")[0]
        assert reasons["craft"] == f"cannot predict classes that it was not fitted on, which {asked} asks for"
    with pytest.raises(ConfigError, match="nothing can run: craft cannot predict classes"):
        lab.plan("methods=[craft]", "protocol=base_to_new")


def test_a_data_set_without_test_images_of_one_half_is_refused(tmp_path: Path, lab: Lab) -> None:
    card = mixed(tmp_path, "halfless", [0, 1, 2, 3], tested=[0, 1])
    with pytest.raises(DataError, match="data set 'halfless' has no test image of new classes: it cannot be halved"):
        lab.plan("methods=[zero_shot]", "protocol=base_to_new", f"datasets=[{card}]", "shots=1")


# --- test sets of other data ---------------------------------------------------------------------------------------


def mixed(folder: Path, name: str, order: Sequence[int], tested: Sequence[int] | None = None, **changes: Any) -> Path:
    """The card of a set of icons with these of its classes, in this order: 4 train, 4 val and 6 test images each."""
    icons = source_of(dataset_card("icons"))
    wanted = {"train": 4, "val": 4, "test": 6}
    rows = [
        (row, label, split)
        for split, n in wanted.items()
        for label, original in enumerate(order)
        for row in [r for r in icons.rows_of(split).tolist() if icons.labels[r] == original][:n]
        if split != "test" or tested is None or label in tested
    ]
    source = write_source(
        folder / f"{name}.parquet",
        [icons.image_bytes(row) for row, _, _ in rows],
        [label for _, label, _ in rows],
        [split for _, _, split in rows],
        [icons.classnames[c] for c in order],
    )
    sizes = {split: sum(s == split for _, _, s in rows) for split in wanted}
    return write_card(folder, source, name=name, classes=len(order), **sizes, **changes)


def test_a_shift_set_of_some_classes_in_another_order_is_scored_on_their_columns(lab: Lab, tmp_path: Path) -> None:
    # the lab's set has the icons 0 to 4: as its own shift, three of them in another order
    card = mixed(tmp_path, "some", [4, 0, 2], shift_of="small")
    spec = lab.spec("logit_head", f"eval_shift=[{card}]")
    _, shift = spec.eval_sets
    assert (shift.kind, shift.name, list(shift.columns or ())) == ("shift", "some", [4, 0, 2])
    whole, some = lab.run(spec)
    assert (some.kind, some.n_test, some.n_classes, some.dataset) == ("shift", 18, 3, "small")
    seen, kept = (lab.store.read_predictions(spec.trial_id, r.test_set) for r in (whole, some))
    both = [key for key in seen.image_keys if key in set(kept.image_keys)]
    assert len(both) == 18, "the first six test images of a class are in both sets"
    for key in both:
        i, j = seen.image_keys.index(key), kept.image_keys.index(key)
        np.testing.assert_allclose(kept.logits_BC[j], seen.logits_BC[i][[4, 0, 2]], rtol=1e-4, atol=1e-4)
        assert [4, 0, 2][kept.labels[j]] == seen.labels[i]
    assert some.evaluate_prompts == 5, "the fitted classes are asked about, then three columns are kept"


def test_a_shift_set_with_a_foreign_class_is_refused_by_name(lab: Lab, tmp_path: Path) -> None:
    card = mixed(tmp_path, "foreign", [0, 7], shift_of="small")
    name = source_of(dataset_card("icons")).classnames[7]
    with pytest.raises(DataError, match=f"'foreign' has other classes than 'small', .* '{name}' is not among them"):
        lab.plan("methods=[zero_shot]", f"eval_shift=[{card}]")


class Named(NamedTuple):
    """What the columns of a shift set depend on."""

    class_ids: tuple[str, ...]
    classnames: tuple[str, ...]
    digest: str = ""


def dataset(name: str, source: Named) -> Dataset:
    """A data set with these classes."""
    card = dataclasses.replace(dataset_card(name), classes=len(source.class_ids))
    return Dataset.of(card, cast(Source, source))


WORDS = Named(("cat", "tabby_cat", "dog"), ("cat", "tabby cat", "dog"))
NUMBERS = Named(("0", "1", "2"), ("cat", "tabby cat", "dog"))
WNIDS = Named(("n1", "n2", "n3"), ("crane", "crane", "dog"))


@pytest.mark.parametrize(
    ("own", "other", "wanted"),
    [
        (WORDS, WORDS, [0, 1, 2]),
        (WORDS, Named(("dog", "cat"), ("dog", "cat")), [2, 0]),
        (WORDS, Named(("dog", "cat"), ("puppy", "kitten")), [2, 0]),
        (WORDS, Named(("Dog", "Tabby Cat"), ("Dog", "Tabby Cat")), [2, 1]),
        (WORDS, Named(("0", "1"), ("dog", "cat")), [2, 0]),
        (NUMBERS, Named(("dog", "cat"), ("dog", "cat")), [2, 0]),
        (NUMBERS, NUMBERS, [0, 1, 2]),
        (NUMBERS, Named(("0", "1"), ("dog", "cat")), [2, 0]),
        (WNIDS, Named(("n3", "n2"), ("dog", "crane")), [2, 1]),
    ],
)
def test_shift_classes_are_found_by_id_and_else_by_name(own: Named, other: Named, wanted: list[int]) -> None:
    assert list(protocol.fitted_columns(dataset("icons", own), dataset("icons_outline", other))) == wanted


@pytest.mark.parametrize(
    ("own", "other", "foreign"),
    [
        (NUMBERS, Named(("0", "1"), ("cat", "lion")), "'1' ('lion') is not among them"),
        (NUMBERS, Named(("0", "3"), ("cat", "lion")), "'3' ('lion') is not among them"),
        (NUMBERS, Named(("0", "1"), ("0", "1")), "'0' is not among them"),
        (WORDS, Named(("dog", "cat"), ("cat", "dog")), "'dog' ('cat') is not among them"),
        (WNIDS, Named(("crane",), ("crane",)), "'crane' is not among them"),
        (WORDS, Named(("Cat", "cat "), ("Cat", "cat ")), "has two classes that are one class of 'icons'"),
    ],
)
def test_shift_classes_whose_meaning_is_not_certain_are_refused(own: Named, other: Named, foreign: str) -> None:
    with pytest.raises(DataError) as caught:
        protocol.fitted_columns(dataset("icons", own), dataset("icons_outline", other))
    assert foreign in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval_shift=[digits]"], r"eval_shift: 'digits' is no shift of icons: use transfer=digits"),
        (["eval_shift=[emoji_contrast]"], r"eval_shift: 'emoji_contrast' is no shift of icons: use datasets=emoji"),
        (["eval_shift=[icons_outlin]"], "no dataset named 'icons_outlin'; did you mean 'icons_outline'"),
        (["transfer=[digit]"], "no dataset named 'digit'; did you mean 'digits'"),
        (
            ["protocol=base_to_new", "eval_shift=[icons_outline]"],
            "eval_shift: protocol=base_to_new scores base",
        ),
        (["protocol=base_to_new", "transfer=[digits]"], "transfer: protocol=base_to_new scores base and new classes"),
    ],
)
def test_what_cannot_be_scored_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(compose(["sweep=smoke", "datasets=[icons]", "methods=[zero_shot]", *words]))


def test_eval_sets_are_all_shifts_none_or_the_listed_ones(lab: Lab) -> None:
    def tested(*words: str) -> list[tuple[str, str]]:
        plan = lab.plan("methods=[zero_shot]", "datasets=[icons,emoji]", *words)
        return [(t.kind, t.name) for spec in plan.trials for t in spec.eval_sets if t.kind != "source"]

    assert tested() == [("shift", "icons_outline"), ("shift", "emoji_contrast")]
    assert tested("eval_shift=false") == []
    assert tested("eval_shift=[emoji_contrast]") == [("shift", "emoji_contrast")]
    assert tested("eval_shift=false", "transfer=[emoji,digits]") == [
        *(("transfer", "emoji"), ("transfer", "digits")),  # of icons
        ("transfer", "digits"),  # of emoji, which is no transfer set of itself
    ]


def test_a_transfer_set_is_predicted_under_its_own_classes_and_template(lab: Lab, tmp_path: Path) -> None:
    other = mixed(tmp_path, "other", [7, 9], template="a drawing of a {}", templates=["{}"])
    rows = {m: lab.run(lab.spec(m, f"transfer=[{other}]")) for m in ("zero_shot", "bbt")}
    for method, (source, transfer) in rows.items():
        assert (source.kind, transfer.kind, transfer.test_set) == ("source", "transfer", "other"), method
        assert (transfer.dataset, transfer.n_classes, transfer.n_test) == ("small", 2, 12)
    (alone,) = lab.run(lab.spec("zero_shot", f"datasets=[{other}]", "shots=1"))
    here, there = (lab.store.read_predictions(r.trial_id, "other") for r in (alone, rows["zero_shot"][1]))
    np.testing.assert_allclose(here.logits_BC, there.logits_BC, rtol=1e-4, atol=1e-4)
    changed = mixed(tmp_path / "..", "other", [7, 9], template="a sketch of a {}", templates=["{}"])
    ids = {lab.spec("zero_shot", *words).trial_id for words in ([], [f"transfer=[{other}]"], [f"transfer=[{changed}]"])}
    assert len(ids) == 3


def test_the_digest_of_a_test_set_covers_the_names_and_templates_given_to_predict(lab: Lab, tmp_path: Path) -> None:
    card = mixed(tmp_path, "other", [4, 0, 2], shift_of="small")

    def digests() -> tuple[str, str]:
        shift = lab.spec("zero_shot", f"eval_shift=[{card}]").eval_sets[-1]
        transfer = lab.spec("zero_shot", "eval_shift=false", f"transfer=[{card}]").eval_sets[-1]
        assert (shift.kind, transfer.kind) == ("shift", "transfer")
        return shift.digest, transfer.digest

    shift, transfer = digests()
    card.write_text(card.read_text().replace("an icon of a {}.", "a sign of a {}.", 1))
    assert digests()[0] == shift != transfer != digests()[1]


def test_protocols_have_separate_sections(lab: Lab) -> None:
    rows = [
        *lab.run(lab.spec("zero_shot", "datasets=[icons]", "transfer=[digits]", "shots=1")),
        *lab.run(lab.spec("zero_shot", "datasets=[icons]", "protocol=base_to_new", "shots=1")),
    ]
    table = report_of(rows).board.to_pylist()
    assert {r["kind"]: r["datasets"] for r in table} == dict.fromkeys(
        ["source", "shift", "transfer", "base", "new", "harmonic"], 1
    )


# --- what a card alone can plan ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [[], ["protocol=base_to_new"], ["validation=none"], ["views=fresh"], ["draw=imbalanced"]], ids=" ".join
)
def test_bills_are_predicted_from_the_card_alone(monkeypatch: pytest.MonkeyPatch, lab: Lab, words: list[str]) -> None:
    asked = [f"methods=[{','.join(ABLE)}]", "shots=[1,4]", *words]
    plan = lab.plan(*asked)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.data.dataset.source_of", None)  # no file is opened
        config = compose([*lab.words, *asked])
        cells, left_out = planning.cells(config)
        width = planning.describe(config.model).feature_dim
        bills = [planning.predicted(c, planning.shape_of(config, c.dataset, c.shots, width)) for c in cells]
    assert left_out == dict(plan.unable) == {}
    assert bills == [trial.predicted for trial in plan.trials]
    assert sum(bills, Bill()).requests > 0


FEW = ("budget.requests=100", "budget.images=1000")
"""An allotment that is spent quickly."""


@pytest.mark.parametrize("method", sorted(all_methods()))
def test_classes_with_fewer_images_than_shots_are_billed_as_they_are_drawn(
    lab: Lab, tmp_path: Path, method: str
) -> None:
    icons = source_of(dataset_card("icons"))
    many = {0: 6, 1: 2, 2: 4}  # class 1 has two images where four are asked
    rows = [
        (row, split)
        for split, n in (("train", many), ("val", many), ("test", dict.fromkeys(many, 5)))
        for label in many
        for row in [r for r in icons.rows_of(split).tolist() if icons.labels[r] == label][: n[label]]
    ]
    source = write_source(
        tmp_path / "short.parquet",
        [icons.image_bytes(r) for r, _ in rows],
        [int(icons.labels[r]) for r, _ in rows],
        [split for _, split in rows],
        icons.classnames[:3],
    )
    sizes = {split: sum(s == split for _, s in rows) for split in ("train", "val", "test")}
    card = write_card(tmp_path, source, classes=3, **sizes)
    with pytest.raises(DataError, match="has 2"):
        lab.spec(method, f"datasets=[{card}]")
    spec = lab.spec(method, f"datasets=[{card}]", "data.small_classes=take_all", *FEW)
    (row,) = lab.run(spec)
    assert (row.status, row.error) == ("done", None)
    assert len(spec.split.train) == 4 + 2 + 4 and plain_bill(row) == spec.predicted
    assert row.labels_used == len(spec.split.train) + len(spec.split.val)


@pytest.mark.parametrize("method", sorted(all_methods()))
def test_imbalanced_shots_are_billed_as_planned_and_counted_in_the_row(lab: Lab, method: str) -> None:
    spec = lab.spec(method, "draw=imbalanced", "validation=none", "shots=2", "seeds=3", *FEW)
    counts = np.bincount(spec.dataset.source.labels[list(spec.split.train)], minlength=5)
    assert counts.sum() == 2 * 5 and counts.min() == 0 and counts.max() > 2  # of this seed
    (row,) = lab.run(spec)
    assert (row.status, row.error) == ("done", None)
    assert (row.draw, row.missing_classes, row.labels_used) == ("imbalanced", (counts == 0).sum(), 10)
    assert plain_bill(row) == spec.predicted and row.validate_requests == 0
    balanced = lab.spec(method, "validation=none", "shots=2", "seeds=3", *FEW)
    assert spec.trial_id != balanced.trial_id and spec.predicted == balanced.predicted


# --- test labels ---------------------------------------------------------------------------------------------------


class Noting(np.ndarray):  # type: ignore[type-arg]
    """Labels that note which rows were read."""

    noted: list[np.ndarray]

    def __getitem__(self, rows: Any) -> Any:
        self.noted.append(np.atleast_1d(np.asarray(rows)))
        return np.asarray(self)[rows]


@pytest.mark.parametrize(
    "words",
    [["datasets=[icons]", "shots=1"], ["curve=3"], ["protocol=base_to_new", "curve=2"]],
    ids=["shift", "curve", "base_to_new"],
)
def test_every_read_of_test_labels_is_counted_in_the_row(lab: Lab, words: list[str]) -> None:
    spec = lab.spec("bbt", *words, "budget.requests=200")
    reads: dict[str, int] = {}
    sources: dict[str, Source] = {t.dataset.name: t.dataset.source for t in spec.eval_sets}
    for source in sources.values():
        noting = source.labels.view(Noting)
        noting.noted = []
        vars(source)["labels"] = noting
    try:
        rows = lab.run(spec)
        for name, source in sources.items():
            test = set(source.rows_of("test").tolist())
            reads[name] = sum(bool(test & set(read.tolist())) for read in source.labels.noted)  # type: ignore[attr-defined]
    finally:
        for source in sources.values():
            vars(source)["labels"] = np.asarray(source.labels)
    counted = {name: sum(r.test_label_reads for r in rows if r.test_set.split(":")[0] == name) for name in sources}
    assert counted[spec.dataset.name] == sum(t.dataset is spec.dataset for t in spec.eval_sets) + spec.curve
    if spec.protocol == "all_to_all":  # halves are chosen by label as well, each time they are listed
        assert reads == counted
    assert all(reads[name] >= counted[name] for name in sources)


def test_a_curve_point_that_stands_for_several_is_one_read(lab: Lab) -> None:
    (row,) = lab.run(lab.spec("linear_probe", "curve=50"))
    assert row.test_label_reads < 1 + 50


def test_a_method_is_given_nothing_that_tells_a_test_label(lab: Lab) -> None:
    assert {f.name for f in dataclasses.fields(FewShotTask)} == {
        *("dataset", "classes", "shots", "train", "val", "views", "fresh_views", "local")
    }
    offered = {name for name in vars(ImageSet) if not name.startswith("_")}
    assert offered == {"views", "pixels", "array"}
    assert "labels" not in dir(few_shot_task(lab.spec("taskres")).train.images)


def test_only_the_scorer_reads_test_labels() -> None:
    """Every place outside `pipeline/data` that takes labels from a source; a new one is a decision."""
    allowed = {
        "pipeline/trials/protocol.py",  # which images belong to the tested half of the classes
        "pipeline/trials/trial.py",  # the few-shot task's own rows
        "pipeline/trials/evaluate.py",  # the scorer
        "pipeline/trials/rows.py",  # which classes an imbalanced draw lacks
        "pipeline/bench/craft.py",  # its draw of training images
    }
    root = Path(pipeline.__file__).parent
    found = {
        f"pipeline/{path.relative_to(root)}"
        for path in set(root.rglob("*.py")) - set((root / "data").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr == "labels"
        and ast.unparse(node.value).split("(")[0].split(".")[-1] in ("source", "source_of", "opened")
    }
    assert found == allowed


def test_a_split_is_kept_in_drawn_order_within_some_classes() -> None:
    spec = make_plan(compose(["sweep=smoke", "datasets=[icons]", "methods=[zero_shot]", "shots=4", "seeds=1"])).trials[
        0
    ]
    source = spec.dataset.source
    some = within(spec.split, source, range(2, 5))
    assert some.train == tuple(r for r in spec.split.train if 2 <= source.labels[r] < 5) and len(some.train) == 12
    assert within(spec.split, source, range(16)) == spec.split


def test_the_shape_of_a_base_to_new_task_is_the_base_classes(lab: Lab) -> None:
    spec = halves(lab, "bbt")
    shape = TaskShape.of(few_shot_task(spec), lab.pool.info.feature_dim)
    config = compose([*lab.words, "protocol=base_to_new"])
    assert planning.shape_of(config, spec.dataset.card, spec.shots, shape.feature_dim) == shape
    assert (shape.n_classes, shape.n_train, shape.n_val) == (3, 12, 12)
