"""The command line: parse arguments, call the pipeline, print, and turn errors into exit codes (`ABOUT`)."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from pipeline import __version__, check_packages
from pipeline.commands import subcommands
from pipeline.commands.examples import epilog
from pipeline.commands.subcommands import RAW
from pipeline.console import Terminal, accept_any_text, echo, exit_code, log, print_error, print_table
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
OVERRIDES = "configuration overrides, e.g. sweep=demo shots=1,16 method.craft.popsize=20; conf/base.yaml lists all keys"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    accept_any_text(sys.stdout, sys.stderr)
    logging.basicConfig(level=os.environ.get("FAREBOX_LOG", "WARNING"), format="%(levelname)s %(message)s")
    try:
        check_packages()
        refuse_passwords(sys.argv[1:] if argv is None else argv)
        arguments = _parse(argv)
        code = int(arguments.command(arguments))
        sys.stdout.flush()
        return code
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
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python writes at its exit goes nowhere
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

    config = compose([*arguments.words, "spend=true"] if arguments.spend else arguments.words)
    for line in (*notes(arguments.words), *ignored_variable(config)):
        log(f"farebox: {line}")
    mirror = BackgroundMirror(config)
    outcome = sweep.run(config, echo, mirror.add)
    mirror.close()
    damaged = publish(config, echo, Terminal.of(sys.stdout))
    for line in (*outcome.problems, *damaged):
        print(shortened(line), file=sys.stderr)
    return 3 if outcome.problems or damaged else 0


def plan(arguments: argparse.Namespace) -> int:
    """Print the predicted bill of every trial and what is missing on this machine; send no requests."""
    from pipeline.commands.plan import absent_lines, model_lines, plan_table, refuse_unpayable_plan
    from pipeline.config.compose import compose
    from pipeline.config.files import notes
    from pipeline.trials.estimate import estimate as estimated

    estimate = estimated(compose(arguments.words))
    for line in notes(arguments.words):
        log(f"farebox: {line}")
    print(strict_json(estimate.records(), indent=1) if arguments.json else plan_table(estimate))
    for line in (*model_lines(estimate), *absent_lines(estimate)) if arguments.json else ():
        log(line)
    refuse_unpayable_plan(estimate)
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
    """Print the leaderboard of a sweep: one screen; --by and --all show more, methods=, shots= ... select rows."""
    from pipeline.commands.leaderboard import Options, leaderboard, of_words
    from pipeline.commands.merge import merged_words

    with merged_words(arguments.words, log) as several:
        config, only = of_words(several.words)
        options = Options(arguments.format, arguments.raw, arguments.published, arguments.by, arguments.all)
        text, damaged = leaderboard(config, options, only, Terminal.of(sys.stdout), log)
    print(several.as_typed(text))
    return exit_code([*several.problems, *damaged])


def merge(arguments: argparse.Namespace) -> int:
    """Merge the results of several storages, for example of two machines, into a new storage."""
    from pipeline.commands.merge import merge_storages

    return exit_code(merge_storages(arguments.words, arguments.to, arguments.keep_code, echo))


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


def records(arguments: argparse.Namespace) -> int:
    """Pack the recorded answers of remote models into an archive, or verify one."""
    from pipeline.commands import records as records_command

    print(records_command.run(arguments.verb, arguments.words))
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


def serve(arguments: argparse.Namespace) -> int:
    """Serve a model of this machine over HTTP, for adapters of kind http; see docs/serve.md."""
    from pipeline.commands.serve import serve_model

    return serve_model(arguments.words, echo)


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
    """List the models, with the access that they grant, or measure the text_norm of one."""
    from pipeline.commands import catalog

    if arguments.text_norm is None:
        return print_table(catalog.models(), arguments.json)
    print(catalog.text_norm_text(arguments.text_norm, arguments.json))
    return 0


def probe(arguments: argparse.Namespace) -> int:
    """Ask a model the same questions in different batches and orders; print how far its answers differ."""
    from pipeline.commands import probe as probe_command

    print(probe_command.run([*arguments.words, *["spend=true"] * arguments.spend], arguments.json, log))
    return 0


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


def audit(arguments: argparse.Namespace) -> int:
    """Print what the released code of papers selects on, its seeds and its cost; with names, the full records."""
    from pipeline.commands import audit as audit_command

    chosen = audit_command.select(arguments.words)
    if arguments.json:
        print(strict_json(audit_command.records(chosen), indent=1))
    else:
        print("\n\n".join(map(audit_command.record, chosen)) if arguments.words else audit_command.table(chosen))
    return 0


def completion(arguments: argparse.Namespace) -> int:
    """Print a script that completes commands, keys and names in a shell; its first line says where to put it."""
    from pipeline.commands.completion import script

    print(script(arguments.shell, _parser()), end="")
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


def _parser() -> argparse.ArgumentParser:
    parser = subcommands.Parser(prog="farebox", description=ABOUT, epilog=epilog(""), formatter_class=RAW)
    parser.add_argument("--version", action="version", version=f"farebox {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function: Any, overrides: bool = True) -> argparse.ArgumentParser:
        name, text = function.__name__, function.__doc__
        subparser = commands.add_parser(name, help=text, description=text, epilog=epilog(name), formatter_class=RAW)
        subparser.set_defaults(command=function)
        if overrides:
            subparser.add_argument("words", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
        return subparser

    subcommands.add_spend_option(command(run))
    command(plan).add_argument("--json", action="store_true", help="print one JSON record per trial")
    command(status).add_argument("--json", action="store_true", help="print one JSON object")
    subcommands.add_leaderboard_options(command(leaderboard))
    subcommands.add_merge_arguments(command(merge, overrides=False))
    command(ledger).add_argument("--json", action="store_true", help="print accounts, bills and problems as JSON")
    subcommands.add_budget_commands(command(budget, overrides=False))
    command(sync)
    subcommands.add_ui_options(command(ui))
    subcommands.add_probe_options(command(probe))
    command(serve, overrides=False).add_argument("words", nargs="*", metavar="KEY=VALUE", help=subcommands.SERVE_KEYS)
    subcommands.add_record_commands(command(records, overrides=False))
    subcommands.add_report_options(*(command(function, False) for function in (bench, claims, audit)))
    subcommands.add_data_commands(command(data, overrides=False))
    command(completion, overrides=False).add_argument("shell", metavar="SHELL", help="bash, zsh or fish")
    for listing in (methods, datasets, models):
        listed = command(listing, False)
        listed.add_argument("--json", action="store_true", help="print JSON")
    listed.add_argument("--text-norm", metavar="MODEL", help="load this model, and print its text_norm for its card")
    return parser


if __name__ == "__main__":
    sys.exit(main())
