"""Merge the results of several storages, for example of two machines or two labs, into a new storage.

Of each source, the trials that its own leaderboard shows are taken. A trial that several sources have, under one trial
id, is taken once. Its accuracies and bills must be equal; only rounding between machines is allowed (`ROUNDING`). Rows
of other Farebox code stay apart, as in any storage (`pipeline.results.identity`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.budget import UNITS
from pipeline.errors import DamagedFile
from pipeline.files import read_sealed, read_sealed_json, sealed_json, write_atomic
from pipeline.results.identity import ENVIRONMENT, select
from pipeline.results.row import FINISHED, ResultRow
from pipeline.results.runs import add_run, read_runs
from pipeline.results.store import ResultStore

FILE = "merged.json"
ROUNDING = 0.01
"""Largest share of test images that two machines may classify differently in one trial."""


@dataclass
class Merged:
    """The outcome of a merge."""

    taken: list[int]
    """Number of trials that were taken from each source."""
    equal: int = 0
    """Trials that several sources have with equal results."""
    rounded: int = 0
    """Trials that several machines have with results that differ by rounding; the first source's are taken."""
    notes: list[str] = field(default_factory=list)
    """One line for each group of rows that a source leaves out."""
    problems: list[str] = field(default_factory=list)
    """One line for each damaged file, and for each trial whose results contradict each other."""


@dataclass(frozen=True)
class _Trial:
    """A trial of a source, with its rows by test set."""

    source: int
    rows: Mapping[str, ResultRow]

    @property
    def first(self) -> ResultRow:
        return next(iter(self.rows.values()))

    @property
    def finished(self) -> bool:
        return self.first.status in FINISHED

    @property
    def machine(self) -> tuple[object, ...]:
        return tuple(getattr(self.first, column) for column in ENVIRONMENT)


def merge(sources: Sequence[Path], target: Path, keep_code: bool, echo: Callable[[str], None]) -> Merged:
    """Copy the current results of the sources into `target`, an empty folder.

    Args:
        sources: Storages.
        target: The new storage.
        keep_code: Show results of all versions of the code, marked as such; otherwise only those of the newest.
        echo: Prints a line.

    Raises:
        DamagedFile: the record of runs of a source is damaged.
        StorageError: a file cannot be written.
    """
    stores, target_store = [ResultStore(folder) for folder in sources], ResultStore(target)
    merged, found = Merged([0] * len(sources)), dict[str, list[_Trial]]()
    for number, store in enumerate(stores):
        table = store.read()
        selection = select(table, read_runs(store.storage))
        merged.notes += [f"{store.storage}: {note}" for note in selection.notes]
        current = set(selection.rows["trial_id"].to_pylist())
        for trial_id, rows in store.trials(table).items():
            if trial_id in current and _intact(store, rows):
                found.setdefault(trial_id, []).append(_Trial(number, {row.test_set: row for row in rows}))
        merged.problems += [f"{line} (left out)" for line in store.damage()]
    taken: list[str] = []
    for trial_id, trials in found.items():
        chosen = _choose(trials, stores, merged)
        if chosen is not None:
            _copy(stores[chosen.source], target_store, list(chosen.rows.values()))
            merged.taken[chosen.source] += 1
            taken.append(trial_id)
    target_store.write_snapshot()
    add_run(target, sorted(taken), keep_code, echo)
    record = {"sources": [str(folder) for folder in sources], "trials": merged.taken}
    write_atomic(target / FILE, sealed_json(record, indent=1))
    return merged


def sources_of(storage: Path) -> list[str]:
    """Return the storages from which a storage was merged; an empty list for the storage of a sweep.

    Raises:
        DamagedFile: the record of the merge is damaged.
    """
    try:
        return [str(path) for path in read_sealed_json(storage / FILE)["sources"]]
    except FileNotFoundError:
        return []
    except (OSError, KeyError, TypeError) as error:
        raise DamagedFile(storage / FILE, "it is not the record of a merge; merge the storages again") from error


def _intact(store: ResultStore, rows: Sequence[ResultRow]) -> bool:
    return all(store.intact(row.trial_id, row.test_set, row.predictions_digest) for row in rows)


def _choose(trials: Sequence[_Trial], stores: Sequence[ResultStore], merged: Merged) -> _Trial | None:
    """Return the trial to take: a finished one if there is one, the first of equal ones; None if they contradict."""
    finished = [trial for trial in trials if trial.finished]
    first, *others = finished or trials[:1]
    differences = [_difference(first, other, stores) for other in others]
    if contradictions := [text for text in differences if text not in ("", "rounding")]:
        merged.problems += contradictions
        return None
    merged.rounded += "rounding" in differences
    merged.equal += bool(others) and "rounding" not in differences
    return first


def _difference(one: _Trial, other: _Trial, stores: Sequence[ResultStore]) -> str:
    """Return "" for equal results, "rounding", or how the results of one trial contradict each other."""
    row = one.first
    where = f"{row.method} on {row.dataset}, {row.shots} shots, seed {row.seed} ({row.trial_id[:12]})"
    folders = [stores[trial.source].storage for trial in (one, other)]
    if one.rows.keys() != other.rows.keys():
        return f"{where}: other test sets in {folders[0]} than in {folders[1]} (left out)"
    for unit in UNITS:
        bills = [getattr(trial.first, unit) for trial in (one, other)]
        if bills[0] != bills[1]:
            return f"{where}: {bills[0]:,} {unit} in {folders[0]}, {bills[1]:,} in {folders[1]} (left out)"
    differing = max(_share_that_differs(one, other, stores, test_set) for test_set in one.rows)
    if differing == 0:
        return ""
    if differing <= ROUNDING and one.machine != other.machine:
        return "rounding"
    accuracies = [
        f"{trial.first.accuracy:.2f}% in {folder}" for trial, folder in zip((one, other), folders, strict=True)
    ]
    return f"{where}: {', '.join(accuracies)}; {differing:.1%} of the predictions differ (left out)"


def _share_that_differs(one: _Trial, other: _Trial, stores: Sequence[ResultStore], test_set: str) -> float:
    """Return the share of test images with different predictions; 1 for different images or labels."""
    a, b = (
        stores[t.source].read_predictions(t.first.trial_id, test_set, t.rows[test_set].predictions_digest)
        for t in (one, other)
    )
    if a.image_keys != b.image_keys or (a.labels != b.labels).any():
        return 1.0
    return float((a.predicted != b.predicted).mean())


def _copy(source: ResultStore, target: ResultStore, rows: Sequence[ResultRow]) -> None:
    """Copy one trial: its predictions, then its rows."""
    for row in rows:
        if row.predictions_digest:
            file = source.predictions_path(row.trial_id, row.test_set)
            write_atomic(target.predictions_path(row.trial_id, row.test_set), read_sealed(file))
    target.write(rows)
