"""The completion scripts of the shells."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.commands.completion import SHELLS, script
from pipeline.errors import ConfigError

ASK = """
source "$1"
COMP_LINE="$2"; COMP_POINT=${#COMP_LINE}
_farebox
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def bash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("completion") / "farebox.bash"
    file.write_text(script("bash", cli._parser()))
    return file


@pytest.mark.parametrize(
    ("line", "first", "all_of"),
    [
        ("farebox lea", "leaderboard", {"leaderboard"}),
        ("farebox ", "run", {"run", "plan", "completion", "--help"}),
        ("farebox run swe", "sweep=", {"sweep="}),
        ("farebox run sweep=dem", "demo", {"demo"}),
        ("farebox run sweep=demo methods=taskres,cra", "taskres,craft", {"taskres,craft"}),
        ("farebox plan datasets=ic", "icons", {"icons", "icons_outline"}),
        ("farebox run model=", "fake", {"tiny", "vit_b16"}),
        ("farebox leaderboard --", "--all", {"--all", "--by", "--format"}),
        ("farebox data ", "add", {"add", "check", "export-split"}),
    ],
)
def test_bash_completes_commands_options_keys_and_names(bash: Path, line: str, first: str, all_of: set[str]) -> None:
    done = subprocess.run(["bash", "-c", ASK, "bash", str(bash), line], capture_output=True, text=True, check=False)
    found = done.stdout.split()
    assert found[0] == first and set(found) >= all_of, (found, done.stderr)


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("farebox lea", {"leaderboard"}),
        ("farebox run sweep=dem", {"sweep=demo"}),
        ("farebox plan datasets=ic", {"datasets=icons", "datasets=icons_outline"}),
        ("farebox run methods=taskres,cra", {"methods=taskres,craft"}),
        ("farebox leaderboard --al", {"--all"}),
    ],
)
def test_fish_completes_commands_options_keys_and_names(line: str, found: set[str], tmp_path: Path) -> None:
    (file := tmp_path / "farebox.fish").write_text(script("fish", cli._parser()))
    ask = ["fish", "--no-config", "-c", f"source {file}; complete -C '{line}'"]
    done = subprocess.run(ask, capture_output=True, text=True, check=True)
    assert found <= {row.split("\t")[0] for row in done.stdout.splitlines()}, done.stdout


@pytest.mark.parametrize("shell", SHELLS)
def test_each_shell_reads_its_script(shell: str, tmp_path: Path) -> None:
    text = script(shell, cli._parser())
    assert all(name in text for name in ("leaderboard", "sweep=", "taskres", "icons", "vit_b16", "demo"))
    (file := tmp_path / "script").write_text(text)
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    subprocess.run([shell, "-n", file], check=True)


def test_an_unknown_shell_is_refused() -> None:
    with pytest.raises(ConfigError, match="no shell named 'tcsh'"):
        script("tcsh", cli._parser())
