"""Parquet and Arrow files of any origin: image bytes, label and split in columns, Hugging Face's layouts too.

A folder may hold Parquet files of a data set's repository (data/train-00000-of-00001.parquet), or what `save_to_disk`
writes (dataset_info.json, state.json, data-00000-of-00001.arrow, in a folder for each split or one folder). The split
is a column, or else the first word of the file's or of its folder's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.folder import NAMES_OF_SPLITS
from pipeline.data.listing import SCHEMA, SPLITS, Listing
from pipeline.errors import DataError
from pipeline.untrusted import check_texts, parse_json

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels")
ROWS_AT_ONCE = 256
"""Rows that are held in memory while a table is copied into the index."""
_WITH_IMAGE = SCHEMA.append(pa.field("image", pa.large_binary()))


@dataclass(frozen=True)
class _File:
    path: Path
    schema: pa.Schema
    image: str
    label: str
    split: str | None
    """The split of all its rows; None: the column `split` says."""

    def labels(self) -> Iterator[Any]:
        """Its labels, read without the images."""
        for batch in self.batches([self.label]):
            yield from batch[self.label].to_pylist()

    def batches(self, names: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Its image, label and split columns (or those named), some rows at a time. DataError when it is damaged."""
        names = names or [self.image, self.label, *(() if self.split else ("split",))]
        try:
            if self.path.suffix == ".parquet":
                with pq.ParquetFile(self.path) as file:
                    yield from file.iter_batches(ROWS_AT_ONCE, columns=names)
            else:
                with pa.memory_map(str(self.path)) as source:
                    table = _arrow(source).read_all().select(names)
                yield from table.to_batches(ROWS_AT_ONCE)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.path} is damaged: {error}") from error


@dataclass(frozen=True)
class Tables:
    """One file, or a folder of files that are taken in the order of their names."""

    needs: tuple[str, ...] = ()

    def lists(self, where: Path) -> bool:
        """Images are rows."""
        return False

    def read(self, where: Path, seed: int) -> Listing:
        """All rows of all files."""
        found = [where] if where.is_file() else [*where.rglob("*.parquet"), *where.rglob("*.arrow")]
        paths = sorted(path for path in found if not path.name.startswith("cache-"))  # left by Hugging Face's `map`
        if not paths:
            raise DataError(f"{where} holds no .parquet or .arrow file")
        check_texts("a table's file", map(str, paths))
        root = where.parent if where.is_file() else where
        files = [_open(path, root) for path in paths]
        names = _class_names(files)
        ids = names or _numbered(files)
        label_of: dict[Any, int] = {key: label for label, name in enumerate(ids) for key in (name, label)}

        def batches() -> Iterator[pa.RecordBatch]:
            for file in files:
                number, prefix = 0, f"{file.path.relative_to(root)}#"
                for batch in file.batches():
                    yield _plain(batch, file, label_of, prefix, number)
                    number += len(batch)

        holding = () if where.is_file() else sorted({where, *(path.parent for path in paths)})
        return Listing(root, names, ids, batches, (*holding, *paths))


def _arrow(source: Any) -> Any:
    """A reader of either of Arrow's formats: the file, or the stream that `save_to_disk` writes."""
    try:
        return pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        return pa.ipc.open_stream(source)


def _open(path: Path, root: Path) -> _File:
    try:
        if path.suffix == ".parquet":
            schema = pq.read_schema(path)
        else:
            with pa.memory_map(str(path)) as source:
                schema = _arrow(source).schema
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable {path.suffix[1:]} file: {error}") from error
    image = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    split = None if "split" in schema.names else _split_of(path, root)
    if image is None or label is None or (split is None and "split" not in schema.names):
        raise DataError(
            f"{path} has the columns {', '.join(schema.names)}: wanted image, label and split (or a file name that "
            "begins with train, validation or test)"
        )
    return _File(path, schema, image, label, split)


def _split_of(path: Path, root: Path) -> str | None:
    """From the file's name or from its folders': 'train-00000-of-00001.parquet', 'train/data-00000-of-00001.arrow'."""
    for name in (path.name, *(parent.name for parent in path.relative_to(root).parents)):
        word = re.split(r"[^a-z]", name.lower())[0]
        if word in NAMES_OF_SPLITS:
            return NAMES_OF_SPLITS[word]
    return None


def _class_names(files: list[_File]) -> tuple[str, ...]:
    """The schema's (Hugging Face's ClassLabel, or a JSON list under `classes`), or the labels if text, or none."""
    for file in files:
        metadata = file.schema.metadata or {}
        where = f"the metadata of {file.path}"
        if names := parse_json(metadata.get(b"classes", b"[]"), where):
            return tuple(map(str, names))
        features = parse_json(metadata.get(b"huggingface", b"{}"), where).get("info", {}).get("features", {})
        if names := features.get(file.label, {}).get("names"):
            return tuple(map(str, names))
    if all(_is_text(file.schema.field(file.label).type) for file in files):
        return tuple(sorted({str(label) for file in files for label in file.labels()}))
    return ()


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _numbered(files: list[_File]) -> tuple[str, ...]:
    """The numbers of classes without names, as text. DataError when they are not 0, 1, 2, ..."""
    for file in files:
        if not pa.types.is_integer(kind := file.schema.field(file.label).type):
            raise DataError(f"{file.path} has labels of type {kind} in {file.label!r}: wanted whole numbers or text")
    found = {label for file in files for label in file.labels()} - {None}
    if gaps := set(range(len(found))) - found:
        raise DataError(f"{files[0].path} has {len(found)} labels but no label {min(gaps)}: wanted 0, 1, 2, ...")
    return tuple(map(str, range(len(found))))


def _plain(batch: pa.RecordBatch, file: _File, label_of: dict[Any, int], prefix: str, number: int) -> pa.RecordBatch:
    """A batch as the index has it. DataError naming the first row that cannot be used."""
    splits = [file.split] * len(batch) if file.split else batch["split"].to_pylist()
    labels = batch[file.label].to_pylist()
    images = [image.get("bytes") if isinstance(image, dict) else image for image in batch[file.image].to_pylist()]
    for row, (image, label, split) in enumerate(zip(images, labels, splits, strict=True), start=number):
        if not isinstance(image, bytes):
            raise DataError(f"row {row} of {file.path} has no image bytes (only a path, or nothing)")
        if label not in label_of:
            raise DataError(
                f"row {row} of {file.path} has the label {label!r}: wanted one of {len(label_of) // 2} classes"
            )
        if str(split).lower() not in NAMES_OF_SPLITS:
            raise DataError(f"row {row} of {file.path} has the split {split!r}: wanted train, val or test")
    columns = [
        [f"{prefix}{row}" for row in range(number, number + len(batch))],
        [label_of[label] for label in labels],
        [SPLITS.index(NAMES_OF_SPLITS[str(split).lower()]) for split in splits],
        images,
    ]
    return pa.record_batch(columns, schema=_WITH_IMAGE)
