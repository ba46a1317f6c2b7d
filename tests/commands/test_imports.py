"""Which large packages each command imports: their import is most of the time of a short command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.lab import run_here

LARGE = ("torch", "torchvision", "open_clip", "ray", "mlflow", "matplotlib", "pandas", "scipy.stats", "cma", "rich")
PROGRAM = f"""
import contextlib, io, sys
import farebox
from pipeline.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main(sys.argv[1:])
print(*(name for name in {LARGE} if name in sys.modules))
"""


def imported(*words: str) -> set[str]:
    """Return which of `LARGE` a command imports."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("imports")
    word = f"storage={folder / 'storage'}"
    run_here("sweep=smoke", "model=fake", "methods=zero_shot", "shots=1", "seeds=1", word)
    return word


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["run", "--help"], ["datasets"], ["models"], ["audit"]])
def test_help_and_lists_import_none_of_the_large_packages(words: list[str]) -> None:
    assert imported(*words) == set()


@pytest.mark.parametrize("command", ["status", "ledger", "leaderboard", "leaderboard --all", "leaderboard --raw"])
def test_commands_that_read_results_import_no_large_package(storage: str, command: str) -> None:
    # pyarrow imports pandas when it makes an array, which the leaderboard does
    assert imported(*command.split(), storage) <= ({"pandas"} if "leaderboard" in command else set())


def test_methods_are_listed_without_torch() -> None:
    assert imported("methods") == set()


def test_a_plan_needs_neither_torch_nor_open_clip_once_the_facts_of_its_model_are_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAREBOX_CACHE", str(tmp_path))
    first = imported("plan", "sweep=demo")
    assert first >= {"torch", "open_clip"} and not first & {"ray", "mlflow", "matplotlib", "cma"}
    # pyarrow imports pandas when it turns a column into an array
    assert imported("plan", "sweep=demo") <= {"pandas"}


def test_a_run_with_nothing_to_do_imports_neither_ray_nor_mlflow_nor_open_clip(storage: str) -> None:
    words = ("run", "sweep=smoke", "model=fake", "methods=zero_shot", "shots=1", "seeds=1", storage)
    imported(*words)  # writes the leaderboard and MLflow's copy of the rows
    assert not imported(*words) & {"ray", "mlflow", "matplotlib", "open_clip", "cma"}


def test_sync_imports_mlflow_but_not_torch(storage: str) -> None:
    assert {"mlflow", "torch"} & imported("sync", storage) == {"mlflow"}
