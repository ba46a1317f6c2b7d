"""Zero-shot classification in the format of Jina's classifier: probabilities of labels, several images in a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from methods.base import Access
from pipeline.remote.adapter import (
    Adapter,
    Call,
    WrongAnswer,
    base64_of,
    field,
    in_order,
    log_probabilities,
    shown,
    size_of,
)


class JinaClassifier(Adapter):
    """POST {model, input, labels} to the URL of the card."""

    most_images = 1024

    def scores(self, images: Sequence[bytes], prompts: Sequence[str]) -> Call:
        """See Adapter.scores. A grant of LABELS needs the best label, any other all `predictions`."""
        inputs = [{"image": image} for image in base64_of(images)]
        body = {"model": self.card.identity.model, "input": inputs, "labels": list(prompts)}

        def parse(answer: Any) -> np.ndarray:
            items = in_order(field(answer, "data", list), len(images))
            self._check_model(answer.get("model"))
            return np.stack([self._row(item, prompts) for item in items])

        n_numbers, size = len(images) * len(prompts), size_of(prompts)
        return Call("", body, parse, 8 * n_numbers + len(images) * size, len(images), len(prompts), size)

    def _row(self, item: Any, labels: Sequence[str]) -> np.ndarray:
        """Return the log probabilities [C] of an item, or zero for the best label and -inf for the others."""
        if Access.TOPK in self.grant.closure():
            return log_probabilities(field(item, "predictions", list), labels)
        best = field(item, "prediction", str)
        if best not in labels:
            raise WrongAnswer(f"its response has a label that was not asked for: {shown(best, 40)}")
        row = np.full(len(labels), -np.inf, np.float32)
        row[list(labels).index(best)] = 0
        return row
