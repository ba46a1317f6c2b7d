"""Released code: each record is whole and in closed terms, and costs that Farebox can plan are those that it plans."""

from __future__ import annotations

import math
import re
from typing import Any, get_args, get_type_hints

import pytest

from methods import all_methods
from methods.base import Remaining, TaskShape
from pipeline.commands.audit import select
from pipeline.config.card_files import dataset_card
from pipeline.config.method_choice import method_choice
from pipeline.results.published import ORIGIN, printed
from pipeline.results.releases import (
    BY_AUTHORS,
    COST_EVIDENCE,
    EVIDENCE,
    IMAGENET,
    SELECTS_ON,
    Cost,
    Note,
    Release,
    Settings,
    printed_selection,
    release_of,
    releases,
    without_release,
)

EUROSAT = TaskShape(
    n_classes=10, n_train=160, n_val=0, shots=16, views=10, fresh_views=True, n_templates=1, feature_dim=1024
)
PLANNED = [release for release in releases().values() if release.cost.evidence == "plan"]
UNITS = ("requests", "images", "selection_images")


def typed(record: Any) -> bool:
    """Every text is text and not empty, every number a whole number of at least 0 or None."""
    for name, hint in get_type_hints(type(record)).items():
        value = getattr(record, name)
        if hint is str and not (isinstance(value, str) and (value.strip() == value) and (value or name in EMPTY)):
            return False
        if int in get_args(hint) and not (value is None or (type(value) is int and value >= 0)):
            return False
    return True


EMPTY = {"selects_on_imagenet", "method"}
"""Texts that may be empty."""


@pytest.mark.parametrize("release", releases().values(), ids=lambda release: release.name)
def test_every_record_is_whole_and_in_closed_terms(release: Release) -> None:
    parts: list[Cost | Note | Settings] = [release.cost, *release.notes]
    parts += [release.per_dataset] if release.per_dataset else []
    assert all(map(typed, (release, *parts)))
    assert {part.evidence for part in parts} | {release.evidence} <= EVIDENCE.keys()
    assert release.cost.evidence in COST_EVIDENCE
    assert release.selects_on in SELECTS_ON
    assert release.selects_on_imagenet in {"", *SELECTS_ON} - {release.selects_on}
    assert re.fullmatch(r"[0-9a-f]{7,40}|none", release.commit)
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", release.repository)
    assert re.fullmatch(r"[a-z0-9_]+", release.name)
    assert (release.selects_on == "unknown") == (release.evidence == "unverified")
    assert (release.cost.requests is None) == (release.cost.images is None) == (release.cost.evidence == "none")
    assert bool(release.cost.method) == (release.cost.evidence == "plan")
    assert release.selection.endswith(".") and all(note.what.endswith(".") for note in release.notes)


def test_every_registered_method_has_a_record_or_a_reason_and_no_record_names_another() -> None:
    registered = all_methods()
    for name, info in registered.items():
        if name not in without_release():
            (release, *_) = select([name])
            assert release.paper == info.paper or name in release.methods, name
    named = [method for release in releases().values() for method in release.methods]
    assert set(named) <= registered.keys() and len(named) == len(set(named))
    assert without_release().keys() <= registered.keys() - set(named)
    assert all(map(release_of, named))


def test_the_shape_of_the_costs_is_that_of_sixteen_shots_of_eurosat() -> None:
    card = dataset_card("eurosat")
    assert (EUROSAT.n_classes, EUROSAT.n_train) == (card.classes, 16 * card.classes)
    assert {release.cost.selection_images for release in releases().values()} <= {
        *(None, 0, 4 * card.classes, 16 * card.classes),  # none, min(K, 4) a class, K a class
        *(card.val, card.test, card.val + card.test),
    }


@pytest.mark.parametrize("release", PLANNED, ids=lambda release: release.name)
def test_a_planned_cost_is_what_the_method_plans_with_its_papers_settings_and_fresh_views(release: Release) -> None:
    choice = method_choice(release.cost.method, "eurosat", "paper", {})
    bill = choice.build().plan(EUROSAT, Remaining()).bill
    assert (release.cost.requests, release.cost.images) == (bill.requests, bill.images)
    assert choice.info.name in release.methods


def test_costs_of_the_three_papers_and_of_the_queries_that_papers_count_are_planned() -> None:
    assert {"craft", "taskres", "cbbt"} <= {release.name for release in PLANNED}
    generations, popsize = 200, 40
    for name, each in (("craft", popsize + 1), ("bbt", popsize)):
        release = releases()[name]
        assert release.own_count == f"{generations * popsize:,} queries"
        assert release.cost.requests == generations * each
    assert (releases()["clip_lora"].cost.requests, releases()["clip_lora"].cost.images) == (500 * 16, 500 * 16 * 32 * 2)
    for name, sets in (("blackvip", 10), ("bar", 6)):
        planned = releases()[name].cost
        assert (planned.requests, planned.images) == (5_000 * sets, 5_000 * sets * 128)
    cbbt = releases()["cbbt"].cost
    steps = 150 * math.floor(EUROSAT.n_train / 32)
    assert (cbbt.requests, cbbt.images) == (257 * steps, 257 * steps * 32) == (192_750, 6_168_000)


@pytest.mark.parametrize(
    ("name", "requests", "images"),
    [
        ("zip", 500 * 10, 500 * 10 * 128),
        ("sharpzo", 100 * (40 + 2 * 512) + 199_900 * 2, (100 * (40 + 2 * 512) + 199_900 * 2) * 160),
        ("bpt_vlm", 25_200, 25_200 * 160),
        ("gda", 2, 10 * 160),
        ("clap", 2, 20 * 160),
        ("rla", 2, 300 * 160),
        ("lfa", 2, 5 * 160),
    ],
)
def test_a_derived_cost_is_the_product_that_its_formula_states(name: str, requests: int, images: int) -> None:
    cost = releases()[name].cost
    assert (cost.evidence, cost.requests, cost.images) == ("derived", requests, images)


def test_what_a_printed_number_was_chosen_on_is_stated_for_its_own_authors_only() -> None:
    assert set(BY_AUTHORS) < set(ORIGIN)
    assert printed_selection("tip_adapter_f", "dtd", "authors") == "test"
    assert printed_selection("tip_adapter_f", "dtd", "others") == ""
    assert printed_selection("tip_adapter", "dtd", "authors") == "validation"
    assert {printed_selection("tip_adapter", dataset, "authors") for dataset in IMAGENET} == {"test"}
    assert printed_selection("taskres", "dtd", "rerun") == ""
    assert printed_selection("bbt", "dtd", "authors") == printed_selection("zero_shot", "dtd", "authors") == ""
    found = {(row.farebox_method, printed_selection(row.farebox_method, row.dataset, row.origin)) for row in printed()}
    assert found >= {("tip_adapter", "test"), ("tip_adapter", "validation"), ("tip_adapter_f", "test")}
    assert ("craft", "nothing") in found


def test_no_release_is_listed_twice() -> None:
    titles = [release.title.casefold() for release in releases().values()]
    assert len(titles) == len(set(titles))
    assert len(releases()) == len({(r.repository, r.file, r.title) for r in releases().values()})
