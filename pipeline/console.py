"""What commands print: lines on standard output and standard error, and tables of records."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.errors import shortened
from pipeline.files import strict_json

Echo = Callable[[str], None]
"""Prints one line for the user."""


def print_table(records: list[dict[str, Any]], as_json: bool) -> int:
    """Print records as an aligned table, or as JSON; the exit code."""
    if as_json:
        print(strict_json(records, indent=1))
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


def exit_code(problems: Sequence[str]) -> int:
    """Print problems on stderr; 3 when there are any, else 0."""
    for problem in problems:
        print_error(problem)
    return 3 if problems else 0


def print_error(problem: object) -> None:
    """Print an error as one line of at most 300 characters on standard error."""
    print(shortened(f"farebox: {problem}"), file=sys.stderr)


def echo(line: str) -> None:
    """Print a line on standard output."""
    print(line, flush=True)


def log(line: str) -> None:
    """Print a line on standard error."""
    print(line, file=sys.stderr, flush=True)
