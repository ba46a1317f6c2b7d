"""Count the images that a run still has to encode: those of its trials whose features are not stored yet."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from methods.base import Access
from pipeline.blackbox.feature_store import FeatureStore
from pipeline.data.images import Images
from pipeline.trials.plan import TrialSpec
from pipeline.trials.trial import few_shot_task

AT_ONCE = 4_096
"""Maximum number of features that are read at a time."""
Name = tuple[object, ...]
"""Identifies a set of images."""
NOT_STORED = Access.PIXELS | Access.LORA
"""Access with which a method's images are not those of the store: it makes them, or changes the model."""


class ImagesLeft:
    """The images of the trials that are not stored, counted by a thread.

    Images of an ended trial are not counted as left, whether it needed them or not: which of its training images a
    method sends is known to the method only.

    Args:
        trials: the trials of the run.
        store: returns the store of the images that are sent in a way (`Answers.images`), None if there is none here.
    """

    def __init__(self, trials: Sequence[TrialSpec], store: Callable[[str], FeatureStore | None]) -> None:
        self.trials, self.store = trials, store
        self.total = 0
        """Number of images to encode when the run started."""
        self.left: int | None = None
        """Number of images still to be encoded; None until they are counted."""
        self._missing = defaultdict[str, set[str]](set)
        self._counted, self._over = set[Name](), set[Name]()
        self._ended = deque[TrialSpec]()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def start(self) -> None:
        """Start to count."""
        self._thread.start()

    def stop(self) -> None:
        """Stop counting."""
        self._stop.set()

    def ended(self, spec: TrialSpec) -> None:
        """Take in that a trial ended."""
        self._ended.append(spec)

    def count(self) -> None:
        """Find the images of the trials that are not stored."""
        for spec in self.trials:
            for keys in _new_keys(spec, self._counted):
                self._missing[spec.answers.images] |= keys
            if self._stop.is_set():
                return
        self._look_up()
        self.total = self.left = self._n_missing

    def refresh(self) -> None:
        """Look up the images that were missing."""
        while self._ended:
            spec = self._ended.popleft()
            for keys in _new_keys(spec, self._over):
                self._missing[spec.answers.images] -= keys
        self._look_up()
        self.left = self._n_missing

    @property
    def _n_missing(self) -> int:
        return sum(map(len, self._missing.values()))

    def _look_up(self) -> None:
        """Leave out the images that are stored by now."""
        for codec, missing in self._missing.items():
            store, keys = self.store(codec), list(missing)
            if store is None:
                missing.clear()
                continue
            for start in range(0, len(keys), AT_ONCE):
                some = keys[start : start + AT_ONCE]
                missing.difference_update(some)
                missing.update(some[i] for i in store.read(some)[1])

    def _loop(self) -> None:
        began = time.monotonic()
        with contextlib.suppress(OSError):  # a folder that cannot be read: there is no count
            self.count()
            while self.left and not self._stop.wait(max(1.0, 20 * (time.monotonic() - began))):
                began = time.monotonic()
                self.refresh()


def _new_keys(spec: TrialSpec, seen: set[Name]) -> Iterator[set[str]]:
    """Yield the keys of the trial's sets of images that are not in `seen`, and add them: many trials share them."""
    for name, images in images_of(spec):
        if name not in seen:
            seen.add(name)
            yield set(images().keys)


def images_of(spec: TrialSpec) -> Iterator[tuple[Name, Callable[[], Images]]]:
    """Yield sets of images whose features a trial needs, as far as they are known before it runs, each with a name.

    These are its test images, and for a method that sends images its training images, or their fixed views.
    """
    if spec.choice.info.access & NOT_STORED or spec.model.http is not None:
        return
    codec = spec.answers.images
    for test in spec.eval_sets:
        dataset = test.dataset
        name: Name = (codec, "test", dataset.digest, test.labels, dataset.card.bits)
        yield name, partial(Images.plain, dataset.source, "test", test.rows, dataset.card.augment)
    if spec.predicted.images and not spec.fresh_views:
        name = (codec, "train", spec.dataset.digest, spec.split_digest, spec.views, spec.dataset.card.augment)
        yield name, partial(_training_images, spec)


def _training_images(spec: TrialSpec) -> Images:
    train = few_shot_task(spec).train.images
    assert isinstance(train, Images)
    return train.views(spec.views) if spec.views else train
