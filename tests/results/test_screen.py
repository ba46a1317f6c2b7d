"""The screen that ends a run: it fits, it is sorted, and what it says is true."""

from __future__ import annotations

import re

import pytest

from pipeline.config.compose import compose
from pipeline.console import Terminal
from pipeline.results.overview import AXES, Overview, conclusions, overview
from pipeline.results.pivot import caption
from pipeline.results.report import Report, last_screen
from pipeline.results.row import ResultRow
from pipeline.results.screen import screen
from pipeline.results.tables import compact
from tests.support.screens import FOLDER, demo, screens
from tests.support.synthetic import METHODS, base_to_new, make, report_of, sweep


def shown(report: Report, width: int = 80, axis: str | None = None, **terminal: bool | int) -> list[str]:
    return last_screen(report, compose(["sweep=demo"]), Terminal(width, **terminal), None, axis).splitlines()  # type: ignore[arg-type]


def view_of(rows: list[ResultRow], axis: str | None = None) -> Overview:
    view = report_of(rows).overview(axis)
    assert view is not None
    return view


def seeds(method: str, *accuracies: float, access: str = "SOFT+SCORES", **changes: object) -> list[ResultRow]:
    return [make(method=method, access=access, seed=i, accuracy=a, **changes) for i, a in enumerate(accuracies, 1)]


def test_the_files_in_docs_are_these_screens() -> None:
    assert {path.name: path.read_text() for path in FOLDER.glob("*.txt")} == screens(), (
        "python -m tests.support.screens"
    )


def test_the_last_screen_of_the_demo_has_24_lines_of_80_columns_and_every_method() -> None:
    lines = screens()["run_80.txt"].splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert all(any(re.match(rf"[*= ] {method}\b", line) for line in lines) for method in METHODS)
    text = "\n".join(lines)
    assert "The black box is" in text and "A request is" in text  # what it is, and what a query costs
    assert "With scores, " in text and "With features, " in text and "Under domain shift" in text
    assert "craft with 100 / 300 / 1,000 requests" in text and "leaderboard.html" in text and "--all" in text


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
@pytest.mark.parametrize("axis", [None, *AXES])
def test_every_screen_fits(width: int, axis: str | None) -> None:
    lines = shown(demo(), width, axis)
    assert len(lines) <= 24 and max(len(line) for line in lines if not line.startswith("more: ")) <= width


@pytest.mark.parametrize("axis", [None, "dataset", "shots"])
def test_base_to_new_names_the_harmonic_mean_and_shows_its_halves(axis: str | None) -> None:
    report = report_of(base_to_new("zero_shot", "bbt", "cbbt"))
    lines = shown(report, 120, axis)
    assert "H (harmonic mean of base and new classes)" in lines[0]
    if axis != "shots":
        head = next(line for line in lines if "gain over zero_shot" in line).split("zero_shot")[1]
        assert head.split("  requests")[0].split() == ["H", "base", "new", "digits", "H", "icons", "H"]
        assert re.search(r"cbbt +\+3.2 ± 2.1 +\+3.0 ± 2.0 +\+3.0 ± 2.0 ", "\n".join(lines))
    assert "H (harmonic mean of base and new classes)" in caption(report.overview(axis))


def test_a_ladder_is_shown_whole_on_80_columns_and_what_is_left_out_is_named() -> None:
    requests = (100, 250, 500, 1000, 2000, 4000, 8000, 16000)
    trials = [*sweep(seeds=(1,), budgets=((32000, None),))]
    trials += sweep(seeds=(1,), budgets=tuple((n, None) for n in requests), methods=("craft",))
    trials += sweep(seeds=(1,), budgets=((32000, 300), (32000, 1200)), methods=("tip_adapter",))
    report = report_of([row for trial in trials for row in trial])
    rungs = ["100", "250", "500", "1k", "2k", "4k", "8k", "16k"]

    def head(width: int) -> tuple[list[str], str]:
        lines = shown(report, width, "budget")
        start = next(i for i, line in enumerate(lines) if "gain by requests" in line)
        return lines[start].split()[3:], " ".join(lines[start + 1 :])

    assert head(120)[0] == [*rungs, "300im", "1.2kim", "32k", "requests", "images"]
    assert "--all has" not in head(120)[1]
    columns, rest = head(80)
    assert columns == [*rungs, "32k"]
    assert "--all has the columns 32,000 requests and 300 images; " in rest
    columns, rest = head(60)
    assert columns[-1] == "32k" and columns[:-1] == rungs[9 - len(columns) :]
    assert "--all has the columns 100 requests; " in rest.replace("2 more methods and ", "")


def test_many_methods_are_reduced_to_the_best_of_each_class_and_the_rest_is_counted() -> None:
    many = [r for t in sweep((16,), (1, 2, 3), ((1000, None),), ("zero_shot", "logit_head", "taskres")) for r in t]
    many += [r for i in range(35) for r in seeds(f"method_{i}", 40.0 + i, 41.0 + i, 40.0 + i, budget_requests=1000)]
    lines = shown(report_of(many))
    assert len(lines) <= 24
    assert any(line.startswith("* method_34") for line in lines) and not any("method_2 " in line for line in lines)
    (more,) = (line for line in lines if line.startswith("--all has "))
    methods = [line for line in lines if re.match(r"[*= ] (method_|zero_|logit|taskres)", line)]
    assert int(more.split()[2]) + len(methods) == 38
    tall = shown(report_of(many), height=60)
    assert not any(" more methods" in line for line in tall)


def test_a_terminal_of_ascii_gets_ascii_and_colour_is_bold_for_leaders_only() -> None:
    assert all(line.isascii() for line in shown(demo(), unicode=False))
    assert any("+-" in line for line in shown(demo(), unicode=False))
    plain, bold = shown(demo()), shown(demo(), colour=True)
    assert [re.sub(r"\x1b\[\d+m", "", line) for line in bold] == plain
    assert all(line[6:].startswith("*") or "[1m* " in line or ": " in line for line in bold if "\x1b" in line)


def test_one_seed_has_values_two_have_ranges_and_three_have_intervals() -> None:
    zero = [make(accuracy=40.0)]
    one, two, three = (
        view_of([*zero, *seeds("craft", *values)]) for values in ((50.0,), (50.0, 54.0), (50.0, 54.0, 52))
    )
    text = {name: screen(v, Terminal(), title="t") for name, v in (("one", one), ("two", two), ("three", three))}
    assert "+10.0 " in text["one"] and "±" not in text["one"]
    assert "+10.0..+14.0" in text["two"] and "±" not in text["two"]
    assert "+12.0 ± 5.0" in text["three"]


def test_tied_means_that_the_paired_interval_to_the_leader_contains_zero() -> None:
    rows = [
        *[make(seed=s, accuracy=40.0) for s in (1, 2, 3)],
        *seeds("craft", 60.0, 50.0, 55.0),  # the leader; its own interval is wide
        *seeds("bbt", 59.0, 49.1, 53.9),  # a point below it on every seed
        *seeds("cbbt_prompt", 55.0, 54.0, 53.0),  # one to minus four points below it
    ]
    lines = {line.main["method"]: line.main for line in view_of(rows).groups["scores"]}
    assert lines["craft"]["leader"] and lines["craft"]["tied"] is None
    assert lines["bbt"]["tied"] is False and lines["bbt"]["behind_leader"] == pytest.approx(1.0)
    assert lines["cbbt_prompt"]["tied"] is True
    (sentence,) = conclusions(view_of(rows))
    assert sentence == "With scores, craft leads (+15.0; tied: cbbt_prompt)."
    pair = [row for row in rows if row.seed < 3]
    assert {line.main["tied"] for line in view_of(pair).lines} == {None}


def test_a_reference_without_another_method_of_its_class_is_shown_in_its_class() -> None:
    rows = [make(seed=s, accuracy=40.0) for s in (1, 2, 3)]
    rows += [make(method="logit_head", access="TEXT+SCORES", seed=s, accuracy=50.0) for s in (1, 2, 3)]
    rows += [make(method="taskres", access="TEXT+FEATURES", seed=s, accuracy=60.0) for s in (1, 2, 3)]
    groups = {name: [line.main["method"] for line in lines] for name, lines in view_of(rows).groups.items()}
    assert groups == {"no fit": ["zero_shot"], "scores": ["logit_head"], "features": ["taskres"]}


def test_a_class_without_a_method_above_zero_shot_has_no_winner() -> None:
    rows = [make(seed=s, accuracy=40.0) for s in (1, 2, 3)] + seeds("craft", 39.0, 42.0, 40.5)
    assert conclusions(view_of(rows)) == ["With scores, none is clearly above zero_shot (best: craft +0.5)."]


def test_columns_are_shots_or_data_sets_and_the_largest_allotment_is_named() -> None:
    assert view_of([r for t in sweep((1, 16), (1,)) for r in t]).columns == ("1 shot", "16 shots", "shift")
    one = view_of([r for t in sweep((16,), (1,)) for r in t])
    assert one.columns[:4] == ("mean", "digits", "emoji", "icons") and one.axis == "dataset"
    assert one.facts["allotment"] == "8,000 requests (largest of 2 allotments)"
    budgets = overview(demo().board, demo().summary, "budget")
    assert budgets is not None and budgets.columns == ("100 requests", "300 requests", "1,000 requests")


def test_groups_by_access_say_what_methods_send_and_get() -> None:
    lines = shown(demo(), 120, "access")
    assert "SOFT+SCORES: soft prompts → scores" in lines and "TEXT+FEATURES: text prompts → features" in lines
    assert "SOFT+SCORES: soft prompts -> scores" in shown(demo(), 120, "access", unicode=False)


def test_a_title_that_is_too_long_loses_what_is_in_parentheses_first() -> None:
    titles = [shown(demo(), width)[0] for width in (120, 80, 60)]
    assert "3 seeds, 1,000 requests (largest of 3 allotments), tiny" in titles[0]
    assert "3 seeds, 1,000 requests, tiny" in titles[1] and "1,000" not in titles[2]


def test_without_zero_shot_accuracies_are_shown_and_a_note_says_what_to_add() -> None:
    report = report_of(seeds("craft", 50.0, 54.0, 52.0))
    lines = shown(report)
    assert any(line.startswith("  accuracy in %") for line in lines) and any("52.0 ± 5.0" in line for line in lines)
    assert any("no gain over zero_shot" in line for line in lines)


def test_failures_are_counted_and_an_empty_storage_says_so() -> None:
    failed = [
        make(accuracy=40.0),
        *seeds("craft", 50.0),
        make(method="craft", access="SOFT+SCORES", seed=2, status="failed"),
    ]
    assert any(line == "! 1 failed" for line in shown(report_of(failed)))
    assert shown(report_of([]))[0] == "no finished trials"


def test_counts_are_compact() -> None:
    counts = {None: "-", 7995.0: "7,995", 208_000.0: "208k", 999_600.0: "1M", 1_662_960.0: "1.66M"}
    assert {n: compact(n) for n in counts} == counts
