"""Call a method: with a timeout, with seeded global generators, and with its inputs and outputs checked."""

from __future__ import annotations

import contextlib
import copy
import math
import numbers
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from methods._finite import first_non_finite
from methods._state import outside_state
from methods.base import FewShotTask, Method
from pipeline.data.images import Images
from pipeline.errors import MethodError, NonFiniteError
from pipeline.trials.boundary import Session
from pipeline.trials.isolation import Settings, seed_globals

T = TypeVar("T")


_BEFORE: dict[type[Method], dict[str, bytes]] = {}
"""By class, the state outside the method before a trial of this process changed it; later trials compare with it."""


class Supervisor:
    """Makes the calls of one method in one trial.

    Args:
        session: the trial's box and image sets.
        cls: class of the method.
        seed: with the name of the stage, seeds the global generators before each call.
    """

    def __init__(self, session: Session, cls: type[Method], seed: int) -> None:
        self.session, self.cls, self.seed = session, cls, seed
        self._outside, self._settings = _BEFORE.get(cls) or outside_state(cls), Settings()
        self._given: FewShotTask | None = None
        self._kept: FewShotTask | None = None

    def __enter__(self) -> Supervisor:
        self.check_outside()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(MethodError):  # after another failure: record the change for the next trial
            self.check_outside()

    def task(self, task: FewShotTask) -> FewShotTask:
        """Return the task to give to the method. Each later `call` checks that it was not changed."""
        self._given = self.session.task(task)
        self._kept = task
        return self._given

    def call(self, stage: str, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function of the method. Errors name the stage.

        Raises:
            MethodError: it hung, exited, or changed the task.
            FareboxError: an error of the box that fails the trial even if the method caught it.
            Exception: what the method raised.
        """
        seed_globals(self.seed, stage)
        try:
            with self.session.watchdog.watching(f"{stage} of {self.session.method}"):
                result = function(*arguments)
        except SystemExit as error:
            raise self._error(f"{stage} exited the process (SystemExit: {error.code})") from error
        except Exception as error:
            if self.session.failure is not None and error is not self.session.failure:
                raise self.session.failure from error
            raise
        finally:
            self._settings.restore()
        if self.session.failure is not None:
            raise self.session.failure
        self._check_task(stage)
        return result

    def copy(self, method: Method) -> Method:
        """Return a deep copy of the method, for one prediction."""
        try:
            subject = self.call("copy", copy.deepcopy, method)
        except (TypeError, RuntimeError) as error:
            raise self._error(f"its state cannot be copied ({error})") from error
        if subject is method:
            raise self._error("copy.deepcopy returns the method itself: a prediction could change its state")
        return subject

    def check_logits(self, logits: object, images: Images, n_classes: int) -> Tensor:
        """Check the logits [B, C] of these images and return a copy.

        Raises:
            MethodError: they have another type, dtype, device or shape.
            NonFiniteError: one is NaN or infinite; the first image is named.
        """
        expected = f"a float32 CPU tensor of shape ({len(images)}, {n_classes})"
        if not isinstance(logits, Tensor) or logits.layout is not torch.strided:
            raise self._error(f"predict returned {type(logits).__name__}, expected {expected}")
        if logits.dtype != torch.float32 or logits.device.type != "cpu" or logits.shape != (len(images), n_classes):
            actual = f"{str(logits.dtype).removeprefix('torch.')} on {logits.device} of shape {tuple(logits.shape)}"
            raise self._error(f"predict returned {actual}, expected {expected}")
        logits = logits.detach().as_subclass(Tensor).clone()
        if (bad := first_non_finite(logits)) is not None:
            value, image = float(logits[bad]), images.where(bad[0])
            raise NonFiniteError(f"predict: {self.session.method} gave the logit {value} for {image}, class {bad[1]}")
        return logits

    def check_result(self, method: Method) -> dict[str, Tensor]:
        """Check what a fitted method reports beside its logits; return the tensors that it deploys.

        Raises:
            MethodError: notes, paper_queries or trainable_params have a wrong type.
            NonFiniteError: one of them, or a deployed tensor, is NaN or infinite.
        """
        self._check_number("trainable_params", method.trainable_params)
        if method.paper_queries is not None:
            self._check_number("paper_queries", method.paper_queries)
        if not isinstance(method.notes, dict):
            raise self._error(f"notes is {type(method.notes).__name__}, expected a dict")
        for key, value in method.notes.items():
            if not isinstance(key, str):
                raise self._error(f"notes has the key {key!r}, expected a string")
            if not isinstance(value, str):
                self._check_number(f"notes[{key!r}]", value)
        deployed = dict(self.call("deployed", method.deployed))
        for key, tensor in deployed.items():
            if not isinstance(tensor, Tensor):
                raise self._error(f"deployed()[{key!r}] is {type(tensor).__name__}, expected a tensor")
            if (bad := first_non_finite(tensor)) is not None:
                raise NonFiniteError(f"fit: {self.session.method} deploys {key}{list(bad)} = {float(tensor[bad])}")
        return deployed

    def check_outside(self) -> None:
        """Raise MethodError if state outside the method object changed: class attributes, globals, defaults."""
        now = outside_state(self.cls)
        changed = sorted(name for name in {*now, *self._outside} if now.get(name) != self._outside.get(name))
        if changed:
            _BEFORE[self.cls] = self._outside
            raise self._error(f"changed {changed[0]}: state outside its own object outlives a prediction and a trial")

    def _check_number(self, name: str, value: object) -> None:
        if not isinstance(value, (int, float)):
            kind = "number" if isinstance(value, numbers.Number) else "value"
            raise self._error(
                f"{name} is the {kind} {value!r:.60} of type {type(value).__name__}, expected int or float"
            )
        if not math.isfinite(value):
            raise NonFiniteError(f"fit: {name} of {self.session.method} is {value}")

    def _check_task(self, stage: str) -> None:
        given, kept = self._given, self._kept
        if given is None or kept is None:
            return
        for part in ("train", "val"):
            if not torch.equal(getattr(given, part).labels, getattr(kept, part).labels):
                raise self._error(f"{stage} changed the {part} labels in place: work on a copy")
        for name in ("dataset", "classes", "shots", "views", "fresh_views"):
            if getattr(given, name) != getattr(kept, name):
                raise self._error(f"{stage} changed task.{name}: work on a copy")

    def _error(self, what: str) -> MethodError:
        return MethodError(f"{self.session.method}: {what}")
