"""An epoch's view is asked about once, however many batches the epoch has."""

from __future__ import annotations

import pytest

from methods.base import Bill, Method, Remaining, TaskShape
from methods.cbbt import CBBT
from methods.coop import CoOp
from methods.testing import ToyBox, fit, toy_task


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    "method",
    [
        CBBT(CBBT.Config(batch_size=4, epochs=3, directions=4)),
        CoOp(CoOp.Config(batch_size=4, epochs=3)),
    ],
    ids=["cbbt", "coop"],
)
def test_a_view_is_paid_once_in_an_epoch_of_several_batches(method: Method, fresh: bool) -> None:
    task, _ = toy_task(fresh_views=fresh)
    box = ToyBox(method.info.access)
    shape = TaskShape.of(task, box.feature_dim)
    assert shape.n_train > 2 * method.config.batch_size
    wanted: Bill = method.bill(shape, Remaining())
    fit(method, task, box)
    assert box.bill == wanted
    assert wanted.images == 3 * shape.n_train
