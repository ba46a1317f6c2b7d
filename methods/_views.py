"""Augmented views of the training images: which views a schedule uses, and in which epoch each is queried.

Shapes: N training images, V views. A set of V views is view-major: row v * N + i is view v of image i.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from methods._torch import Tensor
from methods._training import affordable
from methods.base import Bill, BlackBox, FewShotTask, ImageSet, Plan, Remaining, TaskShape


@dataclass(frozen=True, kw_only=True)
class ViewsPlan(Plan):
    """How many views of the training images are queried."""

    views: int
    """V: views of the training images."""


@dataclass(frozen=True, kw_only=True)
class ValidationPlan(ViewsPlan):
    """How many views are queried, and whether the validation images are."""

    search: bool
    """Whether settings are chosen on the validation images."""


def plan_views(shape: TaskShape, remaining: Remaining, paid: Bill, wanted: int) -> ViewsPlan:
    """Return the plan of a method that pays `paid`, then queries fixed views in one request: `wanted`, at least 1."""
    views = affordable(wanted, Bill(images=shape.n_train), remaining.minus(paid))
    return ViewsPlan(bill=paid + Bill.image_features(views * shape.n_train, shape.feature_dim), views=views)


def plan_validation(
    shape: TaskShape, remaining: Remaining, text: Bill, wanted: int, search: bool = True
) -> ValidationPlan:
    """Return the plan of a method that queries text features, validation images and fixed views.

    The allotment pays for the validation images first. If not even one view fits beside them, they are left out.
    """
    with_val = text + Bill.image_features(shape.n_val, shape.feature_dim)
    view = Bill.image_features(shape.n_train, shape.feature_dim)
    search = search and shape.n_val > 0 and remaining.affords(with_val + view) != 0
    plan = plan_views(shape, remaining, with_val if search else text, wanted)
    return ValidationPlan(bill=plan.bill, views=plan.views, search=search)


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


def plan_epoch_views(shape: TaskShape, remaining: Remaining, paid: Bill, epochs: int) -> ViewsPlan:
    """Return the plan of a method that pays `paid`, then queries the features of the views that its epochs use."""
    view = Bill(requests=1 if shape.fresh_views else 0, images=shape.n_train)
    views = affordable(n_views_used(shape, epochs), view, remaining.minus(paid))
    return ViewsPlan(bill=paid + view_features_bill(shape, views), views=views)


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
