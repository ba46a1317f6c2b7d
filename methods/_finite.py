"""Checks that tensors are finite."""

from __future__ import annotations

import math

from methods._torch import Tensor


def first_non_finite(values: Tensor) -> tuple[int, ...] | None:
    """Return the index of the first element that is NaN or infinite; None if all are finite.

    The sum is tested first: it is some 25 times faster than `isfinite`, and it is finite only if all elements are.
    """
    if not values.is_floating_point() or math.isfinite(float(values.detach().sum())):
        return None
    bad = (~values.detach().isfinite()).nonzero()
    return tuple(bad[0].tolist()) if len(bad) else None  # finite elements whose sum overflows


def finite(values: Tensor, what: str) -> Tensor:
    """Return `values` when all are finite: a loss, the fitness [P] of candidates, weights.

    Raises:
        FloatingPointError: one is NaN or infinite. The message says `what`, and in [P] the candidate's number from 1.
    """
    if (bad := first_non_finite(values)) is not None:
        number = f" of candidate {bad[0] + 1}" if values.dim() == 1 else ""
        raise FloatingPointError(f"{what}{number} is {float(values.detach()[bad])}")
    return values
