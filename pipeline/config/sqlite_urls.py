"""SQLite files named by URLs, of the ledger and of MLflow's store.

SQLAlchemy takes what follows `?` as options, and its versions differ in whether %20 is a space. A path with `?` or `%`
would put the database beside the folder that was named, so such paths are refused.
"""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.errors import ConfigError

_SQLITE = re.compile(r"sqlite(?:\+\w+)?:(?://)?(?:/(?P<path>[^?]*))?(?:\?(?P<options>.*))?", re.DOTALL)
_OPTIONS = re.compile(r"\w+=[^&?/]*(?:&\w+=[^&?/]*)*")


def check_sqlite(key: str, url: str | None) -> str | None:
    """Check a URL that a user typed; other databases than SQLite, and None, are returned as they are.

    Raises:
        ConfigError: a database in memory, or a path that is not taken as it is typed.
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
    """Check that the folder can hold SQLite files.

    Raises:
        ConfigError: its path has a character with a meaning of its own in a database URL.
    """
    if marks := [mark for mark in "?%" if mark in str(folder)]:
        raise ConfigError(
            f"{key}={folder}: {' and '.join(marks)} cannot be part of this path, since database URLs give a meaning to "
            "it: name another folder"
        )
    return folder
