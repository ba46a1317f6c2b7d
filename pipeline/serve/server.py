"""The server: its socket, its model, and the loop that answers until it is stopped."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
from asyncio.transports import BaseTransport
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeline.cards import ModelCard
from pipeline.errors import ConfigError
from pipeline.serve.app import TRANSPORT, App
from pipeline.serve.faults import FaultOptions, Faults
from pipeline.serve.service import Service

LOOPBACK = ("127.0.0.1", "::1", "localhost")
"""Hosts that other machines cannot reach."""
MAX_CONNECTIONS = 256
"""Maximum number of open connections; further ones are answered with 503."""
STOP_S = 5
"""Seconds in which requests under way are answered when the server stops."""


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What to serve, and where."""

    card: ModelCard
    host: str = "127.0.0.1"
    port: int = 5000
    """0: any free port."""
    token: str | None = field(default=None, repr=False)
    """The token that clients send; None: no token."""
    threads: int = 1
    """CPU threads of the model."""
    faults: FaultOptions = field(default_factory=FaultOptions)


def check_options(options: ServeOptions) -> None:
    """Check what can be checked before the model is loaded.

    Raises:
        ConfigError: the model is not one of this machine, or other machines could use the service without a token.
    """
    card, token = options.card, options.token
    if card.kind not in ("fake", "embedded", "open_clip"):
        raise ConfigError(f"model={card.name}: expected a model of this machine, and its card is of kind {card.kind!r}")
    if token is not None and not (token.isascii() and token.isprintable() and token.strip() == token and token):
        raise ConfigError("FAREBOX_SERVE_TOKEN: expected printable ASCII characters without spaces around them")
    if options.host not in LOOPBACK and token is None:
        raise ConfigError(
            f"host={options.host}: other machines could use the service: set a token in the environment variable "
            "FAREBOX_SERVE_TOKEN, or leave host out to serve this machine only"
        )


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to this address.

    Raises:
        ConfigError: the port is in use or not allowed, or the host is not an address of this machine.
    """
    try:
        (family, _, _, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"host={host}: {error.strerror}: expected an address of this machine") from error
    server = socket.socket(family)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that just ended do not count
    try:
        server.bind(address)
        server.listen(MAX_CONNECTIONS)
    except OSError as error:
        server.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} is in use: name another, as port={port + 1}") from error
        raise ConfigError(f"host={host} port={port} cannot be used ({error.strerror})") from error
    return server


class _Protocol(H11Protocol):
    """HTTP/1.1, with the connection's transport in the state of its requests."""

    def connection_made(self, transport: BaseTransport) -> None:
        """Keep the transport."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self.app_state = {**self.app_state, TRANSPORT: transport}


class _Server(uvicorn.Server):
    """A server whose signals are handled by `serve`: uvicorn would raise them again when it has stopped."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals as they are."""
        yield


class Server:
    """A service on a socket. `stop` may be called from another thread."""

    def __init__(self, options: ServeOptions) -> None:
        check_options(options)
        self.options, self.socket = options, listen(options.host, options.port)
        self._server: _Server | None = None
        self._stopped = False

    @property
    def url(self) -> str:
        """The address of the service."""
        host, port = self.socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def stop(self) -> None:
        """Answer the requests under way, and end."""
        self._stopped = True
        if self._server is not None:
            self._server.should_exit = True

    async def serve(self, ready: Callable[[Service], None]) -> None:
        """Load the model, call `ready`, and answer until the server is stopped.

        Raises:
            ConfigError, DataError: the model cannot be loaded.
        """
        options = self.options
        with contextlib.closing(self.socket):
            service = Service(options.card.name, Faults(options.faults), options.threads)
            await service.load(options.card)
            self._server = _Server(
                uvicorn.Config(
                    App(service, options.token).asgi,
                    http=_Protocol,
                    ws="none",
                    lifespan="off",
                    log_level="error",
                    access_log=False,
                    proxy_headers=False,
                    server_header=False,
                    limit_concurrency=MAX_CONNECTIONS,
                    timeout_graceful_shutdown=STOP_S,
                )
            )
            if not self._stopped:
                ready(service)
                await self._server.serve([self.socket])


def serve(server: Server, ready: Callable[[Service], None]) -> None:
    """Serve until SIGINT or SIGTERM; see Server.serve. It must run in the main thread."""

    async def until_stopped() -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, server.stop)
        await server.serve(ready)

    asyncio.run(until_stopped())
