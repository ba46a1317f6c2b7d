"""What an adapter is: it turns images and texts into the JSON of one API, and its responses into arrays.

Shapes: B images in a call, C prompts in a set, P prompt sets, D feature width.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from pipeline.cards import HttpCard, ModelCard
from pipeline.errors import one_line
from pipeline.untrusted import text_problem

TINY = float(np.finfo(np.float32).tiny)
"""Least probability that is told; a smaller one is rounded up to it, so that its logarithm is finite."""


class WrongAnswer(Exception):
    """A response is JSON, but not what the adapter expects. It is not asked for again."""


class OtherModel(Exception):
    """A response states that another model computed it."""


@dataclass(frozen=True)
class Call:
    """One HTTP call."""

    path: str
    """Appended to the URL of the card."""
    body: Mapping[str, Any] | None
    """Sent as JSON by POST; None: a GET."""
    parse: Callable[[Any], np.ndarray]
    """Returns float32 of the JSON of the response. Raises WrongAnswer or OtherModel."""
    numbers: int
    """Numbers in the response, which limits its size."""
    images: int = 0
    texts: int = 0
    characters: int = 0
    """UTF-8 bytes of the texts: at most as many tokens, apart from a start and an end token for each."""


class Adapter:
    """Base of the adapters. One that gives features overrides the first two methods, any other the third."""

    whole_texts: ClassVar[bool] = False
    """Whether a response depends on all texts of a request, so that requests are recorded whole."""
    most_images: ClassVar[int | None] = None
    """Most images that the API takes in one call; None: the card decides."""
    honours_keys: ClassVar[bool] = False
    """Whether the server answers the same `Idempotency-Key` again without computing it twice. Others are sent none."""

    def __init__(self, card: ModelCard) -> None:
        assert card.http is not None
        self.card: HttpCard = card.http
        self.grant = card.access

    def image_features(self, images: Sequence[bytes]) -> Call:
        """Return the call for the features [B, D] of encoded images."""
        raise NotImplementedError

    def text_features(self, prompts: Sequence[Sequence[str]]) -> Call:
        """Return the call for the features [P * C, D] of prompt sets."""
        raise NotImplementedError

    def scores(self, images: Sequence[bytes], prompts: Sequence[str]) -> Call:
        """Return the call for the scores [B, C] of images under one prompt set: the most that the card grants.

        Probabilities are returned as their logarithms: logits up to a constant for each image.
        """
        raise NotImplementedError

    def introduction(self) -> Call | None:
        """Return the call that verifies the card before anything is asked, if the API has one."""
        return None

    def tokens(self, answer: Any) -> int:
        """Return the tokens that a response reports; 0 if it reports none."""
        usage = answer.get("usage") if isinstance(answer, dict) else None
        tokens = usage.get("total_tokens", 0) if isinstance(usage, dict) else 0
        return tokens if isinstance(tokens, int) and not isinstance(tokens, bool) and tokens >= 0 else 0

    def _check_model(self, found: Any) -> None:
        """Raise OtherModel if a response names another model. A longer name counts as a version of the model."""
        expected = self.card.identity.model
        if expected and isinstance(found, str) and not found.startswith(expected):
            raise OtherModel(f"{shown(found)} answered, the card expects {expected}")


def shown(text: object, most: int = 80) -> str:
    """Return text of a server for a message: one line of printable characters, shortened and quoted."""
    line = "".join(c for c in one_line(text) if not text_problem(c))
    return repr(line if len(line) <= most else line[:most] + "...")


def base64_of(images: Sequence[bytes]) -> list[str]:
    """Return encoded images as base64 texts."""
    return [base64.b64encode(image).decode() for image in images]


def size_of(texts: Sequence[str]) -> int:
    """Return the UTF-8 bytes of texts."""
    return sum(len(text.encode()) for text in texts)


def field(record: Any, name: str, kind: type | tuple[type, ...]) -> Any:
    """Return an entry of a JSON object. Raises WrongAnswer if it is missing or of another type."""
    if not isinstance(record, dict) or not isinstance(record.get(name), kind) or isinstance(record.get(name), bool):
        raise WrongAnswer(f"its response has no usable {name!r}: {shown(record)}")
    return record[name]


def in_order(items: Sequence[Any], count: int) -> list[Any]:
    """Return the items of a response in the order of the request: by their `index`, where they have one.

    Raises:
        WrongAnswer: there are more or fewer than `count`, or their indices are not 0 to count - 1.
    """
    if len(items) != count:
        raise WrongAnswer(f"its response has {len(items)} items, {count} were asked for")
    indices = [item.get("index") if isinstance(item, dict) else None for item in items]
    if all(index is None for index in indices):
        return list(items)
    by_index = {index: item for index, item in zip(indices, items, strict=True) if type(index) is int}
    if by_index.keys() != set(range(count)):
        raise WrongAnswer(f"the indices of its response are not 0 to {count - 1}: {shown(indices)}")
    return [by_index[index] for index in range(count)]


def float32(values: Any, shape: tuple[int, ...], finite: bool = True) -> np.ndarray:
    """Return numbers, or the base64 of little-endian float32, as an array of this shape.

    Raises:
        WrongAnswer: they are not numbers, are too many or too few, or one is NaN (or infinite, if `finite`).
    """
    try:
        if isinstance(values, str):
            array = np.frombuffer(base64.b64decode(values, validate=True), "<f4").astype(np.float32)
        else:
            array = np.array(values, np.float64).astype(np.float32)
    except (ValueError, TypeError) as error:
        raise WrongAnswer("its response has an array that cannot be read") from error
    if array.size != int(np.prod(shape)):
        raise WrongAnswer(f"its response has {array.size} numbers, {'x'.join(map(str, shape))} were expected")
    if np.isnan(array).any() or (finite and not np.isfinite(array).all()):
        raise WrongAnswer("its response has a number that is NaN or infinite")
    return array.reshape(shape)


def unit(features: np.ndarray) -> np.ndarray:
    """Return features [..., D] with unit length. Raises WrongAnswer if one has length 0."""
    lengths = np.linalg.norm(features.astype(np.float64), axis=-1, keepdims=True)
    if not (lengths > 0).all():
        raise WrongAnswer("its response has a feature of length 0")
    return (features / lengths).astype(np.float32)


def log_probabilities(told: Sequence[Any], labels: Sequence[str]) -> np.ndarray:
    """Return the log probabilities [C] of labels, told as `{label, score}` in any order.

    Raises:
        WrongAnswer: a label has no score, or a score is no probability.
    """
    scores = {field(item, "label", str): float(field(item, "score", (int, float))) for item in told}
    missing = [label for label in labels if label not in scores]
    if missing:
        raise WrongAnswer(f"its response has no score for {len(missing)} labels, such as {shown(missing[0], 40)}")
    values = np.array([scores[label] for label in labels])
    if not ((values >= 0) & (values <= 1 + 1e-6)).all():
        raise WrongAnswer("its response has a score outside 0 to 1")
    return np.log(np.maximum(values, TINY)).astype(np.float32)
