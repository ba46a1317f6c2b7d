"""Augmented views of the training images: which views a schedule uses, and in which epoch each is queried.

Shapes: N training images, V views. A set of V views is view-major: row v * N + i is view v of image i.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from methods.base import Bill, BlackBox, FewShotTask, ImageSet, Plan, TaskShape


@dataclass(frozen=True, kw_only=True)
class ViewsPlan(Plan):
    """How many views of the training images are queried."""

    views: int


def n_views_used(shape: TaskShape, epochs: int) -> int:
    """Return how many different views `epochs` epochs use: one per epoch if fresh, else at most the fixed views."""
    return epochs if shape.fresh_views else min(max(1, shape.views), epochs)


def training_views(task: FewShotTask, n: int) -> ImageSet:
    """Return n fixed views of the training images, [n * N]; the plain images if the task offers no views."""
    return task.train.images.views(n) if task.views else task.train.images


def epoch_view(task: FewShotTask, epoch: int) -> ImageSet:
    """Return the view of the training images [N] for one epoch: a fresh view, or the fixed views in turn."""
    if task.fresh_views:
        return task.train.images.views(1, seed=epoch + 1)
    if not task.views:
        return task.train.images
    n, v = len(task.train.images), epoch % task.views
    return task.train.images.views(task.views)[v * n : (v + 1) * n]


def view_features_bill(shape: TaskShape, views: int) -> Bill:
    """Return the cost of the features of `views` views: one request for each fresh view, one for all fixed views."""
    if shape.fresh_views or not views:
        return Bill.image_features(shape.n_train, shape.feature_dim) * views
    return Bill.image_features(shape.n_train * views, shape.feature_dim)


def view_features(task: FewShotTask, views: int, epochs: int, box: BlackBox) -> EpochViews:
    """Query the features of fixed views in one request. Those of fresh views are queried by `EpochViews.of`."""
    if task.fresh_views:
        return EpochViews(task, views, epochs)
    bank_VND = box.image_features(training_views(task, views)).view(views, -1, box.feature_dim)
    return EpochViews(task, views, epochs, bank_VND)


class EpochViews:
    """Query one view of the training images per epoch and cache the responses: epoch e uses view e mod n.

    A view is queried in the first epoch that needs it, unless `bank_VNX` holds the responses already. Responses that no
    later epoch needs are dropped, and the images too once every view has been queried.
    """

    def __init__(self, task: FewShotTask, n: int, epochs: int, bank_VNX: Tensor | None = None) -> None:
        self.n, self.epochs = n, epochs
        self.kept: dict[int, Tensor] = {} if bank_VNX is None else {v: view.clone() for v, view in enumerate(bank_VNX)}
        self.images = None if bank_VNX is not None else task.train.images
        self.fixed = None if bank_VNX is not None or task.fresh_views else training_views(task, n)

    def of(self, epoch: int, query: Callable[[ImageSet], Tensor]) -> Tensor:
        """Return the responses [N, ...] of an epoch's view; `query` is called only if they are not cached."""
        v = epoch % self.n
        if v not in self.kept:
            assert self.images is not None
            n = len(self.images)
            view = self.images.views(1, seed=v + 1) if self.fixed is None else self.fixed[v * n : (v + 1) * n]
            response = query(view)
            if self.epochs <= self.n:
                self.kept.clear()
            self.kept[v] = response
            if v + 1 == self.n:
                self.images = self.fixed = None
        return self.kept[v]
