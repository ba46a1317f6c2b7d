"""The local model that a method is given: an opaque handle, which reads the images that the trial allows.

A pickle of the handle holds the name of its trial alone. In each process the trial opens the handle again, so a
checkpoint holds no weights, and a method that continues from it finds the same model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NoReturn

from torch import Tensor

from methods.base import ImageSet
from pipeline.errors import AccessDenied
from pipeline.local.encoder import Encoder, open_encoder
from pipeline.local.facts import LocalFacts
from pipeline.trials.boundary import Session

_OPEN: dict[str, tuple[Session, Encoder]] = {}
"""The session and the encoder of each trial that has a local model open."""


class LocalHandle:
    """Implements `methods.base.LocalModel` during one trial. It has the documented attributes only, all read-only."""

    __slots__ = ("_trial",)
    _trial: str

    def __init__(self, trial: str) -> None:
        object.__setattr__(self, "_trial", trial)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a method cannot set local.{name}")

    def __reduce__(self) -> tuple[type[LocalHandle], tuple[str]]:
        return LocalHandle, (self._trial,)

    @property
    def size(self) -> int:
        """Side of the model's input in pixels."""
        return _opened(self)[1].size

    @property
    def feature_dim(self) -> int:
        """Width F of a feature."""
        return _opened(self)[1].feature_dim

    def features(self, images: ImageSet) -> Tensor:
        """Return the features [B, F] of images that the method may use at the moment."""
        session, encoder = _opened(self)
        return session.read(images, encoder.features)

    def pixels(self, images: ImageSet, size: int) -> Tensor:
        """Return RGB pixels [B, 3, size, size] in [0, 1] of images that the method may use at the moment."""
        session, encoder = _opened(self)
        return session.read(images, lambda whole: encoder.pixels(whole, size))

    def encode(self, pixels_B3SS: Tensor) -> Tensor:
        """Return the features [B, F] of pixels, with their gradient."""
        return _opened(self)[1].encode(pixels_B3SS)


@contextlib.contextmanager
def opened(session: Session, facts: LocalFacts | None) -> Iterator[LocalHandle | None]:
    """Open the local model of a trial within the block; None if the trial has none.

    Raises:
        ConfigError, DataError: it cannot be loaded here.
    """
    if facts is None:
        yield None
        return
    trial = session.box.trial
    _OPEN[trial] = session, open_encoder(facts.card)
    try:
        yield LocalHandle(trial)
    finally:
        _OPEN.pop(trial, None)


def _opened(handle: LocalHandle) -> tuple[Session, Encoder]:
    if handle._trial not in _OPEN:
        raise AccessDenied("the local model is used outside of its trial")
    return _OPEN[handle._trial]
