"""Parsers with short messages, and commands and options of the larger commands, for argparse."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

from pipeline.commands.examples import epilog
from pipeline.errors import did_you_mean, shortened

RAW = argparse.RawTextHelpFormatter
BUDGET_COMMANDS = {
    "show": ("url=URL|storage=DIR", "print the limits and amounts of every account, and what reserves them"),
    "set": ("NAME requests=N images=N usd=N url=URL", "set limits of a named budget ('none' removes one); others stay"),
    "release": ("[STORAGE ...] url=URL", "release reservations of deleted storages, or of the named ones"),
}

DATA_COMMANDS = {
    "add": ("NAME PATH [KEY=VALUE]", "inspect a folder or file of images, and write the data set's card"),
    "check": ("[NAME ...] [data.root=DIR]", "check that data sets are complete, readable and match their cards"),
    "show": ("NAME [data.root=DIR]", "draw the classes of a data set with some images of each"),
    "export-split": ("NAME [shots=16] [seed=1]", "print a few-shot split as JSON: [path, label, class name] per image"),
}

RECORD_COMMANDS = {
    "pack": ("storage=DIR to=FILE", "write the recorded answers of a storage's models to an archive for others"),
    "verify": ("FILE", "verify that an archive is whole"),
}

SERVE_KEYS = """model=NAME         a model of this machine: fake, embedded or open_clip
port=5000          0: any free port
host=127.0.0.1     other hosts need a token in the environment variable FAREBOX_SERVE_TOKEN
threads=1          CPU threads; answers are bit-identical only for equal numbers
faults, for tests of clients; one of every N requests, chosen by fault.seed=1, after the first fault.after=0:
  fault.every_429=N          is refused with 429 and Retry-After: fault.retry_after_s=0
  fault.down_every=N         begins fault.down_s=1 seconds of 503
  fault.drop_every=N         is computed, and its connection closed
  fault.truncate_every=N     gets half of its answer
and every answer:
  fault.slow_s=S             waits S seconds
  fault.model=other          states another identity
  fault.permute_labels=true  has the classes of its scores, or its prompts, in another order
  fault.jitter=1e-6          has noise that differs each time"""


INSTEAD = {
    **dict.fromkeys(("show", "compare", "report", "results", "table"), "leaderboard"),
    **dict.fromkeys(("list", "ls"), "methods, farebox datasets or farebox models"),
    **dict.fromkeys(("resume", "continue", "start"), "run"),
    **dict.fromkeys(("--dry-run", "--collect-only", "--dryrun"), "plan"),
    **dict.fromkeys(("dashboard", "mlflow", "web"), "ui"),
    "help": "--help",
}
"""Commands and options of similar tools, and the command that does the same here."""


class Parser(argparse.ArgumentParser):
    """A parser whose error messages are one line that says what to type."""

    def error(self, message: str) -> NoReturn:
        """Print the error in one line, and exit with code 2."""
        if wrong := re.search(r"COMMAND: invalid choice: '(.*?)'|unrecognized arguments: (--\S+)", message):
            word = wrong[1] or wrong[2]
            if word in INSTEAD:
                message = f"there is no {word}: type farebox {INSTEAD[word]}"
            elif wrong[1]:
                known = re.findall(r"'([^']+)'", message[wrong.end() :])
                message = did_you_mean("command", word, known)
        elif message.endswith("required: COMMAND"):
            message = f"name a command, as in: {self.prog} {self._first_command()}"
        self.exit(2, f"{self.prog}: {shortened(message, 250)}; {self.prog} --help lists all\n")

    def _first_command(self) -> str:
        choices = next(a.choices for a in self._actions if isinstance(a, argparse._SubParsersAction))
        return "run sweep=demo" if "run" in choices else str(next(iter(choices)))


def add_leaderboard_options(board: argparse.ArgumentParser) -> None:
    """Add the options of `farebox leaderboard`."""
    form = "table (default), csv, json, html; latex and md: methods by data sets, for a paper, without --all"
    board.add_argument("--format", default="table", help=form)
    by = "columns: dataset, shots, answers or budget (to choose a method for 1,000 requests); access: group by access"
    board.add_argument("--by", metavar="AXIS", help=by)
    board.add_argument("--all", action="store_true", help="print every section: each test set, shots and allotment")
    board.add_argument("--raw", action="store_true", help="print one record per trial and test set, as csv or json")
    board.add_argument("--published", action="store_true", help="append a comparison with accuracies printed in papers")


def add_ui_options(pages: argparse.ArgumentParser) -> None:
    """Add the options of `farebox ui`."""
    pages.add_argument("--port", type=int, default=5000, help="port on 127.0.0.1 (default 5000)")
    pages.add_argument("--no-browser", dest="browser", action="store_false", help="only print the addresses")


def add_budget_commands(parser: argparse.ArgumentParser) -> None:
    """Add the commands of `farebox budget`."""
    for subparser in _added(parser, "budget", BUDGET_COMMANDS).values():
        subparser.add_argument("--json", action="store_true", help="print JSON")


def add_spend_option(parser: argparse.ArgumentParser) -> None:
    """Add the confirmation that a remote model may be asked."""
    parser.add_argument("--spend", action="store_true", help="let a remote model be asked, which may cost money")


def add_probe_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `probe`."""
    add_spend_option(parser)
    parser.add_argument("--json", action="store_true", help="print the record as JSON")


def add_record_commands(parser: argparse.ArgumentParser) -> None:
    """Add the commands of `farebox records`."""
    _added(parser, "remote", RECORD_COMMANDS, "records")


def add_report_options(
    bench: argparse.ArgumentParser, claims: argparse.ArgumentParser, audit: argparse.ArgumentParser
) -> None:
    """Add the options of `farebox bench`, `farebox claims` and `farebox audit`."""
    bench.add_argument("--json", action="store_true", help="print one JSON object per benchmark, one a line")
    bench.add_argument("bench", nargs="*", metavar="NAME [ARG ...]", help="name of a module in pipeline/bench/")
    claims.add_argument("--json", action="store_true", help="print one JSON record per claim")
    help_words = "papers (craft, taskres, cbbt; default all), and configuration overrides for their sweeps"
    claims.add_argument("words", nargs="*", metavar="PAPER|KEY=VALUE", help=help_words)
    audit.add_argument("--json", action="store_true", help="print one JSON record per release")
    audit.add_argument("words", nargs="*", metavar="METHOD|PAPER", help="method, title or paper; default all")


def add_data_commands(parser: argparse.ArgumentParser) -> None:
    """Add the commands of `farebox data`."""
    parsers = _added(parser, "data", DATA_COMMANDS)
    parsers["add"].add_argument("--force", action="store_true", help="replace an existing card of this name")
    parsers["add"].add_argument("--json", action="store_true", help="print what was found, used and skipped as JSON")
    parsers["check"].add_argument("--json", action="store_true", help="print one JSON record per data set")
    parsers["check"].add_argument("--quick", action="store_true", help="do not open images")
    parsers["show"].add_argument("--page", type=int, default=1, help="page of 40 classes (default 1)")
    parsers["show"].add_argument("--out", metavar="FILE", help="PNG file to write (default NAME.png)")
    parsers["export-split"].add_argument("--out", metavar="FILE", help="file to write (default: standard output)")


def add_merge_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `farebox merge`."""
    parser.add_argument("words", nargs="*", metavar="DIR", help="storages, two or more")
    parser.add_argument("--to", metavar="DIR", required=True, help="new storage")
    what = "show results of all versions of the code, marked as such, instead of the newest's only"
    parser.add_argument("--keep-code", action="store_true", help=what)


def _added(
    parser: argparse.ArgumentParser, page: str, verbs: dict[str, tuple[str, str]], command: str = ""
) -> dict[str, argparse.ArgumentParser]:
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="verb")
    parsers = {}
    for name, (usage, what) in verbs.items():
        text = f"{name} {usage}: {what}. See docs/{page}.md."
        end = epilog(f"{command or page} {name}")
        parsers[name] = commands.add_parser(name, help=what, description=text, epilog=end, formatter_class=RAW)
        parsers[name].add_argument("words", nargs="*", metavar="ARGUMENT", help=usage)
    return parsers
