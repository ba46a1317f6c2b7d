"""The command line. Thin: it parses words, calls the pipeline, prints, and turns errors into exit codes.

Exit codes: 0 done; 2 the user's input is wrong (one line says what was found, what was wanted, what to type), nothing
was spent; 3 finished, but trials failed, were truncated or unfunded, or the ledger does not add up; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from pipeline import __version__, check_packages
from pipeline.errors import AccessDenied, BudgetExceeded, ConfigError, DataError, FareboxError

ABOUT = """Few-shot adaptation of black-box vision-language models, under one honest meter.

Exit codes: 0 done; 2 the input is wrong (one line says what to type), nothing was spent; 3 finished, but trials failed,
were truncated or unfunded, or the ledger does not add up; 130 interrupted (the same command continues)."""
WORDS = "key=value words, as in: sweep=demo shots=[1,16] method.craft.popsize=20 (conf/base.yaml lists every key)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    check_packages()
    logging.basicConfig(level=os.environ.get("FAREBOX_LOG", "WARNING"), format="%(levelname)s %(message)s")
    arguments = _parse(argv)
    try:
        return int(arguments.command(arguments))
    except (ConfigError, DataError, AccessDenied, BudgetExceeded) as error:
        print(f"farebox: {_one_line(error)}", file=sys.stderr)
        return 2
    except FareboxError as error:
        print(f"farebox: {_one_line(error)}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("\nfarebox: interrupted; nothing is lost: the same command continues", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone: `farebox leaderboard | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
        return 0


def run(arguments: argparse.Namespace) -> int:
    """Run what is not done yet of a sweep, then print and write its leaderboard."""
    from pipeline import report, sweep
    from pipeline.config import compose, notes

    config = compose(arguments.words)
    for line in notes(arguments.words):
        _say_aside(f"farebox: {line}")
    mirror = report.Mirroring(config)
    outcome = sweep.run(config, _say, mirror.add)
    mirror.close()
    report.publish(config, _say)
    for line in outcome.problems:
        print(line, file=sys.stderr)
    return 3 if outcome.problems else 0


def plan(arguments: argparse.Namespace) -> int:
    """Every trial's predicted bill and what is not on this machine; refuses what ceilings cannot pay. Asks nothing."""
    from pipeline import report
    from pipeline.config import compose, notes
    from pipeline.outline import outline
    from pipeline.plan import refuse_unpayable

    made = outline(compose(arguments.words))
    for line in notes(arguments.words):
        _say_aside(f"farebox: {line}")
    if arguments.json:
        print(json.dumps(made.records(), indent=1))
        for line in report.absent_lines(made):
            _say_aside(line)
    else:
        print(report.plan_table(made))
    if not made.config.partial:
        refuse_unpayable(made.config, made.total)
    return 0


def status(arguments: argparse.Namespace) -> int:
    """What a sweep is doing: trials, replicas, budget, time left; from any terminal, while it runs or after."""
    from pipeline import status as view
    from pipeline.config import compose

    config = compose(arguments.words)
    record = view.status(config.storage, config.ledger_url)
    print(json.dumps(record, indent=1) if arguments.json else view.shown(record))
    return 0


def leaderboard(arguments: argparse.Namespace) -> int:
    """The leaderboard of a sweep's rows, in several formats; --raw: one record for each trial and test set."""
    from pipeline import report
    from pipeline.config import compose

    config = compose(arguments.words)
    print(report.formatted(config, arguments.format, raw=arguments.raw, published=arguments.published))
    return 0


def ledger(arguments: argparse.Namespace) -> int:
    """Print the ledger and verify it: charges add up, match the rows, and passed no limit."""
    from pipeline import report
    from pipeline.config import compose

    text, problems = report.ledger(compose(arguments.words), as_json=arguments.json)
    print(text)
    for problem in problems:
        print(f"farebox: {problem}", file=sys.stderr)
    return 3 if problems else 0


def sync(arguments: argparse.Namespace) -> int:
    """Rebuild the MLflow mirror from the rows."""
    from pipeline import report
    from pipeline.config import compose

    report.sync(compose(arguments.words), _say)
    return 0


def ui(arguments: argparse.Namespace) -> int:
    """Open MLflow's pages on this machine."""
    from pipeline import report
    from pipeline.config import compose

    command, environment = report.ui_command(compose(arguments.words), arguments.port)
    _say(f"http://127.0.0.1:{arguments.port}  (Ctrl-C ends it)")
    os.execvpe(command[0], command, os.environ | environment)


def methods(arguments: argparse.Namespace) -> int:
    """What methods exist, with the access that they need and their paper."""
    from pipeline import report

    return _table(report.methods(), arguments.json)


def datasets(arguments: argparse.Namespace) -> int:
    """What data sets exist, with sizes and licence."""
    from pipeline import report

    return _table(report.datasets(), arguments.json)


def models(arguments: argparse.Namespace) -> int:
    """What models exist, with the access that they grant."""
    from pipeline import report

    return _table(report.models(), arguments.json)


def bench(arguments: argparse.Namespace) -> int:
    """Time what is claimed to be fast, on this machine, in interleaved pairs; without NAME all benches in turn."""
    from pipeline.bench import harness

    name, *rest = arguments.bench or [None]
    for each in [name] if name else [n for n in harness.names() if n not in harness.ON_REQUEST]:
        figure = harness.run(each, rest, _say_aside)
        print(json.dumps(figure.record()) if arguments.json else figure.table(), flush=True)
    return 0


def claims(arguments: argparse.Namespace) -> int:
    """What the seed papers claim, measured here: runs what is missing (under an hour), prints each verdict and why."""
    from pipeline.claims import table
    from pipeline.claims.evidence import Evidence
    from pipeline.typed_values import path

    papers = [word for word in arguments.words if "=" not in word]
    storage = [word.partition("=")[2] for word in arguments.words if word.startswith("storage=")]
    words = [word for word in arguments.words if "=" in word and not word.startswith("storage=")]
    evidence = Evidence(path("storage", storage[-1] if storage else "runs/claims").absolute(), words, _say_aside)
    rows = table.find(papers, evidence)
    print(json.dumps(table.records(rows), indent=1) if arguments.json else table.text(rows))
    _say_aside(f"\nwritten to {evidence.storage}: {', '.join(table.write(rows, evidence))}")
    return 0


def data(arguments: argparse.Namespace) -> int:
    """Your own images, and what is known of all data sets: add, check, show, export-split."""
    from pipeline import data_commands

    return int(getattr(data_commands, arguments.verb.replace("-", "_"))(arguments, _say, _say_aside))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options may stand before, between and after words, which argparse alone does not allow."""
    parser = _parser()
    arguments, more = parser.parse_known_args(argv)
    if more and (not hasattr(arguments, "words") or any(word.startswith("-") for word in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        arguments.words += more
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="farebox", description=ABOUT, formatter_class=argparse.RawTextHelpFormatter)
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
    made["check"].add_argument("--json", action="store_true", help="one record for each data set")
    made["check"].add_argument("--quick", action="store_true", help="open no image")
    made["show"].add_argument("--page", type=int, default=1, help="40 classes a page")
    made["show"].add_argument("--out", metavar="FILE", help="a PNG file; NAME.png when left out")
    made["export-split"].add_argument("--out", metavar="FILE", help="standard output when left out")


def _table(records: list[dict[str, Any]], as_json: bool) -> int:
    if as_json:
        print(json.dumps(records, indent=1))
        return 0
    shown = [{k: _cell(v) for k, v in r.items()} for r in records]
    widths = {k: min(46, max(len(k), *(len(r[k]) for r in shown))) for k in shown[0]}
    print("  ".join(k.ljust(w) for k, w in widths.items()).rstrip())
    for record in shown:
        print("  ".join(_cut(record[k], w).ljust(w) for k, w in widths.items()).rstrip())
    return 0


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _say(line: str) -> None:
    print(line, flush=True)


def _say_aside(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
