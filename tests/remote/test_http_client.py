"""One HTTP call: what is repeated, what ends it, what is counted, and what is never shown."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from methods.base import Bill
from pipeline.budget import HttpBill, Phase
from pipeline.errors import BudgetExceeded, EndpointBusy, EndpointLost, EndpointRefused, EndpointStopped
from pipeline.ledger.records import Charge
from pipeline.remote.adapters import adapter_of
from pipeline.remote.call_log import CallLog
from pipeline.remote.http_client import HttpClient, Payer, TooLarge, retry_after
from pipeline.remote.openai_embeddings import OpenAIEmbeddings
from pipeline.remote.wallet import NoWallet, Wallet
from tests.support.peer import KEY, Peer, peer, peer_card

PAYER = Payer("s/t/0/digest/", Charge("s", "t", 0, "digest", Phase.ADAPT, Bill(1)))
TEXTS = ("a red circle", "stripes")


@pytest.fixture
def served() -> Iterator[Peer]:
    with peer() as one:
        yield one


class Tried:
    """What came of a call, and its bill."""

    def __init__(self, client: HttpClient, log: CallLog, values: np.ndarray | None, error: Exception | None) -> None:
        self.client, self.values, self.error = client, values, error
        self.bill = log.bill(PAYER.request)


def attempt(
    folder: Path,
    served: Peer,
    wallet: Wallet | None = None,
    key: str = "",
    url: str = "",
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    **changes: Any,
) -> Tried:
    """Send one call of two texts."""

    async def run() -> Tried:
        card = peer_card(folder, url or served.url, **changes)
        assert card.http is not None
        adapter, log = adapter_of(card), CallLog(None)
        client = HttpClient(card.http, adapter, key, wallet or NoWallet(), log, sleep)
        try:
            return Tried(client, log, await client.send(adapter.text_features([TEXTS]), PAYER), None)
        except Exception as error:
            return Tried(client, log, None, error)
        finally:
            await client.close()

    return asyncio.run(run())


def test_an_answer_is_counted_with_its_bytes_and_tokens(tmp_path: Path, served: Peer) -> None:
    tried = attempt(tmp_path, served)
    assert tried.values is not None and tried.values.shape == (2, 16)
    assert np.allclose(tried.values, served.texts(TEXTS), atol=1e-6)
    assert (
        tried.bill == replace(HttpBill(calls=1, texts=2, tokens=14), bytes=tried.bill.bytes) and tried.bill.bytes > 50
    )
    assert "Idempotency-Key" not in served.calls[0]["headers"]


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_a_status_that_may_pass_is_repeated(
    tmp_path: Path, served: Peer, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OpenAIEmbeddings, "honours_keys", True)
    served.faults.extend([status, status])
    tried = attempt(tmp_path, served)
    assert tried.values is not None
    assert (tried.bill.calls, tried.bill.retries, tried.bill.uncertain) == (3, 2, 0)
    assert tried.bill.rate_limited == (2 if status == 429 else 0) and tried.bill.waited_s > 0
    keys = {call["headers"]["Idempotency-Key"] for call in served.calls}
    assert len(keys) == 1 and keys.pop().startswith("s/t/0/digest/"), "a repeated call has the key of the first"


@pytest.mark.parametrize("fault", ["drop", "truncate"])
def test_a_call_with_an_unknown_outcome_is_repeated_and_counted_as_uncertain(
    tmp_path: Path, served: Peer, fault: str
) -> None:
    served.faults.extend([fault])
    tried = attempt(tmp_path, served)
    assert tried.values is not None and (tried.bill.calls, tried.bill.uncertain) == (2, 1)


def test_a_body_that_is_no_json_is_repeated(tmp_path: Path, served: Peer) -> None:
    served.faults.extend(["not_json"])
    tried = attempt(tmp_path, served)
    assert tried.values is not None and (tried.bill.calls, tried.bill.retries) == (2, 1)


def test_a_response_that_takes_too_long_is_uncertain(tmp_path: Path, served: Peer) -> None:
    served.faults.extend(["slow"])
    tried = attempt(tmp_path, served, timeout_s=0.3)
    assert tried.values is not None and (tried.bill.calls, tried.bill.uncertain) == (2, 1)


def test_a_server_that_stays_busy_is_given_up_and_computed_nothing(tmp_path: Path, served: Peer) -> None:
    served.faults.extend([503] * 10)
    tried = attempt(tmp_path, served)
    assert type(tried.error) is EndpointBusy and "4 tries: status 503: 'fault 503 {x}'" in str(tried.error)
    assert tried.bill.calls == len(served.calls) == 4


def test_a_server_that_may_have_computed_is_named_so(tmp_path: Path, served: Peer) -> None:
    served.faults.extend(["drop", 503, 503, 503])
    tried = attempt(tmp_path, served)
    assert isinstance(tried.error, EndpointLost) and "may have computed" in str(tried.error)


def test_a_long_wait_after_a_lost_answer_is_named_so_too(tmp_path: Path, served: Peer) -> None:
    served.faults.extend(["drop", 429])
    served.headers["Retry-After"] = "3600"
    tried = attempt(tmp_path, served)
    assert isinstance(tried.error, EndpointLost) and "retry.most_s" in str(tried.error)


def test_nothing_is_sent_when_nobody_listens(tmp_path: Path, served: Peer) -> None:
    tried = attempt(tmp_path, served, url="http://127.0.0.1:9")
    assert type(tried.error) is EndpointBusy and "no connection" in str(tried.error)
    assert (tried.bill.calls, tried.bill.uncertain, served.calls) == (0, 0, [])


@pytest.mark.parametrize(
    ("status", "names"),
    [(401, "rejects the key"), (403, "forbids"), (402, "account is empty"), (404, "check url"), (501, "check url")],
)
def test_a_status_that_concerns_every_call_stops_them_all(
    tmp_path: Path, served: Peer, status: int, names: str
) -> None:
    served.faults.extend([status])
    tried = attempt(tmp_path, served)
    assert isinstance(tried.error, EndpointStopped) and names in str(tried.error)
    assert len(served.calls) == 1 and tried.client.stopped is tried.error


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_status_that_concerns_the_call_is_not_repeated(tmp_path: Path, served: Peer, status: int) -> None:
    served.faults.extend([status])
    tried = attempt(tmp_path, served)
    assert isinstance(tried.error, EndpointRefused) and "refuses a call of 2 texts" in str(tried.error)
    assert isinstance(tried.error, TooLarge) == (status == 413) and len(served.calls) == 1


@pytest.mark.parametrize(("fault", "names"), [("redirect", "elsewhere.example"), ("huge", "more than")])
def test_a_server_that_redirects_or_sends_too_much_is_left(
    tmp_path: Path, served: Peer, fault: str, names: str
) -> None:
    served.faults.extend([fault])
    tried = attempt(tmp_path, served)
    assert isinstance(tried.error, EndpointStopped) and names in str(tried.error) and len(served.calls) == 1


def test_another_model_stops_all_calls(tmp_path: Path, served: Peer) -> None:
    served.model = "nope"
    tried = attempt(tmp_path, served)
    assert isinstance(tried.error, EndpointStopped) and "'nope' answered, the card expects toy" in str(tried.error)


@pytest.mark.parametrize("status", [429, 503])
def test_the_wait_that_a_server_asks_for_is_waited(tmp_path: Path, served: Peer, status: int) -> None:
    served.faults.extend([status])
    served.headers["Retry-After"] = "1"
    began = time.monotonic()
    tried = attempt(tmp_path, served)
    assert tried.values is not None and time.monotonic() - began >= 1 and tried.bill.waited_s >= 1


def test_a_longer_wait_than_the_card_allows_ends_the_call(tmp_path: Path, served: Peer) -> None:
    served.faults.extend([429])
    served.headers["Retry-After"] = formatdate(time.time() + 3600, usegmt=True)
    tried = attempt(tmp_path, served)
    assert isinstance(tried.error, EndpointBusy) and "longer than retry.most_s" in str(tried.error)


def test_retry_after_has_seconds_or_a_date() -> None:
    now = 1_790_000_000.0
    assert retry_after(" 7 ", now) == 7
    assert retry_after(formatdate(now + 30, usegmt=True), now) == 30
    assert retry_after(formatdate(now - 30, usegmt=True), now) == 0
    assert [retry_after(text, now) for text in ("", "soon", "-5", "1.5x")] == [None] * 4


def test_the_key_is_sent_and_shown_nowhere(tmp_path: Path, served: Peer) -> None:
    served.expects_key = True
    auth = {"env": "PEER_KEY"}
    assert attempt(tmp_path, served, key=KEY, auth=auth).values is not None
    assert served.calls[0]["headers"]["Authorization"] == f"Bearer {KEY}"
    refused = attempt(tmp_path, served, key=f"{KEY}x", auth=auth)
    assert "PEER_KEY" in str(refused.error) and KEY not in str(refused.error), "the server repeats the key"


class Purse:
    """A wallet that records what it is asked for."""

    def __init__(self, left: int = 10**9) -> None:
        self.left, self.paid, self.settled = left, dict[str, int](), dict[str, int]()

    async def pay(self, charge: Charge | None, call_id: str, micro_usd: int) -> None:
        assert call_id not in self.paid
        if micro_usd > self.left:
            raise BudgetExceeded("sweep", "usd", micro_usd, 0, self.left)
        self.paid[call_id] = micro_usd

    async def settle(self, call_id: str, micro_usd: int) -> None:
        self.settled[call_id] = micro_usd


PRICE = {"usd_per_request": 0.001, "usd_per_1k_tokens": 1.0, "tokens_per_image": 100, "as_of": "2026-11-01"}


def test_each_attempt_is_paid_before_it_is_sent_and_settled_by_its_outcome(tmp_path: Path, served: Peer) -> None:
    purse = Purse()
    served.faults.extend([429, "drop"])
    tried = attempt(tmp_path, served, wallet=purse, price=PRICE)
    tokens = sum(len(text) for text in TEXTS) + 2 * len(TEXTS)
    assert list(purse.paid.values()) == [1000 + 1000 * tokens] * 3
    assert list(purse.settled.values()) == [0, 1000 + 1000 * tokens, 1000 + 1000 * 14], "refused, unknown, answered"
    assert tried.bill.micro_usd == sum(purse.settled.values()) and tried.bill.uncertain == 1


def test_a_call_that_money_does_not_allow_is_not_sent(tmp_path: Path, served: Peer) -> None:
    tried = attempt(tmp_path, served, wallet=Purse(left=10), price=PRICE)
    assert isinstance(tried.error, BudgetExceeded) and served.calls == [] and tried.bill.calls == 0


def test_waits_between_tries_follow_from_the_call(tmp_path: Path, served: Peer) -> None:
    waits: list[list[float]] = []
    for _ in range(2):
        waits.append([])

        async def sleep(seconds: float, into: list[float] = waits[-1]) -> None:
            into.append(seconds)

        served.faults.extend([500] * 5)
        tried = attempt(tmp_path, served, sleep=sleep, retry={"first_s": 1, "most_s": 6, "tries": 6})
        assert tried.bill.waited_s >= sum(waits[-1]) - 0.01
    assert waits[0] == waits[1]
    for wait, longest in zip(waits[0], (1, 2, 4, 6, 6), strict=True):
        assert longest / 2 <= wait <= longest
