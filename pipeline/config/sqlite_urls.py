"""Check the URLs of SQLite files, which the ledger and MLflow's store use.

SQLAlchemy parses what follows `?` as options, and its versions differ in whether %20 is a space. A path with `?` or `%`
would create the database in another place, so such paths are rejected.
"""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.errors import ConfigError

_SQLITE = re.compile(r"sqlite(?:\+\w+)?:(?://)?(?:/(?P<path>[^?]*))?(?:\?(?P<options>.*))?", re.DOTALL)
_OPTIONS = re.compile(r"\w+=[^&?/]*(?:&\w+=[^&?/]*)*")


def check_sqlite(key: str, url: str | None) -> str | None:
    """Check the URL of a SQLite file and return it. URLs of other databases, and None, are returned unchecked.

    Raises:
        ConfigError: An in-memory database, or a path with `~`, `%` or `?`.
    """
    match = _SQLITE.fullmatch(url or "")
    if not match:
        return url
    path, options = (match["path"] or "").removeprefix("file:"), match["options"] or ""
    if path in ("", ":memory:") or "mode=memory" in options:
        raise ConfigError(
            f"{key}={url}: a database in memory is lost with its process: name a file, sqlite:////DIR/FILE"
        )
    if "%" in path or path.startswith("~") or (options and not _OPTIONS.fullmatch(options)):
        raise ConfigError(f"{key}={url}: a SQLite file is named by its whole path, without ~, % and ?")
    return url


def sqlite_folder(key: str, folder: Path) -> Path:
    """Check that a folder's path can be part of a SQLite URL, and return it.

    Raises:
        ConfigError: It has `?` or `%`, which have a special meaning in URLs.
    """
    if marks := [mark for mark in "?%" if mark in str(folder)]:
        raise ConfigError(
            f"{key}={folder}: {' and '.join(marks)} cannot be part of this path, since it has a special meaning in "
            "database URLs: name another folder"
        )
    return folder
