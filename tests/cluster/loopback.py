"""A Ray cluster of one node behind an SSH server on this machine: ray up, submit, kill, submit again, jobs, ray down.

Root creates an unprivileged user with keys, and an sshd for it on 127.0.0.1 at a free port. `cluster.yaml` is used with
its on-premise provider and without its set-up commands. The user, its processes and its files are removed at the end.
Needs Debian's openssh-server and rsync.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import yaml

from tests.support.command import free_port
from tests.support.patience import patience

ROOT = Path(__file__).resolve().parents[2]
USER = "fareboxtest"
HOME = Path("/home") / USER
STORAGE = HOME / "runs/loop"
WORDS = (
    *("sweep=smoke", f"storage={STORAGE}", "model=tiny", "datasets=[icons]", "methods=[zero_shot,craft]"),
    *("budget.requests=3000", "checkpoint_s=1", "replicas=1", "concurrency=1", "eval_shift=false"),
)
TIMEOUT_S = patience(300)


def echo(line: str) -> None:
    print(line, flush=True)


def as_user(command: str, expect: int | None = 0) -> str:
    """Run a line in a login shell of the user; print it and its output."""
    echo(f"$ {command}")
    began = time.monotonic()
    environment = {"HOME": str(HOME), "USER": USER, "LOGNAME": USER, "TERM": "dumb", "PATH": os.environ["PATH"]}
    done = subprocess.run(
        ["bash", "--login", "-c", f". ~/.bashrc; cd ~/farebox && {command}"],
        user=USER, group=USER, extra_groups=[], cwd="/", env=environment, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=TIMEOUT_S,
    )  # fmt: skip
    echo(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", done.stdout).strip())
    echo(f"-- exit {done.returncode} after {time.monotonic() - began:.1f} s\n")
    assert expect is None or done.returncode == expect, f"exit {done.returncode}, wanted {expect}"
    return done.stdout


def make_user() -> int:
    """The user, its interpreter, its keys; the port of its sshd."""
    subprocess.run(["useradd", "--create-home", "--shell", "/bin/bash", "--password", "*", USER], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    base = Path(sys.base_prefix) / "bin" / version
    try:
        subprocess.run([base, "-V"], user=USER, group=USER, check=True, capture_output=True)
    except PermissionError:
        base = Path("/usr/bin") / version  # ours is in a folder that only root may enter
    bin_ = HOME / "bin"
    bin_.mkdir()
    (bin_ / "python").symlink_to(base)
    (bin_ / "ray").write_text(f"#!{bin_}/python\nimport sys\nfrom ray.scripts.scripts import main\nsys.exit(main())\n")
    (bin_ / "ray").chmod(0o755)
    packages = next(p for p in sys.path if p.endswith("site-packages"))
    lines = {
        "PATH": f"{bin_}:$PATH",
        "PYTHONPATH": f"{HOME}/farebox:{packages}",
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": f"{HOME}/t",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    (HOME / ".bashrc").write_text("".join(f"export {key}={value}\n" for key, value in lines.items()))
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "build", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, HOME / "farebox", ignore=ignored)

    ssh, port = HOME / ".ssh", free_port()
    ssh.mkdir(mode=0o700)
    for key in ("id", "host"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / key)], check=True)
    (ssh / "authorized_keys").write_text((ssh / "id.pub").read_text())
    (ssh / "config").write_text(f"Host 127.0.0.1\n  Port {port}\n")
    (ssh / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {ssh}/host\nAllowUsers {USER}\nPasswordAuthentication no\n"
        f"UsePAM no\nPidFile none\nAuthorizedKeysFile {ssh}/authorized_keys\n"
    )
    subprocess.run(["chown", "-R", f"{USER}:{USER}", str(HOME)], check=True)
    return port


def cluster_yaml() -> None:
    """`cluster.yaml` with its on-premise provider, on this machine."""
    made = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    for key in ("head_node_type", "available_node_types", "idle_timeout_minutes", "file_mounts", "setup_commands"):
        made.pop(key)  # the code and the token are there already: head and user's machine are one
    made |= {
        "provider": {"type": "local", "head_ip": "127.0.0.1", "worker_ips": []},
        "auth": {"ssh_user": USER, "ssh_private_key": f"{HOME}/.ssh/id"},
        "max_workers": 0,
        "worker_start_ray_commands": [],
    }
    own = (
        f"--port={free_port()} --num-cpus=2 --dashboard-port={free_port()} --ray-client-server-port={free_port()} "
        f"--object-store-memory=300000000 --temp-dir={HOME}/t/r"
    )
    start = made["head_start_ray_commands"]
    start[-1] = re.sub(r"--port=\d+", own, start[-1])
    (HOME / "farebox/loop.yaml").write_text(yaml.safe_dump(made))
    shutil.chown(HOME / "farebox/loop.yaml", USER, USER)


def charges() -> int:
    try:
        with sqlite3.connect(f"file:{STORAGE}/ledger.db?mode=ro", uri=True, timeout=10) as db:
            return int(db.execute("select count(*) from ledger_charge").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


def drivers() -> list[int]:
    """Processes of the user that run submit.py under python itself."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            if folder.stat().st_uid == pwd.getpwnam(USER).pw_uid and "python" in Path(words[0]).name:
                found += [int(folder.name)] if any(w.endswith("submit.py") for w in words[1:2]) else []
        except (OSError, IndexError):
            continue
    return found


def exercise() -> None:
    as_user("ray get-auth-token --generate > /dev/null")
    as_user("ray up -y --no-config-cache loop.yaml")
    submit = f"ray submit loop.yaml pipeline/submit.py -- {' '.join(WORDS)}"
    pid = os.fork()
    if pid == 0:
        try:
            as_user(submit, expect=None)
        finally:
            os._exit(0)
    deadline = time.monotonic() + TIMEOUT_S
    while charges() < 40 or not drivers():
        assert time.monotonic() < deadline, "the first submit asked nothing"
        time.sleep(0.2)
    paid = charges()
    for driver in drivers():
        os.kill(driver, signal.SIGKILL)
    os.waitpid(pid, 0)
    echo(f"== the driver was killed after {paid} charges\n")
    as_user(f"python -m pipeline.cli status storage={STORAGE}")
    left = json.loads(as_user(f"python -m pipeline.cli status storage={STORAGE} --json"))
    assert not left["alive"] and left["waiting"], "it was killed too late: nothing was left to resume"
    resumed = as_user(submit)
    assert "nothing to run" not in resumed and "trials to run" in resumed
    record = json.loads(as_user(f"python -m pipeline.cli ledger storage={STORAGE} --json"))
    assert record["problems"] == [] and record["open_trials"] == 0
    assert record["phases"]["replay"]["requests"] == 0, "nothing was paid twice"
    nothing = as_user(submit)
    assert "nothing to run" in nothing
    job = " ".join(WORDS).replace(str(STORAGE), f"{STORAGE}_job")
    dashboard = re.search(r"--dashboard-port=(\d+)", (HOME / "farebox/loop.yaml").read_text())
    assert dashboard
    address = f"http://127.0.0.1:{dashboard[1]}"
    out = as_user(f"ray job submit --address={address} -- python {HOME}/farebox/pipeline/submit.py {job}")
    assert "succeeded" in out
    wrong = as_user("RAY_AUTH_TOKEN=0123456789abcdef0123456789abcdef ray status --address=127.0.0.1:"
                    + re.search(r"--port=(\d+)", (HOME / "farebox/loop.yaml").read_text())[1], expect=None)  # type: ignore[index] # fmt: skip
    assert "CPU" not in wrong, "a wrong token was let in"
    as_user("ray down -y loop.yaml")


def possible() -> bool:
    """Whether this machine can run it."""
    return os.geteuid() == 0 and shutil.which("rsync") is not None and Path("/usr/sbin/sshd").exists()


def run() -> None:
    """Create the user, run everything, remove the user."""
    sshd = None
    try:
        port = make_user()
        cluster_yaml()
        Path("/run/sshd").mkdir(exist_ok=True)
        sshd = subprocess.Popen(["/usr/sbin/sshd", "-D", "-f", str(HOME / ".ssh/sshd_config")])
        echo(f"== sshd on 127.0.0.1:{port}")
        exercise()
        echo("== all of it worked")
    finally:
        if sshd is not None:
            sshd.terminate()
        uid = pwd.getpwnam(USER).pw_uid
        for _ in range(3):  # what ray down leaves: all of this user's processes, and nobody else's
            subprocess.run(["pkill", "-KILL", "-U", str(uid)], check=False)
            time.sleep(0.5)
        for left in Path("/tmp").glob("ray*"):  # Ray's cached cluster configuration and SSH sockets
            if left.lstat().st_uid == uid:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        subprocess.run(["userdel", "--remove", USER], check=False, stderr=subprocess.DEVNULL)
