"""The file that a SQLite URL names, for ledgers and MLflow's store. SQLAlchemy is not imported."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import parse_qs

_URL = re.compile(r"sqlite(?:\+\w+)?:///(?P<path>[^?]*)(?:\?(?P<options>.*))?", re.DOTALL)
_URI_PREFIX = re.compile(r"file:(?://(?:localhost)?(?=/))?")


def sqlite_file(url: str) -> Path | None:
    """Return the file of a SQLite URL; None for a database in memory, a server, or a text that is not a URL.

    The path may be a URI of SQLite, as in sqlite:///file:/DIR/FILE?uri=true.
    """
    match = _URL.fullmatch(url)
    if match is None:
        return None
    path, options = match["path"], parse_qs(match["options"] or "")
    if options.get("uri", ["false"])[-1].lower() in ("true", "yes", "on", "y", "t", "1"):  # as SQLAlchemy reads it
        path = _URI_PREFIX.sub("", path, count=1)
        if "memory" in options.get("mode", []):
            return None
    return None if path in ("", ":memory:") else Path(path)
