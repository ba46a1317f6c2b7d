"""What a run records of its local model."""

from __future__ import annotations

from typing import NamedTuple

from pipeline.cards import LocalCard


class LocalFacts(NamedTuple):
    """A local model that a trial uses, with what its rows record."""

    card: LocalCard
    digest: str
    """Digest of the architecture, the weights and the input rule; part of the trial id."""
    params: int
    """Number of parameters of the encoder."""
    note: str
    """Line for the user: what the model is and what it was trained on."""
