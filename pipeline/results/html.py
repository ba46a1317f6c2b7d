"""Write the leaderboard as one self-contained HTML page, without scripts and external links."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

import pyarrow as pa

from pipeline.console import plain
from pipeline.results.comparison import GAINS, HARMONIC
from pipeline.results.identity import Selection
from pipeline.results.row import STATUSES
from pipeline.results.tables import LEGEND, count, gain, heading, plus_minus, sections, state

Record = dict[str, Any]

CAPTIONS = {
    "accuracy_by_shots": "Accuracy by labelled images per class, at the largest allotment.",
    "accuracy_by_requests": "Accuracy by requests billed for fitting; methods without a fit are horizontal lines.",
    "accuracy_by_images": "The same trials by image rows billed for fitting.",
    "gain_over_zero_shot": "Gain over zero-shot at the largest number of shots and the largest allotment.",
}
_GAIN = "gain over zero_shot in percentage points, paired by data set and seed ± 95% CI (t)"
_BY_IMAGE = "95% bootstrap confidence interval of the gain over test images (1,000 resamples, seeds fixed)"
COLUMNS = {
    "method": "",
    "seeds": "number of finished seeds",
    "accuracy": "percent ± 95% CI (t) over seeds",
    "base": "accuracy on the fitted classes in percent ± 95% CI (t)",
    "base gain": _GAIN,
    "new": "accuracy on the classes that were not fitted in percent ± 95% CI (t)",
    "new gain": _GAIN,
    "H": "harmonic mean of base and new, per data set and seed",
    "H gain": _GAIN,
    "over zero_shot": "paired gain in percentage points ± 95% CI (t); bold: the interval excludes 0",
    "over logit_head": "paired gain in percentage points ± 95% CI (t); bold: the interval excludes 0",
    "rank": "average rank within the access class; shown only with five or more seeds",
    "requests": "requests billed for fitting (adapt + validate)",
    "images": "image rows billed for fitting (adapt + validate)",
    "access": "what the method may ask of the endpoint",
    "zero_shot, by image": _BY_IMAGE,
    "logit_head, by image": _BY_IMAGE,
    "eval requests": "requests billed for predicting the test set",
    "paper queries": "number of queries as the paper counts them",
    "params": "number of learned parameters",
    "client bytes": "size of the fitted method on the client",
    "seconds": "wall-clock time; trials that run at the same time slow each other down",
    "state": "",
}
CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; margin: 2rem auto; max-width: 1500px;
  padding: 0 1rem }
h1 { font-size: 1.6rem; margin: 0 0 .3rem } h2 { font-size: 1.2rem; margin: 2rem 0 .4rem }
h3 { font-size: .95rem; margin: 1.1rem 0 .3rem; font-weight: 600 }
.note { background: #fff6dd; border-left: 4px solid #e0a800; padding: .4rem .8rem; margin: .5rem 0 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .22rem .45rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee }
th { border-bottom: 1px solid #888; font-weight: 600; cursor: help } .l { text-align: left }
tr.ref td { color: #666; background: #fafafa } td.i { color: #777; font-size: 12px }
td.printed { color: #446; background: #f3f5fb }
figure { margin: 1.2rem 0 } figure img { max-width: 100% } figcaption { color: #555; font-size: 13px }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: 13px }
dt { font-weight: 600 } dd { margin: 0 } summary { cursor: pointer; font-weight: 600; margin: .8rem 0 }
footer { color: #666; font-size: 12px; margin-top: 2rem; border-top: 1px solid #ddd }
"""


def html(
    board: pa.Table,
    summary: pa.Table,
    selection: Selection,
    figures: Mapping[str, bytes],
    title: str = "Leaderboard",
    label: str = "",
    notes: Sequence[str] = (),
    printed: str = "",
) -> str:
    """Return the page.

    Args:
        board: The leaderboard by test set.
        summary: The leaderboard over data sets.
        selection: The rows of both.
        figures: PNG figures by name.
        title: Title of the page.
        label: Description shown above the tables.
        notes: Lines shown below the tables.
        printed: HTML section of printed numbers.
    """
    title = plain(title)
    parts = [f"<h1>{escape(title)}</h1>", f"<p>{escape(_facts(selection.everything))}</p>"]
    parts += [f'<p class="note">{escape(plain(label))}</p>'] if label else []
    places = {"tables": "Leaderboard", "figures": "Figures", "sets": "Every test set", "terms": "Legend"}
    places |= {"printed": "Printed numbers"} if printed else {}
    parts.append("<p>" + " · ".join(f'<a href="#{k}">{v}</a>' for k, v in places.items()) + "</p>")
    parts += ["<div id=tables>", _tables(summary), "</div>", *_notes(notes), "<h2 id=figures>Figures</h2>"]
    for name, png in figures.items():
        caption = CAPTIONS.get(name, name)
        image = base64.b64encode(png).decode()
        parts.append(f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{image}">')
        parts.append(f"<figcaption>{escape(caption)} Error bars: 95% CI (t) over seeds.</figcaption></figure>")
    parts.append(f"<details id=sets><summary>Every test set</summary>{_tables(board)}</details>")
    parts.append(printed)
    terms = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in LEGEND.items())
    parts += [
        f"<h2 id=terms>Legend</h2><dl>{terms}</dl>",
        f"<footer>{escape(_environment(selection.rows))}</footer>",
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{CSS}</style>'
    return f"<!doctype html>\n<html lang=en><head>{head}</head><body>\n" + "\n".join(parts) + "\n</body></html>\n"


def _notes(lines: Sequence[str]) -> list[str]:
    items = "".join(f"<li>{escape(plain(line))}</li>" for line in lines)
    return [f"<ul class=note>{items}</ul>"] if items else []


def _tables(table: pa.Table) -> str:
    parts = []
    for name, group in groupby(sections(table), key=lambda section: section[0]["access_class"]):
        parts.append(f"<h2>Access: {escape(name)}</h2>")
        for section in group:
            lines = [_line(r) for r in section]
            always = ("method", "accuracy", "H")
            used = [c for c in COLUMNS if c in lines[0] and (c in always or any(x[c] not in ("", "-") for x in lines))]
            head = "".join(f'<th class="{_css(c)}" title="{escape(COLUMNS[c])}">{escape(c)}</th>' for c in used)
            body = []
            for r, line in zip(section, lines, strict=True):
                cells = "".join(f'<td class="{_css(c)}">{line[c]}</td>' for c in used)
                body.append(f"<tr{' class=ref' if r['reference'] else ''}>{cells}</tr>\n")
            grid = f"<table><tr>{head}</tr>\n{''.join(body)}</table>"
            parts.append(f"<h3>{escape(heading(section))}</h3><div class=wide>{grid}</div>")
    return "\n".join(parts)


def _css(column: str) -> str:
    return "l" if column in ("method", "access", "state") else "i" if column.endswith("by image") else ""


def _line(r: Record) -> dict[str, str]:
    if r["kind"] == HARMONIC:
        halves = {"base": r["base"], "new": r["new"], "H": r}
        numbers = {name: plus_minus(h.get("accuracy"), h.get("accuracy_ci95")) for name, h in halves.items()}
        numbers |= {f"{name} gain": _gain(h, "zero_shot") for name, h in halves.items()}
    else:
        numbers = {"accuracy": plus_minus(r["accuracy"], r["accuracy_ci95"])}
        numbers |= {f"over {name}": _gain(r, name) for name in GAINS}
        numbers |= {f"{name}, by image": _bootstrap(r, name) for name in GAINS}
    return {
        "method": escape(plain(r["label"])) + (" (ref)" if r["reference"] else ""),
        "access": escape(r["access"]) or "none",
        "seeds": str(r["seeds"]),
        **numbers,
        "rank": "-" if r["rank"] is None else f"{r['rank']:.1f} of {r['ranked_among']}",
        "requests": count(r["requests"]),
        "images": count(r["images"]),
        "eval requests": count(r["evaluate_requests"]),
        "paper queries": count(r["paper_queries"]),
        "params": count(r["trainable_params"]),
        "client bytes": count(r["client_bytes"]),
        "seconds": "-" if r["seconds"] is None else f"{r['seconds']:,.1f}",
        "state": escape(state(r)),
    }


def _gain(r: Record, name: str) -> str:
    text, ci95 = gain(r, name), r.get(f"gain_{name}_ci95")
    return f"<b>{text}</b>" if ci95 is not None and abs(r[f"gain_{name}"]) > ci95 else text


def _bootstrap(r: Record, name: str) -> str:
    low, high = r[f"gain_{name}_low"], r[f"gain_{name}_high"]
    return "-" if low is None else f"[{low:+.1f}, {high:+.1f}]"


def _facts(rows: pa.Table) -> str:
    records = {r["trial_id"]: r for r in rows.select(["trial_id", "status", "requests", "images"]).to_pylist()}.values()
    states = {text: sum(r["status"] == status for r in records) for status, text in STATUSES.items()}
    counted = ", ".join(f"{n:,} {text}" for text, n in states.items() if n)
    bill = f"{sum(r['requests'] for r in records):,} requests and {sum(r['images'] for r in records):,} image rows"
    return f"{len(records):,} trials ({counted or 'none'}); {bill} billed for fitting."


def _environment(rows: pa.Table) -> str:
    def all_of(column: str) -> str:
        return ", ".join(sorted({str(v) for v in rows[column].to_pylist() if v not in (None, "")})) or "unknown"

    weights = ", ".join(sorted({d[:12] for d in rows["model_digest"].to_pylist()}))
    newest = max(rows["created"].to_pylist(), default="")
    return (
        f"Farebox {all_of('farebox_version')}, torch {all_of('torch_version')}, Python {all_of('python_version')}; "
        f"CPU {all_of('cpu')}, replicas on {all_of('device')} with {all_of('threads')} threads each; "
        f"weights {weights}; newest row {newest}."
    )
