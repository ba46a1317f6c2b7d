"""Files that a data set lists: regular files, which are inside its folder where a file states their paths."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from pipeline.errors import DataError

FOLLOW_LINKS = "FAREBOX_FOLLOW_LINKS"
"""Environment variable; 1 allows stated paths to lead out of the data set's folder by links."""


class ListedFiles:
    """Sizes of the files of one data set.

    Args:
        root: Folder that the paths are relative to. It may be a link itself.
        stated: Whether the paths are taken from a split file or list, rather than found by listing folders.
        folders: Other folders that a link may lead to.
    """

    def __init__(self, root: Path, stated: bool, folders: Iterable[Path] = ()) -> None:
        self.root, self.stated = str(root), stated
        self._confined = stated and os.environ.get(FOLLOW_LINKS) != "1"
        self._allowed = [Path(os.path.realpath(folder)) for folder in (root, *folders)]
        self._checked: set[str] = set()
        """Folders that were found to be inside."""

    def size(self, path: str) -> int:
        """Return the size of a file in bytes.

        Raises:
            OSError: there is no such file.
            DataError: the path leads out of the data set's folder, or to something that is not a file.
        """
        if self.stated:
            self._check_path(path)
        whole = f"{self.root}/{path}"
        found = os.lstat(whole)
        if stat.S_ISLNK(found.st_mode):
            if self._confined:
                self._check_inside(path, whole)
            found = os.stat(whole)  # noqa: PTH116
        if not stat.S_ISREG(found.st_mode):
            kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a FIFO, a device or a socket"
            raise DataError(f"{whole} is {kind}: wanted an image file")
        return found.st_size

    def _check_path(self, path: str) -> None:
        parts = PurePosixPath(path)
        if parts.is_absolute() or ".." in parts.parts:
            raise DataError(
                f"{self.root}: the path {path!r} leads out of the data set's folder: wanted a path inside it"
            )
        folder = str(parts.parent)
        if self._confined and folder not in self._checked:
            self._check_inside(path, f"{self.root}/{folder}")
            self._checked.add(folder)

    def _check_inside(self, path: str, place: str) -> None:
        real = Path(os.path.realpath(place))
        if not any(real.is_relative_to(folder) for folder in self._allowed):
            raise DataError(
                f"{self.root}: the path {path!r} leads out of the data set's folder, to {real}: copy the files "
                f"or set {FOLLOW_LINKS}=1"
            )
