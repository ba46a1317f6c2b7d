"""Scoring: a method's copy predicts a test set, and this module alone reads the set's labels, each time on record."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot, softmax

from methods.base import BlackBox, Method
from pipeline.data.card import source_of
from pipeline.data.images import Images
from pipeline.protocol import TestSet

TEST_BATCH = 500
"""Images in one prediction call: a method sees them shuffled, without labels."""


def test_labels(test: TestSet, reads: Counter[str]) -> Tensor:
    """Labels [B] of a test set in file order, 0 for its first class; the read is counted under the set's name.

    No other code asks for them: a method is given a task without a test split, and images that tell no label.
    """
    reads[test.name] += 1
    return torch.from_numpy(source_of(test.card).labels[test.rows] - test.labels.start)


def predict(method: Method, box: BlackBox, test: TestSet, seed: int) -> tuple[Tensor, list[str]]:
    """Logits [B, C] and content keys of a test set, in file order: predicted by a copy, in shuffled batches."""
    images = Images.plain(source_of(test.card), "test", test.rows, test.card.augment)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(images)))
    subject, new = copy.deepcopy(method), (test.classes,) if test.columns is None else ()
    batches = (images[order[i : i + TEST_BATCH]] for i in range(0, len(images), TEST_BATCH))
    shuffled = torch.cat([subject.predict(batch, box, *new) for batch in batches])
    if test.columns is not None and test.columns != range(shuffled.shape[1]):
        shuffled = shuffled[:, list(test.columns)]
    logits = torch.empty_like(shuffled)
    logits[order] = shuffled
    return logits, images.keys


def metrics(logits_BC: Tensor, labels_B: Tensor) -> dict[str, float]:
    """Accuracy, mean of class accuracies (both 0 to 100), negative log-likelihood (nats), 15-bin ECE (0 to 100)."""
    logits_BC = logits_BC.double()
    hit_B = (logits_BC.argmax(1) == labels_B).double()
    confidence_B = softmax(logits_BC, 1).amax(1)
    member_BC = one_hot(labels_B, logits_BC.shape[1]).double()
    present_C = member_BC.sum(0) > 0
    by_class_C = (hit_B @ member_BC)[present_C] / member_BC.sum(0)[present_C]
    bins_B = (confidence_B * 15).long().clamp(max=14)
    gaps = [
        abs(float(hit_B[bins_B == b].sum() - confidence_B[bins_B == b].sum())) for b in range(15) if (bins_B == b).any()
    ]
    return {
        "accuracy": 100 * float(hit_B.mean()),
        "macro_accuracy": 100 * float(by_class_C.mean()),
        "nll": float(cross_entropy(logits_BC, labels_B)),
        "ece": 100 * sum(gaps) / len(labels_B),
    }
