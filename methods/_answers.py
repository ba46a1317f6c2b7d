"""What an endpoint answers to `scores`: all scores, the best of them as probabilities, or a label.

Shapes: P prompt sets, B images in a call, C classes.
"""

from __future__ import annotations

from torch import Tensor

from methods.base import TOP_K, Access, Bill

OUTPUTS = (Access.SCORES, Access.TOPK, Access.LABELS)
"""Answers to `scores`, from the most detailed to the least."""


def answer_of(access: Access) -> Access:
    """Return the most detailed answer that an access allows: SCORES, TOPK or LABELS; SCORES if it allows none."""
    return next((output for output in OUTPUTS if output in access.closure()), Access.SCORES)


def reduced(scores_PBC: Tensor, answer: Access) -> Tensor:
    """Reduce scores [P, B, C] to an answer of the same shape.

    SCORES: the scores. TOPK: the log probabilities of the TOP_K best classes; of equal scores the first classes count.
    LABELS: zero for the best class. What is not told is -inf.
    """
    if answer is Access.SCORES:
        return scores_PBC
    k = 1 if answer is Access.LABELS else min(TOP_K, scores_PBC.shape[-1])
    best_PBk = scores_PBC.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    told_PBC = scores_PBC.log_softmax(-1) if answer is Access.TOPK else scores_PBC.new_zeros(scores_PBC.shape)
    return scores_PBC.new_full(scores_PBC.shape, -float("inf")).scatter(-1, best_PBk, told_PBC.gather(-1, best_PBk))


def bill_of(answer: Access, p: int, b: int, c: int) -> Bill:
    """Return the cost of scoring P prompt sets on B images and C classes with this answer, in one call."""
    if answer is Access.SCORES:
        return Bill.scores(p, b, c)
    return Bill.labels(p, b, c) if answer is Access.LABELS else Bill.top_k(p, b, c)
