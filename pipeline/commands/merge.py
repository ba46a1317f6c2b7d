"""`farebox merge`: one storage with the results of several, and `farebox leaderboard storage=A,B`."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.config.typed_values import path as path_of
from pipeline.console import Echo, short_path
from pipeline.errors import ConfigError
from pipeline.results.merge import Merged, merge
from pipeline.sweep.storage_id import new_id, read_id, write_id

STORAGE = "storage="


def merge_storages(folders: Sequence[str], to: str, keep_code: bool, echo: Echo) -> list[str]:
    """Merge storages into a new one and print what was taken.

    Returns:
        One line for each damaged file and for each trial whose results contradict each other.

    Raises:
        ConfigError: fewer than two storages, one is no storage or named twice, or the target exists.
    """
    target = path_of("--to", to).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"--to {to}: it exists: name a new folder")
    sources = _sources(folders)
    target.mkdir(parents=True, exist_ok=True)
    merged = merge(sources, target, keep_code, echo)
    write_id(target, new_id(target))
    for line in merged.notes:
        echo(line)
    for folder, count in zip(folders, merged.taken, strict=True):
        echo(f"{folder}: {count:,} trials taken")
    echo(f"{to}: {_total(merged)}")
    echo(f"next: farebox leaderboard storage={short_path(target)}")
    return merged.problems


def _sources(folders: Sequence[str]) -> list[Path]:
    if len(folders) < 2:
        raise ConfigError("expected two or more storages: farebox merge runs/a runs/b --to runs/both")
    sources = [path_of("merge", folder).absolute() for folder in folders]
    ids: dict[str, str] = {}
    for name, folder in zip(folders, sources, strict=True):
        identity = read_id(folder).id
        if identity in ids:
            raise ConfigError(f"{ids[identity]} and {name} are one storage or a copy of it: name each storage once")
        ids[identity] = name
    return sources


def _total(merged: Merged) -> str:
    text = f"{sum(merged.taken):,} trials"
    if merged.equal:
        text += f"; {merged.equal:,} are in several storages, with equal results"
    if merged.rounded:
        text += f"; {merged.rounded:,} differ by rounding between machines, the first storage's are taken"
    return text


class Several(NamedTuple):
    """Overrides in which storage=A,B is replaced by a temporary storage with the results of both."""

    words: list[str]
    problems: list[str]
    """One line for each problem of the merge."""
    temporary: str = ""
    """The temporary storage as messages show it; empty for one storage."""
    typed: str = ""
    """What was typed in its place."""

    def as_typed(self, text: str) -> str:
        """Return a text with the temporary storage replaced by what was typed."""
        return text.replace(self.temporary, self.typed) if self.temporary else text


@contextlib.contextmanager
def merged_words(words: Sequence[str], log: Echo) -> Iterator[Several]:
    """Merge the storages of storage=A,B among the overrides for the time of a command."""
    folders = next((_listed(word) for word in reversed(words) if word.startswith(STORAGE)), [])
    if not folders:
        yield Several(list(words), [])
        return
    with tempfile.TemporaryDirectory(prefix="farebox-merged-") as folder:
        target = Path(folder) / "merged"
        target.mkdir()
        merged = merge(_sources(folders), target, keep_code=False, echo=log)
        write_id(target, new_id(target))
        log(f"{len(folders)} storages: {_total(merged)}")
        others = [word for word in words if not word.startswith(STORAGE)]
        yield Several([*others, f"{STORAGE}{target}"], merged.problems, short_path(target), ",".join(folders))


def _listed(word: str) -> list[str]:
    """Return the folders of storage=A,B or storage=[A,B]; an empty list if the word names one folder."""
    value = word.removeprefix(STORAGE)
    if "," not in value or Path(value).exists():
        return []
    return [part.strip() for part in value.removeprefix("[").removesuffix("]").split(",")]
