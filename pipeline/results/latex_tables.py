"""Write the leaderboard as LaTeX: a booktabs table per section."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import pyarrow as pa

from pipeline.console import plain
from pipeline.results.escape import latex
from pipeline.results.tables import heading, is_text, sections, with_values


def to_latex(table: pa.Table, notes: Sequence[str] = ()) -> str:
    """Return the notes as comments, followed by a booktabs table per section."""
    blocks = [f"% {plain(note)}" for note in notes]
    for rows in sections(table):
        blocks.append(latex_table(f"{rows[0]['access_class']}: {heading(rows)}", with_values(rows)))
    return "\n".join(blocks)


def latex_table(caption: str, shown: Sequence[Mapping[str, str]]) -> str:
    """Return lines of cells as a booktabs table."""
    left = is_text(shown[0])
    lines = [
        " & ".join(latex(c) if text else latex_number(c) for c, text in zip(cells.values(), left, strict=True)) + r" \\"
        for cells in shown
    ]
    columns = "".join("l" if text else "r" for text in left)
    return latex_environment(caption, caption, columns, [*map(latex, shown[0])], [r"\midrule", *lines])


def latex_environment(caption: str, label: str, columns: str, head: Sequence[str], body: Sequence[str]) -> str:
    """Return a booktabs table that is scaled down where it is wider than the text.

    Args:
        caption: its caption, as plain text.
        label: text of whose letters and digits the label is made.
        columns: a letter for the alignment of each column.
        head: headings, as LaTeX.
        body: lines below the headings, as LaTeX.
    """
    lines = [
        r"% Needs \usepackage{booktabs,graphicx}.",
        r"\begin{table}[t]",
        r"\centering",
        rf"\caption{{{latex(caption)}}}",
        latex_label(label),
        r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(head) + r" \\",
        *body,
        r"\bottomrule",
        r"\end{tabular}}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def latex_label(text: str) -> str:
    """Return the label of a table, made of the letters and digits of a text."""
    key = re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()
    return rf"\label{{tab:{key}}}"


def latex_number(text: str) -> str:
    """Return a cell of numbers for LaTeX, with minus signs in place of hyphens."""
    return re.sub(r"-(?=[0-9.])", "$-$", latex(text))
