"""The cells of a sweep: every combination of answers, allotment, method, data set, shots and seed that can run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from methods.base import MethodInfo
from pipeline.budget import Limits
from pipeline.cards import FULL_ANSWERS, Answers, DatasetCard, LocalCard
from pipeline.config.compose import Config
from pipeline.config.method_choice import MethodChoice
from pipeline.errors import ConfigError
from pipeline.local.facts import LocalFacts


class Cell(NamedTuple):
    """A cell in the table of a sweep: the part of a trial that the configuration alone determines."""

    choice: MethodChoice
    dataset: DatasetCard
    allotment: Limits
    shots: int
    seed: int
    answers: Answers
    hparams: str

    @property
    def budget_name(self) -> str:
        """The allotment as text: '8,000 requests', '500,000 images' or 'no limit'."""
        return self.allotment.text or "no limit"


def trial_name(method: str, dataset: str, shots: int, seed: int, allotment: Limits, hparams: str, answers: str) -> str:
    """Return a readable name of a trial, with hyperparameters and answers only if they are not the default."""
    papers = ", hparams=paper" if hparams == "paper" else ""
    degraded = "" if answers == FULL_ANSWERS.text else f", answers {answers}"
    return f"{method} on {dataset}, {shots} shots, seed {seed}, {allotment.text or 'no limit'}{papers}{degraded}"


def cells(config: Config, withheld: Sequence[str] = ()) -> tuple[list[Cell], dict[str, str]]:
    """Return all cells that can run, in plan order, and the reason for each method that cannot.

    Args:
        config: the composed configuration.
        withheld: what the model cannot grant, and why (`ModelFacts.withheld`), for the error.

    Raises:
        ConfigError: no method can run.
    """
    to_run: list[Cell] = []
    left_out: dict[str, str] = {}
    for answers in config.answers:
        for allotment in dict.fromkeys(a for name in config.methods for a in config.allotments_of(name)):
            for name in (n for n in config.methods if allotment in config.allotments_of(n)):
                for card, hparams, choice in _choices(config, name):
                    if reason := unable(config, choice.info):
                        left_out[name] = reason
                    elif answers in able_with(config, choice.info):
                        pairs = [(k, seed) for k in config.shots for seed in config.seeds]
                        to_run += [Cell(choice, card, allotment, k, seed, answers, hparams) for k, seed in pairs]
                    else:
                        left_out[name] = unable_with(config, choice.info)
    if not to_run:
        reasons = (*(f"{name} {reason}" for name, reason in left_out.items()), *withheld)
        raise ConfigError("nothing can run: " + "; ".join(reasons))
    return to_run, left_out


def _choices(config: Config, name: str) -> Iterator[tuple[DatasetCard, str, MethodChoice]]:
    """Yield each data set with the value of `hparams` and the method under it."""
    for card in config.datasets:
        for hparams, choice in config.choices(name, card.name).items():
            yield card, hparams, choice


def tuning_notes(some: Iterable[Cell]) -> Iterator[str]:
    """Yield a line for each tuned method: how many settings it tries, and that its bill is a bound."""
    for name, tuning in {cell.choice.name: cell.choice.tuning for cell in some}.items():
        if tuning is not None:
            tried = f"{tuning.trials} settings (sampler {tuning.sampler}) with {tuning.share:g} of its allotment"
            yield f"{name}: tries {tried}; its bill is an upper bound"


def able_with(config: Config, info: MethodInfo) -> list[Answers]:
    """Return the answers of a run whose access covers that of a method."""
    return [answers for answers in config.answers if answers.granted(config.model.access).covers(info.access)]


def unable_with(config: Config, info: MethodInfo) -> str:
    """Return which answers of a run a method cannot use, and why."""
    able = able_with(config, info)
    refused = [answers for answers in config.answers if answers not in able]
    texts = "; ".join(answers.text for answers in refused)
    granted = " or ".join(dict.fromkeys(a.granted(config.model.access).label for a in refused))
    return f"needs {info.access.label}, {config.model.name} with answers {texts} grants {granted}"


def local_of(card: LocalCard | None, info: MethodInfo) -> LocalFacts | None:
    """Return the run's local model for a method that uses one, else None. Raises as `local.encoder.Encoder` does."""
    if card is None or not info.uses_local:
        return None
    from pipeline.local.encoder import describe  # imports torch

    return describe(card)


def unable(config: Config, info: MethodInfo) -> str | None:
    """Return why a method cannot run under this model, its answers and this protocol; None if it can."""
    if not config.model.access.covers(info.access):
        return f"needs {info.access.label}, {config.model.name} grants {config.model.access.label}"
    if not able_with(config, info):
        return unable_with(config, info)
    if info.uses_text_norm and config.model.http is not None and config.model.text_norm is None:
        return f"reads text_norm, which the card of {config.model.name} does not state"
    if info.uses_local and config.local is None:
        return "runs a pretrained model on the client: name its card, as in local=tiny_local (docs/models.md)"
    if not info.new_classes and (config.protocol == "base_to_new" or config.transfer):
        reason = "transfer" if config.transfer else "protocol=base_to_new"
        return f"cannot predict classes that it was not fitted on, which {reason} asks for"
    return None
