"""Facts of a model before a run: of a remote one from its card, since nothing is sent; of any other from its files.

Modules that import torch and open_clip are imported only if these facts are not on disk already.
"""

from __future__ import annotations

from pipeline.blackbox.model_facts import ModelFacts, store_facts, stored_facts
from pipeline.cards import ModelCard


def describe(card: ModelCard, fetch: bool = False) -> ModelFacts:
    """Return what is known of a model without asking it; see `blackbox.facts.describe`."""
    http = card.http
    if http is not None:
        where = f"answers come from {http.host} ({http.adapter}), images are sent as {http.transform}"
        return ModelFacts(card, http.model_identity, http.feature_dim, http.transform, rule=where)
    if stored := stored_facts(card):
        return stored
    from pipeline.blackbox.facts import describe as described

    facts = described(card, fetch)
    store_facts(card, facts)
    return facts


def feature_dim(card: ModelCard) -> int:
    """Return the width of the features; 0 for a remote model that gives none."""
    if card.http is not None:
        return card.http.feature_dim
    from pipeline.blackbox import facts

    return facts.feature_dim(card)


def missing(card: ModelCard) -> tuple[str, str] | None:
    """Return what is missing on this machine and where it is published; None if nothing is."""
    if card.http is not None or stored_facts(card):
        return None
    from pipeline.blackbox import architecture

    return architecture.missing(card)
