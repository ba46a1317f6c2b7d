"""Screens of the terminal from a small fixed set of rows: `python -m tests.support.screens` writes docs/screens/."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from pipeline.config.compose import compose
from pipeline.console import Terminal
from pipeline.results.report import Report, last_screen
from pipeline.results.row import ResultRow
from tests.support.synthetic import report_of, sweep

FOLDER = Path(__file__).resolve().parents[2] / "docs/screens"


def rows(seeds: tuple[int, ...] = (1, 2, 3)) -> list[ResultRow]:
    """Rows as `farebox run sweep=demo` makes them, with effects that are known."""
    trials = [*sweep(seeds=seeds, budgets=((1000, None),))]
    trials += sweep(seeds=seeds, budgets=((100, None), (300, None)), methods=("craft",))
    return [row for trial in trials for row in trial if row.dataset != "emoji"]


@cache
def demo(seeds: tuple[int, ...] = (1, 2, 3)) -> Report:
    """The report of these rows."""
    return report_of(rows(seeds), title="demo", label=compose(["sweep=demo"]).label, sweep="demo")


def screens() -> dict[str, str]:
    """Content of each file of docs/screens/, by its name."""
    config, page = compose(["sweep=demo"]), Path("runs/demo/leaderboard/leaderboard.html")

    def of(report: Report, width: int, axis: str | None = None, unicode: bool = True) -> str:
        return last_screen(report, config, Terminal(width, unicode=unicode), page, axis) + "\n"

    found = {f"run_{width}.txt": of(demo(), width) for width in (80, 120)}
    found |= {
        f"by_{axis}_{width}.txt": of(demo(), width, axis) for axis in ("dataset", "budget") for width in (80, 120)
    }
    found["two_seeds_80.txt"] = of(demo((1, 2)), 80)
    found["ascii_80.txt"] = of(demo(), 80, unicode=False)
    return found


def main() -> None:
    """Write the files."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in screens().items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()
