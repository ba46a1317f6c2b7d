"""Run the real command line in its own processes, to its end or until it is killed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from pipeline.cli import main
from tests.support.patience import COMMAND_S, patience

ROOT = Path(__file__).resolve().parents[2]
FAREBOX = (sys.executable, "-m", "pipeline.cli")
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Helper processes of Ray, which notice after a minute that their Ray is gone."""


def farebox(
    *words: str, expect: int | None = 0, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and check its exit code."""
    done = subprocess.run(
        [*FAREBOX, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=patience(), check=False
    )
    assert expect is None or done.returncode == expect, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def free_port() -> int:
    """Return a port on this machine that nothing uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def here(*words: str, expect: int = 0) -> str:
    """Run a command that only reads in this process; return what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(words) == expect
    return out.getvalue()


def records(storage: Path) -> list[dict[str, Any]]:
    """Return what `farebox leaderboard --raw --format json` prints."""
    found: list[dict[str, Any]] = json.loads(here("leaderboard", f"storage={storage}", "--raw", "--format", "json"))
    return found


def below(roots: set[int], title: str = "") -> list[int]:
    """Ids of the processes started by these whose title starts so, oldest first."""
    table, found, last = processes(), list[int](), roots
    while last:
        last = {pid for pid, (parent, _) in table.items() if parent in last}
        found += last
    return sorted(pid for pid in found if table[pid][1].startswith(title))


def _heed_interrupts() -> None:
    """Accept Ctrl-C: a background process of a shell ignores it, and so would the processes that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Running:
    """A running command in its own process group, and the processes that it started (from /proc)."""

    def __init__(
        self,
        *words: str,
        env: Mapping[str, str] | None = None,
        output: IO[str] | None = None,
        program: Sequence[str] = FAREBOX,
    ) -> None:
        self.process = subprocess.Popen(
            [*program, *words],
            cwd=ROOT,
            env=env,
            stdout=output or subprocess.PIPE,
            stderr=subprocess.STDOUT if output else subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=_heed_interrupts,
        )

    def wait_for(self, true: Callable[[], object], what: str) -> None:
        """Wait until it is true; AssertionError if the command ends first."""
        wait_until(lambda: true() or self.process.poll() is not None, what)
        if not true():
            out, err = self.process.communicate()
            raise AssertionError(f"the command ended ({self.process.returncode}) before: {what}\n{out}\n{err}")

    def below(self, title: str = "") -> list[int]:
        """Ids of the processes started by the command whose title starts so, oldest first."""
        return below({self.process.pid}, title)

    def end(self) -> tuple[int, str, str]:
        """Wait until it ends; return its exit code, stdout and stderr."""
        out, err = self.process.communicate(timeout=patience())
        return self.process.returncode, out, err

    def kill(self) -> None:
        """Kill the driver alone, as a crash would, and wait until its Ray has ended, except `AGENTS`."""
        left = self.below()
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate(timeout=patience())
        wait_until(lambda: all(processes().get(p, (0, AGENTS[0]))[1] in AGENTS for p in alive(left)), "Ray is gone", 90)


def processes() -> dict[int, tuple[int, str]]:
    """Return (parent, title) of every process by id."""
    table = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            table[int(folder.name)] = (parent, (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip())
        except (OSError, ValueError):  # it has ended meanwhile
            continue
    return table


def alive(pids: Sequence[int]) -> list[int]:
    """Return those that are running, without zombies."""
    return [pid for pid in pids if processes().get(pid, (0, ""))[1]]


def kill(pid: int) -> None:
    """Send SIGKILL."""
    os.kill(pid, signal.SIGKILL)


def wait_until(true: Callable[[], object], what: str, seconds: float = COMMAND_S) -> None:
    """Wait until it is true. AssertionError after so many seconds, scaled by FAREBOX_TEST_PATIENCE."""
    deadline = time.monotonic() + patience(seconds)
    while not true():
        assert time.monotonic() < deadline, f"not within {patience(seconds):.0f} s: {what}"
        time.sleep(0.2)  # `true` may read all of /proc


def charges(storage: Path) -> int:
    """Return the number of charges in the ledger of a sweep; 0 if there is no ledger yet."""
    path = storage / "ledger.db"
    if not path.exists():
        return 0
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10) as db:
            return int(db.execute("select count(*) from ledger_charge").fetchone()[0])
    except sqlite3.OperationalError:  # its tables are being made
        return 0


def ledger_record(storage: Path, *words: str) -> dict[str, Any]:
    """Return what `farebox ledger --json` prints; it must state no problem. `words`: overrides that name the ledger."""
    found: dict[str, Any] = json.loads(here("ledger", f"storage={storage}", *words, "--json"))
    assert found["problems"] == []
    return found
