"""The objects that a method works with: an opaque box and opaque image sets.

Neither has an attribute that leads to a label, a file name, a row number, the pool, the bill or the phase. This module
looks up the box, and the set that an image set (image_handle.py) names, so a pickle of a method contains nothing else
either.

`Session` decides which images a call may name and which phase is charged for it (docs/budget.md).
"""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NoReturn, TypeVar, cast

import numpy as np
from torch import Tensor

from methods.base import (
    Access,
    Bill,
    FewShotTask,
    ImageSet,
    LabelledImages,
    Lora,
    PixelImages,
    Prompts,
    Remaining,
    SoftPrompts,
    TextPrompts,
)
from pipeline.blackbox.client import MeteredBox, wrong_plan
from pipeline.blackbox.request import check_shapes, plain_prompts
from pipeline.budget import Phase
from pipeline.data.images import PLAIN, Images
from pipeline.errors import AccessDenied, BudgetExceeded, FareboxError, MethodError, NonFiniteError
from pipeline.trials.image_handle import OPEN, ImageHandle
from pipeline.trials.one_pass import OnePass
from pipeline.trials.watchdog import Watchdog

T = TypeVar("T")


class MethodBox:
    """Implements `methods.base.BlackBox` during one trial. It has the documented attributes only, all read-only."""

    __slots__ = ("__weakref__",)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a method cannot set box.{name}")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise MethodError("the method keeps the box: use the box that each call is given, do not store it")

    @property
    def logit_scale(self) -> float:
        """Factor of the scores over cosine similarities."""
        return _session(self).box.logit_scale

    @property
    def text_norm(self) -> float:
        """Mean length of the text tower's output; only for methods that declare `uses_text_norm`."""
        return _session(self).text_norm

    @property
    def token_dim(self) -> int:
        """Width E of a token embedding."""
        return _session(self).box.token_dim

    @property
    def feature_dim(self) -> int:
        """Width D of a feature."""
        return _session(self).box.feature_dim

    @property
    def image_size(self) -> int:
        """Side of the model's input in pixels."""
        return _session(self).box.image_size

    @property
    def top_k(self) -> int:
        """Number of classes that are told under access TOPK."""
        return _session(self).box.top_k

    @property
    def lora_shapes(self) -> tuple[tuple[int, int], ...]:
        """Number and width of the attention layers of each tower."""
        return _session(self).box.lora_shapes

    @property
    def remaining(self) -> Remaining:
        """The unspent part of the allotment."""
        return _session(self).box.remaining

    def scores(self, images: ImageSet | PixelImages, prompts: Prompts, lora: Lora | None = None) -> Tensor:
        """Return the scores [P, B, C]."""
        session, prompts = _session(self), plain_prompts(prompts)
        whole, positions = session.resolve_made(images)
        return session.send(lambda: session.box.scores(whole, prompts, lora), positions, prompts)

    def score_blocks(
        self, images: ImageSet | PixelImages, prompts: Prompts, lora: Lora | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield the scores of one call in blocks: rows and their scores [P, rows, C]."""
        session, prompts = _session(self), plain_prompts(prompts)
        whole, positions = session.resolve_made(images)
        blocks = session.box.score_blocks(whole, prompts, lora)
        block = session.send(lambda: next(blocks, None), positions, prompts)  # the call is charged with its first block
        while block is not None:
            yield block
            block = session.answer(lambda: next(blocks, None))

    def image_features(self, images: ImageSet) -> Tensor:
        """Return the image features [B, D]."""
        session = _session(self)
        whole, positions = session.resolve(images)
        return session.send(lambda: session.box.image_features(whole), positions, None)

    def text_features(self, prompts: Prompts) -> Tensor:
        """Return the text features [P, C, D]."""
        session, prompts = _session(self), plain_prompts(prompts)
        return session.send(lambda: session.box.text_features(prompts), None, prompts)

    def text_gradients(self, prompts: SoftPrompts, upstream_PCD: Tensor) -> Tensor:
        """Return the gradients [P, L, E] with respect to the context tokens. Needs access GRADIENTS."""
        session, plain = _session(self), cast(SoftPrompts, plain_prompts(prompts))  # others are refused by the endpoint
        return session.send(lambda: session.box.text_gradients(plain, upstream_PCD), None, plain, gradients=True)

    def lora_gradients(
        self, images: ImageSet, labels_B: Tensor, prompts: TextPrompts, lora: Lora, dropout: float, seed: int
    ) -> tuple[Tensor, ...]:
        """Return the loss of a changed model and its gradients. Needs access LORA."""
        session, plain = _session(self), cast(TextPrompts, plain_prompts(prompts))
        whole, positions = session.resolve(images)
        arguments = whole, labels_B, plain, lora, dropout, seed
        return session.send(lambda: session.box.lora_gradients(*arguments), positions, plain, gradients=True)

    def embed_text(self, text: str) -> Tensor:
        """Return the token embeddings [L, E] of a text, free of charge."""
        session = _session(self)
        with session.watchdog.paused():
            return session.box.embed_text(text)


_BOXES: weakref.WeakKeyDictionary[MethodBox, Session] = weakref.WeakKeyDictionary()


def _session(box: MethodBox) -> Session:
    session = _BOXES.get(box)
    if session is None:
        raise AccessDenied("the box is used outside of its trial")
    return session


class Session:
    """The box of one trial and the image sets that the method may use at the moment.

    Args:
        box: the metered box that makes the calls.
        method: name of the method, for messages.
        watchdog: is paused during calls; without one, nothing is timed.
        uses_text_norm: the method may read `box.text_norm`.
    """

    def __init__(
        self,
        box: MeteredBox,
        method: str,
        watchdog: Watchdog | None = None,
        predicted: Bill | None = None,
        uses_text_norm: bool = False,
    ) -> None:
        self.box, self.method, self.watchdog, self.predicted = box, method, watchdog or Watchdog(0), predicted
        self.uses_text_norm, self.method_box = uses_text_norm, MethodBox()
        self.failure: FareboxError | None = None
        """First error that fails the trial even if the method catches it."""
        self._name = hashlib.sha256(box.trial.encode()).hexdigest()[:16]  # the same in every process
        self._sets: dict[str, Images] = {}
        self._prediction: OnePass | None = None
        self._batches = 0

    def __enter__(self) -> Session:
        _BOXES[self.method_box] = self
        return self

    def __exit__(self, *_: object) -> None:
        _BOXES.pop(self.method_box, None)
        for name in list(self._sets):
            self._close(name)

    @property
    def text_norm(self) -> float:
        """The model's `text_norm`. Raises AccessDenied for a method that does not declare that it reads it."""
        if not self.uses_text_norm:
            self._deny("reads box.text_norm: declare uses_text_norm=True in @method")
        return self.answer(lambda: self.box.text_norm)

    def task(self, task: FewShotTask) -> FewShotTask:
        """Return a copy of the task for the method, with opaque images."""
        train = LabelledImages(self._open("train", task.train.images), task.train.labels.clone())
        val = LabelledImages(self._open("val", task.val.images), task.val.labels.clone())
        return replace(task, classes=replace(task.classes), train=train, val=val)

    @contextlib.contextmanager
    def predicting(self, phase: Phase, most_sets: int) -> Iterator[None]:
        """Charge the calls in the block to `phase`, as far as they are one pass over each `batch` of a test set."""
        self._prediction = OnePass(phase, most_sets)
        try:
            yield
        finally:
            self._close(self._prediction.batch)
            self._prediction = None

    def batch(self, images: Images) -> ImageHandle:
        """Open the next batch of a test set and close the last one."""
        prediction = self._prediction
        assert prediction is not None
        self._close(prediction.batch)
        self._batches += 1
        handle = self._open(f"batch{self._batches}", images)
        prediction.batch, prediction.seen = handle._set, np.zeros(len(images), bool)
        return handle

    def resolve(self, images: ImageSet) -> tuple[Images, np.ndarray]:
        """Return the images of a handle, and their positions in the open set.

        Raises:
            TypeError: it is not an image set of this module.
            AccessDenied: the method may not use it in the present call.
        """
        if type(images) is not ImageHandle:
            raise TypeError(f"expected the task's images, got {type(images).__name__}")
        prediction, name = self._prediction, images._set
        if name not in self._sets or (prediction is not None and name != prediction.batch):
            part = name.rpartition("/")[2]
            origin = f"{part} images" if part in ("train", "val") else "images of another batch or trial"
            where = "predict" if prediction is not None else "start and step"
            given = "the images that it is given" if prediction is not None else "train and val images"
            self._deny(f"asked about {len(images)} {origin}: {where} may ask about {given} only")
        base, positions = self._sets[name], np.array(images._positions, np.int64)
        views = np.array(images._views, np.int64)
        return Images(base.source, base.split, base.rows[positions], views, base.augment), positions

    def resolve_made(self, images: ImageSet | PixelImages) -> tuple[Images | PixelImages, np.ndarray]:
        """Return the same for images that the method made: a copy of them, and the positions of their base images."""
        if not isinstance(images, PixelImages):
            return self.resolve(images)
        pixels = images.pixels.detach().as_subclass(Tensor).clone()
        base, positions = self.resolve(images.base)
        made = PixelImages(base, pixels)
        return made, np.tile(positions, len(made.pixels_PB3SS))

    def read(self, images: ImageSet, read: Callable[[Images], Tensor], needed: Access | None = None) -> Tensor:
        """Read pixels of a set on the client. Raises AccessDenied if the method does not declare the access needed."""
        if needed is not None and not self.box.access.covers(needed):
            self._deny(f"reads images.array: declare access {needed.label} in @method")
        whole, _ = self.resolve(images)
        with self.watchdog.paused():
            return read(whole)

    def send(
        self, call: Callable[[], T], positions: np.ndarray | None, prompts: Prompts | None, gradients: bool = False
    ) -> T:
        """Make a call and charge it to its phase.

        Raises:
            MethodError: a call beyond one pass in predict that the trial's budget does not pay, or a call of the fit
                beyond the bill that the method predicted.
            BudgetExceeded: a call of the fit within that bill that the trial's budget does not pay.
        """
        prediction, phase = self._prediction, Phase.ADAPT
        check_shapes(None, prompts)
        if prediction is not None:
            rows = np.empty(0, np.int64) if positions is None else positions
            phase = prediction.phase if not gradients and prediction.covers(rows, prompts) else Phase.ADAPT
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
        """Wait for the endpoint. NaN and infinity fail the trial even if the method catches the error."""
        try:
            with self.watchdog.paused():
                return call()
        except NonFiniteError as error:
            self.failure = self.failure or error
            raise

    def _deny(self, what: str) -> NoReturn:
        """Fail the trial, even if the method catches the error."""
        error = AccessDenied(f"{self.method} {what}")
        self.failure = self.failure or error
        raise error

    def _open(self, part: str, images: Any) -> ImageHandle:
        name = f"{self._name}/{part}"
        self._sets[name] = images
        OPEN[name] = self
        return ImageHandle(name, np.arange(len(images)), np.full(len(images), PLAIN))

    def _close(self, name: str) -> None:
        self._sets.pop(name, None)
        OPEN.pop(name, None)
