"""Check the files that a data set lists: they must be regular files, and listed paths must stay in its folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from pipeline.errors import DataError

FOLLOW_LINKS = "FAREBOX_FOLLOW_LINKS"
"""Environment variable; 1 allows links that lead out of the data set's folder."""


class ListedFiles:
    """Return the sizes of the files of a data set, after checking their paths.

    Args:
        root: Folder that the paths are relative to. It may itself be a link.
        stated: Whether the paths were read from a split file or list, not found by listing folders.
        folders: Other folders to which links may lead.
    """

    def __init__(self, root: Path, stated: bool, folders: Iterable[Path] = ()) -> None:
        self.root, self.stated = str(root), stated
        self._confined = stated and os.environ.get(FOLLOW_LINKS) != "1"
        self._allowed = [Path(os.path.realpath(folder)) for folder in (root, *folders)]
        self._checked: set[str] = set()
        """Folders that were checked to be inside."""

    def size(self, path: str) -> int:
        """Return the size of a file in bytes.

        Raises:
            OSError: The file does not exist.
            DataError: The path leads out of the data set's folder, or to something that is not a file.
        """
        if self.stated:
            self._check_path(path)
        full = f"{self.root}/{path}"
        status = os.lstat(full)
        if stat.S_ISLNK(status.st_mode):
            if self._confined:
                self._check_inside(path, full)
            status = os.stat(full)  # noqa: PTH116
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a FIFO, a device or a socket"
            raise DataError(f"{full} is {kind}: expected an image file")
        return status.st_size

    def _check_path(self, path: str) -> None:
        parts = PurePosixPath(path)
        if parts.is_absolute() or ".." in parts.parts:
            raise DataError(
                f"{self.root}: the path {path!r} leads out of the data set's folder: expected a path inside it"
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
