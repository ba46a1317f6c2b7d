"""Parsers with short messages, and commands and options of the larger commands, for argparse."""

from __future__ import annotations

import argparse
from typing import NoReturn

from pipeline.commands.examples import epilog
from pipeline.errors import shortened

RAW = argparse.RawTextHelpFormatter
BUDGET_COMMANDS = {
    "show": ("url=URL|storage=DIR", "print the limits and amounts of every account, and what reserves them"),
    "set": ("NAME requests=N images=N url=URL", "set limits of a named budget ('none' removes one); others stay"),
    "release": ("[STORAGE ...] url=URL", "release reservations of deleted storages, or of the named ones"),
}

DATA_COMMANDS = {
    "add": ("NAME PATH [KEY=VALUE]", "inspect a folder or file of images, and write the data set's card"),
    "check": ("[NAME ...] [data.root=DIR]", "check that data sets are complete, readable and match their cards"),
    "show": ("NAME [data.root=DIR]", "draw the classes of a data set with some images of each"),
    "export-split": ("NAME [shots=16] [seed=1]", "print a few-shot split as JSON: [path, label, class name] per image"),
}


def add_leaderboard_options(board: argparse.ArgumentParser) -> None:
    """Add the options of `farebox leaderboard`."""
    board.add_argument("--format", default="table", help="table (default), csv, json, md, latex or html")
    by = "columns: dataset, shots, budget or answers; or access to group by access"
    board.add_argument("--by", metavar="AXIS", help=by)
    board.add_argument("--all", action="store_true", help="print every section: each test set, shots and allotment")
    board.add_argument("--raw", action="store_true", help="print one record per trial and test set, as csv or json")
    board.add_argument("--published", action="store_true", help="append a comparison with accuracies printed in papers")


def add_ui_options(pages: argparse.ArgumentParser) -> None:
    """Add the options of `farebox ui`."""
    pages.add_argument("--port", type=int, default=5000, help="port on 127.0.0.1 (default 5000)")
    pages.add_argument("--no-browser", dest="browser", action="store_false", help="only print the addresses")


class Parser(argparse.ArgumentParser):
    """A parser with short error messages."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and the error, and exit with code 2."""
        super().error(shortened(message, 250))


def add_budget_commands(parser: argparse.ArgumentParser) -> None:
    """Add the commands of `farebox budget`."""
    for subparser in _added(parser, "budget", BUDGET_COMMANDS).values():
        subparser.add_argument("--json", action="store_true", help="print JSON")


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
    parser: argparse.ArgumentParser, command: str, verbs: dict[str, tuple[str, str]]
) -> dict[str, argparse.ArgumentParser]:
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="verb")
    parsers = {}
    for name, (usage, what) in verbs.items():
        text = f"{name} {usage}: {what}. See docs/{command}.md."
        end = epilog(f"{command} {name}")
        parsers[name] = commands.add_parser(name, help=what, description=text, epilog=end, formatter_class=RAW)
        parsers[name].add_argument("words", nargs="*", metavar="ARGUMENT", help=usage)
    return parsers
