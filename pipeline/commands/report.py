"""What commands print and write: the leaderboard and its files, listings, the ledger's statement, the MLflow mirror."""

from __future__ import annotations

import contextlib
import queue
import shlex
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from methods.base import Bill
from pipeline.budget import Limits, Phase, total
from pipeline.config.compose import Config
from pipeline.config.files import load, names
from pipeline.errors import ConfigError, LedgerError, TrackingError, masked
from pipeline.files import strict_json, write_atomic
from pipeline.results.identity import Selection, missing_references, select
from pipeline.results.leaderboard import leaderboard, summary
from pipeline.results.published.tables import html, with_printed
from pipeline.results.runs import read_runs
from pipeline.results.store import ResultRow, ResultStore
from pipeline.results.tables import raw_records, report, text_table, to_csv, to_json, to_latex, to_md
from pipeline.sweep.preflight import check_free_port
from pipeline.sweep.reservations import audit, existing_ledger, trials_of
from pipeline.sweep.storage_id import FILE, read_id
from pipeline.trials.estimate import SweepEstimate

AWAY_S = 60.0
"""After a failure of MLflow, how long a run does not try it again."""
Say = Callable[[str], None]


def publish(config: Config, say: Say) -> list[str]:
    """Print the summary, write the report beside the rows, and mirror it; say where everything lies.

    Returns one line for each damaged file that is left in the storage.
    """
    store = _store(config)
    rows = _selection(store)
    if config.label:
        say(f"\n{config.label}")
    say("\n" + text_table(summary(rows), [*rows.notes, *missing_references(leaderboard(rows))]))
    folder = _write_report(config, store, rows)
    try:
        mirror = _mirror(config)
        behind = mirror.sync(store).problems  # what a crash, or an MLflow that was away, left out
        mirror.sweep_run(folder)
    except TrackingError as error:
        behind = [str(error)]
    for line in [*behind[:2], *([f"{len(behind) - 2} more like these"] if len(behind) > 2 else [])]:
        say(f"not mirrored to MLflow ({line}); later: farebox sync {_word(config)}")
    say(f"page with figures:  {_shown(folder / 'leaderboard.html')}")
    say(f"every data set:     farebox leaderboard {_word(config)}")
    say(f"the bill, checked:  farebox ledger {_word(config)}")
    say(f"MLflow's pages:     farebox ui {_word(config)}")
    return store.damage()


def _write_report(config: Config, store: ResultStore, rows: Selection) -> Path:
    """Write the leaderboard's files and return their folder."""
    folder = config.storage / "leaderboard"
    files = report(rows, store.reader(rows.rows), title=f"Leaderboard of {config.sweep}", notes=_notes(config))
    for name, data in files.items():
        write_atomic(folder / name, data)
    return folder


class Mirroring:
    """Hands finished trials to MLflow from one thread, so that neither its import nor its store delays a trial."""

    def __init__(self, config: Config) -> None:
        self.config, self.store = config, ResultStore(config.storage)
        self._queue: queue.SimpleQueue[Sequence[ResultRow] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.problem: str | None = None

    def add(self, rows: Sequence[ResultRow]) -> None:
        """Mirror these rows soon."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        self._queue.put(rows)

    def _work(self) -> None:
        mirror, again = None, 0.0
        while (rows := self._queue.get()) is not None:
            if time.monotonic() < again:
                continue  # each try would wait for a server that is away; `publish` mirrors what was left out
            try:
                mirror = mirror or _mirror(self.config)
                mirror.mirror(rows, self.store.prediction_files(rows))
            except TrackingError as error:
                self.problem, again = str(error), time.monotonic() + AWAY_S

    def close(self) -> None:
        """Wait for the last rows."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()


def formatted(
    config: Config, form: str, raw: bool, published: bool = False, echo: Say = lambda line: None
) -> tuple[str, list[str]]:
    """Return the leaderboard, or with `raw` its trials, in one of the formats, and a line for each damaged file.

    `published`: printed numbers after it. Notes on rows that are left out are below a table or page; `echo` prints
    them where the format has no place for them.
    """
    store = _store(config)
    text = _formatted(config, store, form, raw, published, echo)
    return text, store.damage()


def _formatted(config: Config, store: ResultStore, form: str, raw: bool, published: bool, echo: Say) -> str:
    rows = _selection(store)
    config = _of_rows(config, rows.everything)
    if raw and published:
        raise ConfigError(
            "--raw --published: printed numbers stand beside means, not beside single trials; leave one out"
        )
    if form == "html":
        beside = html(leaderboard(rows)) if published else ""
        return report(rows, store.reader(rows.rows), config.sweep, _notes(config), beside)["leaderboard.html"].decode()
    if raw:
        if form not in ("json", "csv", "table"):
            raise ConfigError(f"--raw --format {form}: expected json or csv")
        for note in rows.notes:
            echo(note)
        records = raw_records(rows)
        return to_json(records) if form == "json" else to_csv(records)
    table = leaderboard(rows, store.reader(rows.rows))
    notes = [*rows.notes, *missing_references(table)]
    if form in ("csv", "json"):
        for note in notes:
            echo(note)
        said = to_csv(table) if form == "csv" else to_json(table)
    else:
        said = {"table": text_table, "md": to_md, "latex": to_latex}[form](table, notes)
    return with_printed(form, said, table) if published else said


def sync(config: Config, say: Say) -> list[str]:
    """Rebuild the MLflow mirror, and the report that it shows, from the rows on disk.

    Returns one line for each trial that MLflow did not take, and for each damaged file, which is not mirrored.
    """
    store = _store(config)
    rows = _selection(store)
    config = _of_rows(config, rows.everything)
    mirror = _mirror(config)
    outcome = mirror.sync(store)
    say(f"{outcome.mirrored} trials are in MLflow at {masked(config.mlflow)}")
    if (config.storage / "leaderboard").is_dir():
        mirror.sweep_run(_write_report(config, store, rows))
    return [*outcome.problems, *store.damage()]


def ui_command(config: Config, port: int) -> tuple[list[str], dict[str, str]]:
    """The command that serves MLflow's pages for this sweep, and what its environment needs beside ours.

    Raises:
        ConfigError: there is no sweep, or the port is in use.
    """
    from pipeline.results.tracking import ui_command as command

    _store(config)
    check_free_port(port)
    return command(config.mlflow, port)


def plan_table(made: SweepEstimate) -> str:
    """Predicted bills, one line for each method, data set, shots and budget; the total; what cannot run; what lacks."""
    lines: dict[tuple[str, ...], list[Bill]] = {}
    for cell, _, bill, _ in made.trials:
        lines.setdefault((cell.choice.name, cell.dataset.name, str(cell.shots), cell.budget_name), []).append(bill)
    head = ("method", "data set", "shots", "allotment", "trials", "requests each", "images each", "requests", "images")
    cells: list[tuple[str, ...]] = [head]
    for key, bills in lines.items():
        each, all_of_them = bills[0], total(bills)
        numbers = (len(bills), each.requests, each.images, all_of_them.requests, all_of_them.images)
        cells.append((*key, *(f"{n:,}" for n in numbers)))
    whole = made.total
    cells.append(("total", "", "", "", f"{len(made.trials):,}", "", "", f"{whole.requests:,}", f"{whole.images:,}"))
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    text = [
        "  ".join(
            c.ljust(w) if i < 4 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    config = made.config
    for name, limits in (
        ("sweep", config.sweep_budget),
        (f"global {config.global_budget.name!r}", config.global_budget.limits),
    ):
        if limits != Limits():
            text.append(f"ceiling of {name}: {limits.words}")
    text += [*made.notes, *(f"not run: {name} {why}" for name, why in made.unable)]
    return "\n".join([*text, *model_lines(made), *absent_lines(made)])


def model_lines(made: SweepEstimate) -> list[str]:
    """The model's input rule and activation, and what is changed, skipped or guessed about it, one line each."""
    facts, name = made.model, made.config.model.name
    if facts is None:
        return []
    return [f"model {name}: {line}" for line in ((facts.rule, *facts.notes) if facts.rule else facts.notes)]


def absent_lines(made: SweepEstimate) -> list[str]:
    """What is not on this machine and where its authors publish it, one line each; what follows from it."""
    found = [f"not here: {a.kind} {a.name}: {a.what}; published at {a.published}" for a in made.absent]
    if not made.exact:
        found.append("These bills are from the cards alone. `run` refuses (exit 2) until the data is there.")
    return found


def ledger(config: Config, as_json: bool) -> tuple[str, list[str]]:
    """The ledger's statement for this sweep, and what is wrong with it. A damaged ledger has no statement."""
    store = _store(config)
    rows = store.scan().table
    storage = read_id(config.storage)
    with contextlib.closing(existing_ledger(config)) as books:
        problems = [*audit(books, rows, storage), *store.damage()]
        try:
            accounts, trials = books.accounts(), trials_of(books, rows, storage)
        except LedgerError as error:
            problems = problems or [str(error)]
            no_figures = "the ledger is damaged: none of its figures is printed"
            return strict_json({"problems": problems}, indent=1) if as_json else no_figures, problems
    copied = sum(t.storage != storage.id for t in trials)
    phases = {phase: total(t.bills.get(phase, total([])) for t in trials) for phase in Phase}
    if as_json:
        record = {
            "accounts": [
                {"name": a.name, "limits": asdict(a.limits), "reserved": asdict(a.reserved), "spent": asdict(a.spent)}
                for a in accounts
            ],
            "phases": {phase.value: asdict(bill) for phase, bill in phases.items()},
            "trials": len(trials),
            "copied_trials": copied,
            "open_trials": sum(t.open for t in trials),
            "problems": problems,
        }
        return strict_json(record, indent=1), problems
    text = [f"{'phase':<10}{'requests':>14}{'images':>18}{'prompts':>16}{'outputs':>20}"]
    for phase, bill in phases.items():
        text.append(f"{phase.value:<10}{bill.requests:>14,}{bill.images:>18,}{bill.prompts:>16,}{bill.outputs:>20,}")
    for a in accounts:
        text.append(
            f"account {a.name}: {a.spent.requests:,} requests and {a.spent.images:,} images spent, "
            f"{a.reserved.requests:,} and {a.reserved.images:,} reserved; ceiling {a.limits.words or 'none'}"
        )
    verdict = "verified: charges add up, match the rows, and passed no limit" if not problems else "NOT verified"
    inherited = f", {copied} of them paid by the storage that this one was copied from" if copied else ""
    text.append(f"{len(trials)} trials, {sum(t.open for t in trials)} of them open{inherited}; {verdict}")
    return "\n".join(text), problems


def _store(config: Config) -> ResultStore:
    if not (config.storage / FILE).exists():
        raise ConfigError(
            f"no sweep at {_shown(config.storage)}: name one with storage=DIR, or farebox run sweep={config.sweep}"
        )
    return ResultStore(config.storage)


def _selection(store: ResultStore) -> Selection:
    return select(store.scan().table, read_runs(store.storage))


def _of_rows(config: Config, rows: pa.Table) -> Config:
    """The configuration with the name and label of the sweep whose rows these are: storage=DIR alone names none."""
    found = set(rows["sweep"].to_pylist())
    if len(found) != 1 or found == {config.sweep}:
        return config
    sweep = str(found.pop())
    return replace(config, sweep=sweep, label=load("sweep", sweep).get("label", "") if sweep in names("sweep") else "")


def _mirror(config: Config) -> Any:
    from pipeline.results.tracking import Mirror

    return Mirror(config.mlflow, config.storage / "mlflow", f"farebox/{config.sweep}")


def _notes(config: Config) -> list[str]:
    return [config.label] if config.label else []


def _word(config: Config) -> str:
    """The argument that names the storage, quoted for a shell."""
    return shlex.quote(f"storage={_shown(config.storage)}")


def _shown(path: Path) -> str:
    """The path as a person would type it from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
