"""A pool without Ray: one endpoint and one ledger in this process, for notebooks and tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np

from pipeline.blackbox.endpoint import ModelInfo, Request, Response
from pipeline.errors import BudgetExceeded, FareboxError
from pipeline.ledger.ledger import Ledger


class Answering(Protocol):
    """An `Endpoint`, or something that passes calls on to one."""

    @property
    def info(self) -> ModelInfo:
        """The model's constants."""
        ...

    def check(self, request: Request) -> None:
        """Refuse what cannot or may not be answered."""
        ...

    def compute(self, request: Request) -> Response:
        """The answer."""
        ...

    def embed_text(self, text: str) -> np.ndarray:
        """[L, E]"""
        ...


class LocalPool:
    """Answers as the Ray replicas do (pool.py): same checks, same charges, same bits."""

    def __init__(self, endpoint: Answering, ledger: Ledger) -> None:
        self.endpoint, self.ledger = endpoint, ledger
        self.info = endpoint.info

    def send(self, request: Request) -> Response:
        """Check, charge, compute. Raises BudgetExceeded when the charge is refused."""
        self.endpoint.check(request)
        paid = self.ledger.charge([request.charge])[0]
        if isinstance(paid, BudgetExceeded):
            raise paid
        try:
            answer = self.endpoint.compute(request)
        except FareboxError:
            if paid.status != "replayed":  # definitely not computed: the one case in which money goes back
                self.ledger.refund([paid.id])
            raise
        return replace(answer, status=paid.status)

    def embed_text(self, text: str) -> np.ndarray:
        """[L, E]"""
        return self.endpoint.embed_text(text)
