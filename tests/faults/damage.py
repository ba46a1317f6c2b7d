"""Damage random bytes of a finished sweep and compare all that a user then sees with the undamaged sweep.

    python -m tests.faults.damage --flips 1000 --seed 1

Each damage is done to a copy of the sweep and looked at in a forked process, so that a crash of a C library is counted
and not suffered. The sweep has rows, predictions, checkpoints, a feature store, the cached index of an image folder and
of a Parquet table, embedded weights and data, and a ledger. The exit code is 1 when a displayed number changed without
a line that says so, or when a process crashed, hung or ended with a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip  # noqa: F401 (imported before a fork, so that each child does not import it)
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

import pipeline.blackbox.architecture
import pipeline.cards
import pipeline.results.published
from pipeline import cli
from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.local_pool import LocalPool
from pipeline.cards import EMBEDDED
from pipeline.commands import leaderboard  # noqa: F401
from pipeline.config.compose import compose
from pipeline.errors import FareboxError
from pipeline.ledger.ledger import Ledger
from pipeline.results.snapshot import read_snapshot
from pipeline.results.store import ResultStore
from pipeline.sweep import status  # noqa: F401
from pipeline.sweep.reservations import (
    close_trials,
    finished,
    pending,
    problems,
    release_left_over,
    remove_checkpoints,
    reserve,
)
from pipeline.sweep.run_ledger import open_ledger
from pipeline.trials.plan import make_plan
from pipeline.trials.trial import run_trial
from tests.faults.forked import forked
from tests.support.lab import small_data
from tests.support.miniature import picture, put

RERUN_EVERY = 8
"""Of the damages that a leaderboard or ledger shows, how many are followed by a second run."""
LOOSE = {"seconds", "created", "computed_images", "computed_prompts", "cache_hits"}
"""Columns that differ between two runs of one trial."""
FILES = {
    "rows": ["storage/results/*.arrow"],
    "snapshot": ["storage/rows.arrow"],
    "predictions": ["storage/predictions/*/*.arrow"],
    "ledger": ["storage/ledger.db"],
    "storage id": ["storage/storage_id"],
    "checkpoints": ["storage/checkpoints/*.ckpt"],
    "features": ["features/*/*.features"],
    "index": ["cache/index/*.json", "cache/index/*.arrow", "cache/index/*.images"],
    "known files": ["cache/index/*.known/*.records"],
    "embedded": ["embedded/tiny.json", "embedded/tiny.safetensors", "embedded/tiny_bpe.txt.gz", "embedded/*.parquet"],
    "printed": ["embedded/published.csv"],
}
"""What is damaged, as patterns under the sweep's folder."""
SHOWN = {"rows", "snapshot", "predictions", "ledger", "storage id"}
"""Kinds that the leaderboard and the ledger read; the others enter numbers through a run."""
REMOVED = {"snapshot", "predictions", "checkpoints", "features", "index", "known files", "embedded"}
"""Kinds of which a whole file may be missing. A missing row file is a trial that was not run."""
Seen = dict[str, tuple[int, str, str]]
"""By command: exit code, standard output, standard error."""


@dataclass(frozen=True)
class Sweep:
    """A finished sweep in `folder`: storage/, features/, cache/ and embedded/ are copied, data/ is not."""

    folder: Path

    def words(self, run: str) -> list[str]:
        """The overrides of one of its three runs."""
        data = self.folder / "data"
        common = ["sweep=smoke", f"storage={self.folder / 'storage'}", f"features={self.folder / 'features'}"]
        common += ["views=2", "shots=2", "budget.requests=40", f"mlflow=sqlite:///{self.folder / 'mlflow.db'}"]
        sets = f"datasets=[{data / 'pets.yaml'},{data / 'table.yaml'},{self.folder / 'embedded/small.yaml'}]"
        return {
            "fake": [*common, "model=fake", "methods=[zero_shot,logit_head,taskres,craft]", sets, "seeds=[1,2]"],
            "tiny": [*common, "model=tiny", "methods=[zero_shot,logit_head,taskres]", sets, "seeds=[1]"],
            "stopped": [
                *common,
                "model=fake",
                "methods=[bbt]",
                "method.bbt.popsize=10",
                "method.bbt.intrinsic_dim=16",
                sets,
                "seeds=[1]",
            ],
        }[run]

    def files(self, kind: str) -> list[Path]:
        """The files of a kind."""
        return sorted(path for pattern in FILES[kind] for path in self.folder.glob(pattern))

    def copied(self, to: Path) -> Sweep:
        """A copy that may be damaged. Files that are only ever replaced are linked, the ledger is copied."""

        def copy(source: str, target: str) -> None:
            (shutil.copy if Path(source).name.startswith("ledger.db") else os.link)(source, target)

        for part in ("storage", "features", "cache", "embedded"):
            shutil.copytree(self.folder / part, to / part, copy_function=copy)
        (to / "data").symlink_to(self.folder / "data")
        return Sweep(to)

    def enter(self) -> None:
        """Make this process use the copy's index cache and embedded files."""
        os.environ["FAREBOX_CACHE"] = str(self.folder / "cache")
        pipeline.cards.EMBEDDED = pipeline.blackbox.architecture.EMBEDDED = self.folder / "embedded"  # type: ignore[misc]
        pipeline.results.published.FILE = self.folder / "embedded/published.csv"


def make(folder: Path) -> Sweep:
    """Make the sweep. Call it in a process of its own: a process opens a data set and registers a model once."""
    sweep, data = Sweep(folder), folder / "data"
    data.mkdir(parents=True)
    counts = {"train": 4, "val": 2, "test": 6}
    rows: dict[str, list[Any]] = {"image": [], "label": [], "split": []}
    for kind in ("cat", "dog", "bird"):
        for split, n in counts.items():
            for i in range(n):
                put(data / f"pets/{split}/{kind}/{i}.png")
                for column, value in zip(rows, (picture(f"{kind}{split}{i}", "PNG"), kind, split), strict=True):
                    rows[column].append(value)
    pq.write_table(pa.table(rows), data / "own.parquet")
    card = {"classes": 3, "template": "a photo of a {}.", **{split: 3 * n for split, n in counts.items()}}
    (data / "pets.yaml").write_text(yaml.safe_dump({"layout": "folder", "path": str(data / "pets"), **card}))
    (data / "table.yaml").write_text(yaml.safe_dump({"layout": "table", "path": str(data / "own.parquet"), **card}))
    (folder / "embedded").mkdir()
    for path in EMBEDDED.glob("tiny*"):
        shutil.copy(path, folder / "embedded")
    shutil.copy(EMBEDDED / "digests.json", folder / "embedded")
    digests = json.loads((EMBEDDED / "digests.json").read_text())
    digests |= json.loads(pipeline.results.published.FILE.with_name("digests.json").read_text())
    (folder / "embedded/digests.json").write_text(json.dumps(digests))
    shutil.copy(pipeline.results.published.FILE, folder / "embedded")
    small = small_data(folder / "embedded")
    small.write_text(small.read_text().replace(f"{folder / 'embedded'}/", ""))  # found in EMBEDDED, as what ships is
    sweep.enter()
    stopped = run(sweep.words("stopped"), steps=2)
    assert len(stopped) == 3 and all("stopped" in line for line in stopped), stopped
    for name in ("fake", "tiny"):
        assert run(sweep.words(name)) == []
    store, old = ResultStore(folder / "storage"), time.time() - 60
    for path in sweep.files("rows"):
        os.utime(path, (old, old))  # younger files are not in the snapshot
    store.write_snapshot()
    assert read_snapshot(store.storage).table.equals(store.read()) and len(store.read()) > 30
    return sweep


class Stopped(Exception):
    """The end of a trial that is to leave a checkpoint."""


def run(words: Sequence[str], steps: int | None = None) -> list[str]:
    """`farebox run` in this process, without Ray; the lines that tell of damage and failure.

    `steps`: end every trial after so many steps, with a checkpoint.
    """
    said: list[str] = []
    plan = make_plan(compose(list(words)))
    config, store = plan.config, ResultStore(plan.config.storage)
    config.storage.mkdir(parents=True, exist_ok=True)
    ledger, storage = open_ledger(config, lambda line: None)  # a note about a copied storage is no detection
    storage_id = storage.id
    with contextlib.closing(ledger):
        todo, _ = pending(plan, store)
        said += store.recomputed({spec.trial_id for spec in todo})
        release_left_over(ledger, storage_id, todo)
        funded, unfunded = reserve(ledger, plan, todo, storage_id)
        said += unfunded.values()
        if funded:
            pool = LocalPool(Endpoint(config.model, config.features), ledger)
            for spec in funded:
                if steps is not None:
                    said += _stop(spec, pool, storage_id, store, steps)
                    continue
                run_trial(spec, pool, storage_id, store)
                if finished(store, spec):
                    ledger.release(storage_id, spec.account)
            if steps is None:
                close_trials(ledger, storage_id, funded, store)
        if steps is None:
            remove_checkpoints(store, plan.trials)
            said += problems(plan, store, ledger, storage)
    return said


def _stop(spec: Any, pool: LocalPool, storage_id: str, store: ResultStore, steps: int) -> list[str]:
    cls, count = spec.choice.info.cls, iter(range(steps))
    step = cls.step

    def stopping(self: Any, box: Any) -> bool:
        if next(count, None) is None:
            raise Stopped
        return bool(step(self, box))

    cls.step = stopping
    try:
        run_trial(spec, pool, storage_id, store, checkpoint_s=0)
    except Stopped:
        return [f"{spec.name}: stopped"]
    finally:
        cls.step = step
    return []


class Lines(logging.Handler):
    """Collects what is logged as a warning: the command line shows it on standard error."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def look(sweep: Sweep, thorough: bool = True) -> Seen:
    """What the commands say about a sweep, without the folder's own name."""
    storage = f"storage={sweep.folder / 'storage'}"
    commands = [("leaderboard", storage, "--format", "json"), ("ledger", storage, "--json")]
    commands += [("leaderboard", storage, "--raw", "--format", "json")]
    if thorough:
        commands += [("leaderboard", storage), ("ledger", storage), ("status", storage)]
    seen: Seen = {}
    for command in commands:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(list(command))
        name = " ".join(word for word in command if word != storage)
        seen[name] = code, *(text.getvalue().replace(str(sweep.folder), "FOLDER") for text in (out, err))
    return seen


def numbers(sweep: Sweep) -> dict[str, Any]:
    """Every number of every row, by trial and test set, and what was charged."""
    rows = ResultStore(sweep.folder / "storage").read().to_pylist()
    found = {f"{r['trial_id']} {r['test_set']}": {k: v for k, v in r.items() if k not in LOOSE} for r in rows}
    ledger = Ledger(f"sqlite:///{sweep.folder / 'storage/ledger.db'}")
    with contextlib.closing(ledger):
        charged = {account.name: account.charged.requests for account in ledger.accounts()}
    return {"rows": found, "charged": charged}


# --- one damage -----------------------------------------------------------------------------------------------------


def damage(kind: str, path: Path, rng: random.Random, flips_only: bool) -> str:
    """Damage a file and return what was done. Nine of ten damages are a flipped byte."""
    data = bytearray(path.read_bytes())
    others = ["cut", "zeros", "exchanged", *(["removed"] if kind in REMOVED else [])]
    how = "flip" if flips_only or rng.random() < 0.9 else rng.choice(others)
    at = rng.randrange(len(data))
    if how == "flip":
        data[at] ^= rng.randrange(1, 256)
    elif how == "cut":
        del data[at:]
    elif how == "zeros":
        data[at : at + 512] = bytes(len(data[at : at + 512]))
    elif how == "exchanged":
        beside = [p for p in path.parent.parent.rglob(f"*{path.suffix}") if p != path and p.is_file()]
        data = bytearray(rng.choice(beside).read_bytes()) if beside else data
    path.unlink()
    if how != "removed":
        path.write_bytes(data)
    return f"{how} of {path.name} at byte {at}"


def judge(kind: str, path: Path, sweep: Sweep, before: dict[str, Any], thorough: bool) -> tuple[str, str]:
    """(outcome, why) of a sweep with this damaged file: harmless, detected, or silent."""
    told = []
    if kind in SHOWN:
        outcome, why = compare(before["seen"], look(sweep, thorough))
        if outcome == "silent" or not thorough:
            return outcome, why
        told = [why] if outcome == "detected" else []
    if kind == "printed":
        return printed(sweep, before["printed"])
    outcome, why = again(kind, reader(kind, path, before), sweep, before)
    return ("detected" if told and outcome == "harmless" else outcome), "; ".join([*told, why])


def compare(before: Seen, after: Seen) -> tuple[str, str]:
    """A command must say what it said, or state a problem; and no single row that it shows may have changed."""
    lines = []
    for name, (code, out, err) in after.items():
        if "Traceback" in err:
            return "traceback", f"{name}: {err}"
        if (code, out) != before[name][:2] and not (code and err.strip()):
            return "silent", f"{name}: exit {code}, {difference(before[name][1], out)}"
        lines += err.strip().splitlines()
        if name == "leaderboard --raw --format json" and out.strip():
            known = {(r["trial_id"], r["test_set"]): r for r in json.loads(before[name][1])}
            for row in json.loads(out):
                if known.get((row["trial_id"], row["test_set"])) != row:
                    return "silent", f"a row differs: {row}"
    return ("detected", lines[0]) if lines else ("harmless", "")


def difference(before: str, after: str) -> str:
    """The first line that differs."""
    for a, b in zip(before.splitlines(), after.splitlines(), strict=False):
        if a != b:
            return f"{a.strip()!r} became {b.strip()!r}"
    return "it has another length"


def printed(sweep: Sweep, before: list[Any]) -> tuple[str, str]:
    """Whether printed accuracies are refused or as they were."""
    try:
        found = [list(row) for row in pipeline.results.published.printed()]
    except FareboxError as error:
        return "detected", str(error)
    return ("harmless", "") if found == before else ("silent", "a printed accuracy changed")


def reader(kind: str, path: Path, before: dict[str, Any]) -> str:
    """Which of the sweep's runs reads a file, or made it."""
    if kind in ("rows", "predictions"):
        trial = path.stem if kind == "rows" else path.parent.name
        return str(next(row["model"] for row in before["rows"].values() if row["trial_id"] == trial))
    if kind == "checkpoints":
        return "stopped"
    weights = kind == "embedded" and path.suffix != ".parquet"
    stored = kind == "features" and not path.with_name("model.txt").read_text().startswith("fake")
    return "tiny" if weights or stored else "fake"


def again(kind: str, name: str, sweep: Sweep, before: dict[str, Any]) -> tuple[str, str]:
    """Run the sweep a second time, one trial of each data set anew: it gives the same rows, or says why not."""
    handler = Lines()
    logging.getLogger().addHandler(handler)
    told: list[str] = []
    storage = sweep.folder / "storage"
    if kind not in SHOWN:
        for row in ResultStore(storage).read().to_pylist():
            if (row["model"], row["method"], row["seed"]) == (name, "taskres", 1):
                (storage / f"results/{row['trial_id']}.arrow").unlink()
    if kind in ("index", "known files", "embedded"):
        shutil.rmtree(sweep.folder / "features")  # so that the images are encoded again
    try:
        told += run(sweep.words(name))
    except FareboxError as error:
        told.append(str(error))
    told += handler.lines
    try:
        after = numbers(sweep)
    except FareboxError as error:
        return "detected", "; ".join([*told, str(error)])
    for key, row in after["rows"].items():
        if row["status"] == "done" and before["rows"].get(key, row) != row:
            changed = {k for k in row if row[k] != before["rows"][key][k]}
            return "silent", f"{key} differs in {sorted(changed)}"
    if not told and before["whole"]["rows"].keys() - after["rows"].keys():
        return "silent", "rows are missing and nothing was said"
    # The sweep's own account has another name here: a copied storage gets an id of its own.
    spent = sum(after["charged"].values()) - sum(before["whole"]["charged"].values())
    if spent and kind not in ("checkpoints", "ledger", "storage id"):
        return "silent", f"charged anew: {spent}, before {before['whole']['charged']}"
    return ("detected", "; ".join(told)) if told else ("harmless", "")


# --- many damages ---------------------------------------------------------------------------------------------------


def baseline(sweep: Sweep) -> dict[str, Any]:
    """What the undamaged sweep shows, and its numbers with the stopped trials finished."""
    sweep.enter()
    seen = look(sweep)
    assert all(code == 0 and not err for code, _, err in seen.values()), seen
    rows = [list(row) for row in pipeline.results.published.printed()]
    with tempfile.TemporaryDirectory() as folder:
        copy = sweep.copied(Path(folder))
        copy.enter()
        whole = numbers(copy)
        assert run(copy.words("stopped")) == []
        ended = numbers(copy)
    return {"seen": seen, "printed": rows, "rows": ended["rows"], "whole": whole}


def outcomes(
    flips: int, seed: int, kinds: Sequence[str] = tuple(FILES), flips_only: bool = False
) -> Iterator[tuple[str, str, str, str]]:
    """(kind, outcome, what was damaged, why) of each damage."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "sweep"
        state, value = forked(lambda: str(make(home).folder), 900)
        assert state == "done", value
        sweep = Sweep(home)
        state, before = forked(lambda: baseline(sweep), 900)
        assert state == "done", before
        before["seen"] = {name: tuple(seen) for name, seen in before["seen"].items()}
        look(sweep)  # so that no child imports what commands import
        for number in range(flips):
            kind = kinds[number % len(kinds)]
            thorough = kind not in SHOWN or number // len(kinds) % RERUN_EVERY == 0
            place = Path(folder) / "copy"
            copy = sweep.copied(place)
            path = rng.choice(copy.files(kind))
            what = damage(kind, path, rng, flips_only)

            def work(copy: Sweep = copy, kind: str = kind, path: Path = path, thorough: bool = thorough) -> Any:
                copy.enter()
                return judge(kind, path, copy, before, thorough)

            state, value = forked(work)
            outcome, why = value if state == "done" else (state, str(value))
            yield kind, outcome, what, why
            shutil.rmtree(place)


BAD = ("silent", "crash", "traceback", "hang")


def main() -> int:
    """Print the counts; 1 when a damage had a bad outcome."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--flips", type=int, default=1000, help="number of damages")
    parser.add_argument("--seed", type=int, default=1, help="of files, bytes and bits")
    parser.add_argument("--kinds", nargs="*", default=list(FILES), choices=list(FILES), help="what is damaged")
    parser.add_argument("--flips-only", action="store_true", help="no cuts, zeroed blocks, exchanged or removed files")
    parser.add_argument("--verbose", action="store_true", help="one line for each damage")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    counts: Counter[tuple[str, str]] = Counter()
    began = time.monotonic()
    for kind, outcome, what, why in outcomes(arguments.flips, arguments.seed, arguments.kinds, arguments.flips_only):
        counts[kind, outcome] += 1
        if outcome in BAD or arguments.verbose:
            print(f"{outcome}: {kind}: {what}: {why}", file=sys.stderr, flush=True)
    columns = ("damages", "detected", "harmless", *BAD)
    print("".join([f"{'':<14}", *(f"{name:>11}" for name in columns)]))
    for kind in [*arguments.kinds, "all"]:
        of_kind = Counter({o: n for (k, o), n in counts.items() if k == kind})
        if kind == "all":
            for (_, outcome), n in counts.items():
                of_kind[outcome] += n
        print(f"{kind:<14}{of_kind.total():>11,}" + "".join(f"{of_kind[name]:>11,}" for name in columns[1:]))
    print(f"seed {arguments.seed}, {time.monotonic() - began:.0f} s")
    return int(any(outcome in BAD for _, outcome in counts))


if __name__ == "__main__":
    sys.exit(main())
