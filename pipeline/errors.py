"""The errors that callers see: one class for each decision that a caller can take.

FareboxError
 +- ConfigError        the command or the YAML is wrong: fix it; nothing was spent (exit 2)
 +- DataError          a data set, image or checkpoint file is missing or wrong: fix it (exit 2)
 +- AccessDenied       a method requested more than it declared, or than the model grants; never retried
 +- BudgetExceeded     a limit would be passed; ends the trial, which is scored with what it has
 +- MethodError        a method broke a rule of its interface: wrong output, changed input, no return; fails its trial
 +- NonFiniteError     a number that must be finite is NaN or infinite; fails the trial, with the stage and the place
 +- EndpointError      the endpoint did not answer
 |   +- EndpointLost      the replica died, retried on another; or a remote answer was lost, and its charge stays
 |   +- EndpointBusy      a live endpoint did not answer in time; the trial fails and the same command runs it again
 |   |   +- QueueFull         a replica has no room for a request; sent again
 |   +- EndpointRefused   the request itself is wrong; never retried
 |   +- EndpointStopped   no trial can use a remote endpoint (key, account, another model); ends a run, likewise
 +- LedgerError        the ledger cannot be read or written, or is inconsistent; ends a run, the same command continues
 +- StorageError       a file of the sweep cannot be written (disk full, read-only); likewise
 +- CodeMismatch       a worker imports other code than the driver; ends a run before that worker computes anything
 +- DamagedFile        a file that Farebox wrote does not match its checksum; the message names it and how to repair it
 +- TrackingError      MLflow did not store a copy of the rows; the sweep continues, `farebox sync` copies them later
"""

from __future__ import annotations

import difflib
import itertools
import re
import tempfile
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
USD = "usd"
"""Unit of a BudgetExceeded whose numbers are micro-dollars."""


def dollars(micro_usd: int) -> str:
    """Return an amount of micro-dollars as text: $1,234.50, with more decimals if it has them."""
    whole, rest = divmod(micro_usd, 1_000_000)
    decimals = f"{rest:06d}".rstrip("0").ljust(2, "0")
    return f"${whole:,}.{decimals}"


class FareboxError(Exception):
    """Base class of all errors of Farebox."""


class ConfigError(FareboxError):
    """The command or a configuration file is wrong."""


class DataError(FareboxError):
    """A data set, an image or a checkpoint is missing or wrong."""


class AccessDenied(FareboxError):
    """A call needs access that the method did not declare, or that the model does not grant."""


class BudgetExceeded(FareboxError):
    """A charge would exceed a limit. The numbers are attributes; the message is made from them.

    The unit is that of a `Bill`, or `USD`.
    """

    def __init__(self, account: str, unit: str, asked: int, spent: int, limit: int) -> None:
        self.account, self.unit, self.asked, self.spent, self.limit = account, unit, asked, spent, limit
        super().__init__(account, unit, asked, spent, limit)

    def __str__(self) -> str:
        if self.unit == USD:
            return (
                f"{dollars(self.asked)} asked of account {self.account!r}, which has "
                f"{dollars(self.limit - self.spent)} left ({dollars(self.spent)} of {dollars(self.limit)} spent or "
                "reserved)"
            )
        return (
            f"{self.asked:,} {self.unit} asked of account {self.account!r}, which has {self.limit - self.spent:,} left "
            f"({self.spent:,} of {self.limit:,} charged or reserved)"
        )


class MethodError(FareboxError):
    """A method broke a rule of its interface. The trial fails; a rerun of the same code fails again."""


class NonFiniteError(FareboxError):
    """A number that must be finite is NaN or infinite. The message names the stage, and the image or the prompt set."""


class EndpointError(FareboxError):
    """The endpoint did not answer."""


class EndpointLost(EndpointError):
    """The replica died before it answered, or the answer of a remote endpoint was lost after it may have computed."""


class EndpointBusy(EndpointError):
    """A live replica, or a remote endpoint, did not answer in time."""


class QueueFull(EndpointBusy):
    """The queue of a replica is full: the request was not accepted."""


class EndpointRefused(EndpointError):
    """The request is invalid: no replica can answer it."""


class EndpointStopped(EndpointError):
    """A remote endpoint can be used by no trial: it rejects the key, the account is empty, or another model answers."""


class LedgerError(FareboxError):
    """The ledger cannot be used, or is inconsistent."""


class StorageError(FareboxError):
    """A file of the sweep cannot be written or read. Earlier files are intact."""


class CodeMismatch(FareboxError):
    """A worker imports other code than the driver, so its results would be recorded under the wrong digest."""


class DamagedFile(FareboxError):
    """A file that Farebox wrote does not match its checksum. `path` is the file, `reason` what is wrong with it."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(path, reason)

    def __str__(self) -> str:
        return f"{self.path} is damaged: {self.reason}"


class TrackingError(FareboxError):
    """The rows could not be copied to MLflow. The rows themselves are intact."""


ENDS_A_RUN = (CodeMismatch, EndpointStopped, LedgerError, StorageError)
"""Errors that concern every trial of a run: they end the run, and the same command continues it."""


def unwrap(result: T | FareboxError) -> T:
    """Return a result; raise it if it is an error that an actor returned as a value."""
    if isinstance(result, FareboxError):
        raise result
    return result


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(text: object) -> str:
    """Return a text, or an error's message, with each run of white space replaced by one space."""
    return " ".join(str(text).split())


def shortened(text: str, most: int = 300) -> str:
    """Return the text as one line of at most `most` characters; the middle of a longer text is left out."""
    line = one_line(text)
    if len(line) <= most:
        return line
    end = line[-(most // 2) :]
    start = line[: most - len(end) - len(" ... ")]
    return f"{start.rpartition(' ')[0] or start} ... {end.partition(' ')[2] or end}"


def masked(text: str) -> str:
    """Return the text with the passwords of its URLs replaced by asterisks."""
    text = re.sub(r"(://[^/\s:@]*):\S*@", r"\1:***@", text)
    return re.sub(r"([?&](?:password|passwd|pwd|token|secret|sslpassword)=)[^&\s'\"]+", r"\1***", text, flags=re.I)


def unexpected(error: BaseException) -> str:
    """Write the traceback of an unhandled error to a temporary file; return a line that names both."""
    text = masked("".join(traceback.format_exception(error)))
    name = masked(f"{type(error).__name__}: {first_line(error)}")[:150]
    try:
        with tempfile.NamedTemporaryFile("w", prefix="farebox-", suffix=".txt", delete=False) as file:
            file.write(text)
    except OSError as disk:
        return f"unexpected error: {name} (its traceback cannot be written: {disk.strerror})"
    return f"unexpected error: {name} (traceback in {file.name}; please report it)"


KNOWN = 200
"""Most characters of the known names in a message."""


def did_you_mean(kind: str, found: str, known: Iterable[str]) -> str:
    """Return the message for an unknown name: "no KIND named 'X'; did you mean 'Y'? (known: ...)"."""
    names = sorted(known)
    near = difflib.get_close_matches(found, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    shown = list(itertools.takewhile(lambda part: len(part) <= KNOWN, itertools.accumulate(names, "{}, {}".format)))
    more = f" and {len(names) - len(shown)} more" if len(shown) < len(names) else ""
    return f"no {kind} named {found!r}{hint} (known: {shown[-1] if shown else ''}{more})"
