"""Facts of a model before a run: of a remote one from its card, since nothing is sent; of any other from its files."""

from __future__ import annotations

from pipeline.blackbox import architecture
from pipeline.blackbox import facts as local
from pipeline.blackbox.facts import ModelFacts
from pipeline.cards import ModelCard


def describe(card: ModelCard, fetch: bool = False) -> ModelFacts:
    """Return what is known of a model without asking it; see `blackbox.facts.describe`."""
    http = card.http
    if http is None:
        return local.describe(card, fetch)
    where = f"answers come from {http.host} ({http.adapter}), images are sent as {http.transform}"
    return ModelFacts(card, http.model_identity, http.feature_dim, http.transform, rule=where)


def feature_dim(card: ModelCard) -> int:
    """Return the width of the features; 0 for a remote model that gives none."""
    return card.http.feature_dim if card.http is not None else local.feature_dim(card)


def missing(card: ModelCard) -> tuple[str, str] | None:
    """Return what is missing on this machine and where it is published; None if nothing is."""
    return None if card.http is not None else architecture.missing(card)
