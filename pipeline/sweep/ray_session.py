"""Start Ray or connect to a cluster, verify the workers' code, report a lost Ray in one line, and clean up.

Ray ends a driver whose raylet or GCS (global control service) is gone: with exit code 1, after up to a minute, and
without running any Python code. Therefore a thread checks whether both accept connections. As soon as one does not, it
prints a line and ends the process with Farebox's own exit code.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._private import worker as ray_worker
from ray.exceptions import RayError
from ray.job_config import JobConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.blackbox.ray_actors import NAMESPACE
from pipeline.console import Echo
from pipeline.errors import ConfigError, EndpointLost, first_line
from pipeline.source_code import ROOT, ImportedCode, code_difference, code_probe, driver_code
from pipeline.sweep.preflight import check_listening, close_ray_token

OBJECT_STORE = 512 * 2**20
"""Bytes of shared memory of a Ray that we start: responses are at most 64 MiB, and few are in flight."""
PROBE_TIMEOUT_S = 120.0
"""Seconds within which each node must report its code digest."""
WATCH_INTERVAL_S = 0.25
"""Seconds between two checks of Ray's processes: a driver may end a second after they do."""
GCS_PATIENCE_S = 45.0
"""Seconds for which the GCS of a cluster may be unreachable, as during a restart; Ray itself gives up after 60."""
LOST_EXIT_CODE = 3
LOST = "Ray was lost ({}): finished trials are kept, the same command continues the others"


class DriverPath(JobConfig):  # type: ignore[misc]
    """Job configuration that makes workers import the driver's packages.

    Ray puts the current folder first on the workers' `sys.path`, except for jobs with a working folder. So the folder
    in which the command is typed could replace `methods` and `pipeline`, or any module of the standard library.
    """

    def __init__(self) -> None:
        installed = ROOT.name in ("site-packages", "dist-packages")  # on the path, behind the standard library
        super().__init__(_py_driver_sys_path=[] if installed else [str(ROOT)])

    def _runtime_env_has_working_dir(self) -> bool:
        return True


@contextlib.contextmanager
def ray_session(address: str | None, echo: Echo, **options: Any) -> Iterator[None]:
    """Connect to the cluster at `address`, or start Ray on this machine, and disconnect or stop it at the end.

    Ray started here listens on the loopback interface only, and its session folder is removed at the end.

    Args:
        address: HOST:PORT or "auto"; None starts Ray here.
        echo: prints a line.
        **options: further arguments of `ray.init`.

    Raises:
        ConfigError: Ray does not start, or a node imports other code than the driver.
    """
    logging.getLogger("ray").setLevel(logging.CRITICAL)  # rows and errors of Farebox report what goes wrong
    folder: Path | None = None
    try:
        if address is None:
            folder = _start(echo, options)
        else:
            check_listening(address)
            _init(f"at address={address}", {"address": address, **options})
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _interrupt)  # Ray's own handler aborts with a dump of its stack
        with _watched(0.0 if address is None else GCS_PATIENCE_S, folder):
            check_nodes(driver_code())
            yield
    finally:
        ray.shutdown()
        if folder is not None:
            remove_session(folder)


def _interrupt(*_: object) -> None:
    """Treat SIGTERM, which batch systems send, as Ctrl-C."""
    raise KeyboardInterrupt


def lost(error: BaseException) -> EndpointLost:
    """Return the error for a run that Ray ended; raise an error again that is not Ray's.

    Tune raises a RuntimeError when Ray killed a worker because memory ran out.
    """
    text = first_line(error)
    if isinstance(error, RuntimeError) and not isinstance(error, RayError) and "Caught unexpected" not in text:
        raise error
    if "low on memory" in text:
        text = "its workers were killed because memory ran out: free some, or lower replicas and concurrency"
    return EndpointLost(LOST.format(text[:120]))


def check_nodes(expected: ImportedCode) -> None:
    """Verify that the workers of each node import the driver's code.

    Raises:
        ConfigError: a node imports other code, or does not answer.
    """
    probe = ray.remote(num_cpus=0, max_retries=0)(code_probe())
    addresses = {node["NodeID"]: str(node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"]}
    pending = {
        probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(): address
        for node, address in addresses.items()
    }
    for reference, address in pending.items():
        try:
            imported = ImportedCode(*ray.get(reference, timeout=PROBE_TIMEOUT_S))
        except RayError as error:
            raise ConfigError(f"node {address} did not report its code digest: {first_line(error)[:160]}") from error
        if difference := code_difference(expected, imported, address):
            raise ConfigError(difference)


@contextlib.contextmanager
def _watched(gcs_patience_s: float, folder: Path | None) -> Iterator[None]:
    """In the block, end this process with one line as soon as Ray's raylet, agents or GCS do not accept connections."""
    context, stop = ray.get_runtime_context(), threading.Event()
    node = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    host = str(node["NodeManagerAddress"])
    services = {
        "its metrics agent ended": ((host, int(node["MetricsAgentPort"])), 0.0),  # the raylet ends a second later
        "its environment agent ended": ((host, int(node["RuntimeEnvAgentPort"])), 0.0),  # likewise
        "its raylet ended": ((host, int(node["NodeManagerPort"])), 0.0),
        "its control service (GCS) ended": (_host_and_port(context.gcs_address), gcs_patience_s),
    }

    def watch() -> None:
        accepted_at: dict[str, float] = {}  # an agent accepts connections some seconds after Ray has started
        while not stop.wait(WATCH_INTERVAL_S):
            for what, (address, patience_s) in services.items():
                if not refused(address):
                    accepted_at[what] = time.monotonic()
                elif what in accepted_at and time.monotonic() - accepted_at[what] > patience_s and not stop.is_set():
                    _end(LOST.format(what), folder)

    thread = threading.Thread(target=watch, name="ray-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def refused(address: tuple[str, int]) -> bool:
    """Return whether nothing listens at the address. No answer counts as listening."""
    try:
        socket.create_connection(address, timeout=5).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _end(line: str, folder: Path | None) -> None:
    """Print the line and end the process at once. Any further call to Ray would block or end it without a message."""
    sys.stderr.write(("\n" if sys.stderr.isatty() else "") + f"farebox: {line}\n")
    sys.stderr.flush()
    sys.stdout = sys.stderr = io.StringIO()  # the main thread still runs for a moment
    if folder is not None:
        with contextlib.suppress(Exception):
            ray_worker._global_node.kill_all_processes(check_alive=False, allow_graceful=False)
        remove_session(folder)
    os._exit(LOST_EXIT_CODE)


def _start(echo: Echo, options: dict[str, Any]) -> Path:
    """Start Ray on this machine and return its session folder."""
    if (mode := os.environ.get("RAY_AUTH_MODE", "token")) != "token":
        echo(f"RAY_AUTH_MODE={mode}: any user of this machine can run code as you during the run")
    own = {"address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE, **options}
    with _loopback():
        context = _init("on this machine", own)
    close_ray_token(Path.home())
    return Path(str(context.address_info["session_dir"]))


def _init(where: str, options: dict[str, Any]) -> Any:
    ray_worker._worker_logs_enabled = False  # else Ray prints a paragraph about each worker that it restarts
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray's own deprecation notes
            return ray.init(
                **options, namespace=NAMESPACE, log_to_driver=False, configure_logging=False, job_config=DriverPath()
            )
    except Exception as error:  # ConnectionError, RuntimeError, ValueError, TimeoutError, ...
        raise ConfigError(f"Ray did not start {where}: {first_line(error)}") from error


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    """Make Ray listen on the loopback interface only.

    Ray replaces a node address of 127.0.0.1 by the machine's own, except where its switch for clusters is off.
    """
    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    stated = os.environ.get(name)
    ray_constants.ENABLE_RAY_CLUSTER, os.environ[name] = False, "0"  # of this process; of those that it starts
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        os.environ.pop(name)
        if stated is not None:
            os.environ[name] = stated


def remove_session(folder: Path) -> None:
    """Remove the session folder of a Ray that has ended, and the link `session_latest` if it points there."""
    for _ in range(10):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            break
        time.sleep(0.2)  # its last processes write while they end
    latest = folder.parent / "session_latest"
    with contextlib.suppress(OSError):
        if latest.is_symlink() and latest.readlink().name == folder.name:
            latest.unlink()
