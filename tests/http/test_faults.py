"""Whole sweeps through faults on purpose and kills of server and driver, and the time that a rate limit implies."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipeline.ledger.ledger import Ledger
from pipeline.ledger.records import PurseRecord
from pipeline.remote.call_log import FILE, read, total_of
from pipeline.results.store import ResultStore
from tests.support.command import FAREBOX, ROOT, free_port, ledger_record, wait_until
from tests.support.lab import run_here
from tests.support.service import call, serving

pytestmark = [pytest.mark.http, pytest.mark.timeout(3000)]
FAULTS = ("fault.every_429=6", "fault.drop_every=4", "fault.truncate_every=7", "fault.down_every=50")
SWEEP = (
    "sweep=smoke",
    "views=2",
    "shots=8",
    "seeds=[1,2,3]",
    "methods=[zero_shot,gda,score_ridge,taskres,linear_probe]",
)
CALLS_A_KILL = 40
PER_IMAGE = 1_000
"""Price of an image in micro-dollars."""
AT_ONCE = 4
ATTEMPTS = 5
"""Measurements of a time, of which one must be as implied: others may use the machine during the rest."""


class Service:
    """A server in a process of its own, which is killed and started again at one address."""

    def __init__(self) -> None:
        self.port, self.seed, self.made = free_port(), 0, Counter[str]()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        self.seed += 1
        words = ("serve", "model=tiny", f"port={self.port}", *FAULTS, f"fault.seed={self.seed}")
        self.process = subprocess.Popen([*FAREBOX, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert "serving tiny" in self.process.stdout.readline()
        wait_until(self.counts, "the server answers")

    def counts(self) -> dict[str, Any] | None:
        try:
            return call(f"{self.url}/v1/count")[1]
        except OSError:
            return None

    def kill(self) -> None:
        if counts := self.counts():
            self.made.update(counts["faults"])
        self.process.kill()
        self.process.communicate()


def numbers(storage: Path) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """What must not depend on where the model runs, and the bill of every phase."""
    rows = ResultStore(storage).read().to_pylist()
    units = ("requests", "images", "prompts", "outputs")
    bills = [key for key in rows[0] if key.endswith(units) and not key.startswith(("http_", "computed_"))]
    keys = ("status", "accuracy", "nll", "predictions_digest", *bills)
    return {(row["method"], row["seed"]): tuple(row[key] for key in keys) for row in rows}


def purse(storage: Path) -> PurseRecord:
    ledger = Ledger(f"sqlite:///{storage / 'ledger.db'}")
    (found,) = ledger.money.purses()
    ledger.close()
    return found


def write_card(path: Path, url: str, info: dict[str, Any], *lines: str) -> None:
    model = ("adapter: farebox", "grant: TEXT+FEATURES", "identity: {model: tiny}", "image: {size: 64}")
    facts = (f"feature_dim: {info['feature_dim']}", f"logit_scale: {info['logit_scale']!r}", "text_norm: 18.25")
    path.write_text("\n".join(("kind: http", f"url: {url}", *model, *facts, *lines)) + "\n")


def test_faults_and_kills_change_no_result_and_no_bill(tmp_path: Path, card: Path) -> None:
    words, storage = (*SWEEP, f"datasets=[{card}]"), tmp_path / "remote"
    run_here(*words, "model=tiny", f"storage={tmp_path / 'local'}")
    service = Service()
    info = call(f"{service.url}/v1/info")[1]
    own = ("batch: {images: 1}", "retry: {first_s: 0.02, most_s: 1, tries: 60}", f"rate: {{at_once: {AT_ONCE}}}")
    price = f"price: {{usd_per_image: {PER_IMAGE / 1e6}, as_of: 2026-11-01}}"
    write_card(tmp_path / "api.yaml", service.url, info, *own, price)
    usd, kills, runs = 0.5, Counter[str](), 0
    while True:
        runs += 1
        assert runs < 40, "the sweep does not end"
        command = [sys.executable, "-m", "tests.http.drive", *words, f"storage={storage}"]
        command += [f"model={tmp_path / 'api.yaml'}", f"budget.usd={usd:.2f}"]
        driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        before = total_of(storage).calls
        while driver.poll() is None:
            sent = total_of(storage).calls - before
            if (storage / "ledger.db").exists() and sent:
                assert purse(storage).spent <= usd * 1e6
            if sent >= CALLS_A_KILL and sum(kills.values()) < 6:
                victim = ("server", "driver", "server")[sum(kills.values()) % 3]
                kills[victim] += 1
                before = total_of(storage).calls
                if victim == "server":
                    service.kill()
                    service.start()
                else:
                    driver.kill()
            time.sleep(0.05)
        said = driver.communicate()[0]
        if driver.returncode == 0 and not _failed(storage):
            break
        if driver.returncode > 0:  # the same command continues: with a higher limit, or when the server is back
            assert driver.returncode == 3, said
            assert "asked of account 'sweep:" in said or "did not answer in 60 tries" in said, said
            usd += 0.1 if "asked of account" in said else 0
    service.kill()
    assert kills["server"] >= 3 and kills["driver"] >= 2
    assert sum(service.made.values()) >= 150, service.made
    assert numbers(storage) == numbers(tmp_path / "local")
    assert ledger_record(storage)["money"][0]["settled"] <= usd
    _check_calls(storage, kills["driver"], purse(storage))
    print(json.dumps({"faults": service.made, "kills": kills, "runs": runs, "sent": vars(total_of(storage))}))
    offline = tmp_path / "offline"
    run_here(*words, f"model={tmp_path / 'api.yaml'}", f"storage={offline}", "offline=true")
    assert numbers(offline) == numbers(storage) and total_of(offline).calls == 0, "the server is gone"


def _failed(storage: Path) -> bool:
    """Whether the same command has trials to run again: the server was away for longer than a call is repeated."""
    return any(row["status"] == "failed" for row in ResultStore(storage).read().to_pylist())


def _check_calls(storage: Path, driver_kills: int, paid: PurseRecord) -> None:
    """Physical calls are answers and recorded repetitions; an answer is not asked for again."""
    keys, answers, outcomes = dict[int, str](), Counter[str](), Counter[str]()
    for record in read(storage / FILE):
        if "key" in record:
            keys[record["n"]] = record["key"]
        else:
            outcomes[record["outcome"]] += 1
            answers[keys[record["n"]]] += record["outcome"] == "answered"
    total, unknown = total_of(storage), len(keys) - sum(outcomes.values())
    assert total.calls == outcomes["answered"] + outcomes["refused"] + outcomes["lost"] + unknown
    assert unknown <= driver_kills * AT_ONCE
    repeated = sum(n - 1 for n in answers.values() if n > 1)  # answered, and killed before it was recorded
    assert repeated <= driver_kills * AT_ONCE
    assert paid.spent >= total.micro_usd >= paid.spent - driver_kills * AT_ONCE * PER_IMAGE


def test_a_rate_limit_takes_the_time_that_it_implies(tmp_path: Path, card: Path) -> None:
    """Never less. Not more either, beside what the sweep takes without a limit, unless others use the machine."""
    with serving("model=tiny") as url:
        info = call(f"{url}/v1/info")[1]
        for attempt in range(ATTEMPTS):
            took = [
                _timed(tmp_path / f"{attempt}{n}", card, url, info, rate) for n, rate in enumerate((None, 600, None))
            ]
            implied = total_of(tmp_path / f"{attempt}1" / "storage").images / 10
            assert implied > 10 and took[1] >= 0.95 * implied
            if took[1] <= 1.05 * implied + max(took[0], took[2]):
                return
    raise AssertionError(
        f"took {took[1]:.1f} s, {implied:.1f} s are implied, {took[0]:.1f} and {took[2]:.1f} s without"
    )


def _timed(folder: Path, card: Path, url: str, info: dict[str, Any], rate: int | None) -> float:
    """Run a sweep with records of its own at most at this rate of images a minute; return the seconds."""
    folder.mkdir()
    limit = () if rate is None else (f"rate: {{images_per_minute: {rate}}}",)
    write_card(folder / "api.yaml", url, info, "batch: {images: 2}", *limit)
    words = (*SWEEP[:3], "seeds=1", "methods=[gda]", f"datasets=[{card}]", f"model={folder / 'api.yaml'}")
    began = time.monotonic()
    run_here(*words, f"storage={folder / 'storage'}")
    return time.monotonic() - began
