"""Checks before a command starts: ports, Ray's token, passwords in arguments, replicas, network file systems."""

from __future__ import annotations

import contextlib
import errno
import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.errors import ConfigError, masked, shortened
from pipeline.ledger.sqlite_file import sqlite_file

NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "gpfs", "lustre", "beegfs", "glusterfs"}
    | {f"fuse.{name}" for name in ("sshfs", "ceph", "glusterfs", "s3fs", "gcsfuse", "rclone")}
)
"""Network file systems. 9p, virtiofs and overlay are not among them: containers mount local disks with these."""
INSTEAD = {
    "budget.global.url": "sqlite:////LOCAL/ledger.db (or postgresql+psycopg://USER@HOST/NAME)",
    "mlflow": "sqlite:////LOCAL/mlflow.db (or http://HOST:5000)",
}
PASSWORD_VARIABLES = {"budget.global.url": "FAREBOX_LEDGER_URL", "mlflow": "FAREBOX_MLFLOW"}
"""Names suggested for the environment variable that holds a URL with a password."""


def check_listening(address: str) -> None:
    """Raise ConfigError if nothing listens at HOST:PORT. Ray itself would wait for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # "auto"
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ConfigError(f"no Ray at address={address} ({error.strerror or error}): is the cluster up?") from error


def refuse_passwords(arguments: Sequence[str]) -> None:
    """Refuse a password in a URL on the command line, which every user of the machine can read.

    Raises:
        ConfigError: an argument contains one.
    """
    for argument in arguments:
        if masked(argument) != argument:
            key = argument.partition("=")[0]
            name = PASSWORD_VARIABLES.get(key, "FAREBOX_URL")
            variable = f"'${{oc.env:{name}}}'"
            replacement = f"{key}={variable}" if key in PASSWORD_VARIABLES else f"{variable} in its place"
            raise ConfigError(
                f"{shortened(masked(argument), 80)}: any user of this machine can read a password on the command line; "
                f"put the URL into an environment variable, as {name}, and type {replacement}"
            )


def check_free_port(port: int, host: str = "127.0.0.1") -> None:
    """Verify that a server can listen on this port.

    Raises:
        ConfigError: another program listens on it, or the system does not allow it.
    """
    if not 1 <= port <= 65535:
        raise ConfigError(f"--port {port}: expected a number from 1 to 65535")
    if (error := _cannot_listen(host, port)) is None:
        return
    others = [*range(port + 1, min(port + 100, 65536)), *range(max(port - 100, 1024), port)]
    other = next((n for n in others if n >= 1024 and _cannot_listen(host, n) is None), 0)
    what = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
    raise ConfigError(f"port {port} {what}: --port {other or 5000}")


def _cannot_listen(host: str, port: int) -> OSError | None:
    """Return the error of binding the port; None if it can be bound."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that just ended do not count
        try:
            server.bind((host, port))
        except OSError as error:
            return error
    return None


def close_ray_token(home: Path) -> None:
    """Make the file of Ray's token readable by its owner only. Ray creates it readable by everyone."""
    with contextlib.suppress(OSError):
        (home / ".ray" / "auth_token").chmod(0o600)


def check_replicas(replicas: int | str, replica_gpus: float | str, address: str | None, remote: str | None) -> None:
    """Verify that the keys of the replicas mean something for this run.

    Args:
        replicas: their number, or "auto".
        replica_gpus: GPUs of each, or "auto".
        address: the cluster; None: Ray is started on this machine.
        remote: name of the model if it is remote.

    Raises:
        ConfigError: replicas are to wait for GPUs, which join a running cluster only, and none is named; or the model
            is remote, so that the run has one replica, without a GPU.
    """
    if remote is not None:
        for key, value, allowed in (("replicas", replicas, ("auto", 1)), ("replica_gpus", replica_gpus, ("auto",))):
            if value not in allowed:
                raise ConfigError(
                    f"{key}={value:g}: the model {remote} is remote, and has one replica without a GPU: omit {key} "
                    "(rate.at_once in its card limits the requests at the same time)"
                )
    if replica_gpus != "auto" and address is None:
        raise ConfigError(f"replica_gpus={replica_gpus:g}: GPUs join a running cluster only: name it by address")


def refuse_network_sqlite(urls: Mapping[str, str], mounts: Path = Path("/proc/mounts")) -> None:
    """Refuse SQLite files on a network file system.

    SQLite's write-ahead log needs memory shared by all its processes, which two machines do not have
    (sqlite.org/wal.html), and locks that a network file system loses damage the file (sqlite.org/faq.html, question 5).
    Nothing is refused on systems without a table of mounts.

    Args:
        urls: database URLs, by the configuration key that sets each.
        mounts: the table of mounts.

    Raises:
        ConfigError: a URL names such a file.
    """
    found = {key: _network(file, mounts) for key, url in urls.items() if (file := sqlite_file(url))}
    if bad := {key: kind for key, kind in found.items() if kind}:
        raise ConfigError(
            f"{' and '.join(bad)} would lie on a network file system ({', '.join(sorted(set(bad.values())))}), where "
            "SQLite loses its locks: name a local disk or a server, " + " ".join(f"{key}={INSTEAD[key]}" for key in bad)
        )


def _network(path: Path, mounts: Path) -> str | None:
    """Return the kind of the network file system that contains a path; None for a local one."""
    try:
        lines = [line.split() for line in mounts.read_text(errors="surrogateescape").splitlines()]
    except OSError:
        return None
    places = [(Path(re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), line[1])), line[2]) for line in lines]
    real = path.resolve()
    over = [(len(at.parts), n, kind) for n, (at, kind) in enumerate(places) if real.is_relative_to(at)]
    kind = max(over)[2] if over else ""  # the deepest mount; of several at one place, the last
    return kind if kind in NETWORK else None
