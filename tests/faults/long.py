"""Random kills in whole runs: every run must end with the same leaderboard and ledger as an undisturbed one.

    python -m tests.faults.long --runs 20 --kills 200 --seed 1 --json runs/faults.json

A run is one sweep, `fake` and `tiny` in turn, on two replicas with two trials at a time, and ceilings that hold exactly
what the sweep costs. While it works, replicas, the ledger's actor, trials' workers and the driver are killed: by a
clock, and at named points (points.py) that are drawn anew each time the command is started. It is started again, the
same, when its driver was killed. More runs follow until there were --kills kills. At the end a soak of the ledger
(soak.py). Exit code 1 when anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.results.store import ResultStore
from tests.faults.points import POINTS, Faults
from tests.faults.soak import soak
from tests.support.command import Running, alive, here, kill, ledger_record, processes
from tests.support.lab import outcome, small_data
from tests.support.patience import patience

OUTSIDE = {"ray::Replica": 4, "ray::LedgerActor": 3, "ray::ResourceTrainable": 4, "driver": 2}
"""What a clock kills, with weights."""
LATEST = {
    **{"replica.before_charge": 300, "replica.after_charge": 300, "replica.after_compute": 300},
    **{"ledger.before_commit": 600, "ledger.after_commit": 600, "trial.at_a_call": 600, "trial.between_steps": 200},
    **{"trial.before_checkpoint": 9, "trial.checkpoint_written": 9, "trial.between_renames": 9},
    **{"trial.after_checkpoint": 9, "trial.scoring": 4, "trial.row_written": 4, "trial.after_row": 4},
}
"""A point is passed so often in a process that a kill is drawn up to here; 1 where it is not named."""
NAMED = 4
"""Points that are drawn for each start of the command."""
LONGEST = 20
"""Undisturbed runs' times after which a run is taken to hang."""


@dataclass
class Run:
    """One disturbed run."""

    model: str
    seconds: float = 0.0
    kills: Counter[str] = field(default_factory=Counter)
    starts: int = 1
    differs: list[str] = field(default_factory=list)
    """What is not as in the undisturbed run; empty when all is well."""
    hung: bool = False
    lost_s: float | None = None
    """Seconds lost for each kill."""


def sweep_words(model: str, card: Path, quick: bool) -> list[str]:
    """A minute of trials (a few seconds when quick), most of it calls; checkpoints often."""
    small = ("methods=[zero_shot,craft]", "seeds=[1]", "budget.requests=250")
    large = ("methods=[zero_shot,logit_head,bbt,craft,cbbt]", "seeds=[1,2]", "budget.requests=1500")
    return [
        *("sweep=smoke", f"model={model}", f"datasets=[{card}]", "shots=[2]", "views=3", "method.craft.popsize=6"),
        *("checkpoint_s=0.5", "replicas=2", "concurrency=2"),
        *(small if quick else large),
    ]


def facts(storage: Path) -> dict[str, Any]:
    """All that must not depend on who died: rows with predictions, the leaderboard, the ledger."""
    rows = [
        outcome(r) for path in sorted((storage / "results").iterdir()) for r in ResultStore(storage).rows_of(path.stem)
    ]
    board = json.loads(here("leaderboard", f"storage={storage}", "--format", "json"))
    ledger = ledger_record(storage)
    accounts = [{k: v for k, v in a.items() if k != "name"} for a in ledger.pop("accounts")]
    return {
        "rows": rows,
        "leaderboard": [{k: v for k, v in record.items() if k != "seconds"} for record in board],
        "ledger": ledger | {"accounts": accounts},
    }


class Disturbed:
    """A sweep with kills until it ends by itself."""

    def __init__(self, words: Sequence[str], folder: Path, rng: random.Random, kills: int, quiet_s: float) -> None:
        self.storage, self.rng, self.kills, self.quiet_s = folder / "storage", rng, kills, quiet_s
        self.words = ("run", *words, f"storage={self.storage}")
        self.marks, self.left, self.sent = folder / "marks", [], Counter[str]()
        self.starts, self.hung, self.next = 0, False, self._draw()

    def run(self) -> tuple[int, str]:
        """Start the command again and again; the last exit code and what was printed."""
        began = time.monotonic()
        while True:
            code, printed = self._once(began + LONGEST * self.quiet_s + patience(120))
            if code == 3 and "its worker died again and again" in printed and self.starts < LONGEST:
                continue  # as it says: the same command goes on
            if code != -signal.SIGKILL or self.hung:
                return code, printed
            if self._struck() <= self._seen and not self._driver_killed:
                return code, "killed by something else\n" + printed

    def _once(self, deadline: float) -> tuple[int, str]:
        self.starts += 1
        self._seen, self._driver_killed = self._struck(), False
        faults = Faults(self.marks, self.storage)
        if self.total < self.kills:
            for point in self.rng.sample(sorted(POINTS), NAMED):
                faults.at(point, self.rng.randint(1, LATEST.get(point, 1)))
                faults.faults[-1]["name"] += f".{self.starts}"
        with tempfile.TemporaryFile("w+") as printed:
            running = Running(*self.words, env=faults.environment, output=printed)
            following: list[int] = []
            due = time.monotonic() + self._pause()
            while running.process.poll() is None:
                time.sleep(0.05)
                following = running.below() or following
                if time.monotonic() > deadline:
                    self.hung = True
                    running.process.kill()
                elif time.monotonic() > due and self.total < self.kills and self._kill(running):
                    due = time.monotonic() + self._pause()
            running.process.wait()
            self.left += following
            printed.seek(0)
            return running.process.returncode, printed.read()

    def _draw(self) -> str:
        return self.rng.choices(list(OUTSIDE), list(OUTSIDE.values()))[0]

    def _pause(self) -> float:
        return self.rng.uniform(0.3, 1.7) * self.quiet_s / self.kills

    def _kill(self, running: Running) -> bool:
        """Kill what is next; False while it is not there."""
        title = self.next
        if title != "driver" and not running.below(title):
            return False  # it is being started: it is waited for, else most kills would be the driver's
        self.next = self._draw()
        if title == "driver":
            self.sent[title] += 1
            self._driver_killed = True
            running.process.kill()
        elif found := running.below(title):
            with contextlib.suppress(ProcessLookupError):
                kill(self.rng.choice(found))
                self.sent[title] += 1
        return True

    def _struck(self) -> int:
        return len(list(self.marks.iterdir())) if self.marks.exists() else 0

    @property
    def total(self) -> int:
        """Kills so far."""
        return self.sent.total() + self._struck()

    @property
    def counted(self) -> Counter[str]:
        """Kills by what was killed or where."""
        named = Counter(".".join(p.name.split(".")[:2]) for p in self.marks.iterdir()) if self.marks.exists() else {}
        return self.sent + Counter(named)


def end_all(pids: Sequence[int], patience: float) -> None:
    """Wait for Ray's processes of killed drivers, then end what is left (its agents notice after a minute only)."""
    until = time.monotonic() + patience
    while alive(pids) and time.monotonic() < until:
        time.sleep(0.2)
    for pid in alive(pids):
        if "ray" in processes().get(pid, (0, ""))[1]:
            with contextlib.suppress(ProcessLookupError):
                kill(pid)


def disturb(model: str, words: Sequence[str], rng: random.Random, kills: int, quiet: Quiet, keep: Path) -> Run:
    """One run and its verdict; its folder is kept when anything is wrong."""
    folder = Path(tempfile.mkdtemp(prefix="run", dir=keep))
    sweep = Disturbed([*words, f"features={folder / 'features'}"], folder, rng, kills, quiet.seconds)
    began = time.monotonic()
    code, printed = sweep.run()
    run = Run(model, time.monotonic() - began, sweep.counted, sweep.starts, hung=sweep.hung)
    end_all(sweep.left, 5)
    if code != 0:
        run.differs.append(f"exit code {code}")
    if "Traceback" in printed:
        run.differs.append("a traceback was printed")
    try:
        found = facts(sweep.storage)
        run.differs += [part for part, value in quiet.facts.items() if found[part] != value]
        run.differs += [f"left: {p.name}" for p in leftovers(sweep.storage)]
    except (AssertionError, OSError, KeyError) as error:
        run.differs.append(f"it cannot be read: {error}")
    if run.kills.total():
        run.lost_s = max(0.0, run.seconds - quiet.seconds) / run.kills.total()
    if run.differs or run.hung:
        (folder / "printed.txt").write_text(printed)
        print(f"  {folder} is kept: {run.differs}", flush=True)
    else:
        shutil.rmtree(folder)
    return run


def leftovers(storage: Path) -> list[Path]:
    """What a finished sweep must not leave."""
    return [*(storage / "checkpoints").glob("*.ckpt"), *storage.rglob("*.tmp"), *storage.glob("tune")]


@dataclass
class Quiet:
    """An undisturbed run."""

    seconds: float
    facts: dict[str, Any]


def undisturbed(words: list[str], keep: Path, model: str) -> Quiet:
    """Run once with nothing killed, and set the ceilings at exactly what it cost."""
    storage = keep / f"quiet_{model}"
    plan = json.loads(here("plan", *words, "--json"))
    for unit in ("requests", "images"):
        words.append(f"budget.sweep.{unit}={sum(t[f'predicted_{unit}'] for t in plan)}")
    began = time.monotonic()
    running = Running("run", *words, f"storage={storage}", f"features={keep / f'quiet_{model}_features'}")
    code, out, err = running.end()
    assert code == 0, f"{out}\n{err}"
    return Quiet(time.monotonic() - began, facts(storage))


def long(runs: int, kills: int, seed: int, quick: bool, soaked: int, keep: Path) -> dict[str, Any]:
    """All of it; a summary."""
    card = small_data(keep)
    words = {model: sweep_words(model, card, quick) for model in ("fake", "tiny")}
    models = ["fake"] if quick else list(words)
    quiet = {model: undisturbed(words[model], keep, model) for model in models}
    for model, of in quiet.items():
        print(f"undisturbed {model}: {of.seconds:.0f} s", flush=True)
    made: list[Run] = []
    while len(made) < runs or (sum(r.kills.total() for r in made) < kills and len(made) < 2 * runs):
        model = models[len(made) % len(models)]
        rng = random.Random(f"{seed}/{len(made)}")
        made.append(disturb(model, words[model], rng, max(1, -(-kills // runs)), quiet[model], keep))
        last = made[-1]
        print(
            f"run {len(made)} {model}: {last.seconds:.0f} s, {last.kills.total()} kills, {last.starts} starts, "
            f"{'hung' if last.hung else 'differs' if last.differs else 'same'}  {dict(last.kills)}",
            flush=True,
        )
    return summary(made, quiet) | {"soak": soak(soaked, seed)}


def summary(runs: Sequence[Run], quiet: dict[str, Quiet]) -> dict[str, Any]:
    """Counts over all runs."""
    lost = [r.lost_s for r in runs if r.lost_s is not None]
    kills = sum((r.kills for r in runs), Counter[str]())
    return {
        "runs": len(runs),
        "kills": kills.total(),
        "kills_by_point": dict(kills.most_common()),
        "starts": sum(r.starts for r in runs),
        "differing": sum(bool(r.differs) for r in runs),
        "what_differed": [d for r in runs for d in r.differs],
        "hangs": sum(r.hung for r in runs),
        "undisturbed_s": {model: round(q.seconds, 1) for model, q in quiet.items()},
        "seconds": [round(r.seconds, 1) for r in runs],
        "median_s_lost_per_kill": round(statistics.median(lost), 2) if lost else None,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--kills", type=int, default=200, help="in all runs together, at least")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--soak", type=int, default=1_000_000, help="charges of the ledger's soak")
    parser.add_argument("--quick", action="store_true", help="a sweep of seconds in place of a minute")
    parser.add_argument("--json", type=Path, help="where the summary is written")
    arguments = parser.parse_args(argv)
    keep = Path(tempfile.mkdtemp(prefix="farebox-faults-"))
    os.environ["FAREBOX_CACHE"] = str(keep / "cache")
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="fb")  # short: sockets lie in it
    try:
        found = long(arguments.runs, arguments.kills, arguments.seed, arguments.quick, arguments.soak, keep)
    finally:
        shutil.rmtree(os.environ["RAY_TMPDIR"], ignore_errors=True)
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    bad = found["differing"] or found["hangs"] or found["soak"]["problems"]
    if not bad:
        shutil.rmtree(keep, ignore_errors=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
