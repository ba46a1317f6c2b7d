"""The command line. Thin: it parses words, calls the pipeline, prints, and turns errors into exit codes.

Exit codes: 0 done; 2 the user's input is wrong (one line says what was found, what was wanted, what to type), nothing
was spent; 3 finished, but trials failed, were truncated or unfunded, the ledger does not add up, a file of the sweep is
damaged and its numbers are left out, or Ray was lost and the same command continues; 4 an error that is not handled;
130 interrupted.
"""

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

ABOUT = """Few-shot adaptation of black-box vision-language models, under one honest meter.

Exit codes: 0 done; 2 the input is wrong (one line says what to type), nothing was spent; 3 finished, but trials failed,
were truncated or unfunded, the ledger does not add up, a file is damaged and its numbers are left out, or Ray or a file
was lost (the same command continues); 4 an unexpected error (one line names the file with its traceback);
130 interrupted (the same command continues)."""
WORDS = "key=value words, as in: sweep=demo shots=[1,16] method.craft.popsize=20 (conf/base.yaml lists every key)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    logging.basicConfig(level=os.environ.get("FAREBOX_LOG", "WARNING"), format="%(levelname)s %(message)s")
    try:
        check_packages()
        refuse_passwords(sys.argv[1:] if argv is None else argv)
        arguments = _parse(argv)
        return int(arguments.command(arguments))
    except ImportError as error:
        incomplete = isinstance(error, ModuleNotFoundError)
        remedy = ": the installation is incomplete, type: pip install --force-reinstall farebox" if incomplete else ""
        print_error(f"{error}{remedy}")
        return 2
    except (ConfigError, DataError, AccessDenied, BudgetExceeded) as error:
        print_error(error)
        return 2
    except FareboxError as error:
        print_error(error)
        return 3
    except KeyboardInterrupt:
        print("\nfarebox: interrupted; nothing is lost: the same command continues", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone: `farebox leaderboard | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
        return 0
    except Exception as error:
        print(f"farebox: {unexpected(error)}", file=sys.stderr)
        return 4


def run(arguments: argparse.Namespace) -> int:
    """Run what is not done yet of a sweep, then print and write its leaderboard."""
    from pipeline.commands import report
    from pipeline.config.compose import compose
    from pipeline.config.files import notes
    from pipeline.sweep import driver as sweep

    config = compose(arguments.words)
    for line in notes(arguments.words):
        log(f"farebox: {line}")
    mirror = report.Mirroring(config)
    outcome = sweep.run(config, echo, mirror.add)
    mirror.close()
    damaged = report.publish(config, echo)
    for line in (*outcome.problems, *damaged):
        print(shortened(line), file=sys.stderr)
    return 3 if outcome.problems or damaged else 0


def plan(arguments: argparse.Namespace) -> int:
    """Every trial's predicted bill and what is not on this machine; refuses what ceilings cannot pay. Asks nothing."""
    from pipeline.commands import report
    from pipeline.config.compose import compose
    from pipeline.config.files import notes
    from pipeline.trials.estimate import outline
    from pipeline.trials.plan import refuse_unpayable

    made = outline(compose(arguments.words))
    for line in notes(arguments.words):
        log(f"farebox: {line}")
    if arguments.json:
        print(strict_json(made.records(), indent=1))
        for line in (*report.model_lines(made), *report.absent_lines(made)):
            log(line)
    else:
        print(report.plan_table(made))
    if not made.config.partial:
        refuse_unpayable(made.config, made.total)
    return 0


def status(arguments: argparse.Namespace) -> int:
    """What a sweep is doing: trials, replicas, budget, time left; from any terminal, while it runs or after."""
    from pipeline.config.compose import compose
    from pipeline.sweep import status as view

    config = compose(arguments.words)
    record = view.status(config.storage, config.ledger_url)
    print(strict_json(record, indent=1) if arguments.json else view.shown(record))
    return exit_code(record["damaged"])


def leaderboard(arguments: argparse.Namespace) -> int:
    """The leaderboard of a sweep's rows, in several formats; --raw: one record for each trial and test set."""
    from pipeline.commands import report
    from pipeline.config.compose import compose

    config = compose(arguments.words)
    text, damaged = report.formatted(config, arguments.format, arguments.raw, arguments.published, log)
    print(text)
    return exit_code(damaged)


def ledger(arguments: argparse.Namespace) -> int:
    """Print the ledger and verify it: charges add up, match the rows, and passed no limit."""
    from pipeline.commands import report
    from pipeline.config.compose import compose

    text, problems = report.ledger(compose(arguments.words), as_json=arguments.json)
    print(text)
    return exit_code(problems)


def budget(arguments: argparse.Namespace) -> int:
    """Show the budgets of a ledger and what reserves them, set a limit, or release what deleted storages reserve."""
    from pipeline.commands import budget as budget_command

    print(budget_command.run(arguments.verb, arguments.words, arguments.json))
    return 0


def sync(arguments: argparse.Namespace) -> int:
    """Rebuild the MLflow mirror from the rows."""
    from pipeline.commands import report
    from pipeline.config.compose import compose

    return exit_code(report.sync(compose(arguments.words), echo))


def ui(arguments: argparse.Namespace) -> int:
    """Open MLflow's pages on this machine."""
    from pipeline.commands import report
    from pipeline.config.compose import compose

    command, environment = report.ui_command(compose(arguments.words), arguments.port)
    echo(f"http://127.0.0.1:{arguments.port}  (Ctrl-C ends it)")
    os.execvpe(command[0], command, os.environ | environment)


def methods(arguments: argparse.Namespace) -> int:
    """What methods exist, with the access that they need and their paper."""
    from pipeline.commands import catalog

    return print_table(catalog.methods(), arguments.json)


def datasets(arguments: argparse.Namespace) -> int:
    """What data sets exist, with sizes and licence."""
    from pipeline.commands import catalog

    return print_table(catalog.datasets(), arguments.json)


def models(arguments: argparse.Namespace) -> int:
    """What models exist, with the access that they grant."""
    from pipeline.commands import catalog

    return print_table(catalog.models(), arguments.json)


def bench(arguments: argparse.Namespace) -> int:
    """Time what is claimed to be fast, on this machine, in interleaved pairs; without NAME all benches in turn."""
    from pipeline.bench import harness

    name, *rest = arguments.bench or [None]
    for each in [name] if name else [n for n in harness.names() if n not in harness.ON_REQUEST]:
        figure = harness.run(each, rest, log)
        print(strict_json(figure.record()) if arguments.json else figure.table(), flush=True)
    return 0


def claims(arguments: argparse.Namespace) -> int:
    """What the seed papers claim, measured here: runs what is missing (under an hour), prints each verdict and why."""
    from pipeline.claims import table
    from pipeline.claims.evidence import Evidence
    from pipeline.config.typed_values import path

    papers = [word for word in arguments.words if "=" not in word]
    storage = [word.partition("=")[2] for word in arguments.words if word.startswith("storage=")]
    words = [word for word in arguments.words if "=" in word and not word.startswith("storage=")]
    evidence = Evidence(path("storage", storage[-1] if storage else "runs/claims").absolute(), words, log)
    rows = table.find(papers, evidence)
    print(strict_json(table.records(rows), indent=1) if arguments.json else table.text(rows))
    log(f"\nwritten to {evidence.storage}: {', '.join(table.write(rows, evidence))}")
    return 0


def data(arguments: argparse.Namespace) -> int:
    """Your own images, and what is known of all data sets: add, check, show, export-split."""
    from pipeline.commands import data as data_commands
    from pipeline.commands import data_add

    verbs = {"add": data_add.add, "check": data_commands.check, "show": data_commands.show}
    return verbs.get(arguments.verb, data_commands.export_split)(arguments, echo, log)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options may stand before, between and after words, which argparse alone does not allow."""
    parser = _parser()
    arguments, more = parser.parse_known_args(argv)
    if more and (not hasattr(arguments, "words") or any(word.startswith("-") for word in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        arguments.words += more
    return arguments


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are short."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and the error, and exit with 2."""
        super().error(shortened(message, 250))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="farebox", description=ABOUT, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--version", action="version", version=f"farebox {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")

    def verb(function: Any, words: bool = True) -> argparse.ArgumentParser:
        made = verbs.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
        made.set_defaults(command=function)
        if words:
            made.add_argument("words", nargs="*", metavar="KEY=VALUE", help=WORDS)
        return made

    verb(run)
    verb(plan).add_argument("--json", action="store_true", help="one record for each trial")
    verb(status).add_argument("--json", action="store_true", help="the same as one JSON object")
    board = verb(leaderboard)
    board.add_argument("--format", default="table", choices=["table", "csv", "json", "md", "latex", "html"])
    board.add_argument("--raw", action="store_true", help="one record for each trial and test set")
    board.add_argument(
        "--published", action="store_true", help="then our cells beside what papers printed, never mixed"
    )
    verb(ledger).add_argument("--json", action="store_true", help="accounts, bills and problems as JSON")
    budgets = verb(budget, words=False).add_subparsers(required=True, metavar="VERB", dest="verb")
    for name, (words, what) in BUDGET_VERBS.items():
        made = budgets.add_parser(name, help=what, description=f"{name} {words}: {what}. See docs/budget.md.")
        made.add_argument("words", nargs="*", metavar="WORD", help=words)
        made.add_argument("--json", action="store_true", help="as JSON")
    verb(sync)
    verb(ui).add_argument("--port", type=int, default=5000, help="port on 127.0.0.1")
    benches = verb(bench, words=False)
    benches.add_argument("--json", action="store_true", help="one object a line, one for each bench")
    benches.add_argument("bench", nargs="*", metavar="NAME [ARG ...]", help="pipeline/bench/ has one module for each")
    measured = verb(claims, words=False)
    measured.add_argument("--json", action="store_true", help="one record for each claim")
    measured.add_argument("words", nargs="*", metavar="PAPER|KEY=VALUE", help="craft, taskres, cbbt; words for sweeps")
    _data_parsers(verb(data, words=False))
    for listing in (methods, datasets, models):
        verb(listing, words=False).add_argument("--json", action="store_true", help="as JSON")
    return parser


BUDGET_VERBS = {
    "show": ("url=URL|storage=DIR", "print limits, reserved and spent amounts of every account, and who reserves them"),
    "set": ("NAME requests=N images=N url=URL", "set limits of a named budget (none: no limit); other limits stay"),
    "release": (
        "[STORAGE ...] url=URL",
        "give back what the open trials of deleted storages reserve, or of those named",
    ),
}

DATA_VERBS = {
    "add": ("NAME PATH [KEY=VALUE]", "look at a folder or file of images, and write the card by which runs name it"),
    "check": ("[NAME ...] [data.root=DIR]", "is it here, whole, readable, and what its card says; all without NAME"),
    "show": ("NAME [data.root=DIR]", "a picture of its classes, with their names and some images of each"),
    "export-split": ("NAME [shots=16] [seed=1]", "a few-shot draw as JSON: [path, label, class name] of train and val"),
}


def _data_parsers(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(required=True, metavar="VERB", dest="verb")
    made = {}
    for name, (words, what) in DATA_VERBS.items():
        made[name] = verbs.add_parser(name, help=what, description=f"{name} {words}: {what}. See docs/data.md.")
        made[name].add_argument("words", nargs="*", metavar="WORD", help=words)
    made["add"].add_argument("--force", action="store_true", help="replace a card of that name")
    made["add"].add_argument("--json", action="store_true", help="what was found, used and skipped, as one record")
    made["check"].add_argument("--json", action="store_true", help="one record for each data set")
    made["check"].add_argument("--quick", action="store_true", help="open no image")
    made["show"].add_argument("--page", type=int, default=1, help="40 classes a page")
    made["show"].add_argument("--out", metavar="FILE", help="a PNG file; NAME.png when left out")
    made["export-split"].add_argument("--out", metavar="FILE", help="standard output when left out")


if __name__ == "__main__":
    sys.exit(main())
