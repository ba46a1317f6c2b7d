"""An epoch's view is asked about once, however many batches the epoch has."""

from __future__ import annotations

import pytest

from methods._toy_box import ToyBox
from methods._toy_task import fit, toy_task
from methods.base import Method, Remaining, TaskShape
from methods.cbbt import CBBT
from methods.coop import CoOp


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(("cls", "settings"), [(CBBT, {"n_directions": 4}), (CoOp, {})])
def test_a_view_is_paid_once_in_an_epoch_of_several_batches(
    cls: type[Method], settings: dict[str, int], fresh: bool
) -> None:
    task, _ = toy_task(fresh_views=fresh)
    method, box = cls(cls.Config(batch_size=4, epochs=3, **settings)), ToyBox(cls.info.access)
    shape = TaskShape.of(task, box.feature_dim)
    assert shape.n_train > 2 * method.config.batch_size
    wanted = method.bill(shape, Remaining())
    fit(method, task, box)
    assert box.bill == wanted
    assert wanted.images == 3 * shape.n_train
