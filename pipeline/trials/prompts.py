"""Check before a run that every prompt of its data sets fits the text tower. Prompts are never truncated."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from methods.base import Access, Classes
from pipeline.blackbox.model_facts import ModelFacts, recall, remember
from pipeline.config.method_choice import MethodChoice
from pipeline.errors import ConfigError, DataError, one_line
from pipeline.trials.protocol import EvalSet


def check_prompts(
    facts: ModelFacts, tests: Mapping[str, Sequence[EvalSet]], choices: Collection[MethodChoice], fetch: bool
) -> str | None:
    """Check that each class name fits, with the templates and after the soft context of each method.

    Only tokens are counted; no weights are read.

    Args:
        facts: what is known of the model.
        tests: the test sets of each data set.
        choices: the methods of the sweep.
        fetch: download the tokenizer if it is not on this machine.

    Returns:
        A note for the user if nothing was checked, since the tokenizer is not on this machine; else None.

    Raises:
        DataError: a class name is too long.
        ConfigError: the tokenizer cannot be loaded.
    """
    if facts.card.http is not None and facts.card.http.max_text is not None:
        for test in (test for sets in tests.values() for test in sets):
            _check_characters(facts.card.name, test, facts.card.http.max_text)
    if facts.context_length is None:
        return None
    soft = dict(sorted((c.name, _context_tokens(c)) for c in choices if Access.SOFT in c.info.access))
    sets_of = dict[tuple[str, Classes], str]()
    for test in (test for sets in tests.values() for test in sets):
        sets_of.setdefault((test.dataset.name, test.classes), test.name)
    passed = [facts.identity, facts.context_length, [[name, asdict(classes)] for name, classes in sets_of], soft]
    if recall("prompts", passed) is not None:
        return None
    from pipeline.blackbox import architecture  # imports torch

    try:
        tokenizer = architecture.tokenizer(facts.card, fetch)
    except Exception as error:  # whatever the tokenizer's own library raises
        reason = one_line(error)[:120]
        if fetch:
            raise ConfigError(f"model {facts.card.name!r}: its tokenizer cannot be loaded: {reason}") from error
        return f"lengths of prompts are not checked: its tokenizer is not on this machine ({reason})"
    for (_, classes), test_name in sets_of.items():
        check = _Check(tokenizer, facts.context_length, facts.card.name, test_name, classes)
        for template in dict.fromkeys((classes.template, *classes.templates)):
            check([template.format(name) for name in classes.names], 0, f"with template {_short(template)!r}")
        if soft:
            own = architecture.prompt_lengths(tokenizer, [classes.context])[0] - 2
            texts = [f"{name}{classes.template.split('{}')[1]}" for name in classes.names]
            for name, tokens in soft.items():
                check(texts, tokens or own, f"after {tokens or own} context tokens of {name}")
    if hasattr(tokenizer, "encode"):  # open_clip's own, whose words are part of the package; a hub's may change
        remember("prompts", passed, {})
    return None


def _check_characters(model: str, test: EvalSet, most: int) -> None:
    """Raise DataError if a prompt has more characters than the card of a remote model allows."""
    classes = test.classes
    for template in dict.fromkeys((classes.template, *classes.templates)):
        longest = max((template.format(name) for name in classes.names), key=len)
        if len(longest) > most:
            raise DataError(
                f"data set {test.name!r}: the prompt {_short(longest)!r} has {len(longest)} characters, max_text of "
                f"model {model!r} allows {most}: shorten the name (classnames in the card) or the template"
            )


def _context_tokens(choice: MethodChoice) -> int:
    """Return the number of context tokens before each class name; 0: the tokens of the template's context."""
    n_ctx: Any = dict(choice.config).get("n_ctx", 0)
    return n_ctx if isinstance(n_ctx, int) else 0


@dataclass(frozen=True)
class _Check:
    tokenizer: Any
    context_length: int
    model: str
    dataset: str
    classes: Classes

    def __call__(self, texts: Sequence[str], before: int, how: str) -> None:
        """Raise DataError if a text, with `before` tokens before it, has more tokens than the text tower takes."""
        from pipeline.blackbox import architecture

        unsure = [label for label, text in enumerate(texts) if not self._surely_fits(text, before)]
        lengths = architecture.prompt_lengths(self.tokenizer, [texts[label] for label in unsure]) if unsure else []
        most = self.context_length - before
        long = [(label, n + before) for label, n in zip(unsure, lengths, strict=True) if n > most]
        if long:
            label, tokens = long[0]
            raise DataError(
                f"data set {self.dataset!r}: {len(long)} of {len(texts)} class names are too long for model "
                f"{self.model!r}: {_short(self.classes.names[label])!r} {how} is {tokens} tokens, the model takes "
                f"{self.context_length}: shorten the names (classnames in the card) or the template"
            )

    def _surely_fits(self, text: str, before: int) -> bool:
        """Return whether the text fits for certain: a byte-level token has one ASCII character or more."""
        plain = hasattr(self.tokenizer, "encode") and text.isascii() and "&" not in text  # &...; is replaced first
        return plain and len(text) + 2 + before <= self.context_length


def _short(text: str, most: int = 40) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
