"""What a remote model needs before it is asked: a key, and the user's confirmation."""

from __future__ import annotations

import os

from pipeline.cards import HttpCard
from pipeline.config.compose import Config
from pipeline.errors import ConfigError


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


def secret(card: HttpCard) -> str:
    """Return the key of a card's `auth`, from the environment; empty without `auth`.

    Raises:
        ConfigError: the environment has none, or it cannot be part of a header.
    """
    if card.auth is None:
        return ""
    key = os.environ.get(card.auth.env, "")
    if not key:
        raise ConfigError(f"{card.host} needs a key: set the environment variable {card.auth.env} (auth in its card)")
    if not key.isascii() or not key.isprintable() or key != key.strip():
        raise ConfigError(f"the environment variable {card.auth.env} has characters that no key has, such as a newline")
    return key
