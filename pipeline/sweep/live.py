"""The progress of a run on a terminal, redrawn in place with rich."""

from __future__ import annotations

import rich.live
from rich.console import Console, Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.console import plain
from pipeline.sweep.run_state import State

BAR_WIDTH = 40


class Live:
    """Shows the stage, a progress bar, counts and the last results on standard error.

    What is printed meanwhile appears above it.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self._live = rich.live.Live(console=self.console, auto_refresh=False, transient=True)
        self._live.start()
        self.console.show_cursor(True)  # a killed run would leave the terminal without its cursor

    def show(self, state: State) -> None:
        """Draw a state."""
        self._live.update(drawn(state, self.console.width), refresh=True)

    def close(self, state: State | None) -> None:
        """Leave the last state as a line."""
        self._live.stop()
        if state is not None:
            self.console.print(Text(state.line))


def drawn(state: State, width: int) -> Group:
    """Return a state as lines of at most `width` columns."""
    bar = Table.grid()  # a bar alone would not end its line
    bar.add_row(ProgressBar(total=1.0, completed=state.share, width=min(BAR_WIDTH, width)))
    lines = [Text(plain(line, width), style="dim") for line in (f"  {result}" for result in state.results)]
    return Group(*lines, bar, Text(plain(state.line, width)))
