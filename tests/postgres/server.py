"""A PostgreSQL server of its own for as long as a command runs: python -m tests.postgres.server COMMAND ...

It listens on loopback alone, at a port that was free, with a password made for it; its data are gone when it stops. The
command finds its URL in FAREBOX_TEST_LEDGER. PostgreSQL refuses to run as root, which starts it as the user `postgres`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = os.geteuid() == 0
INSTALL = ["apt-get", "install", "--yes", "--quiet", "--no-install-recommends", "postgresql"]


def binaries() -> Path:
    """The folder of PostgreSQL's programs; root installs Debian's package where there is none."""
    for attempt in ("look", "install"):
        found = [*Path("/usr/lib/postgresql").glob("*/bin/pg_ctl")]
        if found:
            return max(found, key=lambda path: float(path.parts[-3])).parent
        if on_path := shutil.which("pg_ctl"):
            return Path(on_path).resolve().parent
        if attempt == "look" and ROOT and shutil.which("apt-get"):
            subprocess.run(["apt-get", "update", "--quiet"], check=True)
            subprocess.run(INSTALL, check=True)
    sys.exit(f"no PostgreSQL here: install it as root ({' '.join(INSTALL)})")


@contextlib.contextmanager
def server() -> Iterator[str]:
    """The URL of a running server with an empty database."""
    programs = binaries()
    someone: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": []} if ROOT else {}
    password = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="farebox-postgres-") as home, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        secret, data = Path(home) / "password", Path(home) / "data"
        secret.write_text(password)
        for path in (Path(home), secret) if ROOT else ():
            shutil.chown(path, "postgres", "postgres")

        def call(program: str, *words: str) -> None:
            done = subprocess.run(
                [str(programs / program), *words], cwd=home, text=True, stderr=subprocess.STDOUT, **someone,
                stdout=(Path(home) / "out").open("w"), check=False,
            )  # fmt: skip
            if done.returncode:
                sys.exit(f"{program} ended with {done.returncode}:\n{(Path(home) / 'out').read_text()}")

        call("initdb", f"--pgdata={data}", "--username=farebox", f"--pwfile={secret}", "--auth=scram-sha-256")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories=''"
        call("pg_ctl", "start", f"--pgdata={data}", f"--log={home}/log", "--wait", f"--options={options}")
        try:
            yield f"postgresql+psycopg://farebox:{password}@127.0.0.1:{port}/postgres"
        finally:
            call("pg_ctl", "stop", f"--pgdata={data}", "--mode=fast")


if __name__ == "__main__":
    with server() as url:
        code = subprocess.run(sys.argv[1:], env=os.environ | {"FAREBOX_TEST_LEDGER": url}, check=False).returncode
    sys.exit(code)
