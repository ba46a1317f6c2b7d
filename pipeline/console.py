"""Print lines and tables on standard output and standard error."""

from __future__ import annotations

import codecs
import io
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from pipeline.errors import shortened
from pipeline.files import strict_json

MAX_COLUMN = 46
"""Characters of a table's column; longer cells are cut."""
MIN_COLUMN = 8
"""Characters that a column of a table keeps on a narrow terminal."""
MIN_WIDTH, MIN_HEIGHT = 60, 24
"""Size below which a screen is not reduced further."""
ASCII = str.maketrans({"±": "+-", "…": "...", "→": "->", "–": "-", "—": "-", "×": "x", "·": "|"})
"""Replacements of the characters that our texts use, for terminals without them."""
Echo = Callable[[str], None]
"""A function that prints a line, such as `echo` and `log`."""


@dataclass(frozen=True)
class Terminal:
    """What a terminal can show."""

    width: int = 80
    height: int = 24
    unicode: bool = True
    colour: bool = False
    is_tty: bool = False

    @staticmethod
    def of(stream: TextIO) -> Terminal:
        """Return the size and abilities of a stream: 80 columns and 24 lines if it is not a terminal."""
        size = shutil.get_terminal_size()
        tty = stream.isatty()
        colour = tty and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        height = max(MIN_HEIGHT, size.lines) if tty else MIN_HEIGHT
        return Terminal(max(MIN_WIDTH, size.columns), height, _encodes(stream, "±…"), colour, tty)

    def text(self, text: str) -> str:
        """Return text with the characters that the terminal has."""
        return text if self.unicode else text.translate(ASCII)

    def bold(self, text: str) -> str:
        """Return text in bold if the terminal shows styles."""
        return f"\033[1m{text}\033[0m" if self.colour else text


def _encodes(stream: TextIO, text: str) -> bool:
    try:
        text.encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def accept_any_text(*streams: TextIO) -> None:
    """Make streams replace the characters that their encoding lacks (`ASCII`), instead of raising an error."""
    codecs.register_error("farebox", _replacement)
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="farebox")


def _replacement(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(ASCII)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


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
    terminal = Terminal.of(sys.stdout)
    rows = [{key: terminal.text(plain(_cell(v), MAX_COLUMN)) for key, v in record.items()} for record in records]
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    if terminal.is_tty:
        widths = _narrowed(widths, terminal.width)
        rows = [{key: _cut(cell, widths[key], terminal) for key, cell in row.items()} for row in rows]
    for row in [{key: key for key in widths}, *rows]:
        print("  ".join(row[key].ljust(width)[:width] for key, width in widths.items()).rstrip())
    return 0


def _narrowed(widths: dict[str, int], total: int) -> dict[str, int]:
    """Return the widths of columns for a line of at most `total` characters: the widest ones lose most."""
    widths = dict(widths)
    while sum(widths.values()) + 2 * (len(widths) - 1) > total and max(widths.values()) > MIN_COLUMN:
        widths[max(widths, key=lambda key: widths[key])] -= 1
    return widths


def _cut(text: str, width: int, terminal: Terminal) -> str:
    dots = terminal.text("…")
    return text if len(text) <= width else text[: width - len(dots)] + dots


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
