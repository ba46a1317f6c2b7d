"""Escape names for Markdown, LaTeX and CSV.

Names of data sets, methods and models come from users' files. A name must not change the table around it: no Markdown
or LaTeX commands, no spreadsheet formulas. Text is made printable with `console.plain`, HTML escaped with
`html.escape`.
"""

from __future__ import annotations

import re
from typing import Any

from pipeline.console import plain

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


def markdown(text: str) -> str:
    """Escape text for a Markdown table cell or heading. An underscore inside a word needs no escape."""
    return _MARKDOWN.sub(lambda match: f"\\{match[0]}", plain(text))


def latex(text: str) -> str:
    """Escape text for a LaTeX table cell, including the first cell of a line."""
    escaped = _LATEX_PARTS.sub(lambda match: _LATEX[match[0]], plain(text))
    return "{}" + escaped if escaped.startswith(("[", "*")) else escaped  # after \\ these would be its arguments


def csv_cell(value: Any) -> Any:
    """Escape a value for CSV: text that a spreadsheet would run as a formula starts with a `'`."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
