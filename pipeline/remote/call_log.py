"""The log of HTTP calls in a storage: the physical bill, which survives every crash.

A call has two lines: before it is sent, and when its outcome is known. A first line without a second is a call that a
killed process sent: its outcome is unknown. Each line is a CRC-32 and a JSON object.
"""

from __future__ import annotations

import itertools
import json
import logging
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pipeline.budget import NOTHING_SENT, HttpBill
from pipeline.errors import StorageError
from pipeline.files import strict_json

FILE = "http_calls.log"
"""Name of the log in a storage."""
Outcome = Literal["answered", "refused", "lost", "unsent"]
"""answered: with a response that is billed. refused: with an error. lost: unknown. unsent: no connection was made."""
PROBES = ""
"""Request of the calls that identify the endpoint, which belong to no trial."""

log = logging.getLogger(__name__)


class CallLog:
    """Records HTTP calls, and sums them for each request of a trial.

    Args:
        storage: folder of the sweep; None to keep the log in memory.
    """

    def __init__(self, storage: Path | None) -> None:
        self.file: BinaryIO | None = None
        self._open: dict[int, tuple[str, HttpBill]] = {}
        """Request and bill of the calls without a known outcome, by number."""
        self._ended: defaultdict[str, HttpBill] = defaultdict(HttpBill)
        """Sum over the other calls, by request."""
        self._keys: Counter[str] = Counter()
        self._numbers = itertools.count()
        if storage is not None:
            self._load(storage / FILE)

    def _load(self, path: Path) -> None:
        last = -1
        for record in read(path):
            last = max(last, record["n"])
            self._add(record)
        self._numbers = itertools.count(last + 1)
        try:
            self.file = path.open("ab")
            if self.file.tell():
                self.file.write(b"\n")  # ends a line that a crash cut off; empty lines are skipped
        except OSError as error:
            raise StorageError(f"{path} cannot be written ({error.strerror}): make it writable") from error

    def sent(self, request: str, key: str, bill: HttpBill) -> int:
        """Record that a call is sent now; return its number.

        Args:
            request: the request of a trial that it is sent for, or `PROBES`.
            key: the call's idempotency key.
            bill: its calls (1), images, texts, bytes, retries and seconds waited, and the upper bound of its price.

        Raises:
            StorageError: the log cannot be written; the call must not be sent.
        """
        number = next(self._numbers)
        told = {name: value for name, value in vars(bill).items() if value}
        self._write({"n": number, "request": request, "key": key, "bill": told})
        return number

    def ended(self, number: int, outcome: Outcome, status: int = 0, tokens: int = 0, micro_usd: int = 0) -> None:
        """Record the outcome of a call, with the tokens that the response reports and its price."""
        self._write({"n": number, "outcome": outcome, "status": status, "tokens": tokens, "micro_usd": micro_usd})

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()

    def times(self, key: str) -> int:
        """Return how often a call with this idempotency key was sent, in this run or an earlier one."""
        return self._keys[key]

    def bill(self, request: str) -> HttpBill:
        """Return what was sent for a request of a trial, in this run and in earlier ones."""
        return self._ended.get(request, NOTHING_SENT) + self._unknown(request)

    def total(self) -> HttpBill:
        """Return what was sent from this storage."""
        return sum(self._ended.values(), self._unknown(None))

    def _unknown(self, request: str | None) -> HttpBill:
        """Return the sum of calls without a known outcome: of a request, or of all."""
        bills = [bill for of, bill in self._open.values() if request in (None, of)]
        return sum(bills, NOTHING_SENT)

    def _add(self, record: dict[str, Any]) -> None:
        if "request" in record:
            self._keys[record["key"]] += 1
            self._open[record["n"]] = record["request"], HttpBill(**record["bill"], uncertain=1)
        elif record["n"] in self._open:  # else its first line is damaged
            request, bill = self._open.pop(record["n"])
            self._ended[request] += _settled(bill, record)

    def _write(self, record: dict[str, Any]) -> None:
        if self.file is not None:
            content = strict_json(record, separators=(",", ":")).encode()
            try:
                self.file.write(f"{zlib.crc32(content):08x} ".encode() + content + b"\n")
                self.file.flush()
            except OSError as error:
                raise StorageError(
                    f"the log of HTTP calls cannot be written ({error.strerror}): make room, then run the same command"
                ) from error
        self._add(record)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the intact records of a log, in order; none if there is no file. Damaged lines are counted in a warning."""
    damaged = 0
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    for line in content.splitlines():
        if not line:
            continue
        digest, _, data = line.partition(b" ")
        if digest != f"{zlib.crc32(data):08x}".encode():
            damaged += 1
            continue
        yield json.loads(data)
    if damaged:
        log.warning("%s: %d lines are damaged, as by a crash: their calls are not counted", path, damaged)


def total_of(storage: Path) -> HttpBill:
    """Return what was sent from a storage; nothing if it has no log."""
    summary = CallLog(None)
    for record in read(storage / FILE):
        summary._add(record)
    return summary.total()


def sent_line(bill: HttpBill) -> list[str]:
    """Return a line for people on what was sent; none if nothing was."""
    if not bill.calls:
        return []
    more = [
        text
        for count, text in (
            (bill.tokens, f"{bill.tokens:,} tokens"),
            (bill.retries, f"{bill.retries:,} calls repeated"),
            (bill.rate_limited, f"{bill.rate_limited:,} rate limits"),
            (bill.waited_s, f"{bill.waited_s:,.0f} s waited"),
            (bill.uncertain, f"{bill.uncertain:,} with an unknown outcome"),
            (bill.micro_usd, f"${bill.micro_usd / 1e6:,.2f} by the card's prices"),
        )
        if count
    ]
    sent = f"sent: {bill.calls:,} HTTP calls with {bill.images:,} images and {bill.texts:,} texts, {bill.bytes:,} bytes"
    return ["; ".join([sent, *more])]


def _settled(sent: HttpBill, record: dict[str, Any]) -> HttpBill:
    """Return the bill of a call whose outcome is known."""
    outcome = record["outcome"]
    if outcome == "unsent":
        return HttpBill(waited_s=sent.waited_s)
    limited = int(record["status"] == 429)
    if outcome == "lost":
        return replace(sent, rate_limited=limited)
    return replace(sent, uncertain=0, tokens=record["tokens"], micro_usd=record["micro_usd"], rate_limited=limited)
