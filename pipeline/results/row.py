"""One row of a result: what is known of one trial on one test set, flat, and the Arrow schema derived from it."""

from __future__ import annotations

import math
import typing
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.budget import UNITS, Phase

PHASES = tuple(phase.value for phase in Phase)
STATUSES = ("done", "truncated", "failed", "unfunded")
FINISHED = ("done", "truncated")
KINDS = ("source", "shift", "transfer", "base", "new")
TRIAL_COLUMNS = (
    *("trial_id", "sweep", "method", "base_method", "method_version", "method_digest", "access", "model"),
    *("model_digest", "code_digest", "precision", "transform", "dataset", "data_digest", "template"),
    *("templates_digest", "classnames_digest", "augment", "split_digest", "shots", "seed", "views", "validation"),
    *("hparams", "budget_requests", "budget_images", "status", "config"),
)
"""Columns of the trial: equal on each of its rows."""


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """One trial on one test set. The bills of all phases but `evaluate` are the trial's: equal on each of its rows."""

    trial_id: str
    """Digest of the resolved spec; with test_set, the row's key."""
    test_set: str
    """Name of the test set: `dataset`, another data set scored without refitting, or one half of the classes."""
    kind: str
    """source: the data set's own test split; shift: one of its shift sets; transfer: another data set, under its own
    classes; base, new: the test images of the classes that were fitted on (base_to_new), and of the others."""
    sweep: str
    """Name of the sweep that asked for the trial."""
    method: str
    """The cell's name: a registered method, or a variant of one."""
    base_method: str
    """The registered method."""
    method_version: int
    """Version that the method declares."""
    method_digest: str
    """Digest of the method's source."""
    access: str
    """Access that the method declares, e.g. 'SOFT+SCORES'."""
    model: str
    """Name of the model's config."""
    model_digest: str
    """Identity of the model: architecture with the weights' digest or tag, and what was changed to load them."""
    code_digest: str = ""
    """Digest of the code that affects results, apart from the method's own."""
    precision: str
    """Number format of the endpoint, e.g. 'fp32'."""
    transform: str
    """Image transform of the endpoint."""
    dataset: str
    """Data set that the few-shot split was drawn from."""
    data_digest: str = ""
    """Digest of the data set: images, labels, splits and class names."""
    test_digest: str = ""
    """The same of the test set's data set; for classes that were not fitted also of their names and templates."""
    template: str = ""
    """Zero-shot template of the data set's card."""
    templates_digest: str = ""
    """Digest of its ensemble templates; empty: it has none."""
    classnames_digest: str = ""
    """Digest of the class names that the fit was given, in label order."""
    augment: str = ""
    """Augmentation of the data set's card, which makes the views."""
    split_digest: str
    """Digest of the drawn train and val images."""
    shots: int
    """Labelled training images a class."""
    seed: int
    """Fixes the draw and the method's own randomness."""
    views: str
    """Augmented views: a number, or 'fresh'; empty: the method uses none."""
    validation: str = ""
    """Validation rule, e.g. 'min4'."""
    hparams: str
    """'default', or 'paper' for the per-dataset settings of its paper."""
    budget_requests: int | None
    """Allotment in requests; null: no limit."""
    budget_images: int | None
    """Allotment in image rows; null: no limit."""
    status: str
    """done, truncated (ran out of budget), failed or unfunded."""
    error: str | None = None
    """First cause of a failure, one line."""
    accuracy: float | None = None
    """Per cent of the test images, 0 to 100."""
    macro_accuracy: float | None = None
    """Mean of the classes' accuracies, 0 to 100."""
    nll: float | None = None
    """Mean negative log-likelihood, nats."""
    ece: float | None = None
    """Expected calibration error, 0 to 100."""
    n_test: int | None = None
    """Images in the test set."""
    n_classes: int | None = None
    """Classes in the test set."""
    requests: int = 0
    """Bill of adapt + validate, which the allotment pays: requests."""
    images: int = 0
    """The same, image rows."""
    prompts: int = 0
    """The same, class prompts."""
    outputs: int = 0
    """The same, numbers returned."""
    adapt_requests: int = 0
    """Phase adapt (fitting): requests."""
    adapt_images: int = 0
    """Phase adapt: image rows."""
    adapt_prompts: int = 0
    """Phase adapt: class prompts."""
    adapt_outputs: int = 0
    """Phase adapt: numbers returned."""
    validate_requests: int = 0
    """Phase validate (calls on val images): requests."""
    validate_images: int = 0
    """Phase validate: image rows."""
    validate_prompts: int = 0
    """Phase validate: class prompts."""
    validate_outputs: int = 0
    """Phase validate: numbers returned."""
    curve_requests: int = 0
    """Phase curve (diagnostic scoring inside the trial): requests."""
    curve_images: int = 0
    """Phase curve: image rows."""
    curve_prompts: int = 0
    """Phase curve: class prompts."""
    curve_outputs: int = 0
    """Phase curve: numbers returned."""
    evaluate_requests: int = 0
    """Phase evaluate (predicting this row's test set): requests."""
    evaluate_images: int = 0
    """Phase evaluate: image rows."""
    evaluate_prompts: int = 0
    """Phase evaluate: class prompts."""
    evaluate_outputs: int = 0
    """Phase evaluate: numbers returned."""
    replay_requests: int = 0
    """Phase replay (a resumed trial that asked something else; 0 on the CPU): requests."""
    replay_images: int = 0
    """Phase replay: image rows."""
    replay_prompts: int = 0
    """Phase replay: class prompts."""
    replay_outputs: int = 0
    """Phase replay: numbers returned."""
    papers_count: float | None = None
    """What the method's paper would call its number of queries."""
    labels_used: int | None = None
    """Labelled images used, train + val."""
    seconds: float | None = None
    """Wall time of the trial; contended when trials ran side by side."""
    trainable_params: int | None = None
    """Numbers that the method learns."""
    client_bytes: int | None = None
    """Bytes that the deployed method keeps on the client."""
    computed_images: int | None = None
    """Image-tower passes that the endpoint really made; never changes the bill."""
    computed_prompts: int | None = None
    """Text-tower passes that it really made."""
    cache_hits: int | None = None
    """Features that it took from its store."""
    notes: str = "{}"
    """JSON: what the method's `start` decided."""
    config: str = "{}"
    """JSON with sorted keys: the method's resolved Config; nothing that differs between seeds."""
    curve: str = "[]"
    """JSON: [requests, images, accuracy] at points inside the trial."""
    test_label_reads: int = 0
    """Times that the scorer read this test set's labels: once at the end, and once for each point of the curve."""
    cpu: str = ""
    """CPU model; bit-identity is claimed per CPU model, thread count and torch version."""
    device: str = ""
    """What the replicas computed on: cpu, or the GPU's name, whose last bits are its own."""
    threads: int = 1
    """CPU threads of a replica."""
    torch_version: str = ""
    """Version of torch."""
    farebox_version: str = ""
    """Version of Farebox."""
    python_version: str = ""
    """Version of Python."""
    created: str = ""
    """When the row was made, UTC, ISO 8601."""
    predictions_file: str | None = None
    """Predictions, relative to `storage`."""
    predictions_digest: str | None = None
    """SHA-256 over their keys, labels and logits."""

    def __post_init__(self) -> None:
        """Refuse a row that contradicts itself: ValueError."""
        if self.status not in STATUSES:
            raise ValueError(f"status {self.status!r} is not one of {', '.join(STATUSES)}")
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is not one of {', '.join(KINDS)}")
        for unit in UNITS:
            paid = getattr(self, f"adapt_{unit}") + getattr(self, f"validate_{unit}")
            if getattr(self, unit) != paid:
                raise ValueError(f"{unit} is {getattr(self, unit):,}, but adapt + validate is {paid:,}")
        for column in fields(self):
            value = getattr(self, column.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{column.name} is {value}, wanted a finite number")


def account_name(trial_id: str, method_digest: str, code_digest: str) -> str:
    """Name of a trial in the ledger and on its checkpoints.

    It includes both digests of the code, so a rerun after an edit is a new account: its requests are charged again, and
    a checkpoint of other code is never continued. Other code may ask other requests or be given other answers, neither
    of which the earlier charges paid for. A rerun by the same code replays its charges for free.
    """
    return ".".join(filter(None, (trial_id, method_digest, code_digest)))


def _schema() -> pa.Schema:
    arrow = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    columns = []
    for name, hint in typing.get_type_hints(ResultRow).items():
        options = typing.get_args(hint) or (hint,)
        columns.append(pa.field(name, arrow[options[0]], nullable=type(None) in options))
    return pa.schema(columns)


SCHEMA = _schema()


def to_table(rows: Sequence[ResultRow]) -> pa.Table:
    """Rows as Arrow."""
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA)


def to_rows(table: pa.Table) -> list[ResultRow]:
    """Arrow as rows; columns that a newer Farebox added are dropped."""
    names = [f.name for f in fields(ResultRow)]
    return [ResultRow(**record) for record in table.select(names).to_pylist()]


def check_trial(table: pa.Table) -> pa.Table:
    """The rows of one trial as they were given.

    Raises:
        ValueError: two rows are about one test set, rows disagree in what belongs to the trial, or a row contradicts
            itself.
    """
    rows = to_rows(table)
    for row in rows[1:]:
        for column in TRIAL_COLUMNS:
            if getattr(row, column) != getattr(rows[0], column):
                raise ValueError(f"its rows disagree in {column}")
    if len({row.test_set for row in rows}) < len(rows):
        raise ValueError("two of its rows are about one test set")
    return table


def conform(table: pa.Table) -> pa.Table:
    """Return the table under the present schema. A missing column takes its default.

    Raises:
        ValueError: a missing column has no default, or a number is NaN or infinite.
    """
    table = table.replace_schema_metadata(None)
    if table.schema.equals(SCHEMA):
        return _finite(table)
    if "kind" not in table.column_names:  # written before other protocols were
        own = pc.equal(table["test_set"], table["dataset"])
        table = table.append_column("kind", pc.if_else(own, "source", "shift"))
    columns: list[Any] = []
    for field, column in zip(fields(ResultRow), SCHEMA, strict=True):
        if column.name in table.column_names:
            columns.append(table[column.name].cast(column.type))
        elif field.default is not MISSING:
            columns.append(pa.array([field.default] * len(table), column.type))
        else:
            raise ValueError(f"made by another Farebox: it has no column {column.name!r}")
    return _finite(pa.Table.from_arrays(columns, schema=SCHEMA))


def _finite(table: pa.Table) -> pa.Table:
    for column in SCHEMA:
        if pa.types.is_floating(column.type) and pc.all(pc.is_finite(table[column.name])).as_py() is False:
            raise ValueError(f"its column {column.name!r} holds NaN or infinity")
    return table
