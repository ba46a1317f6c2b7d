"""Small data sets made for a test, and trials run without Ray."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import OmegaConf
from PIL import Image

from methods.base import Access, Bill, Method, MethodInfo, TaskShape
from pipeline.blackbox.client import MeteredBox
from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.local_pool import EndpointLike, LocalPool
from pipeline.budget import BUDGETED_PHASES, Limits, Phase, total
from pipeline.config.card_files import dataset_card
from pipeline.config.compose import compose
from pipeline.config.method_choice import MethodChoice
from pipeline.data.dataset import source_of
from pipeline.data.source import ParquetSource
from pipeline.files import file_sha256
from pipeline.ledger.ledger import Ledger
from pipeline.results.row import ResultRow
from pipeline.results.store import ResultStore
from pipeline.sweep.in_process import run_all
from pipeline.trials.plan import SweepPlan, TrialSpec, make_plan
from pipeline.trials.trial import few_shot_task, run_trial

STORAGE = "lab"


@contextlib.contextmanager
def box_over(
    endpoint: EndpointLike, folder: Path, access: Access, reserved: Limits | None = None
) -> Iterator[MeteredBox]:
    """Open a metered box of one trial, with a ledger in this folder; the ledger must verify at the end."""
    ledger = Ledger(f"sqlite:///{folder / 'ledger.db'}")
    ledger.open_account("ceiling", Limits())
    ledger.reserve("s", "t", ["ceiling"], reserved or Limits())
    yield MeteredBox(LocalPool(endpoint, ledger), "s", "t", access, Limits())
    assert ledger.verify() == []
    ledger.close()


def run_here(*overrides: str) -> list[str]:
    """Run a sweep in this process, one trial after another; return the printed lines."""
    printed: list[str] = []
    run_all(make_plan(compose(overrides)), printed.append)
    return printed


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    """Return the image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def write_source(
    path: Path, images: Sequence[bytes], labels: Sequence[int], splits: Sequence[str], classes: Sequence[str]
) -> ParquetSource:
    """Write a Parquet data set as users would."""
    schema = pa.schema(
        [("image", pa.binary()), ("label", pa.int64()), ("split", pa.string())],
        metadata={"classes": json.dumps(list(classes))},
    )
    pq.write_table(pa.table([list(images), list(labels), list(splits)], schema=schema), path)
    return ParquetSource(str(path), file_sha256(path))


def small_data(folder: Path) -> Path:
    """Write a data set of five icon classes with 8 train, 4 val and 12 test images each; return its card."""
    icons = source_of(dataset_card("icons"))
    wanted = {"train": 8, "val": 4, "test": 12}
    rows = [
        (row, split)
        for split, n in wanted.items()
        for label in range(5)
        for row in [r for r in icons.rows_of(split).tolist() if icons.labels[r] == label][:n]
    ]
    source = write_source(
        folder / "small.parquet",
        [icons.image_bytes(r) for r, _ in rows],
        [int(icons.labels[r]) for r, _ in rows],
        [split for _, split in rows],
        icons.classnames[:5],
    )
    return write_card(folder, source, classes=5, train=40, val=20, test=60)


def write_card(folder: Path, source: ParquetSource, **changes: Any) -> Path:
    """Write the YAML card of a source."""
    card = {
        "path": source.path,
        "sha256": source.sha256,
        "template": "an icon of a {}.",
        "templates": ["an icon of a {}.", "{} icon", "a picture of a {}"],
    }
    path = folder / f"{Path(source.path).stem}.yaml"
    OmegaConf.save(OmegaConf.create(card | changes), path)
    return path


def stored_rows(features: Path) -> int:
    """Return the number of rows in all files of feature stores; an image that was computed twice counts twice."""
    n = 0
    for path in features.rglob("*.features"):
        with path.open("rb") as file:
            header = file.readline()
        width = json.loads(header.partition(b" ")[2])["width"]
        n += (path.stat().st_size - len(header)) // (16 + 4 + 4 * width)
    return n


class Lab:
    """A storage folder with its ledger, in which trials of a small data set run without Ray."""

    def __init__(self, folder: Path, endpoint: Endpoint, card: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.card = folder, card
        self.ledger = Ledger(f"sqlite:///{folder / 'ledger.db'}")
        self.ledger.open_account("ceiling", Limits())
        self.pool = LocalPool(endpoint, self.ledger)
        self.store = ResultStore(folder)
        self.words = (
            "sweep=smoke",
            f"storage={folder}",
            "model=fake",
            "local=tiny_local",
            f"datasets=[{card}]",
            "views=2",
            "shots=4",
            "seeds=1",
        )

    def plan(self, *words: str) -> SweepPlan:
        """Return the plan of a small sweep on `model=fake`; later overrides win."""
        return make_plan(compose([*self.words, *words]))

    def spec(self, method: str, *words: str) -> TrialSpec:
        """Return the only trial of a method."""
        (spec,) = self.plan(f"methods=[{method}]", *words).trials
        return spec

    def reserve(self, spec: TrialSpec) -> None:
        """Reserve the predicted bill of the trial, as a sweep does."""
        self.ledger.reserve(STORAGE, spec.account, ["ceiling"], spec.reserved)

    def run(self, spec: TrialSpec, checkpoint_s: float = 60.0) -> list[ResultRow]:
        """Reserve, run and close a trial; the ledger must agree with the rows."""
        self.reserve(spec)
        rows = run_trial(spec, self.pool, STORAGE, self.store, checkpoint_s)
        self.ledger.release(STORAGE, spec.account)
        assert self.ledger.verify([asdict(r) | {"trial_id": spec.account} for r in rows], STORAGE) == []
        return rows

    def bills(self, spec: TrialSpec) -> dict[Phase, Bill]:
        """Return the bill of a trial in the ledger, by phase."""
        return self.ledger.trial_bill(STORAGE, spec.account)

    def paid(self, spec: TrialSpec) -> Bill:
        """Return what the ledger charged to the trial's allotment."""
        return total(bill for phase, bill in self.bills(spec).items() if phase in BUDGETED_PHASES)


def spec_of(
    lab: Lab, cls: type[Method], *words: str, access: Access = Access.TEXT | Access.SCORES, new_classes: bool = False
) -> TrialSpec:
    """Return a trial of a method that is not registered; an attribute `uses_text_norm` of its class declares that."""
    spec = lab.spec("zero_shot", *words)
    uses = getattr(cls, "uses_text_norm", False)
    cls.info = MethodInfo(cls.__name__, cls, access, "", 1, new_classes, "", uses_text_norm=uses)
    task = few_shot_task(spec)
    predicted = cls().bill(TaskShape.of(task, 16), spec.allotment.remaining(Bill()))
    changes = {"choice": MethodChoice(cls.__name__, cls.info, ()), "predicted": predicted, "trial_id": cls.__name__}
    return TrialSpec(**{**vars(spec), **changes})


def plain_bill(row: ResultRow) -> Bill:
    """Return the bill of a row, phases adapt and validate together."""
    return Bill(row.requests, row.images, row.prompts, row.outputs)


def outcome(row: ResultRow) -> dict[str, Any]:
    """Return the columns that must not change when a trial is repeated, resumed or moved."""
    loose = {"seconds", "created", "computed_images", "computed_prompts", "cache_hits", "predictions_file"}
    return {k: v for k, v in asdict(row).items() if k not in loose}
