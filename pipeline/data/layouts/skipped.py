"""Record which files of a data folder are used, and which are skipped for what reason.

Skipped files are counted by reason. Some reasons are findings: files that were probably meant to be used, such as
broken links to images. `farebox data add` and `farebox run` reject a data set with findings; `farebox data check`
reports them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.data.layouts.file_kinds import (
    ARCHIVES,
    IMAGES,
    NOT_DECODED,
    TABLES,
    ends_in,
    entries,
    hidden_reason,
    is_image,
)
from pipeline.errors import DataError

SNIFFED = 2_000
"""Maximum number of files with unknown endings whose first bytes are read."""
SNIFFED_OF_FOLDER = 2
"""The same for each ending in each folder."""
WALKED = 1_000_000
"""Maximum number of files below a folder that are counted."""
BROKEN = "links to files that are not there"
SPECIAL = "FIFOs, devices or sockets"
NESTED = "images in a folder below a class folder"
BELOW = "folders below a class folder, without images"
OUTSIDE = "files outside the class folders"
OUTSIDE_IMAGES = "images outside the class folders"
UNLISTED = "images that are not listed"
OTHER = "other files"
UNUSED_TABLES = "tables that are not used"
OTHER_IMAGES = "images outside the tables"
ADVICE = {
    BROKEN: "restore the files or remove the links",
    SPECIAL: "remove them",
    NESTED: "move them into the class folder, or make each folder a class",
}
"""What to do about a reason that is a finding."""


class Skipped(NamedTuple):
    """The files that are skipped for one reason."""

    reason: str
    files: int
    first: str
    """Path of the first one, relative to the data set's folder."""

    def __str__(self) -> str:
        return f"{self.reason}: {self.files:,}, the first is {self.first}"


class Contents(NamedTuple):
    """Content of a data folder other than the images that are used."""

    skipped: tuple[Skipped, ...] = ()
    findings: tuple[str, ...] = ()
    """One line for each problem that must be resolved before the data set can be used."""
    notes: tuple[str, ...] = ()
    """One line for each decision that the reader took."""

    @classmethod
    def of(cls, record: Any) -> Contents:
        """Rebuild the value from the lists that JSON stores for tuples."""
        skipped, findings, notes = record
        return cls(tuple(Skipped(*one) for one in skipped), tuple(findings), tuple(notes))

    def plus(self, findings: Sequence[str] = (), notes: Sequence[str] = ()) -> Contents:
        """Return a copy with more findings and notes."""
        return self._replace(findings=(*self.findings, *findings), notes=(*self.notes, *notes))

    def check(self, place: str) -> None:
        """Raise DataError for the first finding, with the number of the others."""
        if self.findings:
            more = f" (and {len(self.findings) - 1} more findings)" if len(self.findings) > 1 else ""
            raise DataError(f"{place}: {self.findings[0]}{more}")


@dataclass
class _Folder:
    """Skipped files of one folder by reason, and files with unknown endings by ending."""

    reasons: dict[str, tuple[int, str]] = field(default_factory=dict)
    endings: dict[str, list[str]] = field(default_factory=dict)
    """Paths of the first files with each unknown ending, SNIFFED_OF_FOLDER at most."""
    of_ending: Counter[str] = field(default_factory=Counter)

    def add(self, reason: str, path: str, count: int = 1) -> None:
        before, first = self.reasons.get(reason, (0, path))
        self.reasons[reason] = before + count, first

    def add_ending(self, path: str) -> None:
        ending = Path(path).suffix.lower()
        self.of_ending[ending] += 1
        if len(paths := self.endings.setdefault(ending, [])) < SNIFFED_OF_FOLDER:
            paths.append(path)


class Inventory:
    """List class folders and their images, and record every other entry.

    When a folder is listed more than once, the last record counts.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.notes: list[str] = []
        self._accounts: dict[Path, _Folder] = {}

    def folders(self, where: Path) -> list[str]:
        """Return the sorted names of the class folders in a folder."""
        account = self._accounts[where] = _Folder()
        names = []
        for entry in entries(where):
            if self._is_system(entry, account):
                continue
            if entry.is_dir():
                names.append(entry.name)
            elif not self._is_broken(entry, account):
                reason = OUTSIDE_IMAGES if ends_in(entry.name, IMAGES) else OUTSIDE
                account.add("archives" if ends_in(entry.name, ARCHIVES) else reason, self._path(entry))
        return sorted(names)

    def images(self, where: Path) -> list[str]:
        """Return the sorted names of the images in a class folder."""
        account = self._accounts[where] = _Folder()
        names = []
        for entry in entries(where):
            if not entry.name.startswith(".") and ends_in(entry.name, IMAGES) and entry.is_file():
                names.append(entry.name)
            elif self._is_system(entry, account) or self._is_broken(entry, account):
                continue
            elif entry.is_dir():
                self._add_folder(Path(entry.path), account, NESTED, BELOW)
            elif not entry.is_file():
                account.add(SPECIAL, self._path(entry))
            else:
                account.add_ending(self._path(entry))
        return sorted(names)

    def skip_folder(self, where: Path, reason: str) -> None:
        """Record a whole folder that is not used."""
        account = self._accounts[where] = _Folder()
        self._add_folder(where, account, f"images in {reason}", f"{reason}, without images")

    def unused(self, where: Path, used: set[str], images: str) -> None:
        """Record all files below a folder whose paths relative to the root are not in `used`."""
        account = self._accounts[where] = _Folder()
        for number, (path, reason) in enumerate(walk(where)):
            if number == WALKED:
                self.notes.append(f"only the first {WALKED:,} files under {where} were counted")
                break
            if (name := os.path.relpath(path, self.root)) not in used:
                kind = images if ends_in(path.name, IMAGES) else UNUSED_TABLES if ends_in(path.name, TABLES) else OTHER
                account.add(reason or kind, name)

    def contents(self) -> Contents:
        """Return the record of all folders that were listed. Reads the first bytes of files with unknown endings."""
        reasons: dict[str, tuple[int, str]] = {}
        endings: dict[str, list[str]] = {}
        of_ending: Counter[str] = Counter()
        for account in self._accounts.values():
            of_ending += account.of_ending
            for reason, (count, first) in account.reasons.items():
                before, earlier = reasons.get(reason, (0, first))
                reasons[reason] = before + count, earlier
            for ending, paths in account.endings.items():
                endings.setdefault(ending, []).extend(paths)
        findings = [
            f"{reason}: {count:,}, the first is {first}: {ADVICE[reason]}"
            for reason, (count, first) in reasons.items()
            if reason in ADVICE
        ]
        left = SNIFFED
        for ending, paths in endings.items():
            count, name = of_ending[ending], ending or "no ending"
            opened, left = paths[:left], max(0, left - len(paths))
            images = [path for path in opened if is_image(self.root / path)]
            if ending in NOT_DECODED:
                findings.append(
                    f"images that cannot be read ({name}): {count:,}, the first is {paths[0]}: convert them to PNG"
                )
            elif images:
                findings.append(
                    f"images by content, but not by their ending ({name}): {count:,} ({len(images)} of {len(opened)} "
                    f"examined), the first is {images[0]}: rename them (.jpg, .png, ...)"
                )
            kind = "archives" if ending in ARCHIVES else "files that are not images by their ending"
            reasons[f"{kind} ({name})"] = count, paths[0]
        skipped = tuple(Skipped(reason, *counted) for reason, counted in sorted(reasons.items()))
        return Contents(skipped, tuple(findings), tuple(self.notes))

    def _path(self, entry: os.DirEntry[str]) -> str:
        return os.path.relpath(entry.path, self.root)

    def _is_system(self, entry: os.DirEntry[str], account: _Folder) -> bool:
        if reason := hidden_reason(entry.name, entry.is_dir()):
            account.add(reason, self._path(entry))
        return bool(reason)

    def _is_broken(self, entry: os.DirEntry[str], account: _Folder) -> bool:
        broken = entry.is_symlink() and not os.path.exists(entry.path)  # noqa: PTH110
        if broken:
            account.add(BROKEN, self._path(entry))
        return broken

    def _add_folder(self, where: Path, account: _Folder, with_images: str, without_images: str) -> None:
        """Record a folder by the images below it, or as one entry if there are none."""
        images = [path for path, hidden in walk(where) if not hidden and ends_in(path.name, IMAGES)]
        if images:
            account.add(with_images, os.path.relpath(images[0], self.root), len(images))
        else:
            account.add(without_images, os.path.relpath(where, self.root))


def walk(where: Path) -> Iterator[tuple[Path, str]]:
    """Yield every file below a folder with the reason to skip it, if any. A skipped folder counts as one file."""
    for folder, below, names in os.walk(where):
        here = Path(folder)
        for name in [name for name in below if hidden_reason(name, True)]:
            below.remove(name)
            yield here / name, hidden_reason(name, True)
        below.sort()
        yield from ((here / name, hidden_reason(name, False)) for name in sorted(names))
