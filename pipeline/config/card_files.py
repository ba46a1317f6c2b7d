"""Read the cards of models and data sets, and check their values."""

from __future__ import annotations

import dataclasses
import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

from pipeline.cards import AUGMENTATIONS, BITS, DatasetCard, LocalCard, ModelCard, check_model
from pipeline.config import answers, typed_values
from pipeline.config import values as checks
from pipeline.config.files import Kind, file_of, load
from pipeline.config.http_card import HTTP_KEYS, UNUSED_KEYS, http_card
from pipeline.data.layouts.registry import LAYOUTS
from pipeline.errors import ConfigError, did_you_mean

MODEL_KINDS = ("fake", "embedded", "open_clip", "http")
PROSE = frozenset(("licence", "source", "url", "citation", "note", "trained_on"))
"""Keys of cards whose text may have several lines."""


def model_card(name: str) -> ModelCard:
    """Read the card of a model.

    Args:
        name: The name of a file in conf/model, or the path of another card, as in model=my/model.yaml.

    Raises:
        ConfigError: There is no such card, or one of its values is wrong.
    """
    card: ModelCard = _read(ModelCard, "model", name)
    check_model(card)
    return card


def dataset_card(name: str, root: str | None = None) -> DatasetCard:
    """Read the card of a data set.

    Args:
        name: The name of a file in conf/dataset, or the path of another card, as in datasets=my/data.yaml.
        root: Folder that a relative path in the card is resolved against. Default: $FAREBOX_DATA.

    Raises:
        ConfigError: There is no such card, or one of its values is wrong.
    """
    card: DatasetCard = _read(DatasetCard, "dataset", name)
    checks.one_of(f"{card.name}: augment", card.augment, tuple(AUGMENTATIONS))
    checks.one_of(f"{card.name}: layout", card.layout, tuple(LAYOUTS))
    checks.one_of(f"{card.name}: test_split", card.test_split, ("", "val"))
    checks.one_of(f"{card.name}: duplicates", card.duplicates, ("", "allow"))
    if card.bits is not None and card.bits not in BITS:
        raise ConfigError(f"{card.name}: bits={card.bits}: expected a whole number from {BITS[0]} to {BITS[-1]}")
    for template in (card.template, *card.templates):
        if template.count("{}") != 1:
            raise ConfigError(f"{card.name}: template {template!r}: expected one {{}} where the class name goes")
    if isinstance(card.classnames, str):
        lines = checks.lines(f"{card.name}: classnames", file_of("dataset", name).parent / card.classnames)
        card = dataclasses.replace(card, classnames=lines)
    if card.layout == "parquet":
        if not card.sha256 or card.classnames:
            problem = "has no sha256" if not card.sha256 else "has classnames, which the file itself contains"
            raise ConfigError(f"{card.name}: layout parquet {problem}: see docs/data.md, or use layout table")
        return card
    root = root or os.environ.get("FAREBOX_DATA")
    if not root:
        return card
    return dataclasses.replace(card, path=str(typed_values.path("data.root", root).absolute() / card.path))


def local_card(name: str) -> LocalCard:
    """Read the card of a local model.

    Args:
        name: The name of a file in conf/local, or the path of another card, as in local=my/encoder.yaml.

    Raises:
        ConfigError: There is no such card, or one of its values is missing or wrong.
    """
    card: LocalCard = _read(LocalCard, "local", name)
    for key in ("arch", "weights", "licence", "trained_on"):
        if not getattr(card, key).strip():
            raise ConfigError(f"local model {card.name!r}: {key} is empty: state it in its card (docs/models.md)")
    if not re.fullmatch("[0-9a-f]{64}", card.sha256):
        raise ConfigError(
            f"local model {card.name!r}: sha256: {card.sha256[:70]!r}: expected 64 hexadecimal digits (sha256sum FILE)"
        )
    return card


def _read(cls: type[Any], kind: Kind, name: str) -> Any:
    """Return a card with each value converted to the type of its field."""
    data = load(kind, name)
    file = file_of(kind, name)
    known = {f.name for f in dataclasses.fields(cls)} - {"card_file", "http"}
    http = None
    if cls is ModelCard:
        if data.get("kind") is None:
            raise ConfigError(f"{file}: kind: missing: expected one of {', '.join(MODEL_KINDS)}")
        checks.one_of(f"{file}: kind", str(data["kind"]), MODEL_KINDS)
    if cls is ModelCard and data.get("kind") == "http":
        own = {key: data.pop(key) for key in list(data) if key in HTTP_KEYS}
        http, known = http_card(str(file), own, data), (known | HTTP_KEYS) - UNUSED_KEYS
    for key in data:
        if key not in known:
            raise ConfigError(f"{file}: " + did_you_mean("key", key, known))
    hints = get_type_hints(cls)
    names_file = data.pop("classnames") if isinstance(data.get("classnames"), str) else None
    if cls is ModelCard and "answers" in data:
        data["answers"] = answers.of_value(f"{file}: answers", data["answers"])
    for key, value in data.items():
        convert = typed_values.prose if key in PROSE else typed_values.of_type
        data[key] = convert(f"{file}: {key}", value, hints[key])
    if names_file is not None:
        data["classnames"] = checks.text("classnames", names_file)
    data["name"] = checks.card_name(f"{file}: name", file.stem if data.get("name") is None else data["name"])
    further: dict[str, Any] = {"card_file": str(file)} if cls is DatasetCard else {}
    if cls is ModelCard:
        further["http"] = http
    try:
        return cls(**data, **further)
    except TypeError as error:
        raise ConfigError(f"{file}: {error}") from error


def refuse_same_names(*groups: Sequence[DatasetCard]) -> None:
    """Check that no two cards of a run have the same name: rows, draws and predictions are stored by name.

    Names that differ only in case or in Unicode form count as the same. One card may be in several groups (fitted
    sets, shift sets, transfer sets), but only once in each.

    Raises:
        ConfigError: Two cards have the same name, or one card is listed twice in a group.
    """
    files: dict[str, str] = {}
    for group in groups:
        listed = set[str]()
        for card in group:
            key, file = unicodedata.normalize("NFC", card.name).casefold(), str(Path(card.card_file).resolve())
            if file in listed:
                raise ConfigError(f"data set {card.name!r} is listed twice: {card.card_file}")
            listed.add(file)
            if files.setdefault(key, file) != file:
                raise ConfigError(
                    f"two data sets are named {card.name!r}: {files[key]} and {file}; change the `name:` of one card"
                )
