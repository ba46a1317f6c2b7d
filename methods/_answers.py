"""What an endpoint answers to `scores`: all scores, the best of them as probabilities, or a label.

Shapes: P prompt sets, B images in a call, C classes.
"""

from __future__ import annotations

from methods._torch import Tensor
from methods.base import TOP_K, Access, Bill

OUTPUTS = (Access.SCORES, Access.TOPK, Access.LABELS)
"""Answers to `scores`, from the most detailed to the least."""


def answer_of(access: Access) -> Access:
    """Return the most detailed answer that an access allows: SCORES, TOPK or LABELS; SCORES if it allows none."""
    return next((output for output in OUTPUTS if output in access.closure()), Access.SCORES)


def best_of(values_PBC: Tensor, scores_PBC: Tensor, k: int) -> Tensor:
    """Return the values of the classes with the k best scores, and -inf for others; of equal scores the first count."""
    best_PBk = scores_PBC.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    untold_PBC = values_PBC.new_full(values_PBC.shape, -float("inf"))
    return untold_PBC.scatter(-1, best_PBk, values_PBC.gather(-1, best_PBk))


def reduced(scores_PBC: Tensor, answer: Access) -> Tensor:
    """Reduce scores [P, B, C] to an answer of the same shape.

    SCORES: the scores. TOPK: the log probabilities of the TOP_K best classes. LABELS: zero for the best class. What
    is not told is -inf.
    """
    if answer is Access.SCORES:
        return scores_PBC
    if answer is Access.LABELS:
        return best_of(scores_PBC.new_zeros(scores_PBC.shape), scores_PBC, 1)
    return best_of(scores_PBC.log_softmax(-1), scores_PBC, TOP_K)


def bill_of(answer: Access, p: int, b: int, c: int, k: int = TOP_K) -> Bill:
    """Return the cost of scoring P prompt sets on B images and C classes with this answer, in one call."""
    if answer is Access.SCORES:
        return Bill.scores(p, b, c)
    return Bill.labels(p, b, c) if answer is Access.LABELS else Bill.top_k(p, b, c, k)
