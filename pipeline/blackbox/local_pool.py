"""A pool without Ray, for notebooks and tests: one endpoint and one ledger in this process."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np

from pipeline.blackbox.request import ModelInfo, Request, Response
from pipeline.errors import EndpointLost, FareboxError, unwrap
from pipeline.ledger.ledger import Ledger


class EndpointLike(Protocol):
    """An `Endpoint`, an object that forwards calls to one, or a client of a remote one."""

    @property
    def info(self) -> ModelInfo:
        """The model's constants."""
        ...

    def check(self, request: Request) -> None:
        """See Endpoint.check."""
        ...

    def compute(self, request: Request) -> Response:
        """See Endpoint.compute."""
        ...

    def embed_text(self, text: str) -> np.ndarray:
        """See Endpoint.embed_text."""
        ...


class LocalPool:
    """Sends requests to an endpoint in this process, with the checks, charges and results of the Ray replicas."""

    def __init__(self, endpoint: EndpointLike, ledger: Ledger) -> None:
        self.endpoint, self.ledger = endpoint, ledger
        self.info = endpoint.info

    def send(self, request: Request) -> Response:
        """Check, charge and compute a request.

        Raises:
            BudgetExceeded: the charge is refused; nothing is computed.
            FareboxError: an error of the endpoint or the ledger. A call that was not computed is refunded.
        """
        self.endpoint.check(request)
        receipt = unwrap(self.ledger.charge([request.charge])[0])
        try:
            response = self.endpoint.compute(request)
        except EndpointLost:  # a remote endpoint may have computed it: the charge stays
            raise
        except FareboxError:
            if receipt.status != "replayed":
                self.ledger.refund([receipt.id])
            raise
        return replace(response, status=receipt.status)

    def embed_text(self, text: str) -> np.ndarray:
        """Return the token embeddings [L, E] of a text; free."""
        return self.endpoint.embed_text(text)
