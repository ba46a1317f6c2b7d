"""Which large packages each command imports: their import is most of the time of a short command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import here
from tests.support.without_ray import without_ray

OF_DATA = ("PIL", "pyarrow.parquet")
"""What a plan reads the embedded data sets with."""
LARGE = (
    *("torch", "torchvision", "open_clip", "ray", "mlflow", "matplotlib", "pandas", "scipy.stats", "scipy.special"),
    *("cma", "rich", "sqlalchemy.dialects.postgresql", *OF_DATA),
)
PROGRAM = f"""
import contextlib, io, json, sys
import farebox
from pipeline.cli import main
found = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main(words)
    found.append([name for name in {LARGE} if name in sys.modules])
print(json.dumps(found))
"""
RUN = ("sweep=smoke", "model=tiny", "methods=zero_shot", "shots=1", "seeds=1")


def imported(*commands: str) -> list[set[str]]:
    """Run commands in one new process; return which of `LARGE` are imported after each of them."""
    words = json.dumps([command.split() for command in commands])
    done = subprocess.run([sys.executable, "-c", PROGRAM, words], capture_output=True, text=True, check=True)
    return [set(names) for names in json.loads(done.stdout)]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished sweep with its leaderboard and MLflow's copy of the rows."""
    word = f"storage={tmp_path_factory.mktemp('imports') / 'storage'}"
    with without_ray():
        here("run", *RUN, word)
    return word


def test_help_and_lists_import_none_of_the_large_packages() -> None:
    commands = ("--help", "--version", "run --help", "datasets", "models", "audit", "methods")
    assert dict(zip(commands, imported(*commands), strict=True)) == {command: set() for command in commands}


def test_commands_that_read_results_import_no_large_package(storage: str) -> None:
    commands = ("status", "ledger", "leaderboard", "leaderboard --all", "leaderboard --raw")
    status, ledger, *boards = imported(*(f"{command} {storage}" for command in commands))
    assert status == ledger == set()
    # pyarrow imports pandas when it makes an array, which the leaderboard does; its intervals need scipy.special
    assert all(board <= {"pandas", "scipy.special"} for board in boards)


def test_a_plan_needs_neither_torch_nor_open_clip_once_the_facts_of_its_model_are_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAREBOX_CACHE", str(tmp_path))
    (first,) = imported("plan sweep=demo")
    assert first >= {"torch", "open_clip"} and not first & {"ray", "mlflow", "matplotlib", "cma"}
    # pyarrow imports pandas when it turns a column into an array
    assert imported("plan sweep=demo")[0] <= {"pandas", *OF_DATA}


def test_a_run_with_nothing_to_do_imports_no_package_that_trials_need(storage: str) -> None:
    (found,) = imported(" ".join(("run", *RUN, storage)))
    assert found <= {"pandas", "scipy.special", *OF_DATA}


def test_sync_imports_mlflow_but_not_torch(storage: str) -> None:
    assert {"mlflow", "torch"} & imported(f"sync {storage}")[0] == {"mlflow"}
