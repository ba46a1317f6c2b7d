"""The `farebox` command. It verifies that the package it is about to import is the one it was installed with."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> int:
    """Run the command line; return its exit code.

    A folder named `pipeline` that comes first on the path (for example with PYTHONPATH=.) would be imported instead of
    ours. `pipeline.check_packages` does the same for `methods`.
    """
    ours = Path(__file__).resolve().parent / "pipeline"
    spec = find_spec("pipeline")
    places = [Path(place).resolve() for place in (spec.submodule_search_locations or ())] if spec else []
    if places != [ours]:
        found = ", ".join(map(str, places)) or (spec.origin if spec else None) or "nothing"
        return _refuse(
            f"'pipeline' comes from {found}, not from {ours}: rename that folder, or remove it from PYTHONPATH"
        )
    try:
        from pipeline.cli import main as command_line
    except ImportError as error:
        return _refuse(f"the installation at {ours} is incomplete ({error}): pip install --force-reinstall farebox")
    return command_line()


def _refuse(line: str) -> int:
    print(f"farebox: {line}", file=sys.stderr)
    return 2
