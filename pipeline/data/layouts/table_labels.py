"""Map the labels of table files, each with its own class names, to one order of the classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from pipeline.data.layouts.class_names import in_order
from pipeline.errors import DataError, one_line
from pipeline.untrusted import parse_json

SHOWN = 60
"""Maximum number of characters of a column's type in a message."""


class LabelColumn(Protocol):
    """The label column of one file."""

    @property
    def path(self) -> Path:
        """The file."""
        ...

    @property
    def split(self) -> str | None:
        """Split of all rows, if the name of the file means one."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """Class names of the file's metadata, by label."""
        ...

    @property
    def is_text(self) -> bool:
        """Whether labels are text."""
        ...

    def labels(self) -> Iterable[Any]:
        """Yield all labels."""
        ...


def check_type(path: Path, column: str, kind: pa.DataType) -> bool:
    """Return True when a label column contains text, False when it contains integers.

    Raises:
        DataError: It contains anything else.
    """
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)
    if not is_text and not pa.types.is_integer(value):
        shown = text if len(text := one_line(kind)) <= SHOWN else f"{text[:SHOWN]}..."
        raise DataError(f"{path} has labels of type {shown} in {column!r}: expected whole numbers or text")
    return bool(is_text)


def class_names_of(path: Path, schema: pa.Schema, column: str) -> tuple[str, ...]:
    """Return the class names in a file's metadata: Hugging Face's ClassLabel, or a JSON list under `classes`.

    Raises:
        DataError: The metadata is not JSON, or the names are not a list of text.
    """
    metadata = schema.metadata or {}
    where = f"the metadata of {path}"
    names = parse_json(metadata.get(b"classes", b"null"), where)
    if names is None:
        try:
            feature = parse_json(metadata.get(b"huggingface", b"{}"), where)["info"]["features"][column]
            names = feature.get("names")
        except (KeyError, TypeError, AttributeError):
            names = None
    if names is None:
        return ()
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path} has class names in its metadata that are not a list of text")
    return tuple(names)


def class_ids(files: Sequence[LabelColumn]) -> tuple[tuple[str, ...], str]:
    """Return the classes of all files in label order, and a description of the order.

    The order is that of the class names in the first training file. Text labels without class names are sorted, and
    plain numbers are the labels themselves.

    Raises:
        DataError: Naming a file with other classes or another kind of labels.
    """
    named = [file for file in files if file.names]
    if named:
        first = next((file for file in named if file.split == "train"), named[0])
        for file in files:
            _check_known(file, first)
        return first.names, f"class names in the metadata of {first.path.name}"
    kinds = {file.is_text: file for file in files}
    if len(kinds) > 1:
        raise DataError(f"{kinds[True].path} has labels of text, {kinds[False].path} whole numbers: expected one kind")
    if True in kinds:
        texts = {label for file in files for label in file.labels()} - {None}
        ids, order = in_order(texts, "text labels")
        return tuple(ids), order
    return _numbered(files), "labels are numbers"


def _check_known(file: LabelColumn, first: LabelColumn) -> None:
    if file.names == first.names or (file.is_text and not file.names):
        return
    if not file.names:
        raise DataError(
            f"{file.path} has numbers as labels and no class names, {first.path} has class names: expected them in both"
        )
    if foreign := [name for name in file.names if name not in first.names]:
        raise DataError(f"{file.path} has the class {foreign[0]!r}, which {first.path} does not have")
    if len(set(first.names)) < len(first.names):
        raise DataError(
            f"{file.path} has its class names in another order than {first.path}, where one name occurs twice"
        )


def _numbered(files: Sequence[LabelColumn]) -> tuple[str, ...]:
    labels = {label for file in files for label in file.labels()} - {None}
    if labels and min(labels) < 0:
        file = next(file for file in files if any(label is not None and label < 0 for label in file.labels()))
        raise DataError(f"{file.path} has the label {min(labels)}: expected 0, 1, 2, ...{unlabelled(min(labels))}")
    if gaps := set(range(len(labels))) - labels:
        raise DataError(f"{files[0].path} has {len(labels)} labels but no label {min(gaps)}: expected 0, 1, 2, ...")
    return tuple(map(str, range(len(labels))))


def unlabelled(label: Any) -> str:
    """Return a hint for a label that marks images without one; an empty string for other labels."""
    if label is None or label == -1:
        return " (images without labels: move the file out, or type test=val if they are the test split)"
    return ""


def labels_by_value(file: LabelColumn, ids: Sequence[str]) -> dict[Any, int]:
    """Return the label of each value that the label column of one file may contain."""
    label_of = {name: label for label, name in enumerate(ids)}
    if file.is_text:
        return dict(label_of)
    if not file.names or file.names == tuple(ids):  # a name may occur twice: the position counts
        return {label: label for label in range(len(ids))}
    return {value: label_of[name] for value, name in enumerate(file.names)}
