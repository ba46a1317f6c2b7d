"""The machine around the methods: endpoint, meter, trials, sweeps, results."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

try:
    __version__ = version("farebox")
except PackageNotFoundError:  # a checkout on the path, not installed
    __version__ = "0+unknown"


def check_packages() -> None:
    """Verify that `methods` is imported from the folder that `pipeline` was imported from.

    Both names are common: a package of the same name that comes first on the path would be imported instead.

    Raises:
        ImportError: it would be imported from elsewhere.
    """
    ours = Path(__file__).resolve().parent.parent / "methods"
    spec = find_spec("methods")
    places = [Path(place).resolve() for place in (spec.submodule_search_locations or ())] if spec else []
    if places != [ours]:
        found = ", ".join(map(str, places)) or (spec.origin if spec else None) or "nothing"
        raise ImportError(
            f"'methods' comes from {found}, not from {ours}: rename that folder, or remove it from PYTHONPATH"
        )
