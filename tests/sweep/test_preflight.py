"""Checks of the machine: where a SQLite file may be, told from a table of mounts, and whether a port is free."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.sweep.preflight import (
    check_free_port,
    check_replicas,
    close_ray_token,
    refuse_network_sqlite,
)

MOUNTS = r"""
overlay / overlay rw 0 0
/dev/sda1 /home ext4 rw 0 0
systemd-1 /shared autofs rw 0 0
files:/farebox /shared nfs4 rw,vers=4.2 0 0
/dev/sdb1 /shared/scratch xfs rw 0 0
//files/us /mnt/my\040share cifs rw 0 0
C: /mnt/c 9p rw 0 0
host /mnt/host virtiofs rw 0 0
"""


@pytest.fixture
def mounts(tmp_path: Path) -> Path:
    path = tmp_path / "mounts"
    path.write_text(MOUNTS.lstrip())
    return path


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("sqlite:////shared/mine/ledger.db", "nfs4"),
        ("sqlite+pysqlite:////shared/ledger.db?timeout=3", "nfs4"),
        ("sqlite:////mnt/my share/ledger.db", "cifs"),
    ],
)
def test_sqlite_on_a_network_file_system_is_refused(url: str, kind: str, mounts: Path) -> None:
    with pytest.raises(ConfigError, match=rf"network file system \({kind}\).*budget.global.url=sqlite:////LOCAL"):
        refuse_network_sqlite({"budget.global.url": url, "mlflow": "sqlite:////home/me/mlflow.db"}, mounts)


def test_one_message_names_both_databases(mounts: Path) -> None:
    with pytest.raises(ConfigError, match=r"budget\.global\.url=.* mlflow=sqlite:////LOCAL"):
        refuse_network_sqlite(
            {"budget.global.url": "sqlite:////shared/a.db", "mlflow": "sqlite:////shared/b.db"}, mounts
        )


@pytest.mark.parametrize(
    "url",
    [
        *("sqlite:////root/ledger.db", "sqlite:////home/me/ledger.db", "sqlite:////shared/scratch/ledger.db"),
        *("sqlite:////mnt/c/ledger.db", "sqlite:////mnt/host/ledger.db", "sqlite:////sharedby/ledger.db"),
        *("sqlite://", "sqlite:///:memory:", "postgresql+psycopg://me@shared/shared", "http://shared:5000"),
    ],
)
def test_other_locations_are_accepted(url: str, mounts: Path) -> None:
    refuse_network_sqlite({"budget.global.url": url}, mounts)


def test_without_a_table_of_mounts_nothing_is_refused(tmp_path: Path) -> None:
    refuse_network_sqlite({"budget.global.url": "sqlite:////shared/ledger.db"}, tmp_path / "none")


def test_only_the_user_can_read_the_token_of_ray(tmp_path: Path) -> None:
    close_ray_token(tmp_path)  # there is none yet
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("secret")
    token.chmod(0o644)
    close_ray_token(tmp_path)
    assert token.stat().st_mode & 0o777 == 0o600


def test_a_port_in_use_is_refused_and_a_free_one_suggested() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"^port {port} is in use: --port \d+$") as error:
            check_free_port(port)
        other = int(str(error.value).split()[-1])
        assert other != port
        check_free_port(other)
    check_free_port(port)


@pytest.mark.parametrize("port", [-1, 0, 65536, 10**9])
def test_an_invalid_port_is_refused(port: int) -> None:
    with pytest.raises(ConfigError, match="expected a number from 1 to 65535"):
        check_free_port(port)


def test_replicas_wait_for_gpus_on_a_named_cluster_only() -> None:
    check_replicas(4, "auto", None, None)
    check_replicas("auto", 0.5, "auto", None)
    with pytest.raises(ConfigError, match=r"replica_gpus=0\.5: GPUs join a running cluster only: name it by address"):
        check_replicas("auto", 0.5, None, None)


@pytest.mark.parametrize(("replicas", "gpus", "found"), [(4, "auto", "replicas=4"), ("auto", 1.0, "replica_gpus=1")])
def test_a_remote_model_has_one_replica(replicas: int | str, gpus: float | str, found: str) -> None:
    check_replicas(1, "auto", None, "served")
    with pytest.raises(ConfigError, match=f"^{found}: the model served is remote"):
        check_replicas(replicas, gpus, "auto", "served")
