"""Test the claims of papers, print the table, and write it as JSON, Markdown and figures."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

from pipeline.bench.harness import machine
from pipeline.claims import cbbt, craft, taskres  # noqa: F401  importing registers their claims
from pipeline.claims.claim import PAPERS, REGISTRY, Claim, Finding
from pipeline.claims.evidence import Evidence
from pipeline.claims.figures import draw
from pipeline.config.typed_values import path
from pipeline.errors import ConfigError, did_you_mean
from pipeline.files import strict_json, write_atomic

Row = tuple[Claim, Finding]
WIDTH = 116


def parse(arguments: Sequence[str], log: Callable[[str], None]) -> tuple[list[str], Evidence]:
    """Return the papers that the arguments name, and the evidence, whose folder is storage=DIR or runs/claims.

    Other arguments are configuration overrides of all sweeps.
    """
    papers = [argument for argument in arguments if "=" not in argument]
    storage = [argument.partition("=")[2] for argument in arguments if argument.startswith("storage=")]
    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("storage=")]
    return papers, Evidence(path("storage", storage[-1] if storage else "runs/claims").absolute(), overrides, log)


def find(papers: Sequence[str], evidence: Evidence) -> list[Row]:
    """Test the claims of these papers, or of all if none is named; missing sweeps are run first."""
    for paper in papers:
        if paper not in PAPERS:
            raise ConfigError(did_you_mean("paper", paper, PAPERS))
    chosen = [claim for claim in REGISTRY if not papers or claim.paper in papers]
    chosen.sort(key=lambda claim: list(PAPERS).index(claim.paper))
    return [(claim, claim.find(evidence)) for claim in chosen]


def records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return one record per claim."""
    return [
        {
            "paper": claim.paper,
            "claim": claim.name,
            "where": claim.where,
            "says": claim.says,
            "tested": claim.tested,
            "verdict": str(finding.verdict),
            "ours": finding.ours,
            "why": finding.why,
            "measured": finding.measured._asdict() if finding.measured else None,
            "command": claim.command,
        }
        for claim, finding in rows
    ]


def text(rows: Sequence[Row]) -> str:
    """Return the table as text."""
    blocks = []
    for paper, group in groupby(rows, key=lambda row: row[0].paper):
        blocks.append(PAPERS[paper])
        for claim, finding in group:
            lines = [f"{finding.verdict.upper()}  {claim.says} ({claim.where})"]
            body = [f"tested: {claim.tested}", *([f"ours: {finding.ours}"] if finding.ours else []), finding.why]
            body.append(claim.command)
            for line in body:
                lines += textwrap.wrap(line, WIDTH, initial_indent="    ", subsequent_indent="      ")
            blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def markdown(rows: Sequence[Row]) -> str:
    """Return a Markdown table per paper."""
    blocks = []
    for paper, group in groupby(rows, key=lambda row: row[0].paper):
        lines = [f"## {PAPERS[paper]}", "", "| claim | tested | ours | verdict | command |"]
        lines.append("|---|---|---|---|---|")
        for claim, finding in group:
            verdict = f"**{finding.verdict}**: {finding.why}"
            cells = (f"{claim.says} ({claim.where})", claim.tested, finding.ours, verdict, f"`{claim.command}`")
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def write(rows: Sequence[Row], evidence: Evidence) -> list[str]:
    """Write claims.json, claims.md and the figures into the folder of the evidence; return their names."""
    environment = {"date": datetime.now(UTC).date().isoformat(), **machine()}
    where = ", ".join(f"{k} {v}" for k, v in environment.items())
    files = {
        "claims.json": strict_json({"environment": environment, "claims": records(rows)}, indent=1).encode(),
        "claims.md": f"Measured: {where}.\n\n{markdown(rows)}".encode(),
        **draw({claim.paper for claim, _ in rows}, evidence),
    }
    for name, data in files.items():
        write_atomic(evidence.storage / name, data)
    return list(files)
