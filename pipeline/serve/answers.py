"""Answers by Idempotency-Key: a request that is sent again under its key gets the same bytes, and computes nothing."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from pipeline.serve.wire import ServiceError, invalid

MAX_BYTES = 2**28
"""Capacity in bytes of answers."""
MAX_KEYS = 10_000
"""Maximum number of keys."""
MAX_KEY_LENGTH = 300
"""Maximum number of characters of a key."""


@dataclass
class _Entry:
    digest: bytes
    """Of the request's path and body."""
    answer: asyncio.Future[bytes]
    size: int = 0


class RecentAnswers:
    """The answers of the keys that were used last. It is called in one event loop."""

    def __init__(self) -> None:
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._size = 0

    async def get(self, key: str | None, request: bytes, compute: Callable[[], Awaitable[bytes]]) -> tuple[bytes, bool]:
        """Return (answer, whether it was known). A request that comes while its key is computed waits for that.

        Args:
            key: the Idempotency-Key; None: the answer is computed and not kept.
            request: what the key stands for: the path and the body.
            compute: computes the answer. Its errors are not kept.

        Raises:
            ServiceError: the key was used for another request (422), or from `compute`.
        """
        if key is None:
            return await compute(), False
        if len(key) > MAX_KEY_LENGTH:
            raise invalid(f"Idempotency-Key: {len(key):,} characters, at most {MAX_KEY_LENGTH} are kept")
        digest = hashlib.sha256(request).digest()
        if (known := self._entries.get(key)) is not None:
            if known.digest != digest:
                raise invalid("Idempotency-Key: it was used for another request", "idempotency_key_reused")
            self._entries.move_to_end(key)
            return await asyncio.shield(known.answer), True
        entry = _Entry(digest, asyncio.get_running_loop().create_future())
        self._entries[key] = entry
        try:
            answer = await compute()
        except BaseException as error:
            del self._entries[key]
            failed = ServiceError(500, "internal", f"an unexpected error ({type(error).__name__})")
            entry.answer.set_exception(error if isinstance(error, ServiceError) else failed)
            entry.answer.exception()  # no one else may be waiting for it
            raise
        entry.answer.set_result(answer)
        entry.size = len(answer)
        self._size += entry.size
        self._trim()
        return answer, False

    def _trim(self) -> None:
        """Remove the keys that were not used for longest, except those that are computed now."""
        for key, entry in list(self._entries.items()):
            if self._size <= MAX_BYTES and len(self._entries) <= MAX_KEYS:
                break
            if entry.answer.done():
                del self._entries[key]
                self._size -= entry.size
