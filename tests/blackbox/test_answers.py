"""Under access LABELS or TOPK the endpoint answers less than all scores."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from methods import all_methods
from methods._answers import answer_of, reduced
from methods.base import TOP_K, Access, Bill, Classes
from pipeline.blackbox.client import MeteredBox
from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.local_pool import LocalPool
from pipeline.blackbox.request import Request
from pipeline.budget import Limits, Phase
from pipeline.cards import ModelCard
from pipeline.config.card_files import model_card
from pipeline.config.compose import compose
from pipeline.data.images import Images
from pipeline.data.source import ParquetSource
from pipeline.errors import AccessDenied, NonFiniteError
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.records import Charge
from pipeline.trials.cells import unable

CLASSES = Classes(("star", "house", "umbrella", "arrow", "box", "bell", "cup"), "an icon of a {}.", ("{} icon", "a {}"))
LABELS, TOPK, SCORES = (Access.TEXT | output for output in (Access.LABELS, Access.TOPK, Access.SCORES))


@pytest.fixture
def images(icons: ParquetSource) -> Images:
    return Images.plain(icons, "test", icons.rows_of("test")[:20], "crop")


def metered(endpoint: Endpoint, ledger: Ledger, access: Access, trial: str = "t") -> MeteredBox:
    ledger.reserve("s", trial, ["ceiling"], Limits(100, 10_000))
    return MeteredBox(LocalPool(endpoint, ledger), "s", trial, access, Limits(100, 10_000))


def plain(scores: np.ndarray, k: int, probabilities: bool) -> np.ndarray:
    """The answer for one row of scores, by a loop."""
    best = sorted(range(len(scores)), key=lambda c: (-scores[c], c))[:k]
    log_p = scores - scores.max() - np.log(np.exp(scores - scores.max()).sum())
    return np.array([(log_p[c] if probabilities else 0.0) if c in best else -np.inf for c in range(len(scores))])


@pytest.mark.parametrize(
    ("access", "k", "outputs"), [(LABELS, 1, 40), (TOPK, 5, 40 * 2 * 5), (SCORES, 7, 40 * 7)], ids=lambda v: str(v)
)
def test_an_answer_is_the_plain_function_of_all_scores_and_billed_for_what_is_told(
    tiny: Endpoint, ledger: Ledger, images: Images, access: Access, k: int, outputs: int
) -> None:
    full = metered(tiny, ledger, SCORES, "full").scores(images, CLASSES.ensemble()).double().numpy()
    box = metered(tiny, ledger, access)
    told = box.scores(images, CLASSES.ensemble())
    expected = full if access is SCORES else np.apply_along_axis(plain, 2, full, k, access is TOPK)
    np.testing.assert_allclose(told.numpy(), expected, rtol=1e-5, atol=1e-5)
    bill = Bill(requests=2, images=40, prompts=14, outputs=outputs)
    assert box.meter.paid == bill == ledger.trial_bill("s", "t")[Phase.ADAPT]


@pytest.mark.parametrize("access", [LABELS, TOPK], ids=lambda a: a.label)
def test_a_replayed_call_gives_the_same_bits_for_free(
    tiny: Endpoint, ledger: Ledger, images: Images, tmp_path: Path, access: Access
) -> None:
    first = metered(tiny, ledger, access).scores(images, CLASSES.ensemble())
    other = Endpoint(model_card("tiny"), tmp_path / "other")
    again = metered(other, ledger, access).scores(images, CLASSES.ensemble())
    assert torch.equal(first, again)
    assert len(ledger.charges("s", "t")) == 1 and ledger.trial_bill("s", "t")[Phase.REPLAY] == Bill()


def test_another_answer_to_the_same_question_is_another_call(tiny: Endpoint, ledger: Ledger, images: Images) -> None:
    metered(tiny, ledger, LABELS).scores(images, CLASSES.prompts())
    metered(tiny, ledger, TOPK).scores(images, CLASSES.prompts())
    assert ledger.trial_bill("s", "t")[Phase.REPLAY] == Bill.top_k(1, 20, 7)


@pytest.mark.parametrize(
    ("granted", "declared", "allowed"),
    [
        (LABELS, LABELS, True),
        (LABELS, TOPK, False),
        (LABELS, SCORES, False),
        (TOPK, LABELS, True),
        (TOPK, TOPK, True),
        (TOPK, SCORES, False),
        (SCORES, LABELS, True),
        (SCORES, TOPK, True),
        (Access.TEXT | Access.FEATURES, LABELS, True),
    ],
    ids=lambda v: v.label if isinstance(v, Access) else "",
)
def test_the_endpoint_answers_no_more_than_it_grants(
    features: Path, ledger: Ledger, images: Images, granted: Access, declared: Access, allowed: bool
) -> None:
    endpoint = Endpoint(ModelCard(name="fake", kind="fake", grant=granted.label), features)
    box = metered(endpoint, ledger, declared)
    if allowed:
        assert torch.isfinite(box.scores(images, CLASSES.prompts())).any(-1).all()
    else:
        with pytest.raises(AccessDenied, match=f"the model grants TEXT.{granted.label.split('+')[1]}"):
            box.scores(images, CLASSES.prompts())
        assert ledger.charges("s", "t") == []


def test_a_method_that_needs_scores_is_listed_as_not_run_where_less_is_granted() -> None:
    config = compose(["sweep=smoke", "model=fake", "methods=[vote]"])
    for grant, able in (("TEXT+LABELS", {"vote", "label_map"}), ("TEXT+TOPK", {"vote", "label_map", "label_map_topk"})):
        limited = replace(config, model=replace(config.model, grant=grant))
        names = ("vote", "label_map", "label_map_topk", "zero_shot", "logit_head", "gda")
        assert {name for name in names if unable(limited, all_methods()[name]) is None} == able
        assert unable(limited, all_methods()["zero_shot"]) == f"needs TEXT+SCORES, fake grants {grant}"


def test_a_method_is_never_told_more_than_it_declares() -> None:
    assert [answer_of(access) for access in (LABELS, TOPK, SCORES)] == [Access.LABELS, Access.TOPK, Access.SCORES]
    assert answer_of(Access.SOFT | Access.FEATURES) is Access.SCORES


def test_equal_scores_are_told_in_the_order_of_the_classes() -> None:
    scores = torch.tensor([[[1.0, 3.0, 3.0, 0.0, 1.0, 1.0, 1.0]]])
    assert torch.isfinite(reduced(scores, Access.LABELS))[0, 0].tolist() == [False, True] + [False] * 5
    assert torch.isfinite(reduced(scores, Access.TOPK))[0, 0].tolist() == [True, True, True, False, True, True, False]
    few = reduced(scores[..., :3], Access.TOPK)
    torch.testing.assert_close(few.exp().sum(), torch.tensor(1.0))
    assert TOP_K == 5


def test_a_score_that_is_not_finite_is_not_hidden_by_the_answer(
    tiny: Endpoint, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny.model, "logit_scale", float("nan"))
    charge = Charge("s", "t", 0, "d", Phase.ADAPT, Bill())
    with pytest.raises(NonFiniteError, match="scores: prompt set 1 of 1"):
        tiny.compute(Request("scores", images, CLASSES.prompts(), charge, answer=Access.LABELS))
