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
from pipeline.errors import ConfigError
from pipeline.remote.endpoint import RemoteEndpoint, secret
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


def refuse_unconfirmed(config: Config) -> None:
    """Check that a remote endpoint may be asked, before anything is reserved or sent.

    Raises:
        ConfigError: the environment has no key, or nobody confirmed that data may be sent to another machine.
    """
    http = config.model.http
    if http is None or config.offline:
        return
    secret(http)
    if not (http.loopback or config.spend or config.usd is not None):
        raise ConfigError(
            f"model {config.model.name} sends images and texts to {http.host}, which may cost money: add --spend, or "
            "budget.usd=AMOUNT, to allow it (farebox plan prints how much is sent)"
        )


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
