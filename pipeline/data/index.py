"""The index of a data set: its rows in an Arrow file that all processes map. It is rebuilt when the files change.

It is kept in a cache folder ($FAREBOX_CACHE, else $XDG_CACHE_HOME/farebox, else ~/.cache/farebox), not in the folder of
the data, which may be read-only:

    <spec>.json       sealed (files.py): the listing, the sizes and modification times of the files and folders that it
                      was read from, and the SHA-256 of the rows file
    <rows>.arrow      the rows, in a file named by its SHA-256, which is verified whenever the index is opened
    <rows>.images     for tables: the concatenated images, each verified by its content key when it is read

Rows are listed in batches. Opening an index hashes its rows (about 60 bytes an image) and reads no image. A damaged
index is rebuilt.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import uuid
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data.file_keys import cache_folder
from pipeline.data.layouts.file_kinds import POINTER_SIZES, is_pointer
from pipeline.data.layouts.listing import SCHEMA, Listing, Manifest, numbers
from pipeline.data.layouts.registry import LayoutSpec, read
from pipeline.data.layouts.skipped import Contents
from pipeline.data.listed_files import ListedFiles
from pipeline.data.source import content_key
from pipeline.errors import DamagedFile, DataError, first_line
from pipeline.files import file_sha256, read_sealed_json, sealed_json

log = logging.getLogger(__name__)

VERSION = 3
"""Version of the format, part of the file name."""
_SIZED = SCHEMA.append(pa.field("size", pa.int64()))
_WITH_IMAGES = _SIZED.append(pa.field("key", pa.string())).append(pa.field("offset", pa.int64()))


class Index(Manifest):
    """The rows of a data set, memory-mapped."""

    def __init__(self, table: pa.Table, listing: Listing, digest: str, file: Path, images: int | None) -> None:
        super().__init__(table, listing)
        self.root, self.digest, self.file = listing.root, digest, file
        self.contents = listing.contents()
        self._images = images
        """File descriptor of a table's images. Unlike a memory map, it is safe if the file is truncated."""
        if images is not None:
            weakref.finalize(self, os.close, images)

    def image(self, row: int) -> tuple[bytes, str]:
        """Return the unverified image of a table's row, and its expected content key."""
        assert self._images is not None
        size, key, offset = (self.table[name][row].as_py() for name in ("size", "key", "offset"))
        return os.pread(self._images, size, offset), key

    @property
    def sizes(self) -> np.ndarray:
        """Sizes [N] of the images in bytes."""
        return numbers(self.table["size"], np.int64)

    def forget(self) -> None:
        """Remove the index file, so that the files are listed again the next time."""
        self.file.unlink(missing_ok=True)


def index_of(spec: LayoutSpec, rebuild: bool = False) -> Index:
    """Return the index of a data set: the cached one if no list or folder was changed since, else a new one.

    Args:
        spec: What the index depends on.
        rebuild: Build a new one in any case, to see files that were overwritten in place.

    Raises:
        DataError: The data set cannot be listed.
    """
    file = cache_folder() / "index" / f"{hashlib.sha256(_name(spec).encode()).hexdigest()[:24]}.json"
    cached = None if rebuild else _cached(spec, file)
    return cached if cached and not cached.contents.findings else _build(spec, file)  # findings may be resolved now


def _name(spec: LayoutSpec) -> str:
    """Return the spec as text."""
    return json.dumps([VERSION, *spec])


def _cached(spec: LayoutSpec, file: Path) -> Index | None:
    """Return the index of a JSON file; None if it does not exist, is outdated, or is damaged."""
    try:
        known = read_sealed_json(file)
        if known.get("spec") != _name(spec):
            raise DamagedFile(file, "it belongs to another data set")
        if any(_stamp(Path(path)) != stamp for path, stamp in known["watched"].items()):
            return None
        rows_file = _rows_path(file, known["rows"])
        with pa.memory_map(str(rows_file)) as source:  # the map stays valid after the file is closed
            rows = source.read_buffer()
        if hashlib.sha256(memoryview(rows)).hexdigest() != known["rows"]:
            raise DamagedFile(rows_file, "its content does not match its checksum")
        images = None if known["image_bytes"] is None else _open_images(rows_file, known["image_bytes"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, pa.ArrowException, DamagedFile) as error:
        log.warning("%s: the index is rebuilt", first_line(error))
        return None
    names, ids = tuple(known["classnames"]), tuple(known["class_ids"])
    contents = Contents.of(known["contents"])
    listing = Listing(
        Path(known["root"]), names, ids, lambda: iter(()), (), known["split_origin"], known["order"], lambda: contents
    )
    table = pa.ipc.open_file(pa.BufferReader(rows)).read_all()
    return Index(table, listing, known["digest"], file, images)


def _open_images(rows_file: Path, size: int) -> int:
    """Open the images of a table and return the file descriptor. Raises DamagedFile if the size in bytes differs."""
    path = _images_path(rows_file)
    images = os.open(path, os.O_RDONLY)
    if (actual := os.fstat(images).st_size) != size:
        os.close(images)
        raise DamagedFile(path, f"it has {actual:,} bytes instead of {size:,}")
    return images


def _rows_path(file: Path, sha256: str) -> Path:
    """Return the path of the rows with this digest, beside the JSON file."""
    return file.with_name(f"{sha256[:32]}.arrow")


def _images_path(rows_file: Path) -> Path:
    return rows_file.with_suffix(".images")


def _rows_of(file: Path) -> Path | None:
    """Return the path of the rows of a JSON file; None when it is missing or damaged."""
    try:
        return _rows_path(file, read_sealed_json(file)["rows"])
    except (OSError, ValueError, KeyError, DamagedFile):
        return None


def _build(spec: LayoutSpec, file: Path) -> Index:
    stamps: dict[str, list[int]] = {}
    listing = read(spec)
    for path in listing.watched:  # before the rows are listed: changes in the meantime are noticed the next time
        stamps[str(path)] = _stamp(path)
    temporary = file.with_name(f"{uuid.uuid4().hex}.tmp")
    images = temporary.with_suffix(".images.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        digest, image_bytes, findings = _write(temporary, images, listing)
        rows = file_sha256(temporary)
        rows_file = _rows_path(file, rows)
        if image_bytes is not None:
            images.replace(_images_path(rows_file))
        temporary.replace(rows_file)
        known: dict[str, Any] = {"spec": _name(spec), "root": str(listing.root)}
        known |= {
            "digest": digest,
            "split_origin": listing.split_origin,
            "rows": rows,
            "image_bytes": image_bytes,
            "watched": stamps,
        }
        known |= {"classnames": listing.classnames, "class_ids": listing.class_ids, "order": listing.order}
        known |= {"contents": listing.contents().plus(findings)}
        before = _rows_of(file)
        temporary.write_bytes(sealed_json(known))
        temporary.replace(file)
        if before and before != rows_file:  # a table's images are as large as the table
            before.unlink(missing_ok=True)
            _images_path(before).unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"the index of {spec.path} cannot be written to {cache_folder()} ({error.strerror}): set FAREBOX_CACHE=DIR"
        ) from error
    finally:
        for left in (temporary, images):
            with contextlib.suppress(OSError):
                left.unlink()
    index = _cached(spec, file)
    if index is None:
        raise DataError(f"{spec.path} was changed while it was listed: type the same command again")
    return index


def _write(path: Path, images: Path, listing: Listing) -> tuple[str, int | None, list[str]]:
    """Write all rows to `path`, and the images of a table to `images`.

    Returns:
        The digest of class names, class ids and rows (images by their content keys), the size of `images` in bytes
        (None if images are files), and findings.
    """
    h = hashlib.sha256("\0".join((*listing.classnames, "", *listing.class_ids)).encode())
    rows, pointers = 0, list[str]()
    with contextlib.ExitStack() as files:
        sink = files.enter_context(pa.OSFile(str(path), "wb"))
        writer = image_file = image_bytes = None
        for batch in _complete(listing, pointers):
            rows += len(batch)
            if "image" in batch.schema.names:
                image_file = image_file or files.enter_context(images.open("xb"))
                for image in batch["image"]:
                    image_file.write(image.as_buffer())
                offsets = (image_bytes or 0) + np.cumsum([0, *batch["size"].to_pylist()])
                image_bytes = int(offsets[-1])
                columns = [batch[name] for name in batch.schema.names if name != "image"]
                batch = pa.record_batch([*columns, pa.array(offsets[:-1])], schema=_WITH_IMAGES)
            writer = writer or files.enter_context(pa.ipc.new_file(sink, batch.schema))
            writer.write_batch(batch)
            plain = [batch[name].to_pylist() for name in batch.schema.names if name != "offset"]
            h.update("".join("\t".join(map(str, row)) + "\n" for row in zip(*plain, strict=True)).encode())
        if writer is None:
            raise DataError(f"{listing.root} contains no image")
    findings = []
    if pointers:
        counted = f"{len(pointers):,} of {rows:,} images are Git LFS pointers, the first is {pointers[0]}"
        findings.append(f"{counted}: type git lfs pull in {listing.root}")
    return h.hexdigest(), image_bytes, findings


def _complete(listing: Listing, pointers: list[str]) -> Iterator[pa.RecordBatch]:
    """Yield the listed rows with the size of each image; for tables, also with content key and image.

    The paths of Git LFS pointers are appended to `pointers`.
    """
    absent, broken, first = 0, 0, ""
    files = ListedFiles(listing.root, listing.stated, [path.parent for path in listing.watched[:1]])
    for batch in listing.batches():
        if "image" in batch.schema.names:
            images = batch["image"].to_pylist()
            keys = [content_key(image) for image in images]
            more = [pa.array([len(image) for image in images]), pa.array(keys), batch["image"]]
            columns = [*(batch[name] for name in SCHEMA.names), *more]
            yield pa.record_batch(columns, names=[*SCHEMA.names, "size", "key", "image"])
            continue
        sizes = []
        for path in batch["path"].to_pylist():
            try:
                size = files.size(path)
            except OSError:
                size = -1
                absent, broken, first = absent + 1, broken + (listing.root / path).is_symlink(), first or path
            if size in POINTER_SIZES and is_pointer(listing.root / path):
                pointers.append(path)
            sizes.append(size)
        yield pa.record_batch([*batch.columns, sizes], schema=_SIZED)
    if absent:
        source = listing.watched[0] if listing.watched else listing.root
        links = f" ({broken:,} of them are broken links)" if broken else ""
        raise DataError(f"{source}: {absent:,} of its images are not under {listing.root}, the first is {first}{links}")


def _stamp(path: Path) -> list[int]:
    """Return size and modification time of a file or folder; [0, 0] if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return [0, 0]
    return [status.st_size, status.st_mtime_ns]
