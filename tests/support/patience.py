"""How long tests wait. `FAREBOX_TEST_PATIENCE=3` makes every wait three times as long, for a very slow machine.

A limit only ends what hangs. Ray and a replica took four minutes to start at a load of about 10 on two cores.
"""

from __future__ import annotations

import os

SCALE = float(os.environ.get("FAREBOX_TEST_PATIENCE", "1"))
COMMAND_S = 800.0
"""Seconds that one command of `farebox` may take, before scaling."""


def patience(seconds: float = COMMAND_S) -> float:
    """Return the number of seconds to wait at most."""
    return SCALE * seconds
