"""Send HTTP calls to a remote endpoint: paid, logged, limited in rate, and repeated by the rules of docs/remote.md.

It is used in one event loop. Nothing that leaves it (messages, logs, errors) has the key.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import Any

import aiohttp
import numpy as np

from pipeline.budget import HttpBill
from pipeline.cards import HttpCard
from pipeline.errors import EndpointBusy, EndpointError, EndpointLost, EndpointRefused, EndpointStopped, one_line
from pipeline.ledger.records import Charge
from pipeline.remote.adapter import Adapter, Call, OtherModel, WrongAnswer, shown
from pipeline.remote.call_log import CallLog, Outcome
from pipeline.remote.limiter import Limiter
from pipeline.remote.wallet import Wallet

SPARE_BYTES = 2**20
"""Size of a response beside its numbers."""
NUMBER_BYTES = 32
"""Most bytes of a number in JSON."""
TEXT_TOKENS = 2
"""Tokens of a text beside those of its bytes: start and end."""
STOPPED = {401: "rejects the key", 403: "forbids the request", 402: "asks for payment: the account is empty"}
REFUSED = (400, 413, 422)
MAY_BE_BILLED = "it may have computed and billed what was sent"


class TooLarge(EndpointRefused):
    """The body of a call is larger than the server takes (413), or than `batch.bytes`, when it was not sent."""

    sent = True


@dataclass(frozen=True)
class Payer:
    """For what a call is sent."""

    request: str
    """The request of a trial in the log, or `call_log.PROBES`."""
    charge: Charge | None = None


@dataclass(frozen=True)
class Reply:
    """What one attempt returned."""

    outcome: Outcome
    status: int = 0
    data: bytes = b""
    headers: Mapping[str, str] | None = None
    problem: str = ""
    """Why there is no response."""
    final: bool = False
    """Whether the problem is the same for every call."""

    @cached_property
    def answer(self) -> Any:
        """The response as JSON, parsed once. Raises ValueError for anything else, and for too many brackets."""
        try:
            return json.loads(self.data)
        except RecursionError as error:
            raise ValueError("too deeply nested") from error


class HttpClient:
    """Sends the calls of an adapter.

    Args:
        card: the endpoint.
        adapter: makes and parses the calls.
        key: secret of the card's `auth`; empty without one.
        wallet: pays in money.
        log: physical bill.
        sleep: replaced by tests.
    """

    def __init__(
        self,
        card: HttpCard,
        adapter: Adapter,
        key: str,
        wallet: Wallet,
        log: CallLog,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.card, self.adapter, self.wallet, self.log, self.sleep = card, adapter, wallet, log, sleep
        self._key = key
        self.limiter = Limiter(card.rate)
        self.sent = 0
        """Calls that were sent in this run."""
        self.stopped: EndpointStopped | None = None
        """Why nothing more is sent."""
        self._session: aiohttp.ClientSession | None = None

    async def send(self, call: Call, payer: Payer) -> np.ndarray:
        """Send a call, again where the card's `retry` says so, and return what the adapter parsed.

        Raises:
            EndpointStopped: no call can succeed; all later ones raise the same.
            EndpointRefused: the server rejects what was sent (`TooLarge`: its size).
            EndpointBusy: the server did not answer, and computed nothing.
            EndpointLost: it did not answer, and may have computed and billed a call.
            BudgetExceeded: the wallet does not allow the call.
        """
        try:
            return await self._send(call, payer)
        except EndpointStopped as error:
            self.stopped = self.stopped or error
            raise

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    async def _send(self, call: Call, payer: Payer) -> np.ndarray:
        body = b"" if call.body is None else json.dumps(call.body, ensure_ascii=False).encode()
        if len(body) > self.card.batch.bytes:
            error = TooLarge(f"a call has {len(body):,} bytes, batch.bytes allows {self.card.batch.bytes:,}")
            error.sent = False
            raise error
        # A probe has a key of its own each time: a server that honours keys would repeat its former answer.
        sender = payer.charge.id if payer.charge else f"probe/{time.time_ns()}"
        key = f"{sender}/{hashlib.sha256(body).hexdigest()[:16]}"
        waited_s, uncertain, reply = 0.0, False, Reply("unsent")
        for attempt in range(self.card.retry.tries):
            if attempt:
                try:
                    waited_s = await self._wait(reply, key, attempt)
                except EndpointBusy as error:
                    raise EndpointLost(f"{error}; {MAY_BE_BILLED}") if uncertain else error from None
            reply = await self._attempt(call, body, key, payer, attempt, waited_s)
            if reply.outcome == "answered":
                try:
                    return self._parsed(call, reply)
                except ValueError:  # a body that was cut off, with a status of success
                    reply = Reply("lost", reply.status, problem="its response is no JSON")
            uncertain = uncertain or reply.outcome == "lost"
            self._raise_final(call, reply)
        tried = f"{self.card.host} did not answer in {self.card.retry.tries} tries: {self._cause(reply)}"
        if uncertain:
            raise EndpointLost(f"{tried}; {MAY_BE_BILLED}; the same command continues")
        raise EndpointBusy(f"{tried}; the same command continues")

    async def _attempt(self, call: Call, body: bytes, key: str, payer: Payer, attempt: int, waited_s: float) -> Reply:
        """Pay, log and send a call once."""
        price = self.card.price
        tokens = call.characters + TEXT_TOKENS * call.texts + (price.tokens_per_image * call.images if price else 0)
        waited_s += await self.limiter.take(call.images, tokens)
        if self.stopped is not None:
            raise self.stopped
        upper = price.micro_usd(1, call.images, tokens) if price else 0
        call_id = f"{key}/{self.log.times(key)}"
        await self.wallet.pay(payer.charge, call_id, upper)
        retries = int(attempt > 0)
        bill = HttpBill(
            1, call.images, call.texts, len(body), retries=retries, waited_s=round(waited_s, 3), micro_usd=upper
        )
        number = self.log.sent(payer.request, key, bill)
        self.sent += 1
        reply = await self._exchange(call, body, key)
        used, cost = 0, 0
        if reply.outcome == "answered":
            used = self._tokens(reply)
            cost = price.micro_usd(1, call.images, used or tokens) if price else 0
        elif reply.outcome == "lost":
            used, cost = tokens, upper
        self.limiter.used(tokens, used or tokens)
        self.log.ended(
            number, reply.outcome, reply.status, used if reply.outcome == "answered" else 0, min(cost, upper)
        )
        await self.wallet.settle(call_id, min(cost, upper))
        return reply

    async def _exchange(self, call: Call, body: bytes, key: str) -> Reply:
        """Send a call once and read its response."""
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        if self.adapter.honours_keys:
            headers["Idempotency-Key"] = key
        auth = self.card.auth
        if auth is not None and self._key:
            headers[auth.header] = auth.prefix + self._key
        if call.body is not None:
            headers["Content-Type"] = "application/json"
        method, url = ("GET" if call.body is None else "POST"), self.card.url.rstrip("/") + call.path
        most = SPARE_BYTES + NUMBER_BYTES * call.numbers
        try:
            async with self._opened().request(
                method, url, data=body or None, headers=headers, allow_redirects=False
            ) as response:
                data = bytearray()
                async for chunk in response.content.iter_chunked(2**16):
                    data += chunk
                    if len(data) > most:
                        return Reply("lost", problem=f"its response has more than {most:,} bytes", final=True)
                outcome: Outcome = "answered" if response.status == 200 else "refused"
                return Reply(outcome, response.status, bytes(data), response.headers)
        except aiohttp.ClientConnectorCertificateError as error:
            return Reply("unsent", problem=f"no valid certificate ({self._safe(error)})", final=True)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            return Reply("unsent", problem=f"no connection ({self._safe(error)})")
        except TimeoutError:
            return Reply("lost", problem=f"no response within {self.card.timeout_s:g} s")
        except aiohttp.ClientError as error:
            return Reply("lost", problem=f"the connection broke ({self._safe(error)})")

    def _opened(self) -> aiohttp.ClientSession:
        """Return the session: no proxies or passwords from the environment, no cookies, certificates verified."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=self.card.timeout_s),
                connector=aiohttp.TCPConnector(limit=self.card.rate.at_once, keepalive_timeout=10),
                cookie_jar=aiohttp.DummyCookieJar(),
                trust_env=False,
            )
        return self._session

    def _parsed(self, call: Call, reply: Reply) -> np.ndarray:
        """Return the content of a response. Raises ValueError if it is no JSON, EndpointStopped if it does not fit."""
        answer = reply.answer
        try:
            return call.parse(answer)
        except OtherModel as error:
            raise EndpointStopped(f"{self.card.host}: another model: {self._safe(error)}") from None
        except WrongAnswer as error:
            raise EndpointStopped(
                f"{self.card.host} does not fit adapter {self.card.adapter}: {self._safe(error)}"
            ) from None

    def _tokens(self, reply: Reply) -> int:
        try:
            return self.adapter.tokens(reply.answer)
        except ValueError:
            return 0

    def _raise_final(self, call: Call, reply: Reply) -> None:
        """Raise the error of a response that a further try cannot change."""
        status = reply.status
        if reply.final:
            raise EndpointStopped(f"{self.card.host}: {reply.problem}")
        if reply.outcome != "refused" or status in self.card.retry.on:
            return
        host, cause = self.card.host, self._cause(reply)
        if status in STOPPED:
            env = f"; the key is read from {self.card.auth.env}" if self.card.auth and status != 402 else ""
            raise EndpointStopped(f"{host} {STOPPED[status]} ({cause}){env}")
        if status in REFUSED:
            sent = f"{call.images} images" if call.images else f"{call.texts} texts"
            kind: type[EndpointError] = TooLarge if status == 413 else EndpointRefused
            raise kind(f"{host} refuses a call of {sent} ({cause})")
        if 300 <= status < 400:
            where = shown(self._safe((reply.headers or {}).get("Location", "another address")), 60)
            raise EndpointStopped(f"{host} redirects to {where}: state the address itself in url")
        raise EndpointStopped(f"{host} gives no answer at this address ({cause}): check url in the card")

    async def _wait(self, reply: Reply, key: str, attempt: int) -> float:
        """Wait before a further try, and let all other calls wait where the server asks for it; return the seconds.

        Raises:
            EndpointBusy: the server asks for a longer wait than `retry.most_s`.
        """
        retry, asked = self.card.retry, None
        if reply.headers is not None:
            asked = retry_after((reply.headers.get("Retry-After") or ""), time.time())
        if asked is not None and asked > retry.most_s:
            raise EndpointBusy(
                f"{self.card.host} asks to wait {asked:,.0f} s, longer than retry.most_s: run the same command later"
            )
        digest = hashlib.sha256(f"{key}/{attempt}".encode()).digest()
        jitter = 0.5 + int.from_bytes(digest[:4], "big") / 2**33  # 0.5 to 1, by the call: trials do not wait in step
        seconds = min(retry.most_s, retry.first_s * 2.0 ** (attempt - 1)) * jitter if asked is None else asked
        if asked is not None or reply.status == 429:
            self.limiter.pause(seconds)
        else:
            await self.sleep(seconds)
            return seconds
        return 0.0  # the limiter counts it

    def _cause(self, reply: Reply) -> str:
        """Return what a server said, or why it said nothing."""
        if reply.problem:
            return reply.problem
        try:
            answer = reply.answer
            error = answer.get("error", answer.get("detail", answer)) if isinstance(answer, dict) else answer
            said = error.get("message", error) if isinstance(error, dict) else error
        except ValueError:
            said = reply.data[:200].decode(errors="replace")
        return f"status {reply.status}: {shown(self._safe(said), 100)}"

    def _safe(self, text: object) -> str:
        """Return text for a message, on one line and without the key."""
        line = one_line(text) or type(text).__name__
        return line.replace(self._key, "***")[:160] if self._key else line[:160]


def retry_after(text: str, now: float) -> float | None:
    """Return the seconds of a `Retry-After` header, a number or an HTTP date; None if it has neither."""
    text = text.strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - now)
    except (ValueError, TypeError, IndexError):
        return None
