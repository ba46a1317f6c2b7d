"""Print lines and tables on standard output and standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import shortened
from pipeline.files import strict_json

MAX_COLUMN = 46
"""Characters of a table's column; longer cells are cut."""
Echo = Callable[[str], None]
"""A function that prints a line, such as `echo` and `log`."""


def plain(text: str, width: int | None = None) -> str:
    """Return text on one line, with control and other invisible characters as escapes, e.g. `\\x1b`.

    A text of more than `width` characters is cut and ends in an ellipsis.
    """
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    return line if width is None or len(line) <= width else line[: width - 1] + "…"


def print_table(records: list[dict[str, Any]], as_json: bool) -> int:
    """Print records as an aligned table or as JSON, and return the exit code 0."""
    if as_json:
        print(strict_json(records, indent=1))
        return 0
    rows = [{key: plain(_cell(value), MAX_COLUMN) for key, value in record.items()} for record in records]
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    for row in [{key: key for key in widths}, *rows]:
        print("  ".join(row[key].ljust(width) for key, width in widths.items()).rstrip())
    return 0


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def exit_code(problems: Sequence[str]) -> int:
    """Print problems on standard error and return the exit code: 3 if there are any, else 0."""
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


def short_path(path: Path) -> str:
    """Return a path relative to the working folder if it is inside it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
