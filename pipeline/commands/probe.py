"""`farebox probe`: how far equal questions to a model differ in their answers, and where it cuts texts."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from methods.base import Access
from pipeline import __version__
from pipeline.blackbox.client import MeteredBox
from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.local_pool import LocalPool
from pipeline.blackbox.probe import MOST_WORDS, Differences, NoiseFloor, measure, text_end
from pipeline.budget import Limits
from pipeline.cards import DatasetCard
from pipeline.config.compose import Config, check_price, compose
from pipeline.console import short_path
from pipeline.data.dataset import check_card
from pipeline.data.images import Images
from pipeline.errors import ConfigError
from pipeline.files import strict_json
from pipeline.ledger.ledger import Ledger
from pipeline.remote.call_log import sent_line
from pipeline.remote.endpoint import RemoteEndpoint
from pipeline.remote.facts import describe
from pipeline.remote.permission import refuse_unconfirmed
from pipeline.remote.wallet import LedgerWallet
from pipeline.results import noise_floor
from pipeline.sweep.money import costs_money

N_IMAGES, N_PROMPTS = 16, 8
"""Images and prompts of each data set; fewer if it has fewer."""
LEAST_EFFECT = 1e-6
"""Difference of features or scores that rounding may make between two texts of one call."""

Record = dict[str, Any]


def run(words: Sequence[str], as_json: bool, log: Callable[[str], None]) -> str:
    """Probe the model of a command, store the record, and return it as text or JSON."""
    record, file = probe(compose(words))
    if as_json:
        return strict_json(record, indent=1)
    log(f"written to {short_path(file)}; leaderboards of this model show the noise floor")
    return "\n".join(lines(record))


def probe(config: Config) -> tuple[Record, Path]:
    """Probe the model of a configuration on training images of its data sets.

    Returns:
        The record that is stored, and its file.

    Raises:
        ConfigError: the configuration has several kinds of answers, or they do not include scores for text prompts; or
            nobody confirmed that a remote model may be asked.
        DataError: the model or a data set cannot be read.
        EndpointError: a remote model does not answer, or another one answers.
    """
    if len(config.answers) != 1:
        raise ConfigError(f"answers: probe asks for one kind at a time, found {len(config.answers)}: name one of them")
    (answers,) = config.answers
    card, named = config.model, describe(config.model).identity
    access = answers.granted(card.access)
    if not access.covers(Access.TEXT | Access.LABELS):
        raise ConfigError(f"model {card.name!r} grants {access.label}: probe needs text prompts and labels at least")
    floor = NoiseFloor(features=Differences() if access.covers(Access.FEATURES) else None)
    with tempfile.TemporaryDirectory() as folder, closing(Ledger("sqlite://")) as ledger:
        ledger.open_account("probe", Limits())
        ledger.reserve("memory", "probe", ["probe"], Limits())
        empty = (Path(folder) / str(i) for i in count())
        with _opened(config, ledger, next(empty)) as endpoint:
            box = MeteredBox(LocalPool(endpoint, ledger), "memory", "probe", access, Limits(), answers=answers)
            for images, texts in map(_question, config.datasets):
                measure(floor, box, images, texts, lambda: endpoint.forget(next(empty)))
            # noise that depends on the text hides whether its end has an effect
            noise = math.inf if answers.noise else LEAST_EFFECT + 2 * (floor.features or floor.scores).largest
            end = text_end(box, access, images[:1], noise)
            info = endpoint.info
            sent = sent_line(endpoint.log.total()) if isinstance(endpoint, RemoteEndpoint) else []
    record: Record = {
        "model": card.name,
        "model_digest": info.identity,
        "card_names": named,
        "precision": info.precision,
        "answers": answers.text,
        "access": access.label,
        "transform": info.transform,
        "device": info.device,
        "datasets": [dataset.name for dataset in config.datasets],
        "images": floor.n_images,
        "scores_largest": floor.scores.largest,
        "scores_mean": floor.scores.mean,
        "features_largest": floor.features and floor.features.largest,
        "features_mean": floor.features and floor.features.mean,
        "changed": floor.changed,
        "text_words": end and end.words,
        "longer_texts": None if end is None or end.words is None else "refused" if end.refused else "cut",
        "text_measured": end is not None,
        "sent": sent,
        "torch_version": torch.__version__,
        "farebox_version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return record, noise_floor.write(config.features, record)


@contextmanager
def _opened(config: Config, ledger: Ledger, features: Path) -> Iterator[Endpoint | RemoteEndpoint]:
    """Open the model's endpoint. A remote one takes texts of any length: the server itself refuses or cuts them.

    It is identified by the records of its sweeps; the answers to the questions are recorded elsewhere (`forget`).
    """
    card = config.model
    if card.http is None:
        yield Endpoint(card, features)
        return
    if config.offline:
        raise ConfigError("offline=true: probe compares new answers, and nothing may be sent: leave it out")
    check_price(config)
    refuse_unconfirmed(config)
    ledger.money.open("memory", "probe", config.usd)
    wallet = LedgerWallet(ledger.money, "memory") if costs_money(config) else None
    whole = replace(card, http=replace(card.http, max_text=None))
    endpoint = RemoteEndpoint(whole, config.records, wallet=wallet)
    try:
        yield endpoint
    finally:
        endpoint.close()


def _question(card: DatasetCard) -> tuple[Images, list[str]]:
    """Return training images and prompts of a data set, evenly spaced over its rows and its classes."""
    source = check_card(card).source
    rows, names = source.rows_of("train"), source.classnames
    images = Images.plain(source, "train", rows[_spaced(len(rows), N_IMAGES)], card.augment)
    return images, [card.template.format(names[i]) for i in _spaced(len(names), N_PROMPTS)]


def _spaced(n: int, most: int) -> np.ndarray:
    return np.unique(np.linspace(0, n - 1, min(n, most)).astype(np.int64))


def lines(record: Record) -> Iterator[str]:
    """Yield a record as lines of text."""
    same = record["model_digest"] == record["card_names"]
    yield f"model {record['model']}: {record['model_digest']} ({'as' if same else 'NOT as'} its card names it)"
    yield f"answers: {record['answers']}; access {record['access']}; {record['precision']} on {record['device']}"
    for name in ("scores", "features"):
        if record[f"{name}_largest"] is None:
            yield f"{name}: not granted"
        else:
            largest, mean = record[f"{name}_largest"], record[f"{name}_mean"]
            yield f"{name}: equal questions differ by at most {largest:.3g}, by {mean:.3g} on average"
    yield from record["sent"]
    share = record["changed"] / record["images"]
    yield f"predicted class: changes for {record['changed']} of {record['images']} images ({share:.1%})"
    words, longer = record["text_words"], record["longer_texts"]
    if not record["text_measured"]:
        yield "long texts: not measured, as these answers do not show the effect of a word"
    elif words is None:
        yield f"long texts: their last word has an effect up to {MOST_WORDS:,} words"
    elif longer == "refused":
        yield f"long texts: refused beyond {words} words"
    else:
        yield f"long texts: only the first {words} words have an effect"
