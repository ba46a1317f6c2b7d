"""The result row, one record per trial and test set, and the Arrow schema derived from it."""

from __future__ import annotations

import math
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import pyarrow as pa

from pipeline.budget import BUDGETED_PHASES, UNITS

STATUSES = {
    "done": "done",
    "budget_exhausted": "budget exhausted",
    "failed": "failed",
    "unfunded": "unfunded (no budget)",
}
"""Each status of a trial, and the text that tables and messages show for it."""
FINISHED = ("done", "budget_exhausted")
"""Statuses of trials that have a score and do not run again."""
KINDS = ("source", "shift", "transfer", "base", "new")
HTTP_COLUMNS = (
    *("http_calls", "http_images", "http_texts", "http_bytes", "http_tokens", "http_retries", "http_rate_limited"),
    *("http_waited_s", "uncertain_calls", "usd"),
)
"""Columns of the physical bill of a remote model."""
LATER_COLUMNS = {
    **{"local_model": "", "local_digest": "", "local_params": None, "answers": "logits"},
    **{"draw": "balanced", "missing_classes": None},
    **dict.fromkeys(HTTP_COLUMNS),
    **dict.fromkeys([f"tune_{unit}" for unit in UNITS], 0),
    **{"tune_trials": None, "chosen": ""},
}
"""Columns that rows of earlier versions lack, with their value in such rows."""
TRIAL_COLUMNS = (
    *("trial_id", "sweep", "method", "base_method", "method_version", "method_digest", "access", "model"),
    *("model_digest", "code_digest", "precision", "transform", "local_model", "local_digest", "dataset"),
    *("data_digest", "template"),
    *("templates_digest", "classnames_digest", "augment", "split_digest", "draw", "missing_classes", "shots", "seed"),
    *("views", "validation", "hparams", "budget_requests", "budget_images", "answers", "status", "config"),
)
"""Columns that describe the trial; they are equal in all of its rows."""


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """Result of one trial on one test set.

    All bills except those of the phase `evaluate` are those of the whole trial and are equal in all of its rows.
    """

    trial_id: str
    """Digest of the resolved trial specification. A row is identified by `trial_id` and `test_set`."""
    test_set: str
    """Name of the test set: `dataset`, another data set evaluated without refitting, or a half of the classes, such as
    `icons:base`."""
    kind: str
    """Kind of test set. source: the data set's own test split; shift: a domain shift of it; transfer: another data set
    with its own classes; base, new: in base-to-new generalization, the fitted classes and the remaining ones."""
    sweep: str
    """Name of the sweep that ran the trial."""
    method: str
    """Name of a registered method, or of a variant of one."""
    base_method: str
    """Name of the registered method."""
    method_version: int
    """Declared version of the method."""
    method_digest: str
    """Digest of the method's source code."""
    access: str
    """Declared access of the method, e.g. 'SOFT+SCORES'."""
    model: str
    """Name of the model's config."""
    model_digest: str
    """Identity of the model: architecture, digest or tag of the weights, and changes made to load them."""
    code_digest: str = ""
    """Digest of the other source code that affects results."""
    precision: str
    """Floating-point precision of the endpoint, e.g. 'fp32'."""
    transform: str
    """Image preprocessing of the endpoint."""
    local_model: str = ""
    """Name of the card of the pretrained model that the method ran on the client; empty for other methods."""
    local_digest: str = ""
    """Digest of the local model: architecture, weights and input rule."""
    local_params: int | None = None
    """Number of parameters of the local model."""
    dataset: str
    """Data set that the few-shot split is drawn from."""
    data_digest: str = ""
    """Digest of the data set's images, labels, splits and class names."""
    test_digest: str = ""
    """Digest of the test set's data set; for classes that were not fitted, it covers their names and templates too."""
    template: str = ""
    """Zero-shot template of the data set's card."""
    templates_digest: str = ""
    """Digest of the card's ensemble templates; empty if it has none."""
    classnames_digest: str = ""
    """Digest of the class names passed to the fit, in label order."""
    augment: str = ""
    """Augmentation of the data set's card, used for views."""
    split_digest: str
    """Digest of the drawn training and validation images."""
    draw: str = "balanced"
    """Training images of the classes: 'balanced', or 'imbalanced' with `shots` per class in the mean."""
    missing_classes: int | None = None
    """Number of fitted classes without a training image."""
    shots: int
    """Labelled training images per class."""
    seed: int
    """Random seed of the few-shot draw and of the method."""
    views: str
    """Number of augmented views per image, or 'fresh'; empty if the method uses no views."""
    validation: str = ""
    """Validation rule, e.g. 'min4'."""
    hparams: str
    """'default', or 'paper' for the per-dataset settings of its paper."""
    budget_requests: int | None
    """Allotment in requests; null without a limit."""
    budget_images: int | None
    """Allotment in image rows; null without a limit."""
    answers: str = "logits"
    """What the endpoint answered, e.g. 'probabilities, 3 digits' (docs/answers.md); 'logits' for full answers."""
    status: str
    """done; budget_exhausted: the allotment ran out and the trial was scored as it was; failed; unfunded: not run, as
    the budget had no room for its allotment."""
    error: str | None = None
    """First cause of a failure, on one line."""
    accuracy: float | None = None
    """Top-1 accuracy in percent, 0 to 100."""
    macro_accuracy: float | None = None
    """Mean of the per-class accuracies in percent, 0 to 100."""
    nll: float | None = None
    """Mean negative log-likelihood in nats."""
    ece: float | None = None
    """Expected calibration error in percent, 0 to 100."""
    n_test: int | None = None
    """Images in the test set."""
    n_classes: int | None = None
    """Classes in the test set."""
    requests: int = 0
    """Requests billed for fitting (phases adapt, validate and tune), which the allotment pays."""
    images: int = 0
    """Image rows billed for fitting."""
    prompts: int = 0
    """Class prompts billed for fitting."""
    outputs: int = 0
    """Returned numbers billed for fitting."""
    adapt_requests: int = 0
    """Requests of phase adapt (fitting)."""
    adapt_images: int = 0
    """Image rows of phase adapt."""
    adapt_prompts: int = 0
    """Class prompts of phase adapt."""
    adapt_outputs: int = 0
    """Returned numbers of phase adapt."""
    validate_requests: int = 0
    """Requests of phase validate (calls on validation images)."""
    validate_images: int = 0
    """Image rows of phase validate."""
    validate_prompts: int = 0
    """Class prompts of phase validate."""
    validate_outputs: int = 0
    """Returned numbers of phase validate."""
    tune_requests: int = 0
    """Requests of phase tune (the search of a tuned method for its settings, docs/tuning.md)."""
    tune_images: int = 0
    """Image rows of phase tune."""
    tune_prompts: int = 0
    """Class prompts of phase tune."""
    tune_outputs: int = 0
    """Returned numbers of phase tune."""
    curve_requests: int = 0
    """Requests of phase curve (diagnostic scoring during the fit)."""
    curve_images: int = 0
    """Image rows of phase curve."""
    curve_prompts: int = 0
    """Class prompts of phase curve."""
    curve_outputs: int = 0
    """Returned numbers of phase curve."""
    evaluate_requests: int = 0
    """Requests of phase evaluate (prediction of this row's test set)."""
    evaluate_images: int = 0
    """Image rows of phase evaluate."""
    evaluate_prompts: int = 0
    """Class prompts of phase evaluate."""
    evaluate_outputs: int = 0
    """Returned numbers of phase evaluate."""
    replay_requests: int = 0
    """Requests of phase replay (requests of a resumed trial that differ from its first run; 0 on the CPU)."""
    replay_images: int = 0
    """Image rows of phase replay."""
    replay_prompts: int = 0
    """Class prompts of phase replay."""
    replay_outputs: int = 0
    """Returned numbers of phase replay."""
    tune_trials: int | None = None
    """Number of settings that a tuned method tried; null for other methods."""
    chosen: str = ""
    """JSON: the settings that a tuned method chose on the validation images; empty for other methods."""
    paper_queries: float | None = None
    """Number of queries as the method's paper counts them."""
    labels_used: int | None = None
    """Labelled images used: training and validation."""
    seconds: float | None = None
    """Wall-clock time of the trial; trials that run at the same time slow each other down."""
    trainable_params: int | None = None
    """Number of learned parameters."""
    client_bytes: int | None = None
    """Size of the fitted method on the client, in bytes."""
    computed_images: int | None = None
    """Images that the endpoint encoded; caching does not change the bill."""
    computed_prompts: int | None = None
    """Prompts that the endpoint encoded."""
    cache_hits: int | None = None
    """Features that the endpoint read from its store."""
    http_calls: int | None = None
    """HTTP calls sent to a remote endpoint for the trial so far, repeated ones included (docs/remote.md)."""
    http_images: int | None = None
    """Images in them."""
    http_texts: int | None = None
    """Texts in them."""
    http_bytes: int | None = None
    """Size of their bodies."""
    http_tokens: int | None = None
    """Tokens that the endpoint reported."""
    http_retries: int | None = None
    """Calls that repeated another one."""
    http_rate_limited: int | None = None
    """Responses with status 429."""
    http_waited_s: float | None = None
    """Seconds waited before calls were repeated."""
    uncertain_calls: int | None = None
    """Calls whose outcome is unknown, which the endpoint may have billed."""
    usd: float | None = None
    """Price of the calls in US dollars, by the price table of the model's card."""
    notes: str = "{}"
    """JSON: decisions recorded by the method, such as its schedule."""
    config: str = "{}"
    """JSON with sorted keys: the method's resolved configuration, equal for all seeds."""
    curve: str = "[]"
    """JSON: list of [requests, images, accuracy] during the fit."""
    test_label_reads: int = 0
    """Number of reads of this test set's labels: one at the end, and one for each point of the curve."""
    cpu: str = ""
    """CPU model. Results are bit-identical for equal CPU model, thread count and torch version."""
    device: str = ""
    """Device of the replicas: 'cpu', or the name of the GPU."""
    threads: int = 1
    """CPU threads per replica."""
    torch_version: str = ""
    """Version of torch."""
    farebox_version: str = ""
    """Version of Farebox."""
    python_version: str = ""
    """Version of Python."""
    created: str = ""
    """Time of creation, UTC, ISO 8601."""
    predictions_file: str | None = None
    """Path of the predictions, relative to `storage`."""
    predictions_digest: str | None = None
    """SHA-256 of the predictions' image keys, labels and logits."""

    def __post_init__(self) -> None:
        """Check that the row is consistent.

        Raises:
            ValueError: an unknown status or kind, a bill that does not add up, or a number that is not finite.
        """
        if self.status not in STATUSES:
            raise ValueError(f"status {self.status!r} is not one of {', '.join(STATUSES)}")
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is not one of {', '.join(KINDS)}")
        for unit in UNITS:
            paid = sum(getattr(self, f"{phase.value}_{unit}") for phase in BUDGETED_PHASES)
            if getattr(self, unit) != paid:
                raise ValueError(f"{unit} is {getattr(self, unit):,}, but adapt + validate + tune is {paid:,}")
        for column in fields(self):
            value = getattr(self, column.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{column.name} is {value}, not a finite number")


def account_name(trial_id: str, method_digest: str, code_digest: str) -> str:
    """Return the name of a trial in the ledger and on its checkpoints.

    The name includes both digests of the code. A rerun after a code change is therefore billed separately and does not
    continue an old checkpoint, as its requests and responses may differ. A rerun of the same code replays its charges
    for free.
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
    """Return rows as an Arrow table with `SCHEMA`."""
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA)


def to_rows(table: pa.Table) -> list[ResultRow]:
    """Return the rows of an Arrow table with `SCHEMA`.

    Raises:
        ValueError: a row is not consistent.
    """
    return [ResultRow(**record) for record in table.to_pylist()]
