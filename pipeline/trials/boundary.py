"""What a method is given: an opaque box and opaque image sets.

Neither has an attribute that leads to a label, a file name, a row number, the pool, the bill or the phase. An image set
holds positions in a set that the trial opened (train, val, or the batch to predict) and view numbers. What a set is,
and which box answers, is looked up in this module, so a pickle of a method holds nothing else either.

`Session` decides what a call may ask about and to which phase it is billed (docs/budget.md).
"""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, TypeVar, cast

import numpy as np
from torch import Tensor

from methods.base import Bill, FewShotTask, ImageSet, LabelledImages, Prompts, Remaining, SoftPrompts, TextPrompts
from pipeline.blackbox.client import MeteredBox, wrong_plan
from pipeline.blackbox.request import check_shapes, prompt_counts, prompts_digest
from pipeline.budget import Phase
from pipeline.data.images import PLAIN, Images, row_index, view_rows
from pipeline.errors import AccessDenied, BudgetExceeded, FareboxError, MethodError, NonFiniteError
from pipeline.trials.watchdog import Watchdog

T = TypeVar("T")


class ImageHandle:
    """An ImageSet (see methods.base): positions in a set that a trial opened, and a view number for each."""

    __slots__ = ("_positions", "_set", "_views")
    _set: str
    _positions: np.ndarray
    _views: np.ndarray

    def __init__(self, name: str, positions: np.ndarray, views: np.ndarray) -> None:
        for array in (positions, views):
            array.flags.writeable = False
        for attribute, value in (("_set", name), ("_positions", positions), ("_views", views)):
            object.__setattr__(self, attribute, value)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"an image set cannot be changed: {name}")

    def __reduce__(self) -> tuple[type[ImageHandle], tuple[str, np.ndarray, np.ndarray]]:
        return ImageHandle, (self._set, self._positions, self._views)

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> ImageHandle:
        index = row_index(rows)
        return ImageHandle(self._set, self._positions[index], self._views[index])

    def views(self, n: int, seed: int = 0) -> ImageHandle:
        """n augmented copies of each image, view-major."""
        return ImageHandle(self._set, *view_rows(self._positions, self._views, n, seed))

    def pixels(self, size: int) -> Tensor:
        """Grey thumbnails [B, size * size] in [0, 1] of the plain images."""
        session = _OPEN.get(self._set)
        if session is None:
            raise AccessDenied(f"{len(self)} images of another trial, or of an earlier batch, cannot be read")
        images, _ = session.resolve(self)
        with session.watchdog.paused():
            return images.pixels(size)


class MethodBox:
    """A BlackBox (see methods.base), valid during one trial. It has the documented attributes only, all read-only."""

    __slots__ = ("__weakref__",)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a method cannot set box.{name}")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise MethodError("the method keeps the box: use the box that each call is given, do not store it")

    @property
    def logit_scale(self) -> float:
        """Factor of the scores."""
        return _session(self).box.logit_scale

    @property
    def token_dim(self) -> int:
        """E"""
        return _session(self).box.token_dim

    @property
    def feature_dim(self) -> int:
        """D"""
        return _session(self).box.feature_dim

    @property
    def remaining(self) -> Remaining:
        """What is left of the allotment."""
        return _session(self).box.remaining

    def scores(self, images: ImageSet, prompts: Prompts) -> Tensor:
        """[P, B, C]"""
        session, prompts = _session(self), _copied(prompts)
        whole, positions = session.resolve(images)
        return session.send(lambda: session.box.scores(whole, prompts), positions, prompts)

    def score_blocks(self, images: ImageSet, prompts: Prompts) -> Iterator[tuple[slice, Tensor]]:
        """(rows, [P, rows, C]) blocks of one call."""
        session, prompts = _session(self), _copied(prompts)
        whole, positions = session.resolve(images)
        blocks = session.box.score_blocks(whole, prompts)
        block: tuple[slice, Tensor] | None
        block = session.send(lambda: next(blocks), positions, prompts)  # the call is charged with its first block
        while block is not None:
            yield block
            block = session.answer(lambda: next(blocks, None))

    def image_features(self, images: ImageSet) -> Tensor:
        """[B, D]"""
        session = _session(self)
        whole, positions = session.resolve(images)
        return session.send(lambda: session.box.image_features(whole), positions, None)

    def text_features(self, prompts: Prompts) -> Tensor:
        """[P, C, D]"""
        session, prompts = _session(self), _copied(prompts)
        return session.send(lambda: session.box.text_features(prompts), None, prompts)

    def text_gradients(self, prompts: SoftPrompts, upstream_PCD: Tensor) -> Tensor:
        """[P, L, E]; white box."""
        session, plain = _session(self), cast(SoftPrompts, _copied(prompts))  # others are refused by the endpoint
        return session.send(lambda: session.box.text_gradients(plain, upstream_PCD), None, plain, gradients=True)

    def embed_text(self, text: str) -> Tensor:
        """[L, E], free of charge."""
        session = _session(self)
        with session.watchdog.paused():
            return session.box.embed_text(text)


def _copied(prompts: Prompts) -> Prompts:
    """The prompts as plain values: what is priced is what is sent, also for a subclass whose attributes change."""
    if isinstance(prompts, SoftPrompts):
        ctx_PLE = prompts.ctx_PLE.detach().as_subclass(Tensor)
        return SoftPrompts(ctx_PLE, tuple(prompts.classnames), str(prompts.suffix))
    if isinstance(prompts, TextPrompts):
        return TextPrompts(tuple(tuple(map(str, texts)) for texts in prompts.texts))
    raise TypeError(f"expected TextPrompts or SoftPrompts, got {type(prompts).__name__}")


_BOXES: weakref.WeakKeyDictionary[MethodBox, Session] = weakref.WeakKeyDictionary()
_OPEN: dict[str, Session] = {}
"""The session in which each image set is open."""


def _session(box: MethodBox) -> Session:
    session = _BOXES.get(box)
    if session is None:
        raise AccessDenied("the box is used outside of its trial")
    return session


@dataclass
class _Prediction:
    """What was asked while one test set is predicted."""

    phase: Phase
    most_sets: int
    """Different prompt sets that belong to the prediction."""
    prompts: set[str] = field(default_factory=set)
    n_sets: int = 0
    batch: str = ""
    seen: np.ndarray = field(default_factory=lambda: np.empty(0, bool))
    """Whether each image of the present batch was asked about."""

    def covers(self, positions: np.ndarray, prompts: Prompts | None) -> bool:
        """True for a call that is part of one pass over the batch with at most `most_sets` prompt sets; it is recorded.

        A call that is not, is charged to adapt and leaves the pass as it is.
        """
        if self.seen[positions].any() or len(np.unique(positions)) < len(positions):
            return False
        if prompts is not None and (digest := prompts_digest(prompts)) not in self.prompts:
            n_sets = self.n_sets + prompt_counts(prompts)[0]
            if n_sets > self.most_sets:
                return False
            self.n_sets = n_sets
            self.prompts.add(digest)
        self.seen[positions] = True
        return True


class Session:
    """The method's side of one trial: its box, and the image sets that it may ask about at the moment."""

    def __init__(
        self, box: MeteredBox, method: str, watchdog: Watchdog | None = None, predicted: Bill | None = None
    ) -> None:
        self.box, self.method, self.watchdog, self.predicted = box, method, watchdog or Watchdog(0), predicted
        self.method_box = MethodBox()
        self.failure: FareboxError | None = None
        """The first error that fails the trial even if the method catches it."""
        self._name = hashlib.sha256(box.trial.encode()).hexdigest()[:16]  # the same in every process
        self._sets: dict[str, Images] = {}
        self._prediction: _Prediction | None = None
        self._batches = 0

    def __enter__(self) -> Session:
        _BOXES[self.method_box] = self
        return self

    def __exit__(self, *_: object) -> None:
        _BOXES.pop(self.method_box, None)
        for name in list(self._sets):
            self._close(name)

    def task(self, task: FewShotTask) -> FewShotTask:
        """The task as the method gets it: with opaque images, and with labels and classes of its own."""
        train = LabelledImages(self._open("train", task.train.images), task.train.labels.clone())
        val = LabelledImages(self._open("val", task.val.images), task.val.labels.clone())
        return replace(task, classes=replace(task.classes), train=train, val=val)

    @contextlib.contextmanager
    def predicting(self, phase: Phase, most_sets: int) -> Iterator[None]:
        """Predict one test set: calls about `batch` are billed to `phase` as far as they are one pass over it."""
        self._prediction = _Prediction(phase, most_sets)
        try:
            yield
        finally:
            self._close(self._prediction.batch)
            self._prediction = None

    def batch(self, images: Images) -> ImageHandle:
        """Open the next batch of a test set; the one before is closed."""
        prediction = self._prediction
        assert prediction is not None
        self._close(prediction.batch)
        self._batches += 1
        handle = self._open(f"batch{self._batches}", images)
        prediction.batch, prediction.seen = handle._set, np.zeros(len(images), bool)
        return handle

    def resolve(self, images: ImageSet) -> tuple[Images, np.ndarray]:
        """The images that a handle stands for, and their positions in the set that was opened.

        Raises:
            TypeError: it is no image set that a task holds.
            AccessDenied: it was not given to the present call.
        """
        if type(images) is not ImageHandle:
            raise TypeError(f"expected the task's images, got {type(images).__name__}")
        prediction, name = self._prediction, images._set
        if name not in self._sets or (prediction is not None and name != prediction.batch):
            part = name.rpartition("/")[2]
            origin = f"{part} images" if part in ("train", "val") else "images of another batch or trial"
            where = "predict" if prediction is not None else "start and step"
            given = "the images that it is given" if prediction is not None else "train and val images"
            error = AccessDenied(
                f"{self.method} asked about {len(images)} {origin}: {where} may ask about {given} only"
            )
            self.failure = self.failure or error
            raise error
        base, positions = self._sets[name], np.array(images._positions, np.int64)
        views = np.array(images._views, np.int64)
        return Images(base.source, base.split, base.rows[positions], views, base.augment), positions

    def send(
        self, call: Callable[[], T], positions: np.ndarray | None, prompts: Prompts | None, gradients: bool = False
    ) -> T:
        """Make a call in its phase.

        Raises:
            MethodError: a call beyond one pass in predict that the trial's budget does not pay, or a call of the fit
                beyond the bill that the method predicted.
            BudgetExceeded: a call of the fit within that bill that the trial's budget does not pay.
        """
        prediction, phase = self._prediction, Phase.ADAPT
        check_shapes(None, prompts)
        if prediction is not None:
            asked = np.empty(0, np.int64) if positions is None else positions
            phase = prediction.phase if not gradients and prediction.covers(asked, prompts) else Phase.ADAPT
        before, self.box.phase = self.box.phase, phase
        try:
            return self.answer(call)
        except BudgetExceeded as error:
            if prediction is None:
                if (wrong := wrong_plan(self.method, self.predicted, self.box.meter.paid, error)) is None:
                    raise
                self.failure = self.failure or wrong
                raise self.failure from error
            rest = f"{error.asked:,} {error.unit} asked, {error.limit - error.spent:,} left"
            raise MethodError(
                f"predict of {self.method} asked for more than one pass (each image once, {prediction.most_sets} "
                f"prompt set(s)), which is charged to adapt: {rest}"
            ) from error
        finally:
            self.box.phase = before

    def answer(self, call: Callable[[], T]) -> T:
        """Wait for the endpoint. A value that is not finite fails the trial, even if the method catches the error."""
        try:
            with self.watchdog.paused():
                return call()
        except NonFiniteError as error:
            self.failure = self.failure or error
            raise

    def _open(self, part: str, images: Any) -> ImageHandle:
        name = f"{self._name}/{part}"
        self._sets[name] = images
        _OPEN[name] = self
        return ImageHandle(name, np.arange(len(images)), np.full(len(images), PLAIN))

    def _close(self, name: str) -> None:
        self._sets.pop(name, None)
        _OPEN.pop(name, None)
