"""The command line: parse arguments, call the pipeline, print, and turn errors into exit codes (`ABOUT`)."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from pipeline import __version__, check_packages
from pipeline.console import echo, exit_code, log, print_error, print_table
from pipeline.errors import AccessDenied, BudgetExceeded, ConfigError, DataError, FareboxError, shortened, unexpected
from pipeline.files import strict_json
from pipeline.sweep.preflight import refuse_passwords

ABOUT = """Benchmark few-shot adaptation of black-box vision-language models under one query meter.

Exit codes:
    0    done
    2    invalid input; one line says what is wrong and what to type; nothing was spent
    3    finished with problems: trials failed, ran out of budget or were not funded, the ledger does not add up, a
         damaged file was left out, or Ray or a file was lost; the same command continues
    4    unexpected error; one line names the file with its traceback
    130  interrupted; the same command continues"""
OVERRIDES = (
    "configuration overrides, e.g. sweep=demo shots=[1,16] method.craft.popsize=20; conf/base.yaml lists all keys"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    logging.basicConfig(level=os.environ.get("FAREBOX_LOG", "WARNING"), format="%(levelname)s %(message)s")
    try:
        check_packages()
        refuse_passwords(sys.argv[1:] if argv is None else argv)
        arguments = _parse(argv)
        return int(arguments.command(arguments))
    except ImportError as error:
        incomplete = isinstance(error, ModuleNotFoundError)
        remedy = ": the installation is incomplete; run: pip install --force-reinstall farebox" if incomplete else ""
        print_error(f"{error}{remedy}")
        return 2
    except (ConfigError, DataError, AccessDenied, BudgetExceeded) as error:
        print_error(error)
        return 2
    except FareboxError as error:
        print_error(error)
        return 3
    except KeyboardInterrupt:
        print("\nfarebox: interrupted; nothing is lost, the same command continues", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has exited: `farebox leaderboard | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
        return 0
    except Exception as error:
        print(f"farebox: {unexpected(error)}", file=sys.stderr)
        return 4


def run(arguments: argparse.Namespace) -> int:
    """Run the trials of a sweep that are not done yet, then print and write its leaderboard."""
    from pipeline.config.compose import compose
    from pipeline.config.files import notes
    from pipeline.results.mirroring import BackgroundMirror, ignored_variable
    from pipeline.results.report import publish
    from pipeline.sweep import driver as sweep

    config = compose(arguments.words)
    for line in (*notes(arguments.words), *ignored_variable(config)):
        log(f"farebox: {line}")
    mirror = BackgroundMirror(config)
    outcome = sweep.run(config, echo, mirror.add)
    mirror.close()
    damaged = publish(config, echo)
    for line in (*outcome.problems, *damaged):
        print(shortened(line), file=sys.stderr)
    return 3 if outcome.problems or damaged else 0


def plan(arguments: argparse.Namespace) -> int:
    """Print the predicted bill of every trial and what is missing on this machine; send no requests."""
    from pipeline.commands.plan import absent_lines, model_lines, plan_table
    from pipeline.config.compose import compose
    from pipeline.config.files import notes
    from pipeline.trials.estimate import estimate as estimated
    from pipeline.trials.plan import refuse_unpayable

    estimate = estimated(compose(arguments.words))
    for line in notes(arguments.words):
        log(f"farebox: {line}")
    if arguments.json:
        print(strict_json(estimate.records(), indent=1))
        for line in (*model_lines(estimate), *absent_lines(estimate)):
            log(line)
    else:
        print(plan_table(estimate))
    if not estimate.config.partial:
        refuse_unpayable(estimate.config, estimate.total)
    return 0


def status(arguments: argparse.Namespace) -> int:
    """Print the progress of a sweep, during or after its run: trials, replicas, budget, time left."""
    from pipeline.config.compose import compose
    from pipeline.sweep import status as view

    config = compose(arguments.words)
    record = view.status(config.storage, config.ledger_url)
    print(strict_json(record, indent=1) if arguments.json else view.shown(record))
    return exit_code(record["damaged"])


def leaderboard(arguments: argparse.Namespace) -> int:
    """Print the leaderboard of a sweep."""
    from pipeline.commands.leaderboard import leaderboard
    from pipeline.config.compose import compose

    text, damaged = leaderboard(compose(arguments.words), arguments.format, arguments.raw, arguments.published, log)
    print(text)
    return exit_code(damaged)


def ledger(arguments: argparse.Namespace) -> int:
    """Print the bill of a sweep and verify it against its charges, rows and limits."""
    from pipeline.commands.ledger import ledger
    from pipeline.config.compose import compose

    text, problems = ledger(compose(arguments.words), as_json=arguments.json)
    print(text)
    return exit_code(problems)


def budget(arguments: argparse.Namespace) -> int:
    """Show the budgets of a ledger, change a limit, or release reservations of deleted storages."""
    from pipeline.commands import budget as budget_command

    print(budget_command.run(arguments.verb, arguments.words, arguments.json))
    return 0


def sync(arguments: argparse.Namespace) -> int:
    """Rebuild the MLflow mirror of a sweep from its rows."""
    from pipeline.commands.mirror import sync
    from pipeline.config.compose import compose

    return exit_code(sync(compose(arguments.words), echo, log))


def ui(arguments: argparse.Namespace) -> int:
    """Serve the MLflow pages of a sweep on this machine, and open the comparison of its methods in a browser."""
    from pipeline.commands.mirror import ui
    from pipeline.config.compose import compose

    served = ui(compose(arguments.words), arguments.port, arguments.browser, echo, log)
    if served is not None:
        command, environment = served
        os.execvpe(command[0], command, os.environ | environment)
    return 0


def methods(arguments: argparse.Namespace) -> int:
    """List the methods, with the access that they need and their paper."""
    from pipeline.commands import catalog

    code = print_table(catalog.methods(), arguments.json)
    for line in catalog.broken():
        log(f"farebox: {line}")
    return code


def datasets(arguments: argparse.Namespace) -> int:
    """List the data sets, with their sizes and licences."""
    from pipeline.commands import catalog

    return print_table(catalog.datasets(), arguments.json)


def models(arguments: argparse.Namespace) -> int:
    """List the models, with the access that they grant."""
    from pipeline.commands import catalog

    return print_table(catalog.models(), arguments.json)


def bench(arguments: argparse.Namespace) -> int:
    """Run performance benchmarks on this machine; without NAME, all of them in turn."""
    from pipeline.bench import harness

    name, *rest = arguments.bench or [None]
    for each in [name] if name else [n for n in harness.names() if n not in harness.ON_REQUEST]:
        figure = harness.run(each, rest, log)
        print(strict_json(figure.record()) if arguments.json else figure.table(), flush=True)
    return 0


def claims(arguments: argparse.Namespace) -> int:
    """Test claims of the papers: run what is missing (under an hour), and print each verdict and its reason."""
    from pipeline.claims import table

    papers, evidence = table.parse(arguments.words, log)
    rows = table.find(papers, evidence)
    print(strict_json(table.records(rows), indent=1) if arguments.json else table.text(rows))
    log(f"\nwritten to {evidence.storage}: {', '.join(table.write(rows, evidence))}")
    return 0


def data(arguments: argparse.Namespace) -> int:
    """Add a data set of your own, check data sets, show their classes, or export a few-shot split."""
    from pipeline.commands import data as data_commands
    from pipeline.commands import data_add

    verbs = {"add": data_add.add, "check": data_commands.check, "show": data_commands.show}
    return verbs.get(arguments.verb, data_commands.export_split)(arguments, echo, log)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse arguments; unlike in plain argparse, options may stand before, between and after overrides."""
    parser = _parser()
    arguments, more = parser.parse_known_args(argv)
    if more and (not hasattr(arguments, "words") or any(word.startswith("-") for word in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        arguments.words += more
    return arguments


class _Parser(argparse.ArgumentParser):
    """A parser with short error messages."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and the error, and exit with code 2."""
        super().error(shortened(message, 250))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="farebox", description=ABOUT, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--version", action="version", version=f"farebox {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function: Any, overrides: bool = True) -> argparse.ArgumentParser:
        subparser = commands.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
        subparser.set_defaults(command=function)
        if overrides:
            subparser.add_argument("words", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
        return subparser

    command(run)
    command(plan).add_argument("--json", action="store_true", help="print one JSON record per trial")
    command(status).add_argument("--json", action="store_true", help="print one JSON object")
    board = command(leaderboard)
    board.add_argument("--format", default="table", help="table (default), csv, json, md, latex or html")
    board.add_argument("--raw", action="store_true", help="print one record per trial and test set, as csv or json")
    board.add_argument("--published", action="store_true", help="append a comparison with accuracies printed in papers")
    command(ledger).add_argument("--json", action="store_true", help="print accounts, bills and problems as JSON")
    budgets = command(budget, overrides=False).add_subparsers(required=True, metavar="COMMAND", dest="verb")
    for name, (usage, what) in BUDGET_COMMANDS.items():
        subparser = budgets.add_parser(name, help=what, description=f"{name} {usage}: {what}. See docs/budget.md.")
        subparser.add_argument("words", nargs="*", metavar="ARGUMENT", help=usage)
        subparser.add_argument("--json", action="store_true", help="print JSON")
    command(sync)
    pages = command(ui)
    pages.add_argument("--port", type=int, default=5000, help="port on 127.0.0.1 (default 5000)")
    pages.add_argument("--no-browser", dest="browser", action="store_false", help="only print the addresses")
    benches = command(bench, overrides=False)
    benches.add_argument("--json", action="store_true", help="print one JSON object per benchmark, one a line")
    benches.add_argument("bench", nargs="*", metavar="NAME [ARG ...]", help="name of a module in pipeline/bench/")
    measured = command(claims, overrides=False)
    measured.add_argument("--json", action="store_true", help="print one JSON record per claim")
    help_words = "papers (craft, taskres, cbbt; default all), and configuration overrides for their sweeps"
    measured.add_argument("words", nargs="*", metavar="PAPER|KEY=VALUE", help=help_words)
    _data_parsers(command(data, overrides=False))
    for listing in (methods, datasets, models):
        command(listing, False).add_argument("--json", action="store_true", help="print JSON")
    return parser


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


def _data_parsers(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="verb")
    parsers = {}
    for name, (usage, what) in DATA_COMMANDS.items():
        parsers[name] = commands.add_parser(name, help=what, description=f"{name} {usage}: {what}. See docs/data.md.")
        parsers[name].add_argument("words", nargs="*", metavar="ARGUMENT", help=usage)
    parsers["add"].add_argument("--force", action="store_true", help="replace an existing card of this name")
    parsers["add"].add_argument("--json", action="store_true", help="print what was found, used and skipped as JSON")
    parsers["check"].add_argument("--json", action="store_true", help="print one JSON record per data set")
    parsers["check"].add_argument("--quick", action="store_true", help="do not open images")
    parsers["show"].add_argument("--page", type=int, default=1, help="page of 40 classes (default 1)")
    parsers["show"].add_argument("--out", metavar="FILE", help="PNG file to write (default NAME.png)")
    parsers["export-split"].add_argument("--out", metavar="FILE", help="file to write (default: standard output)")


if __name__ == "__main__":
    sys.exit(main())
