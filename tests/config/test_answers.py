"""The key `answers`: names, settings, lists, cards, and one clear line for what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.cards import FULL_ANSWERS, Answers
from pipeline.config.answers import texts
from pipeline.config.compose import compose
from pipeline.errors import ConfigError
from pipeline.trials.cells import cells

DIGITS = Answers(scores="probabilities", digits=3)


def answers_of(*words: str) -> tuple[Answers, ...]:
    return compose(["sweep=smoke", *words]).answers


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (FULL_ANSWERS,)),
        (["answers=null"], (FULL_ANSWERS,)),
        (["answers=logits"], (FULL_ANSWERS,)),
        (["answers={}"], (FULL_ANSWERS,)),
        (
            ["answers=probabilities,topk,label"],
            (Answers(scores="probabilities"), Answers(scores="topk"), Answers(scores="label")),
        ),
        (["answers=[logits, {scores: probabilities, digits: 3}]"], (FULL_ANSWERS, DIGITS)),
        (["answers={scores: probabilities, digits: 3}"], (DIGITS,)),
        (["answers.scores=probabilities", "answers.digits=3"], (DIGITS,)),
        (
            ["answers={features: int8, noise: 0.5, images: jpeg90}"],
            (Answers(features="int8", noise=0.5, images="jpeg90"),),
        ),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_answers_are_names_settings_or_lists_of_these(words: list[str], expected: tuple[Answers, ...]) -> None:
    assert answers_of(*words) == expected


def test_a_card_states_answers_and_the_configuration_overrides_them(tmp_path: Path) -> None:
    card = tmp_path / "mine.yaml"
    card.write_text("kind: fake\nanswers: {scores: topk, k: 3}\n")
    assert answers_of(f"model={card}") == (Answers(scores="topk", k=3),)
    assert answers_of(f"model={card}", "answers=logits") == (FULL_ANSWERS,)
    card.write_text("kind: fake\nanswers: {scores: topk, digit: 3}\n")
    with pytest.raises(ConfigError, match=r"mine.yaml: answers: no setting named 'digit'; did you mean 'digits'\?"):
        answers_of(f"model={card}")


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("answers=logit", "answers: no choice named 'logit'; did you mean 'logits'?"),
        ("answers={score: topk}", "answers: no setting named 'score'; did you mean 'scores'?"),
        ("answers=3", "answers: 3: expected logits, probabilities, topk, label, or settings"),
        ("answers=true", "answers: True: expected logits"),
        ("answers=[]", "answers=[]: expected at least one"),
        ("answers=[[topk]]", "answers: ['topk']: expected logits"),
        ("answers=topk,topk", "answers: 'top-5' is listed twice"),
        ("answers=topk,", "nothing before or after a comma"),
        ("answers={k: 3}", "answers.k=3: only scores: topk has a k"),
        ("answers={scores: topk, k: 0}", "answers.k=0: expected a whole number of 1 or more"),
        ("answers={scores: label, digits: 2}", "answers.digits=2: a label has no decimals"),
        ("answers={digits: 1.5}", "answers.digits=1.5: expected a whole number"),
        ("answers={digits: 12}", "answers.digits=12: expected at most 9 decimals"),
        ("answers={features: int4}", "answers.features: no choice named 'int4'; did you mean 'int8'?"),
        ("answers={scores: topk, features: int8}", "answers.features=int8: with scores: topk no features are given"),
        ("answers={noise: -1}", "answers.noise=-1.0: expected a standard deviation of 0 or more"),
        ("answers={noise: loud}", "answers.noise=loud: expected a finite number"),
        ("answers={images: uint8}", "answers.images=uint8: views are 8-bit images already"),
        ("answers={images: png}", "answers.images: no choice named 'png'"),
        ("answers.scorse=topk", "answers: no setting named 'scorse'; did you mean 'scores'?"),
        ("answer=topk", "no key named 'answer'; did you mean 'answers'?"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(word: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        answers_of(word)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("grant", "word", "needs"),
    [
        ("TEXT+LABELS", "topk", "TOPK"),
        ("TEXT+TOPK", "probabilities", "SCORES"),
        ("TEXT+TOPK", "{digits: 2}", "SCORES"),
        ("TEXT+SCORES", "{features: int8}", "FEATURES"),
    ],
)
def test_what_a_model_does_not_grant_cannot_be_degraded(tmp_path: Path, grant: str, word: str, needs: str) -> None:
    card = tmp_path / "mine.yaml"
    card.write_text(f"kind: fake\ngrant: {grant}\n")
    assert answers_of(f"model={card}")
    with pytest.raises(ConfigError, match=f"degrades {needs}, which model 'mine' does not grant"):
        answers_of(f"model={card}", f"answers={word}")


def test_texts_of_rows_and_settings_filter_rows() -> None:
    assert texts("answers", "topk") == ["top-5"]
    assert texts("answers", ["logits", "probabilities", "3 digits", "top-3"]) == [
        "logits",
        "probabilities, 3 digits",
        "top-3",
    ]
    assert texts("answers", {"scores": "probabilities", "digits": 1}) == ["probabilities, 1 digit"]
    with pytest.raises(ConfigError, match="did you mean 'topk'"):
        texts("answers", "topc")


def test_methods_that_cannot_use_some_answers_run_with_the_others_and_are_listed() -> None:
    words = ["sweep=smoke", "model=fake", "methods=[zero_shot,vote,label_map_topk,gda]", "shots=1", "seeds=1"]
    able, unable = cells(compose([*words, "answers=logits,probabilities,topk,label"]))
    ran = {(cell.choice.name, cell.answers.text) for cell in able}
    expected = {
        "zero_shot": ["logits", "probabilities"],
        "vote": ["logits", "probabilities", "top-5", "label"],
        "label_map_topk": ["logits", "probabilities", "top-5"],
        "gda": ["logits"],
    }
    assert ran == {(name, text) for name, some in expected.items() for text in some}
    assert unable == {
        "zero_shot": "needs TEXT+SCORES, fake with answers top-5; label grants SOFT+PIXELS+TOPK or SOFT+PIXELS+LABELS",
        "label_map_topk": "needs TEXT+TOPK, fake with answers label grants SOFT+PIXELS+LABELS",
        "gda": "needs TEXT+FEATURES, fake with answers probabilities; top-5; label grants SOFT+PIXELS+SCORES or "
        "SOFT+PIXELS+TOPK or SOFT+PIXELS+LABELS",
    }
    with pytest.raises(ConfigError, match="nothing can run: gda needs TEXT"):
        cells(compose([*words[:2], "methods=[gda]", "answers=label"]))
