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
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.data.known import cache_folder
from pipeline.data.layouts import Recipe, read
from pipeline.data.listed_files import ListedFiles
from pipeline.data.listing import SCHEMA, Listing, Rows
from pipeline.errors import DataError

VERSION = 1
"""In the file's name: raised when what an index holds changes."""
_SIZED = SCHEMA.append(pa.field("size", pa.int64()))
_WITH_IMAGES = _SIZED.append(pa.field("key", pa.string())).append(pa.field("image", pa.large_binary()))


class Index(Rows):
    """A data set's rows, mapped."""

    def __init__(self, table: pa.Table, listing: Listing, digest: str, file: Path) -> None:
        super().__init__(table, listing)
        self.root, self.digest, self.file = listing.root, digest, file

    def forget(self) -> None:
        """Take the index away, so that the next to ask lists the files again."""
        self.file.unlink(missing_ok=True)


def index_of(recipe: Recipe) -> Index:
    """The index of a data set: the one that is kept if nothing was changed since, else a new one. DataError."""
    name = hashlib.sha256(json.dumps([VERSION, *recipe]).encode()).hexdigest()[:24]
    file = cache_folder() / "index" / f"{name}.json"
    return _kept(file) or _make(recipe, file)


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
    listing = Listing(Path(known["root"]), names, ids, lambda: iter(()), (), known["made"])
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
        digest = _write(temporary, listing)
        temporary.replace(file.with_name(f"{digest}.arrow"))
        known: dict[str, Any] = {"path": recipe.path, "root": str(listing.root), "digest": digest, "made": listing.made}
        known |= {"classnames": listing.classnames, "class_ids": listing.class_ids, "watched": stamps}
        temporary.write_text(json.dumps(known))
        before = _rows_file(file)
        temporary.replace(file)
        if before and before != _rows_file(file):  # a table's rows hold its images, and are as large
            before.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"{cache_folder()} cannot hold the index of {recipe.path} ({error.strerror}): set FAREBOX_CACHE=DIR"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    found = _kept(file)
    if found is None:
        raise DataError(f"{recipe.path} was changed while it was listed: type the same command again")
    return found


def _write(path: Path, listing: Listing) -> str:
    """Write all rows; their digest, over class names, ids and every column but the images themselves."""
    h = hashlib.sha256("\0".join((*listing.classnames, "", *listing.class_ids)).encode())
    writer, rows = None, 0
    with pa.OSFile(str(path), "wb") as sink:
        for batch in _complete(listing):
            writer = writer or pa.ipc.new_file(sink, batch.schema)
            writer.write_batch(batch)
            rows += len(batch)
            plain = [batch[name].to_pylist() for name in batch.schema.names if name != "image"]
            h.update("".join("\t".join(map(str, row)) + "\n" for row in zip(*plain, strict=True)).encode())
        if writer is None:
            raise DataError(f"{listing.root} lists no image")
        writer.close()
    return h.hexdigest()


def _complete(listing: Listing) -> Iterator[pa.RecordBatch]:
    """The listed rows with the size of each image and, of images that are no files, the content key."""
    absent, first = 0, ""
    files = ListedFiles(listing.root, listing.stated, [path.parent for path in listing.watched[:1]])
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
                sizes.append(files.size(path))
            except OSError:
                sizes.append(-1)
                absent, first = absent + 1, first or path
        yield pa.record_batch([*batch.columns, sizes], schema=_SIZED)
    if absent:
        source = listing.watched[0] if listing.watched else listing.root
        raise DataError(f"{source}: {absent:,} of its images are not under {listing.root}, the first is {first}")


def _stamp(path: Path) -> list[int]:
    """What differs after a change: size and time of change, [0, 0] of what is not there."""
    try:
        found = path.stat()
    except OSError:
        return [0, 0]
    return [found.st_size, found.st_mtime_ns]
