"""The index of a data set: its rows in one Arrow file that every process maps, made once and again after a change.

It lies in a folder of the user's own ($FAREBOX_CACHE, else $XDG_CACHE_HOME/farebox, else ~/.cache/farebox), never among
the data, which may be read-only. A small JSON file says what was listed and when the files and folders that it was read
from were last changed; the rows lie in a file named by their digest. Listing walks BATCH rows at a time, and opening an
index reads no row, so neither time nor memory grows with a data set that was indexed before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.data.file_kinds import POINTER_SIZES, is_pointer
from pipeline.data.layouts import Recipe, read
from pipeline.data.listing import SCHEMA, Listing, Rows
from pipeline.data.skipped import Contents
from pipeline.errors import DataError

VERSION = 2
"""In the file's name: raised when what an index holds changes."""
_SIZED = SCHEMA.append(pa.field("size", pa.int64()))
_WITH_IMAGES = _SIZED.append(pa.field("key", pa.string())).append(pa.field("image", pa.large_binary()))


class Index(Rows):
    """A data set's rows, mapped."""

    def __init__(self, table: pa.Table, listing: Listing, digest: str, file: Path) -> None:
        super().__init__(table, listing)
        self.root, self.digest, self.file = listing.root, digest, file
        self.contents = listing.contents()

    def forget(self) -> None:
        """Take the index away, so that the next to ask lists the files again."""
        self.file.unlink(missing_ok=True)


def folder() -> Path:
    """Where indexes are kept."""
    cache = os.environ.get("FAREBOX_CACHE")
    return (
        Path(cache).absolute()
        if cache
        else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "farebox"
    )


def index_of(recipe: Recipe, anew: bool = False) -> Index:
    """Return the index of a data set: the one that is kept if no list or folder was changed since, else a new one.

    With `anew`, a new one in any case: it sees files that were overwritten in place, too.

    Raises:
        DataError: the data set cannot be listed.
    """
    name = hashlib.sha256(json.dumps([VERSION, *recipe]).encode()).hexdigest()[:24]
    file = folder() / "index" / f"{name}.json"
    kept = None if anew else _kept(file)
    return kept if kept and not kept.contents.findings else _make(recipe, file)  # a finding may be resolved by now


def _kept(file: Path) -> Index | None:
    try:
        known = json.loads(file.read_text())
        if any(_stamp(Path(path)) != stamp for path, stamp in known["watched"].items()):
            return None
        with pa.memory_map(str(file.with_name(f"{known['digest']}.arrow"))) as source:  # the map outlives the open file
            table = pa.ipc.open_file(source).read_all()
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None
    names, ids = tuple(known["classnames"]), tuple(known["class_ids"])
    contents = Contents.of(known["contents"])
    listing = Listing(
        Path(known["root"]), names, ids, lambda: iter(()), (), known["made"], known["order"], lambda: contents
    )
    return Index(table, listing, known["digest"], file)


def _rows_file(file: Path) -> Path | None:
    """Where the rows lie that a JSON file speaks of."""
    try:
        return file.with_name(f"{json.loads(file.read_text())['digest']}.arrow")
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _make(recipe: Recipe, file: Path) -> Index:
    stamps: dict[str, list[int]] = {}
    listing = read(recipe)
    for path in listing.watched:  # before the rows are walked: what changes meanwhile is noticed the next time
        stamps[str(path)] = _stamp(path)
    temporary = file.with_name(f"{uuid.uuid4().hex}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        digest, pointers = _write(temporary, listing)
        temporary.replace(file.with_name(f"{digest}.arrow"))
        known: dict[str, Any] = {"path": recipe.path, "root": str(listing.root), "digest": digest, "made": listing.made}
        known |= {"classnames": listing.classnames, "class_ids": listing.class_ids, "watched": stamps}
        known |= {"order": listing.order, "contents": listing.contents().plus(pointers)}
        temporary.write_text(json.dumps(known))
        before = _rows_file(file)
        temporary.replace(file)
        if before and before != _rows_file(file):  # a table's rows hold its images, and are as large
            before.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"{folder()} cannot hold the index of {recipe.path} ({error.strerror}): set FAREBOX_CACHE=DIR"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    found = _kept(file)
    if found is None:
        raise DataError(f"{recipe.path} was changed while it was listed: type the same command again")
    return found


def _write(path: Path, listing: Listing) -> tuple[str, list[str]]:
    """Write all rows.

    Returns:
        The digest of the rows, over class names, ids and every column but the images themselves, and findings.
    """
    h = hashlib.sha256("\0".join((*listing.classnames, "", *listing.class_ids)).encode())
    writer, rows, pointers = None, 0, list[str]()
    with pa.OSFile(str(path), "wb") as sink:
        for batch in _complete(listing, pointers):
            writer = writer or pa.ipc.new_file(sink, batch.schema)
            writer.write_batch(batch)
            rows += len(batch)
            plain = [batch[name].to_pylist() for name in batch.schema.names if name != "image"]
            h.update("".join("\t".join(map(str, row)) + "\n" for row in zip(*plain, strict=True)).encode())
        if writer is None:
            raise DataError(f"{listing.root} lists no image")
        writer.close()
    findings = []
    if pointers:
        counted = f"{len(pointers):,} of {rows:,} images are Git LFS pointers, the first is {pointers[0]}"
        findings.append(f"{counted}: type git lfs pull in {listing.root}")
    return h.hexdigest(), findings


def _complete(listing: Listing, pointers: list[str]) -> Iterator[pa.RecordBatch]:
    """Yield the listed rows with the size of each image and, of images that are no files, the content key.

    Paths of Git LFS pointers are added to `pointers`.
    """
    absent, broken, first = 0, 0, ""
    for batch in listing.batches():
        if "image" in batch.schema.names:
            images = batch["image"].to_pylist()
            keys = [hashlib.sha256(image).hexdigest()[:32] for image in images]
            columns = [*(batch[name] for name in SCHEMA.names), [len(image) for image in images], keys, images]
            yield pa.record_batch(columns, schema=_WITH_IMAGES)
            continue
        sizes = []
        for path in batch["path"].to_pylist():
            try:
                size = (file := listing.root / path).stat().st_size
            except OSError:
                size = -1
                absent, broken, first = absent + 1, broken + file.is_symlink(), first or path
            if size in POINTER_SIZES and is_pointer(file):
                pointers.append(path)
            sizes.append(size)
        yield pa.record_batch([*batch.columns, sizes], schema=_SIZED)
    if absent:
        source = listing.watched[0] if listing.watched else listing.root
        links = f" ({broken:,} of them are links to files that are not there)" if broken else ""
        raise DataError(f"{source}: {absent:,} of its images are not under {listing.root}, the first is {first}{links}")


def _stamp(path: Path) -> list[int]:
    """What differs after a change: size and time of change, [0, 0] of what is not there."""
    try:
        found = path.stat()
    except OSError:
        return [0, 0]
    return [found.st_size, found.st_mtime_ns]
