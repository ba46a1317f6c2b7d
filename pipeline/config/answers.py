"""Check what an endpoint answers: the key `answers` of a model's card and of a configuration (docs/answers.md)."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from methods.base import TOP_K, Access
from pipeline.cards import FULL_ANSWERS, Answers, ModelCard
from pipeline.config import values as checks
from pipeline.errors import ConfigError, did_you_mean

SCORES = ("logits", "probabilities", "topk", "label")
FEATURES = ("float32", "int8", "binary")
IMAGES = ("float", "jpeg90")
MOST_DIGITS = 9
_NEEDS = {"logits": Access.SCORES, "probabilities": Access.SCORES, "topk": Access.TOPK, "label": Access.LABELS}
"""Access that a model must grant for its answers to be of each kind."""


def of_config(key: str, value: Any, model: ModelCard) -> tuple[Answers, ...]:
    """Return the answers of a run: a name, settings, a list of these, or None for those of the model's card.

    Raises:
        ConfigError: a value is wrong, two are equal, or the model does not grant what is to be degraded.
    """
    if value is None:
        several = [model.answers]
    else:
        several = [of_value(key, item) for item in (value if isinstance(value, list) else [value])]
    texts = [answers.text for answers in several]
    if not texts:
        raise ConfigError(f"{key}=[]: expected at least one, as in {key}=logits,topk")
    if doubled := next((text for text in texts if texts.count(text) > 1), None):
        raise ConfigError(f"{key}: {doubled!r} is listed twice")
    for answers in several:
        _check_granted(key, answers, model)
    return tuple(several)


def of_value(key: str, value: Any) -> Answers:
    """Return answers from the name of a kind of scores, or from settings.

    Raises:
        ConfigError: a name or a value is wrong, or two settings contradict each other.
    """
    if isinstance(value, str):
        return Answers(scores=checks.one_of(key, value, SCORES))
    if not isinstance(value, dict):
        example = "{scores: probabilities, digits: 3}"
        raise ConfigError(f"{key}: {value!r}: expected {', '.join(SCORES)}, or settings, as in {key}={example}")
    known = [f.name for f in fields(Answers)]
    for name in value:
        if name not in known:
            raise ConfigError(f"{key}: " + did_you_mean("setting", str(name), known))
    k, digits, noise = value.get("k", TOP_K), value.get("digits"), value.get("noise", 0.0)
    answers = Answers(
        scores=checks.one_of(f"{key}.scores", value.get("scores", "logits"), SCORES),
        k=checks.whole(f"{key}.k", k),
        digits=None if digits is None else checks.whole(f"{key}.digits", digits, minimum=0),
        features=checks.one_of(f"{key}.features", value.get("features", "float32"), FEATURES),
        noise=checks.number(f"{key}.noise", noise),
        images=_images(f"{key}.images", value.get("images", "float")),
    )
    _check_together(key, answers, "k" in value)
    return answers


def texts(key: str, value: Any) -> list[str]:
    """Return answers as rows show them, for a filter of rows: settings, and also the texts of rows.

    The text of a row may have commas, at which the command line splits it: parts that are not a kind of scores belong
    to the part before.
    """
    joined: list[Any] = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str) and joined and isinstance(joined[-1], str) and not _is_kind(item):
            joined[-1] += f", {item}"
        else:
            joined.append(item)
    return [
        item if isinstance(item, str) and item not in SCORES and _is_kind(item) else of_value(key, item).text
        for item in joined
    ]


def _is_kind(text: str) -> bool:
    """Return whether a text starts with a kind of scores, as the texts of rows do."""
    return text.split(",")[0] in SCORES or text.startswith("top-")


def _images(key: str, value: Any) -> str:
    if value == "uint8":
        raise ConfigError(f"{key}=uint8: views are 8-bit images already, so it would change nothing: leave it out")
    return checks.one_of(key, value, IMAGES)


def _check_together(key: str, answers: Answers, k_is_given: bool) -> None:
    """Raise ConfigError for a number that is out of range, and for settings of which one would have no effect."""
    if answers.noise < 0:
        raise ConfigError(f"{key}.noise={answers.noise}: expected a standard deviation of 0 or more")
    if answers.digits is not None and answers.digits > MOST_DIGITS:
        raise ConfigError(f"{key}.digits={answers.digits}: expected at most {MOST_DIGITS} decimals")
    if k_is_given and answers.scores != "topk":
        raise ConfigError(f"{key}.k={answers.k}: only scores: topk has a k; leave it out")
    if answers.scores == "label" and answers.digits is not None:
        raise ConfigError(f"{key}.digits={answers.digits}: a label has no decimals; leave it out")
    if answers.scores != "logits" and answers.features != "float32":
        raise ConfigError(
            f"{key}.features={answers.features}: with scores: {answers.scores} no features are given; leave it out"
        )


def _check_granted(key: str, answers: Answers, model: ModelCard) -> None:
    if model.http is not None and answers != FULL_ANSWERS:
        raise ConfigError(
            f"{key}: {answers.text!r}: model {model.name!r} is remote and answers what its service tells: leave it out"
        )
    needed = _NEEDS[answers.scores] if answers.scores != "logits" or answers.digits is not None else Access(0)
    if answers.features != "float32":
        needed |= Access.FEATURES
    if not model.access.covers(needed):
        raise ConfigError(
            f"{key}: {answers.text!r} degrades {needed.label}, which model {model.name!r} does not grant "
            f"({model.grant}): leave it out"
        )
