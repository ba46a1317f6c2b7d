"""Run a command and write what Ray stores while it runs: python -m tests.remote.ray_state FILE COMMAND ...

The file gets the tables of jobs, nodes, workers and actors, and every entry of the GCS (global control service).
"""

import contextlib
import sys
import threading
from pathlib import Path

import ray
from ray._private import state
from ray._private.worker import global_worker

from pipeline.cli import main

SPACES = (None, b"", b"fun", b"job", b"session", b"cluster", b"usage_stats", b"dashboard", b"_ray_internal_dashboard")


def stored() -> str:
    """Return what Ray stores now, as text."""
    gcs, tables = global_worker.gcs_client, [state.jobs(), state.nodes(), state.workers(), state.actors()]
    entries = [(key, gcs.internal_kv_get(key, space)) for space in SPACES for key in gcs.internal_kv_keys(b"", space)]
    return repr((tables, entries))


def watch(path: Path, ended: threading.Event) -> None:
    """Append what Ray stores to a file, once a second."""
    while not ended.wait(1.0):
        with contextlib.suppress(Exception):  # it starts, or stops
            if ray.is_initialized():
                with path.open("a") as file:
                    file.write(stored() + "\n")


if __name__ == "__main__":
    ended = threading.Event()
    threading.Thread(target=watch, args=(Path(sys.argv[1]), ended), daemon=True).start()
    code = main(sys.argv[2:])
    ended.set()
    sys.exit(code)
