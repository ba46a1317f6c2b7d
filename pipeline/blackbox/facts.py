"""Describe a model before its weights are loaded, and load them.

`describe` runs in the driver before Ray starts, `load_network` in a replica. Both read the file in the same way, so
that the description that the user sees is that of the loaded model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from methods._toy import ToyTowers
from methods.base import Access
from pipeline.blackbox import architecture, lora
from pipeline.blackbox.architecture import KnownFile
from pipeline.blackbox.checkpoint_files import StoredWeights, read_weights, weights_digest
from pipeline.blackbox.model_facts import ModelFacts
from pipeline.blackbox.text_tower import fits
from pipeline.blackbox.weights import fit_weights
from pipeline.cards import ModelCard
from pipeline.data.images import Preprocess
from pipeline.errors import DataError, one_line
from pipeline.files import file_stamp

TOY_TRANSFORM = "grey8"
"""Name of the input rule of the toy model."""


def describe(card: ModelCard, fetch: bool = False) -> ModelFacts:
    """Check a card and its weights file, if that is on this machine, without loading the weights.

    The network is built on the meta device, and the keys and shapes of the file are compared with it.

    Args:
        card: the model.
        fetch: download the weights of a tag when they are not in the cache.

    Raises:
        ConfigError: the card is wrong. The message has one line.
        DataError: the weights file is missing or wrong. The message has one line.
    """
    if card.kind == "fake":
        return ModelFacts(card, "fake-1", feature_dim(card), TOY_TRANSFORM)
    architecture.configuration(card)
    path = architecture.local_file(card)
    if path is None:
        architecture.quick_gelu(card)  # raises for a tag of the other activation before it is downloaded
        cached = architecture.cached_file(architecture.tag_settings(card.arch, card.weights))
        path = _fetched(card) if fetch else cached
    return _describe(card, path, *(file_stamp(path) if path else ()))


@lru_cache(maxsize=32)
def _describe(card: ModelCard, path: Path | None, *_stamp: int) -> ModelFacts:
    plan = _plan(card, path)
    net = architecture.build(card, plan.quick_gelu, torch.device("meta"))
    notes = list(_fitted(card, net, path, plan, values=False)[1]) if path else []
    if card.kind == "embedded":
        notes = []  # the package's own file
    identity = _identity(card, plan, notes)
    rule, whose = architecture.input_rule(card, net.visual.image_size, plan.known)
    activation = "QuickGELU" if plan.quick_gelu else "GELU"
    withheld = list[str]()
    own_tokenizer = bool(architecture.configuration(card)["text_cfg"].get("hf_tokenizer_name"))
    if (own_tokenizer or not fits(net, None)) and card.access & (Access.SOFT | Access.LORA):
        names = (card.access & (Access.SOFT | Access.LORA)).label.replace("+", " and ")
        verb = "are" if " " in names else "is"
        withheld.append(f"{names} {verb} not granted: its text tower takes prompts as strings only")
        card = dataclasses.replace(card, grant=without_soft(card.access).label)
    if Access.LORA in card.access and (reason := _no_lora(card, net)):
        withheld.append(f"LORA is not granted: {reason}")
        card = dataclasses.replace(card, grant=(card.access & ~Access.LORA).label)
    own_file = plan.sha256 and card.kind == "open_clip" and plan.known is None
    other = architecture.other_activation(card.arch)
    if own_file and card.quick_gelu is None and other:
        trained = "GELU" if plan.quick_gelu else "QuickGELU (OpenAI's, MetaCLIP's, DFN's)"
        notes.append(f"activation assumed from arch; weights trained with {trained} need arch: {other}")
    return ModelFacts(
        card=dataclasses.replace(card, weights_sha256=plan.sha256 or card.weights_sha256),
        identity=identity,
        feature_dim=feature_dim(card),
        transform=rule.name,
        rule=f"{card.arch}, {activation}; images {rule.summary}: {whose}",
        notes=(*notes, *withheld),
        withheld=tuple(withheld),
        context_length=int(net.context_length),
    )


def feature_dim(card: ModelCard) -> int:
    """Return the width of the joint embedding space, from the architecture's description."""
    return ToyTowers.D if card.kind == "fake" else int(architecture.configuration(card)["embed_dim"])


@dataclass(frozen=True)
class _LoadPlan:
    """How the weights of a card are loaded."""

    sha256: str
    """SHA-256 of a local file; empty for a tag."""
    known: KnownFile | None
    quick_gelu: bool


def _plan(card: ModelCard, path: Path | None) -> _LoadPlan:
    is_tag = architecture.has_tag(card)
    try:
        sha256 = weights_digest(path) if path and (card.weights_sha256 or not is_tag) else ""
    except OSError as error:
        raise DataError(f"model {card.name!r}: cannot read {str(path)!r} ({error.strerror})") from error
    if sha256 and card.weights_sha256 and sha256 != card.weights_sha256.lower():
        raise DataError(
            f"model {card.name!r}: {path} does not have the digest that its card states (it has {sha256[:12]}): "
            "restore the file, or correct weights_sha256"
        )
    if path is None or is_tag:
        return _LoadPlan("", None, architecture.quick_gelu(card))
    known = architecture.known_file(path, sha256)
    openai = card.quick_gelu is None and known is None and _read(card, path, values=False).openai
    return _LoadPlan(sha256, known, architecture.quick_gelu(card, known, openai))


def _identity(card: ModelCard, plan: _LoadPlan, notes: Sequence[str]) -> str:
    """Return the architecture with open_clip's tag, or with the file's digest and the changes made to its weights."""
    changes = list(notes) if plan.sha256 else []
    if card.quick_gelu is not None:
        changes.append(f"quick_gelu={str(card.quick_gelu).lower()}")
    return "; ".join([f"{card.arch}/{plan.sha256 or card.weights}", *changes])


def _read(card: ModelCard, path: Path, values: bool) -> StoredWeights:
    try:
        return read_weights(path) if values else _contents(path, *file_stamp(path))
    except Exception as error:  # torch raises many kinds of errors for damaged files
        raise DataError(f"model {card.name!r}: cannot load {_shown(path)!r}: {one_line(error)}") from error


@lru_cache(maxsize=4)
def _contents(path: Path, *_stamp: int) -> StoredWeights:
    """Read a file's keys, shapes and types. Cached, since verifying a zip archive reads all of it."""
    return read_weights(path, values=False)


def _fitted(
    card: ModelCard, net: Any, path: Path, plan: _LoadPlan, values: bool
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the file's tensors for the network and notes on changes; without `values`, on the meta device."""
    stored = _read(card, path, values)
    try:
        return fit_weights(net, stored, card.arch, plan.known)
    except ValueError as error:
        raise DataError(f"model {card.name!r}: cannot load {_shown(path)!r}: {one_line(error)}") from error


def _shown(path: Path) -> str:
    """Return the path, shortened to its end if it is long."""
    return str(path) if len(str(path)) <= 60 else f".../{path.parent.name[-30:]}/{path.name[-40:]}"


def _no_lora(card: ModelCard, net: Any) -> str:
    """Return why the network of a card cannot be changed; empty if it can."""
    return lora.unsuited(net) or ("" if card.precision == "fp32" else f"gradients need fp32, not {card.precision}")


def without_soft(grant: Access) -> Access:
    """Return the grant of a model whose text tower takes prompts as strings only."""
    full = grant.closure() & ~(Access.SOFT | Access.GRADIENTS | Access.LORA)
    return full & ~(Access.TOPK | Access.LABELS) if Access.SCORES in full else full  # which SCORES implies


def load_network(card: ModelCard, device: torch.device) -> tuple[Any, Preprocess]:
    """Load the card's network on a device; return it with its input rule. Downloads a tag's weights if needed."""
    path = architecture.local_file(card) or _fetched(card)
    plan = _plan(card, path)
    net = architecture.build(card, plan.quick_gelu, device)
    net.load_state_dict(_fitted(card, net, path, plan, values=True)[0])
    return net, architecture.input_rule(card, net.visual.image_size, plan.known)[0]


def _fetched(card: ModelCard) -> Path:
    try:
        return architecture.fetched_file(card)
    except Exception as error:  # hub clients raise many kinds of errors
        raise DataError(f"model {card.name!r}: open_clip cannot fetch {card.weights!r}: {one_line(error)}") from error
