"""Read Parquet and Arrow files with columns for image bytes, label and split, including Hugging Face's layouts.

A folder may contain Parquet files of a data set's repository (data/train-00000-of-00001.parquet), or the output of
`save_to_disk` (dataset_info.json, state.json, data-00000-of-00001.arrow, in a folder for each split or one folder). The
split is a column, or else the name of the file or of its folder. The labels of each file are read with its own class
names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.data.layouts.file_kinds import is_pointer
from pipeline.data.layouts.image_folder import NAMES_OF_SPLITS
from pipeline.data.layouts.listing import SCHEMA, SPLITS, Listing, Options, scored
from pipeline.data.layouts.shards import check_shards, split_of, tables_below
from pipeline.data.layouts.skipped import OTHER_IMAGES, Inventory
from pipeline.data.layouts.table_labels import check_type, class_ids, class_names_of, labels_by_value, unlabelled
from pipeline.errors import DataError
from pipeline.untrusted import check_texts

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels")
ROWS_AT_ONCE = 256
"""Maximum number of rows in memory while a table is copied into the index."""
_WITH_IMAGE = SCHEMA.append(pa.field("image", pa.large_binary()))


@dataclass(frozen=True)
class _File:
    path: Path
    schema: pa.Schema
    image: str
    label: str
    split: str | None
    """Split of all rows; None: the column `split` has it."""
    names: tuple[str, ...]
    """Class names of the metadata, by label; empty: labels are text or plain numbers."""
    is_text: bool
    """Whether labels are text."""
    test_split: str
    """The split that is scored instead of `test`, whose rows are then not used; empty: `test` itself."""

    @property
    def split_column(self) -> list[str]:
        """Name of the split column, if there is one."""
        return ["split"] if "split" in self.schema.names else []

    def labels(self) -> Iterator[Any]:
        """Yield the labels of the rows that are used, without reading images."""
        for batch in self.batches([self.label, *self.split_column]):
            labels = batch[self.label].to_pylist()
            if self.test_split and self.split_column:
                splits = map(as_split, batch["split"].to_pylist())
                labels = [label for label, split in zip(labels, splits, strict=True) if split != "test"]
            yield from labels

    def batches(self, names: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yield batches of the image, label and split columns, or of those named. Raises DataError when damaged."""
        names = names or [self.image, self.label, *self.split_column]
        try:
            if self.path.suffix.lower() == ".parquet":
                import pyarrow.parquet as pq

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
    """Reader of one table file, or of a folder of table files in the order of their names."""

    needs: tuple[str, ...] = ()

    def lists(self, where: Path) -> bool:
        """Return False: the images are in the tables."""
        return False

    def read(self, where: Path, options: Options) -> Listing:
        """List all rows of all files."""
        root = where.parent if where.is_file() else where
        paths = [where] if where.is_file() else tables_below(where)
        if not paths:
            raise DataError(f"{where} contains no .parquet or .arrow file")
        check_texts("a table's file", map(str, paths))
        inventory = Inventory(root)
        schemas = {path: _schema(path) for path in paths}
        splits = {path: split_of(path, root, "split" in schemas[path].names) for path in paths}
        if options.test_split and None not in splits.values():
            by_split = {split: split for split in splits.values() if split}
            used = set(scored(by_split, options, where).values())
            paths = [path for path in paths if splits[path] in used]
        if where.is_dir():
            check_shards(root, {path: splits[path] for path in paths})
        files = [_open(path, schemas[path], splits[path], options.test_split) for path in paths]
        ids, order = class_ids(files)
        is_numbered = not any(file.names or file.is_text for file in files)

        def batches() -> Iterator[pa.RecordBatch]:
            for file in files:
                rows, number = _Rows(file, labels_by_value(file, ids), root), 0
                for batch in file.batches():
                    yield rows.plain(batch, number)
                    number += len(batch)
            if where.is_dir():
                inventory.unused(where, {str(path.relative_to(root)) for path in paths}, OTHER_IMAGES)

        holding = () if where.is_file() else sorted({where, *(path.parent for path in paths)})
        names = () if is_numbered else ids
        return Listing(root, names, ids, batches, (*holding, *paths), "", order, inventory.contents)


def _arrow(source: Any) -> Any:
    """Return a reader of an Arrow file, or of an Arrow stream as `save_to_disk` writes it."""
    try:
        return pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        return pa.ipc.open_stream(source)


def as_split(value: Any) -> str | None:
    """Return the split that a value of a split column means."""
    return NAMES_OF_SPLITS.get(str(value).lower())


def _schema(path: Path) -> pa.Schema:
    try:
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet as pq

            return pq.read_schema(path)
        with pa.memory_map(str(path)) as source:
            return _arrow(source).schema
    except (pa.ArrowException, OSError) as error:
        if is_pointer(path):
            raise DataError(f"{path} is a Git LFS pointer: type git lfs pull") from error
        raise DataError(f"{path} is not a readable {path.suffix[1:].lower()} file: {error}") from error


def _open(path: Path, schema: pa.Schema, split: str | None, test_split: str) -> _File:
    image = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    if image is None or label is None or (split is None and "split" not in schema.names):
        raise DataError(
            f"{path} has the columns {', '.join(schema.names)}: expected image, label and split (or a file named "
            "train, validation or test, as train-0.parquet)"
        )
    is_text = check_type(path, label, schema.field(label).type)
    return _File(path, schema, image, label, split, class_names_of(path, schema, label), is_text, test_split)


@dataclass(frozen=True)
class _Rows:
    """Converts the rows of one file to rows of the index."""

    file: _File
    label_of: dict[Any, int]
    root: Path

    def plain(self, batch: pa.RecordBatch, number: int) -> pa.RecordBatch:
        """Return a batch with the columns of the index.

        Args:
            batch: Rows of the file.
            number: Number of the first of them in the file.

        Raises:
            DataError: Naming the first row that cannot be used.
        """
        file, prefix = self.file, f"{self.file.path.relative_to(self.root)}#"
        splits = batch["split"].to_pylist() if file.split_column else [file.split] * len(batch)
        labels = batch[file.label].to_pylist()
        images = [image.get("bytes") if isinstance(image, dict) else image for image in batch[file.image].to_pylist()]
        columns: tuple[list[Any], ...] = ([], [], [], [])
        for row, (image, label, value) in enumerate(zip(images, labels, splits, strict=True), start=number):
            split = as_split(value)
            if split is None:
                raise DataError(f"row {row} of {file.path} has the split {value!r}: expected train, val or test")
            if file.split and split != file.split:
                raise DataError(
                    f"row {row} of {file.path} has the split {value!r}, but the name of the file means {file.split}: "
                    "rename the file"
                )
            if file.test_split and split in ("test", file.test_split):
                if split == "test":
                    continue
                split = "test"
            if not isinstance(image, bytes):
                raise DataError(f"row {row} of {file.path} has no image bytes (only a path, or nothing)")
            if label not in self.label_of:
                raise DataError(
                    f"row {row} of {file.path} has the label {label!r}: expected one of {len(self.label_of)} classes"
                    + unlabelled(label)
                )
            fields = f"{prefix}{row}", self.label_of[label], SPLITS.index(split), image
            for column, field in zip(columns, fields, strict=True):
                column.append(field)
        return pa.record_batch(list(columns), schema=_WITH_IMAGE)
