"""The HTTP interface of the service: routes, authorisation, limits on bodies, errors as JSON, and faults."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from pipeline.serve import wire
from pipeline.serve.answers import RecentAnswers
from pipeline.serve.service import RETRY_AFTER_S, Service
from pipeline.serve.wire import ServiceError

MAX_BODIES = 4 * wire.MAX_BODY
"""Maximum size in bytes of all bodies in memory."""
TRANSPORT = "transport"
"""Key of a connection's transport in the state of its requests."""

log = logging.getLogger(__name__)

Compute = Callable[[dict[str, Any], int], Awaitable[dict[str, Any]]]


class App:
    """The routes of a service."""

    def __init__(self, service: Service, token: str | None) -> None:
        self.service, self.token = service, token
        self.answers, self._held = RecentAnswers(), 0
        computed: dict[str, Compute] = {
            "image_features": service.image_features,
            "text_features": service.text_features,
            "scores": service.scores,
            "embeddings": service.embeddings,
        }
        routes = [Route(f"/v1/{kind}", self._posted(kind, run), methods=["POST"]) for kind, run in computed.items()]
        routes += [Route("/v1/info", self._info, methods=["GET"]), Route("/v1/count", self._count, methods=["GET"])]
        handlers: dict[Any, Any] = {ServiceError: self._refused, HTTPException: _no_route, Exception: _failed}
        self.asgi = Starlette(routes=routes, exception_handlers=handlers)

    def _authorise(self, request: Request) -> None:
        if self.token is None:
            return
        expected = f"Bearer {self.token}".encode()
        if not hmac.compare_digest(request.headers.get("authorization", "").encode("utf-8", "replace"), expected):
            raise ServiceError(401, "unauthorised", "expected the header Authorization: Bearer TOKEN")

    async def _info(self, request: Request) -> Response:
        self._authorise(request)
        self.service.faults.refuse_if_down()
        self.service.counts["info"] += 1
        return _json(self.service.info())

    async def _count(self, request: Request) -> Response:
        self._authorise(request)
        return _json({"answered": dict(self.service.counts), "faults": dict(self.service.faults.made)})

    async def _refused(self, _: Request, error: Exception) -> Response:
        assert isinstance(error, ServiceError)
        self.service.counts["refused"] += 1
        headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return _json(error.record, error.status, headers)

    def _posted(self, kind: str, compute: Compute) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            self._authorise(request)
            body = await self._body(request)
            try:
                number = self.service.faults.arrive()
                content = await self._content(request, kind, compute, body, number)
            finally:
                self._held -= len(body)
            return await self._sent(request, content, number)

        return answer

    async def _body(self, request: Request) -> bytes:
        """Return the body; its size counts as held. Raises ServiceError (413, 503) if it is too large."""
        too_large = ServiceError(413, "too_large", f"the body is larger than {wire.MAX_BODY // 2**20} MiB: send fewer")
        stated = request.headers.get("content-length", "0")
        if not stated.isascii() or not stated.isdigit() or int(stated) > wire.MAX_BODY:
            raise too_large
        parts, size = list[bytes](), 0
        try:
            async for part in request.stream():
                size += len(part)
                self._held += len(part)
                if size > wire.MAX_BODY:
                    raise too_large
                if self._held > MAX_BODIES:
                    raise ServiceError(503, "busy", "too many requests at a time", RETRY_AFTER_S)
                parts.append(part)
        except BaseException:
            self._held -= size
            raise
        return b"".join(parts)

    async def _content(self, request: Request, kind: str, compute: Compute, body: bytes, number: int) -> bytes:
        async def computed() -> bytes:
            answer = await compute(await asyncio.to_thread(wire.parse_body, body), number)
            return await asyncio.to_thread(lambda: json.dumps(answer).encode())

        key = request.headers.get("idempotency-key")
        content, known = await self.answers.get(key, kind.encode() + b"\n" + body, computed)
        self.service.counts["repeated" if known else kind] += 1
        return content

    async def _sent(self, request: Request, content: bytes, number: int) -> Response:
        """Return the response, after the faults of this request."""
        faults = self.service.faults
        if faults.active and faults.options.slow_s:
            await asyncio.sleep(faults.options.slow_s)
        if faults.drops(number):
            return _CutOff()
        if faults.truncates(number):
            return _CutOff(content)
        return Response(content, media_type="application/json")


class _CutOff(Response):
    """The first half of a response with this content (nothing without one), and the end of the connection."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write to the connection itself, since a server would complete the response."""
        transport: asyncio.Transport = scope["state"][TRANSPORT]
        if self.body:
            head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(self.body)}\r\n\r\n"
            transport.write(head.encode() + bytes(self.body[: len(self.body) // 2]))
        transport.close()
        while (await receive())["type"] != "http.disconnect":
            pass


def _json(record: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(record), status, headers, media_type="application/json")


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:80]}: {error.detail}"
    return _json(ServiceError(error.status_code, "no_route", message).record, error.status_code)


async def _failed(_: Request, error: Exception) -> Response:
    """Answer an unexpected error without its text, which may have parts of a request."""
    log.error("a request failed: %s", type(error).__name__)
    return _json(ServiceError(500, "internal", f"an unexpected error ({type(error).__name__})").record, 500)
