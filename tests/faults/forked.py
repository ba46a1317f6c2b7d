"""Work in a forked process, whose end is seen however it comes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.patience import patience

TIMEOUT_S = math.ceil(patience(180))


def forked(work: Callable[[], Any], timeout_s: int = TIMEOUT_S) -> tuple[str, Any]:
    """Do work in a forked process.

    Returns ("done", its result as JSON gives it back), ("traceback", text), ("crash", signal) or ("hang", seconds).
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
                result = ["done", work()]
        except BaseException:
            result = ["traceback", traceback.format_exc()]
        with os.fdopen(write, "w") as pipe:
            json.dump(result, pipe, default=str)
            pipe.flush()
            os._exit(0)
    os.close(write)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(pid, signal.SIGKILL))
    signal.alarm(timeout_s)
    try:
        with os.fdopen(read) as pipe:
            text = pipe.read()
        _, wait = os.waitpid(pid, 0)
    finally:
        left = signal.alarm(0)
    if left == 0 and os.WIFSIGNALED(wait):
        return "hang", timeout_s
    if os.WIFSIGNALED(wait) or not text:
        return "crash", signal.Signals(os.WTERMSIG(wait)).name if os.WIFSIGNALED(wait) else "no answer"
    outcome, value = json.loads(text)
    return outcome, value
