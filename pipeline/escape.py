"""Escape names for the formats that results are written in: terminal text, Markdown, LaTeX, CSV and JSON.

Names of data sets, methods and models come from users' files. A name must not change the table around it: no terminal
control sequences, no Markdown or LaTeX commands, no spreadsheet formulas. HTML is escaped with `html.escape`.
"""

from __future__ import annotations

import re
from typing import Any

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""First characters that make a spreadsheet read a text cell as a formula."""
_MARKDOWN = re.compile(r"[\\`*|<\[\]~$&]|(?<![^\W_])_|_(?![^\W_])|^[#>](?= )")
_LATEX = {
    **{char: rf"\{char}" for char in "_%&#{}$"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''"},
    **{"±": r"$\pm$", "->": r"$\to$", "--": "-{}-", "…": r"\dots{}"},
}
_LATEX_PARTS = re.compile("|".join(sorted(map(re.escape, _LATEX), key=len, reverse=True)))


def plain(text: str) -> str:
    """Text in one line, with control and other invisible characters written as escapes, e.g. `\\x1b`."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def markdown(text: str) -> str:
    """Text as it stands in a Markdown table cell or heading. An underscore inside a word needs no escape."""
    return _MARKDOWN.sub(lambda match: f"\\{match[0]}", plain(text))


def latex(text: str) -> str:
    """Text as it stands in a LaTeX table cell, also as the first of a line."""
    escaped = _LATEX_PARTS.sub(lambda match: _LATEX[match[0]], plain(text))
    return "{}" + escaped if escaped.startswith(("[", "*")) else escaped  # after \\ these would be its arguments


def csv_cell(value: Any) -> Any:
    """A value as CSV holds it: numbers unchanged, text that a spreadsheet would run as a formula behind a `'`."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
