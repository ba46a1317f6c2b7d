"""Write an overview as one screen of a terminal: title, table, conclusions, and where the rest is."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.budget import Limits
from pipeline.console import Terminal, plain
from pipeline.results.comparison import LOCAL, access_words
from pipeline.results.overview import NO_FIT, Line, Overview, conclusions, unfinished
from pipeline.results.tables import budget, compact, count, estimate

MAX_LABEL = 3
"""Lines that a sweep's own description may take."""
MAX_CONCLUSIONS = 4
MAX_HEADER = 22
MAX_METHOD = 24
"""Characters of the first column that are kept before intervals and further columns are given up."""
MAX_LEGEND = 2
GROUP = {
    "labels": "methods that get the best class only",
    "top-k": "methods that get the best classes and their scores",
    "scores": "methods that get class scores",
    "features": "methods that get image and text features",
    "white box": "references that get gradients",
}
"""What the methods of each access class get."""


@dataclass(frozen=True)
class Style:
    """How much of the table is shown; `STYLES` is sorted from the widest."""

    intervals: bool
    """Intervals in every column; otherwise in the main one only."""
    full_counts: bool
    dropped: int = 0
    """Columns that are left out, those with the least shots or the last data sets first."""
    short: bool = False
    """Allotments as '32k'."""
    bare: bool = False
    """No interval and no bill, and one space between columns."""


def screen(
    view: Overview | None,
    terminal: Terminal,
    *,
    title: str,
    label: str = "",
    notes: Sequence[str] = (),
    where: Sequence[str] = (),
) -> str:
    """Return an overview as text of at most the terminal's size.

    Args:
        view: The overview; None if nothing has finished.
        terminal: Width, height and characters.
        title: Name of the sweep.
        label: Its own description.
        notes: What to know about the results; the first is shown.
        where: Lines that say where the rest is; they are not cut.
    """
    if view is None:
        return "\n".join(["no finished trials", *(_cut(f"! {note}", terminal) for note in notes), *where])
    start = [_headline(title, view, terminal), *_filled(label, terminal, MAX_LABEL)]
    end = [*_legend(view, terminal), *_filled(" ".join(conclusions(view)), terminal, MAX_CONCLUSIONS)]
    problems = [f"! {text}" for text in ([unfinished(view)] if unfinished(view) else []) + list(notes)]
    end += [_cut(line, terminal) for line in problems[:1]]
    if len(problems) > 1:
        end.append(_cut(f"! {len(problems) - 1} more notes with --all", terminal))
    room = terminal.height - len(start) - len(end) - len(where) - 1
    return "\n".join([*start, *_table(view, terminal, room), *end, *where])


def _headline(title: str, view: Overview, terminal: Terminal) -> str:
    """Return the title and the facts for which there is room, if need be without what is in parentheses."""
    line = _cut(f"{title}: {view.facts['data']}", terminal)
    for fact in (fact for name, fact in view.facts.items() if fact and name != "data"):
        longer = (f"{line}, {terminal.text(text)}" for text in (fact, fact.partition(" (")[0]))
        line = next((text for text in longer if len(text) <= terminal.width), line)
    return line


def _filled(text: str, terminal: Terminal, most: int) -> list[str]:
    return textwrap.wrap(
        terminal.text(plain(text)),
        terminal.width,
        max_lines=most,
        placeholder=terminal.text("…"),
        break_on_hyphens=False,
    )


def _cut(text: str, terminal: Terminal) -> str:
    line = plain(terminal.text(text))
    dots = terminal.text("…")
    return line if len(line) <= terminal.width else line[: terminal.width - len(dots)] + dots


def _legend(view: Overview, terminal: Terminal) -> list[str]:
    seeds = max(line.main["seeds"] for line in view.lines)
    if any(line.main["tied"] is not None for line in view.lines):
        text = f"* best of its class; = tied on {view.facts['seeds']} (paired CI contains 0); ± 95% CI"
    elif seeds == 2:
        text = "* best of its class; a..b: range of two seeds; intervals and ties need three"
    else:
        text = "* best of its class" + "; one seed: no interval, no ties" * (seeds == 1)
    return _filled(text, terminal, MAX_LEGEND)


def _group(name: str, axis: str) -> str:
    """Return the heading of a group: an access class, or the access of its methods, with what it means."""
    base = name.removesuffix(LOCAL)
    if axis == "access":
        return f"{name}: {access_words(base)}"
    local = "methods that also run a pretrained model on the client"
    return f"{name.upper()}: {GROUP[base] if name == base else local}"


def _table(view: Overview, terminal: Terminal, room: int) -> list[str]:
    """Return the header and at most `room` further lines."""
    for style in _styles(view):
        names, widths = _layout(view, style, terminal)
        if _total([min(widths[0], MAX_METHOD), *widths[1:]], style) <= terminal.width:
            break
    widths[0] = max(8, widths[0] - max(0, _total(widths, style) - terminal.width))
    names_of = [budget(of) for of in view.allotments] or view.columns
    left_out = [names_of[i] for i in range(len(view.columns)) if i not in _kept(view, style)]
    shown = _chosen(view, room - sum(name != NO_FIT for name in view.groups), bool(left_out))
    hidden = len(view.lines) - sum(map(len, shown.values()))
    text = [_aligned("", list(names), widths, style)]
    for name, group in shown.items():
        if name != NO_FIT:
            text.append(terminal.bold(_cut(_group(name, view.axis), terminal)))
        for line in group:
            mark = "*" if line.main["leader"] else "=" if line.main["tied"] else ""
            row = _aligned(mark, _cells(view, line, style, terminal), widths, style)
            text.append(terminal.bold(row) if line.main["leader"] else row)
    if left_out:
        methods = f"{hidden} more method{'s' * (hidden != 1)} and " * bool(hidden)
        columns = f"the column{'s' * (len(left_out) != 1)} {'; '.join(left_out)}"
        text.append(_cut(f"--all has {methods}{columns}", terminal))
    elif hidden:
        text.append(_cut(f"--all has {hidden} more method{'s' * (hidden != 1)}", terminal))
    return text


def _chosen(view: Overview, room: int, columns_left_out: bool) -> dict[str, tuple[Line, ...]]:
    """Return the lines for which there is room: in turn the next best of each group."""
    total = len(view.lines)
    if total + columns_left_out <= room:
        return view.groups
    taken = dict.fromkeys(view.groups, 0)
    for _ in range(max(len(view.groups), room - 1)):  # one line says what is missing
        free = [g for g in view.groups if taken[g] < (1 if g == NO_FIT else len(view.groups[g]))]
        if not free:
            break
        taken[min(free, key=lambda g: (taken[g], list(view.groups).index(g)))] += 1
    return {g: lines[: taken[g]] for g, lines in view.groups.items() if taken[g]}


def _styles(view: Overview) -> list[Style]:
    most = len(view.columns) - 1
    narrow = [Style(False, False, dropped) for dropped in range(most + 1)]
    if view.allotments:
        narrow = [Style(False, False), Style(False, False, short=True)]
        narrow += [Style(False, False, dropped, short=True, bare=True) for dropped in range(most + 1)]
    return [Style(True, True), Style(False, True), *narrow]


def _kept(view: Overview, style: Style) -> list[int]:
    """Return the columns that are shown: the main one always."""
    order = [i for i in range(len(view.columns)) if i != view.main]
    if view.allotments:  # a ladder of requests stays before one of image rows
        first = sorted(order, key=lambda i: (view.allotments[i].images is None, i))
    else:
        first = sorted(order, key=lambda i: (view.columns[i] == "shift", i), reverse=view.main == 0)
    gone = set(first[: style.dropped])
    return [i for i in range(len(view.columns)) if i not in gone]


def _layout(view: Overview, style: Style, terminal: Terminal) -> tuple[list[str], list[int]]:
    what = "gain over zero_shot" if view.shows_gains else "accuracy in %"
    if style.short:
        what = "gain by requests" if view.shows_gains else "% by requests"
        columns = [_short(view.allotments[i]) for i in _kept(view, style)]
    else:
        columns = [terminal.text(plain(view.columns[i], MAX_HEADER)) for i in _kept(view, style)]
    names = [what, *columns, *([] if style.bare else ["requests", "images"])]
    rows = [names, *(_cells(view, line, style, terminal) for line in view.lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(names))]
    return names, widths


def _short(of: Limits) -> str:
    """Return an allotment in few characters: '32k' requests, or '300im' for one of image rows as well."""
    number, unit = (of.requests, "") if of.images is None else (of.images, "im")
    if number is None:
        return "no limit"
    return f"{number / 1000:g}k{unit}" if number >= 1000 and number % 100 == 0 else f"{number}{unit}"


def _total(widths: Sequence[int], style: Style) -> int:
    """Return the width of a line: a mark, then columns with spaces between them."""
    return 2 + sum(widths) + (1 if style.bare else 2) * (len(widths) - 1)


def _cells(view: Overview, line: Line, style: Style, terminal: Terminal) -> list[str]:
    is_zero = view.shows_gains and line.main["method"] == "zero_shot"
    is_reference = line.main["reference"] and line.group != NO_FIT
    suffix = " accuracy" if is_zero else " (ref)" if is_reference else ""
    cells = [terminal.text(plain(line.main["label"] + suffix))]
    for i in _kept(view, style):
        record = line.records[i]
        if record is None:
            cells.append("-")
        elif is_zero:
            cells.append("-" if record["accuracy"] is None else f"{record['accuracy']:.1f}%")
        else:
            cells.append(
                terminal.text(_value(record, view.value, style.intervals or (i == view.main and not style.bare)))
            )
    if style.bare:
        return cells
    number: Callable[[Any], str] = count if style.full_counts else compact
    return [*cells, number(line.main["requests"]), number(line.main["images"])]


def _value(record: dict[str, Any], name: str, interval: bool) -> str:
    sign = "" if name == "accuracy" else "+"
    if interval:
        return estimate(record, name, sign)
    return "-" if record[name] is None else f"{record[name]:{sign}.1f}"


def _aligned(mark: str, cells: list[str], widths: list[int], style: Style) -> str:
    first = cells[0] if len(cells[0]) <= widths[0] else cells[0][: widths[0] - 3] + "..."
    rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return (" " if style.bare else "  ").join([f"{mark:<2}{first:<{widths[0]}}", *rest]).rstrip()
