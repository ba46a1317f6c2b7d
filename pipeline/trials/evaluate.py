"""Predict test sets with a copy of a method and compute metrics. No other module reads the labels of a test set."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot, softmax

from methods.base import Classes, Method
from pipeline.budget import Phase
from pipeline.data.images import Images
from pipeline.errors import MethodError
from pipeline.trials.protocol import TEST_BATCH, EvalSet
from pipeline.trials.supervisor import Supervisor


def eval_labels(test: EvalSet, reads: Counter[str]) -> Tensor:
    """Return the labels [B] of a test set in file order, and count the read under the set's name.

    The first class of the set has label 0.
    """
    reads[test.name] += 1
    return torch.from_numpy(test.dataset.source.labels[test.rows] - test.labels.start)


def predict(
    method: Method, supervisor: Supervisor, test: EvalSet, fitted: Classes, phase: Phase
) -> tuple[Tensor, list[str]]:
    """Predict a test set with a copy of the method, in shuffled batches.

    Args:
        method: the fitted method; it is not changed.
        supervisor: makes the calls.
        test: the test set.
        fitted: the classes that the method was fitted on.
        phase: the phase that is charged for one pass over the images.

    Returns:
        Logits [B, C] and the content keys of the images, both in file order.

    Raises:
        MethodError: the method broke a rule of its interface.
        NonFiniteError: a logit is NaN or infinite.
    """
    classes, images = test.classes, Images.plain(test.dataset.source, "test", test.rows, test.dataset.card.augment)
    new, n_classes = ((classes,), len(classes)) if test.columns is None else ((), len(fitted))
    most_sets = max(1, len(fitted.templates), len(classes.templates))
    logits = predict_images(method, supervisor, images, n_classes, phase, most_sets, *new)
    if classes != test.classes:
        raise MethodError(f"{supervisor.session.method}: predict changed the classes that it was given")
    if test.columns is not None and test.columns != range(logits.shape[1]):
        logits = logits[:, list(test.columns)]
    return logits, images.keys


def predict_images(
    method: Method,
    supervisor: Supervisor,
    images: Images,
    n_classes: int,
    phase: Phase,
    most_sets: int,
    *classes: Classes,
) -> Tensor:
    """Predict images with a copy of the method, in shuffled batches.

    Args:
        method: the fitted method; it is not changed.
        supervisor: makes the calls.
        images: B images.
        n_classes: C, the number of columns of the logits.
        phase: the phase that is charged for one pass over the images.
        most_sets: number of different prompt sets that one pass may use.
        *classes: the classes to predict, if they are not the fitted ones.

    Returns:
        Logits [B, C] in the order of the images.

    Raises:
        MethodError, NonFiniteError: as in `predict`.
    """
    session, parts = supervisor.session, []
    order = torch.from_numpy(np.random.default_rng(supervisor.seed).permutation(len(images)))
    subject = supervisor.copy(method)
    with session.predicting(phase, most_sets):
        for start in range(0, len(images), TEST_BATCH):
            batch = images[order[start : start + TEST_BATCH]]
            arguments = session.batch(batch), session.method_box, *classes
            parts.append(
                supervisor.check_logits(supervisor.call("predict", subject.predict, *arguments), batch, n_classes)
            )
    supervisor.check_outside()
    shuffled = torch.cat(parts)
    logits = torch.empty_like(shuffled)
    logits[order] = shuffled
    return logits


def metrics(logits_BC: Tensor, labels_B: Tensor) -> dict[str, float]:
    """Return accuracy and mean class accuracy (0 to 100), negative log-likelihood (nats) and 15-bin ECE (0 to 100)."""
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
