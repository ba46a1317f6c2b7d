"""Open the endpoint of a run: a local model, or a remote one that the user allowed to be asked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.local_pool import EndpointLike
from pipeline.cards import ModelCard
from pipeline.config.compose import Config
from pipeline.remote.endpoint import RemoteEndpoint
from pipeline.remote.permission import refuse_unconfirmed
from pipeline.remote.wallet import Wallet


@dataclass(frozen=True)
class RemoteFactory:
    """Makes a remote endpoint in the process of a replica."""

    records: Path
    storage: Path
    offline: bool
    wallet: Wallet | None = None

    def __call__(self, card: ModelCard, features: Path) -> EndpointLike:
        """Return the endpoint. It stores no image features: its answers are recorded."""
        return RemoteEndpoint(card, self.records, self.storage, self.offline, self.wallet)


@contextlib.contextmanager
def opened_endpoint(config: Config, storage: Path | None, wallet: Wallet | None = None) -> Iterator[EndpointLike]:
    """Open the endpoint of a run in this process.

    Args:
        config: the composed configuration.
        storage: folder of the log of HTTP calls; None to keep it in memory.
        wallet: pays in money for what is sent; None: nothing is paid.

    Raises:
        ConfigError: see `refuse_unconfirmed`.
    """
    if config.model.http is None:
        yield Endpoint(config.model, config.features)
        return
    refuse_unconfirmed(config)
    endpoint = RemoteEndpoint(config.model, config.records, storage, config.offline, wallet)
    try:
        yield endpoint
    finally:
        endpoint.close()
