"""Facts of a model that are known before its weights are loaded, and their copies on disk.

Importing open_clip takes several seconds. So what it tells of a weights file is written to the cache folder. The name
of a copy is the digest of everything that it depends on, and a copy is never changed: an edited card, weights file or
module, or another version of a package, has a copy of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.cards import EMBEDDED, ModelCard
from pipeline.data.file_keys import cache_folder
from pipeline.errors import DamagedFile, StorageError
from pipeline.files import file_stamp, read_sealed_json, sealed_json, strict_json, verified, write_atomic
from pipeline.source_code import driver_code

PACKAGES = ("open_clip_torch", "torch", "torchvision", "timm", "safetensors", "ftfy", "regex")
"""Packages that the facts may depend on."""


@dataclass(frozen=True)
class ModelFacts:
    """Facts of a model that are known before its weights are loaded."""

    card: ModelCard
    """The card, with the access that its text tower can grant and the digest of its local weights."""
    identity: str
    """Name of the weights with every change made to them; part of trial ids, rows and cache keys."""
    feature_dim: int
    """Width of the joint embedding space."""
    transform: str
    """Name of the input rule, as in result rows."""
    rule: str = ""
    """The input rule and the activation in one line, for the user."""
    notes: tuple[str, ...] = ()
    """Lines for the user on what was changed, skipped or assumed."""
    withheld: tuple[str, ...] = ()
    """Those of the notes that are about access which the card grants and the network cannot give."""
    context_length: int | None = None
    """Maximum number of tokens of a prompt, start and end included; None for no maximum."""


def stored_facts(card: ModelCard) -> ModelFacts | None:
    """Return the facts of a card whose weights are a file on this machine, if they have a copy on disk.

    Raises:
        DataError: the file belongs to the package, and is damaged.
    """
    path = _weights_file(card)
    record = recall("facts", _described(card, path)) if path else None
    if path is None or record is None:
        return None
    if card.kind == "embedded":
        verified(path)
    record["card"] = dataclasses.replace(card, **record["card"])
    return ModelFacts(**record | {key: tuple(record[key]) for key in ("notes", "withheld")})


def store_facts(card: ModelCard, facts: ModelFacts) -> None:
    """Write a copy of the facts of a card; none if its weights are a tag, which open_clip's cache may hold or not."""
    path = _weights_file(card)
    if path and facts.card.weights_sha256:
        changed = {"grant": facts.card.grant, "weights_sha256": facts.card.weights_sha256}
        remember("facts", _described(card, path), asdict(facts) | {"card": changed})


def recall(kind: str, key: Any) -> dict[str, Any] | None:
    """Return the record that was written for this key, which is any value that JSON can hold."""
    try:
        return read_sealed_json(_copy(kind, key))
    except (OSError, DamagedFile):
        return None


def remember(kind: str, key: Any, record: dict[str, Any]) -> None:
    """Write a record for `recall`, if the cache folder can be written."""
    with contextlib.suppress(StorageError):
        write_atomic(_copy(kind, key), sealed_json(record))


def _copy(kind: str, key: Any) -> Path:
    text = strict_json([kind, key, _versions(), driver_code().digest])
    return cache_folder() / "models" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def _weights_file(card: ModelCard) -> Path | None:
    if card.kind not in ("embedded", "open_clip"):
        return None
    path = EMBEDDED / card.weights if card.kind == "embedded" else Path(card.weights)
    return path.absolute() if path.is_file() else None


def _described(card: ModelCard, path: Path) -> list[Any]:
    return [asdict(card), str(path), *file_stamp(path)]


@cache
def _versions() -> tuple[str, ...]:
    found = []
    for package in PACKAGES:
        try:
            found.append(version(package))
        except PackageNotFoundError:
            found.append("")
    return tuple(found)
