"""Examples that `--help` prints, by command. A test parses and composes each of them."""

from __future__ import annotations

from collections.abc import Mapping

EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "": ("farebox run sweep=demo", "farebox leaderboard sweep=demo --by dataset"),
    "run": (
        "farebox run sweep=demo",
        "farebox run sweep=demo methods=zero_shot,craft,taskres shots=16 seeds=1,2,3 storage=runs/mine",
    ),
    "plan": ("farebox plan sweep=embedded", "farebox plan sweep=demo methods=craft budget.requests=500,2000 --json"),
    "status": ("farebox status sweep=demo", "farebox status storage=runs/mine --json"),
    "leaderboard": (
        "farebox leaderboard sweep=demo",
        "farebox leaderboard sweep=demo methods=craft,bbt shots=16 --by dataset",
        "farebox leaderboard storage=runs/mine --by dataset --format latex",
    ),
    "merge": (
        "farebox merge runs/laptop runs/cluster --to runs/both",
        "farebox merge runs/a runs/b runs/c --to runs/all --keep-code",
    ),
    "ledger": ("farebox ledger sweep=demo", "farebox ledger storage=runs/mine --json"),
    "budget": (
        "farebox budget show storage=runs/demo",
        "farebox budget set team requests=100000 url=sqlite:////srv/l.db",
    ),
    "budget show": ("farebox budget show storage=runs/demo", "farebox budget show url=sqlite:////srv/ledger.db --json"),
    "budget set": (
        "farebox budget set team requests=100000 url=sqlite:////srv/ledger.db",
        "farebox budget set team images=none url=sqlite:////srv/ledger.db",
    ),
    "budget release": (
        "farebox budget release url=sqlite:////srv/ledger.db",
        "farebox budget release runs/old url=sqlite:////srv/ledger.db",
    ),
    "records": (
        "farebox records pack storage=runs/mine to=records.tar",
        "farebox records verify records.tar",
    ),
    "records pack": (
        "farebox records pack storage=runs/mine to=records.tar",
        "farebox records pack sweep=demo to=records.tar",
    ),
    "records verify": ("farebox records verify records.tar", "farebox records verify ~/records.tar"),
    "sync": ("farebox sync sweep=demo", "farebox sync storage=runs/mine mlflow=http://localhost:5000"),
    "ui": ("farebox ui sweep=demo", "farebox ui storage=runs/mine --port 5001"),
    "probe": (
        "farebox probe model=tiny",
        "farebox probe model=tiny datasets=icons,digits answers=probabilities --json",
        "farebox probe model=api.yaml datasets=icons --spend",
    ),
    "serve": ("farebox serve model=tiny", "farebox serve model=fake port=5001 fault.every_429=5"),
    "bench": ("farebox bench", "farebox bench ledger --json"),
    "claims": ("farebox claims craft", "farebox claims taskres seeds=1,2 --json"),
    "data": ("farebox data check icons digits", "farebox data add pets ~/images/pets"),
    "data add": ("farebox data add pets ~/images/pets", "farebox data add pets ~/images/pets.parquet --force"),
    "data check": ("farebox data check icons digits --quick", "farebox data check data.root=/srv/data"),
    "data show": ("farebox data show icons", "farebox data show icons --page 2 --out icons.png"),
    "data export-split": (
        "farebox data export-split icons shots=4 seed=1",
        "farebox data export-split icons --out split.json",
    ),
    "audit": ("farebox audit", "farebox audit craft zip --json"),
    "methods": ("farebox methods", "farebox methods --json"),
    "datasets": ("farebox datasets", "farebox datasets --json"),
    "models": ("farebox models", "farebox models --text-norm tiny"),
    "completion": ("farebox completion bash", "farebox completion fish"),
}


def epilog(command: str) -> str:
    """Return the examples of a command as the end of its help."""
    return "Examples:\n" + "\n".join(f"    {example}" for example in EXAMPLES[command])
