"""Views of a sweep in MLflow's pages: the table of its trials, and the comparison of its methods.

A view is a tag of the experiment, which MLflow's pages read if the address names it (`viewStateShareKey=NAME`). The
format is internal to MLflow, which ignores keys that it does not know. The pages load 100 runs at first and average no
others, so methods are compared by their means (runs of the kind `mean`), not by their trials. The comparison starts
with the means of one number of shots and one allotment: a bar over several allotments would compare unequal budgets.
"""

from __future__ import annotations

from typing import Any

TRIALS, METHODS = "leaderboard", "methods"
"""Names of the views."""
MAIN = "farebox.main"
"""Tag of a mean: whether the comparison starts with it (`tracking_names.main_means`)."""
SHARED = "mlflow.sharedViewState."
"""Prefix of the tags."""
_SECTION = "farebox-methods"


def _chart(kind: str, name: str, **settings: Any) -> dict[str, Any]:
    common = {"uuid": f"{_SECTION}-{name}", "metricSectionId": _SECTION, "deleted": False, "isGenerated": False}
    return common | {"type": kind, "displayName": name} | settings


def _scatter(x: str) -> dict[str, Any]:
    axes = {"xaxis": {"key": x, "type": "METRIC"}, "yaxis": {"key": "accuracy", "type": "METRIC"}}
    return _chart("SCATTER", f"accuracy by {x}", runsCountToCompare=100, **axes)


def _section(uuid: str, name: str, display: bool) -> dict[str, Any]:
    return {"uuid": uuid, "name": name, "display": display, "isReordered": False, "deleted": False}


def _view(query: str, columns: tuple[str, ...], **more: Any) -> dict[str, Any]:
    return {
        "orderByKey": "metrics.`accuracy`",
        "orderByAsc": False,
        "searchFilter": query,
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "startTime": "ALL",
        "viewMaximized": True,
        "runsHiddenMode": "SHOW_ALL",
        "autoRefreshEnabled": False,
        "isAccordionReordered": True,
        "selectedColumns": list(columns),
        "compareRunSections": [
            _section(_SECTION, "Methods", True),
            _section("farebox-model", "Model metrics", False),
            _section("farebox-system", "System metrics", False),
        ],
        **more,
    }


_COLUMNS = ("metrics.`accuracy`", "metrics.`requests`", "metrics.`images`", "params.`method`")
VIEWS = {
    TRIALS: _view(
        "tags.`farebox.kind` = 'trial'",
        (*_COLUMNS, "params.`dataset`", "params.`shots`", "params.`seed`", "params.`trial/status`"),
        compareRunCharts=[
            _chart("BAR", "accuracy", metricKey="accuracy", runsCountToCompare=100),
            _chart("LINE", "accuracy by requests of the fit", metricKey="curve/accuracy", xAxisKey="step"),
        ],
    ),
    METHODS: _view(
        f"tags.`farebox.kind` = 'mean' AND tags.`{MAIN}` = 'true'",
        (*_COLUMNS, "params.`shots`", "params.`trial/budget_requests`", "params.`trial/budget_images`"),
        groupBy={"aggregateFunction": "average", "groupByKeys": [{"mode": "param", "groupByData": "method"}]},
        useGroupedValuesInCharts=True,
        runListHidden=True,
        compareRunCharts=[
            _chart("BAR", "accuracy", metricKey="accuracy", runsCountToCompare=100),
            _scatter("requests"),
            _scatter("images"),
        ],
    ),
}
"""State of each view, by name."""


def trials_page(experiment_id: str) -> str:
    """Return the part of the address that shows the trials as a table, best accuracy first."""
    return f"#/experiments/{experiment_id}/runs?viewStateShareKey={TRIALS}"


def methods_page(experiment_id: str) -> str:
    """Return the part of the address that compares the methods: accuracy, and its price in requests and images."""
    return f"#/experiments/{experiment_id}/runs?compareRunsMode=CHART&viewStateShareKey={METHODS}"


def experiment_note(name: str, experiment_id: str, run_id: str) -> str:
    """Return the description of an experiment, in Markdown, whose leaderboard is the run `run_id`, if any."""
    links = [f"[compare the methods]({methods_page(experiment_id)})"]
    links += [f"[all trials as a table]({trials_page(experiment_id)})"]
    if run_id:
        page = f"#/experiments/{experiment_id}/runs/{run_id}/artifacts/leaderboard.html"
        links += [f"[the leaderboard, with figures]({page})"]
    return (
        f"**{name}**: {', '.join(links)}.\n\n"
        "There is one run per trial, and one per mean of a method over data sets and seeds. This experiment mirrors "
        "the rows in the sweep's storage; `farebox sync` rebuilds it. MLflow hides the columns of a list of runs at "
        "first; the links show them."
    )
