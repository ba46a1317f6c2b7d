"""The examples in each help: they parse, and their configuration composes."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.bench.harness import names as benchmarks
from pipeline.commands.examples import EXAMPLES
from pipeline.commands.leaderboard import of_words
from pipeline.config.compose import compose
from pipeline.config.files import parse_overrides
from pipeline.console import Terminal

ROOT = Path(__file__).resolve().parents[2]
LARGE = ("numpy", "pyarrow", "omegaconf", "sqlalchemy", "torch", "rich", "ray", "mlflow", "matplotlib", "open_clip")
COMPOSED = (cli.run, cli.plan, cli.status, cli.ledger, cli.sync, cli.ui)


def parsers(parser: argparse.ArgumentParser, name: str = "") -> dict[str, argparse.ArgumentParser]:
    found = {name: parser}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, below in action.choices.items():
                found |= parsers(below, f"{name} {word}".strip())
    return found


PARSERS = parsers(cli._parser())


def test_every_help_has_two_examples_of_its_command() -> None:
    assert PARSERS.keys() == EXAMPLES.keys()
    for name, examples in EXAMPLES.items():
        assert len(examples) >= 2 and all(example.startswith(f"farebox {name}".rstrip()) for example in examples)
        assert all(example in PARSERS[name].format_help() for example in examples)


@pytest.mark.parametrize("example", sorted({example for examples in EXAMPLES.values() for example in examples}))
def test_an_example_in_a_help_works(example: str) -> None:
    arguments = cli._parse(shlex.split(example)[1:])
    if arguments.command is cli.leaderboard:
        of_words(arguments.words)
    elif arguments.command in COMPOSED:
        compose(arguments.words)
    elif arguments.command is cli.bench:
        assert set(arguments.bench) <= set(benchmarks())
    elif arguments.command is cli.completion:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert arguments.command(arguments) == 0
        assert "farebox" in out.getvalue()
    else:
        parse_overrides([word for word in getattr(arguments, "words", ()) if "=" in word])


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_loads_no_large_module(option: str) -> None:
    script = (
        "import sys; from pipeline.cli import main\n"
        f"try: main(['{option}'])\n"
        "except SystemExit: pass\n"
        f"print([m for m in {LARGE} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("words", [["datasets"], ["--help"]])
def test_a_pipe_that_is_closed_ends_a_command_without_a_traceback(words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as `head` does, but always before the command writes
    command = [sys.executable, "-m", "pipeline.cli", *words]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.stderr, done.returncode) == ("", 0)


class Screen(io.StringIO):
    """A stream that is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_a_terminal_has_its_width_and_styles_unless_it_has_none_or_they_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("COLUMNS", "133"), ("LINES", "50"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert Terminal.of(Screen()) == Terminal(133, 50, colour=True, is_tty=True)
    pipe = Terminal.of(io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert pipe == Terminal(133, 24, unicode=False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not Terminal.of(Screen()).colour
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not Terminal.of(Screen()).colour


def test_a_terminal_without_these_characters_gets_others() -> None:
    script = "from pipeline.console import *; import sys; accept_any_text(sys.stdout); echo('1 ± 2 … \u4e2d')"
    env = {"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout == "1 +- 2 ... \\u4e2d\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["list"], "farebox: there is no list: type farebox methods, farebox datasets or farebox models; "),
        (["show"], "farebox: there is no show: type farebox leaderboard; "),
        (["run", "--dry-run"], "farebox: there is no --dry-run: type farebox plan; "),
        (["lederboard"], "farebox: no command named 'lederboard'; did you mean 'leaderboard'? "),
        ([], "farebox: name a command, as in: farebox run sweep=demo; "),
        (["data"], "farebox data: name a command, as in: farebox data add; "),
    ],
)
def test_commands_of_similar_tools_are_answered_with_what_to_type(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(line) and told.endswith("--help lists all")
