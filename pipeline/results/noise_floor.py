"""Stored noise floors: what `farebox probe` measured of a model, and how the leaderboard shows it.

A record is a sealed JSON file in `probes/` in the folder of the feature store, by the identity of the model, its
precision and its answers. A later probe replaces it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.errors import DamagedFile
from pipeline.files import read_sealed_json, sealed_json, write_atomic
from pipeline.results.comparison import FULL
from pipeline.source_code import texts_digest

Record = dict[str, Any]

FOLDER = "probes"
KEY = ("model_digest", "precision", "answers")
"""Columns of rows, and keys of a record, that tell which endpoint was probed."""
COLUMN = "noise_floor"
"""Column of the leaderboard: the largest difference between repeated scores."""


def path_of(features: Path, key: Sequence[str]) -> Path:
    """Return the file of the record of an endpoint, given the values of `KEY`."""
    return features / FOLDER / f"{texts_digest(key)}.json"


def write(features: Path, record: Record) -> Path:
    """Store a record in the folder of the feature store, and return its file."""
    path = path_of(features, [record[name] for name in KEY])
    write_atomic(path, sealed_json(record, indent=1))
    return path


def read(features: Path, rows: pa.Table) -> tuple[list[Record], list[str]]:
    """Return the records of the endpoints of these rows, and one line for each damaged file."""
    records, problems = [], []
    for key in sorted({tuple(row[name] for name in KEY) for row in rows.select(list(KEY)).to_pylist()}):
        try:
            record = read_sealed_json(path_of(features, key))
        except FileNotFoundError:
            continue
        except (OSError, DamagedFile) as error:
            problems.append(f"the noise floor is left out: {error}; run farebox probe again")
            continue
        if tuple(record.get(name) for name in KEY) == key:
            records.append(record)
    return records, problems


def line(record: Record) -> str:
    """Return a record as one line under a leaderboard."""
    answers = f" ({record['answers']})" if record["answers"] != FULL else ""
    return (
        f"noise floor of {record['model']}{answers}, probed {record['created'][:10]}: repeated scores differ by at "
        f"most {record['scores_largest']:.2g} (mean {record['scores_mean']:.2g}); the predicted class changes for "
        f"{record['changed']} of {record['images']} images"
    )


def with_floors(table: pa.Table, records: Sequence[Record]) -> pa.Table:
    """Return a leaderboard with the column `COLUMN` filled where there is a record."""
    largest = {tuple(record[name] for name in KEY): record["scores_largest"] for record in records}
    values = [largest.get(tuple(row[name] for name in KEY)) for row in table.select(list(KEY)).to_pylist()]
    index = table.schema.get_field_index(COLUMN)
    return table.set_column(index, table.schema.field(COLUMN), pa.array(values, pa.float64()))
