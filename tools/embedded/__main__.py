"""``python -m tools.embedded``: builds the embedded model and datasets, step by step.

A step is skipped when its inputs and outputs are the files of its last run. ``--from STEP`` forgets that step
and those after it; ``--list`` prints the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tools.embedded import captions, check, corpus, datasets, dedupe, fetch, local, publish, train, validate, vocabulary
from tools.embedded.drawings import Drawings
from tools.embedded.settings import CARDS, PACKAGE, SIZE, WORK

STAMPS = WORK / "stamps"
ALL_PICTURES, CORPUS, HELD_OUT = WORK / "corpus_all", WORK / "corpus", WORK / "held_out"
TRAINED, FIGURES = WORK / "trained.pt", WORK / "val.json"
ARCHIVES = tuple(p.archive for p in fetch.PACKAGES)
PARQUET = tuple(PACKAGE / f"{name}.parquet" for name in publish.ORIGINS)
MODEL = tuple(PACKAGE / name for name in ("tiny.safetensors", "tiny.json", "tiny_bpe.txt.gz"))
CARD_FILES = tuple(CARDS / f"{name}.yaml" for name in publish.ORIGINS)
DIGESTS = PACKAGE / "digests.json"


def _pair(path: Path) -> tuple[Path, Path]:
    return path.with_suffix(".npy"), path.with_suffix(".json")


@dataclass(frozen=True)
class Step:
    """Something that makes files out of files."""

    name: str
    what: str
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]
    run: Callable[[], None]

    @property
    def stamp(self) -> Path:
        return STAMPS / f"{self.name}.json"

    def digests(self) -> dict[str, str] | None:
        """Digest of every input and output, or nothing when a file is missing."""
        paths = self.inputs + self.outputs
        return {p.name: fetch.sha256(p) for p in paths} if all(p.exists() for p in paths) else None

    def is_done(self) -> bool:
        """Whether the stamp of the last run tells of just these files. A step without outputs always runs."""
        if not self.outputs or not self.stamp.exists():
            return False
        recorded: dict[str, str] = json.loads(self.stamp.read_text())
        return recorded == self.digests()


def _fetch() -> None:
    for package in fetch.PACKAGES:
        fetch.fetch(package)


def _render() -> None:
    corpus.build_corpus().save(ALL_PICTURES)
    corpus.build_held_out().save(HELD_OUT)


def _distinct() -> None:
    every = Drawings.load(ALL_PICTURES)
    kept = dedupe.apart_from(every, Drawings.load(HELD_OUT))
    print(f"  {len(every.records) - len(kept.records)} pictures removed, {len(kept.records)} kept")
    kept.save(CORPUS)


def _vocabulary() -> None:
    phrases = {p for record in Drawings.load(CORPUS).records for p in captions.truth(record).phrases}
    phrases |= {*corpus.STYLE_WORDS.values(), *corpus.SKIN.values(), "skin"}
    print(f"  {vocabulary.build(sorted(phrases), train.BPE)} tokens")


def _train() -> None:
    # Busy-waiting threads stall one another when other programs use the cores.
    environment = {**os.environ, "GOMP_SPINCOUNT": "0"}
    subprocess.run([sys.executable, "-m", "tools.embedded.train"], check=True, env=environment)
    # A finished run's checkpoint would turn the next run into a no-op.
    train.CHECKPOINT.unlink(missing_ok=True)


def _datasets() -> None:
    for dataset in datasets.build(Drawings.load(HELD_OUT), Drawings.load(CORPUS)).values():
        datasets.write(dataset, PACKAGE / f"{dataset.name}.parquet")
        counts = {s: (sum(c), min(c)) for s in ("train", "val", "test") if sum(c := dataset.counts(s))}
        print(f"  {dataset.name}: {len(dataset.classes)} classes, (images, least in a class) {counts}")


def _local() -> None:
    local.run()
    local.card()


def _publish() -> None:
    publish.cards(FIGURES)
    publish.notice_and_digests()


def _check() -> None:
    check.files(TRAINED, FIGURES)
    check.duplicates(Drawings.load(HELD_OUT), Drawings.load(CORPUS))


STEPS = (
    Step("fetch", "download the source packages", (), ARCHIVES, _fetch),
    Step("render", f"draw every picture at {SIZE} pixels", ARCHIVES, (*_pair(ALL_PICTURES), *_pair(HELD_OUT)), _render),
    Step(
        "distinct",
        "take near-duplicates of held-out drawings out of the corpus",
        (*_pair(ALL_PICTURES), *_pair(HELD_OUT)),
        _pair(CORPUS),
        _distinct,
    ),
    Step("vocabulary", "choose the tokens", _pair(CORPUS), (train.BPE,), _vocabulary),
    Step("train", "pre-train (the long step)", (*_pair(CORPUS), train.BPE), (TRAINED,), _train),
    Step("datasets", "build the datasets", (*_pair(CORPUS), *_pair(HELD_OUT)), PARQUET, _datasets),
    Step("model", "write the model's files", (TRAINED, train.BPE), MODEL, lambda: publish.model(TRAINED, PACKAGE)),
    Step("local", "train the local encoder, without class names", PARQUET, (local.WEIGHTS, local.CARD), _local),
    Step("validate", "choose the templates on val", (*MODEL, *PARQUET), (FIGURES,), lambda: validate.run(FIGURES)),
    Step(
        "publish",
        "write cards, notice and digests",
        (FIGURES, publish.NOTICE, *MODEL, local.WEIGHTS, *PARQUET),
        (*CARD_FILES, PACKAGE / "NOTICE.md", DIGESTS),
        _publish,
    ),
    Step("check", "check all of it", (), (), _check),
)


def main() -> None:
    """Runs the steps that have something to do."""
    parser = argparse.ArgumentParser(prog="python -m tools.embedded", description=__doc__)
    parser.add_argument("--from", dest="first", choices=[s.name for s in STEPS], help="forget this step and later ones")
    parser.add_argument("--list", action="store_true", help="print the steps")
    options = parser.parse_args()
    for folder in (STAMPS, PACKAGE, CARDS):
        folder.mkdir(parents=True, exist_ok=True)
    forgotten = False
    for number, step in enumerate(STEPS, 1):
        title = f"[{number}/{len(STEPS)}] {step.name}: {step.what}"
        if options.list:
            print(title)
            continue
        forgotten = forgotten or step.name == options.first
        if forgotten:
            step.stamp.unlink(missing_ok=True)
        if step.is_done():
            print(f"{title}: nothing to do")
            continue
        print(title, flush=True)
        began = time.time()
        step.run()
        if step.outputs:
            step.stamp.write_text(json.dumps(step.digests(), indent=1))
        print(f"  done in {time.time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
