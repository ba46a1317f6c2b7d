"""Stop a method that hangs: one that neither returns nor calls the box for `limit_s` seconds.

First, a signal raises an exception in the method, which ends loops, sleeps and waits. If this has no effect (native
code that does not return to Python, or a method that catches every exception), a worker process writes the stacks of
its threads to the file `dump` and exits. The next worker of the trial reads the file and does not run the trial again.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import MethodError

GRACE_S = 10.0
"""Seconds between the exception and the end of the process."""
LONGEST_TICK_S = 5.0
"""Longest time between two checks."""


class _Hung(BaseException):
    """Raised inside a method that hangs; not an `Exception`, so that an ordinary handler does not catch it."""


class Watchdog:
    """Limits the time that a method may take without progress.

    Args:
        limit_s: seconds without a return or a call to the box; 0 for no limit.
        dump: file for the stacks, in a process that may be ended. If None, the process is never ended.
    """

    def __init__(self, limit_s: float, dump: Path | None = None) -> None:
        self.limit_s, self.dump = limit_s, dump
        self.armed, self.fired, self.since = False, False, 0.0
        self._stop = threading.Event()
        self._file: Any = None

    def __enter__(self) -> Watchdog:
        self._main = threading.current_thread() is threading.main_thread()
        if self.limit_s:
            if self._main:
                self._before = signal.signal(signal.SIGALRM, self._raise)
            if self.dump is not None:
                self.dump.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.dump.open("w")
                self._end_later()
            self._thread = threading.Thread(target=self._watch, args=(threading.get_ident(),), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self.limit_s:
            return
        self._stop.set()
        self._thread.join()
        if self._main:
            signal.signal(signal.SIGALRM, self._before or signal.SIG_DFL)
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            if self.dump is not None:
                self.dump.unlink(missing_ok=True)

    @contextlib.contextmanager
    def watching(self, stage: str) -> Iterator[None]:
        """Limit the time of a block of method code.

        Raises:
            MethodError: the block made no progress for `limit_s` seconds.
        """
        self.since, self.fired, self.armed = time.monotonic(), False, True
        try:
            yield
        except _Hung as error:
            raise self._error(stage) from error
        finally:
            self.armed = False
        if self.fired:  # the method caught the exception
            raise self._error(stage)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock in a block, such as a call to the endpoint, and start it again at zero after it."""
        armed, self.armed = self.armed, False
        try:
            yield
        finally:
            self.since, self.armed = time.monotonic(), armed

    def _error(self, stage: str) -> MethodError:
        return MethodError(
            f"{stage} neither returned nor called the box for {self.limit_s:g} s: the trial was stopped (raise "
            "trial_timeout_s if the method needs longer)"
        )

    def _raise(self, *_: object) -> None:
        if self.armed and self._late(0.0):
            self.fired = True
            raise _Hung

    def _late(self, grace_s: float) -> bool:
        return time.monotonic() - self.since > self.limit_s + grace_s

    @property
    def _tick_s(self) -> float:
        return min(self.limit_s / 4, LONGEST_TICK_S)

    def _end_later(self) -> None:
        """End the process unless this is called again in time. It also works while a method holds Python's lock."""
        faulthandler.dump_traceback_later(self.limit_s + GRACE_S + self._tick_s, exit=True, file=self._file)

    def _watch(self, thread: int) -> None:
        while not self._stop.wait(self._tick_s):
            if self._file is not None:
                self._end_later()
            if self.armed and self._late(0.0):
                if self._main:
                    signal.pthread_kill(thread, signal.SIGALRM)
                if self._file is not None and self._late(GRACE_S):
                    faulthandler.dump_traceback(self._file)
                    self._file.flush()
                    os._exit(1)
