"""The machine around the methods: endpoint, meter, trials, sweeps, results."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    __version__ = version("farebox")
except PackageNotFoundError:  # a checkout on the path, not installed
    __version__ = "0+unknown"


def check_packages() -> None:
    """Raise ImportError when another distribution's `methods` or `pipeline` took the import name.

    Both names are generic: a package of the same name in site-packages can win silently over an editable install.
    """
    import methods

    ours, theirs = Path(__file__).resolve().parent.parent, Path(str(methods.__file__)).resolve().parent.parent
    if ours != theirs:
        raise ImportError(
            f"'pipeline' comes from {ours} but 'methods' from {theirs}: another package has taken one of the names; "
            "type: pip install --force-reinstall --no-deps farebox (or pip install -e . in the checkout)"
        )
