"""Degraded answers: each is the plain function of the full answer, the same in every block, batch and replay."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from methods.base import Access, Bill, Classes, PixelImages, Prompts, SoftPrompts
from pipeline.blackbox import client
from pipeline.blackbox.answers import degraded_scores, gaussian, keys_of, quantised, rounded, set_keys
from pipeline.blackbox.client import MeteredBox
from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.local_pool import LocalPool
from pipeline.blackbox.request import Request
from pipeline.budget import Limits, Phase
from pipeline.cards import FULL_ANSWERS, Answers
from pipeline.config.card_files import model_card
from pipeline.data.images import Images, Preprocess, recoded
from pipeline.data.source import ParquetSource
from pipeline.errors import AccessDenied
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.records import Charge

CLASSES = Classes(("star", "house", "umbrella", "arrow", "box", "bell", "cup"), "an icon of a {}.", ("{} icon", "a {}"))
FREE = Charge("s", "t", 0, "d", Phase.ADAPT, Bill())
PROBABILITIES, TOPK, LABEL = (Answers(scores=scores) for scores in ("probabilities", "topk", "label"))
NOISY = Answers(noise=0.5)
TEXT = {name: Access.TEXT | Access[name] for name in ("LABELS", "TOPK", "SCORES", "FEATURES")}


@pytest.fixture
def images(icons: ParquetSource) -> Images:
    return Images.plain(icons, "test", icons.rows_of("test")[:20], "crop")


def metered(endpoint: Endpoint, ledger: Ledger, access: Access, answers: Answers, trial: str = "t") -> MeteredBox:
    ledger.reserve("s", trial, ["ceiling"], Limits(100, 10_000))
    return MeteredBox(LocalPool(endpoint, ledger), "s", trial, access, Limits(100, 10_000), answers=answers)


def told(endpoint: Endpoint, images: Images, answers: Answers, answer: Access = Access.SCORES) -> np.ndarray:
    """What a request is told, in float64."""
    request = Request("scores", images, CLASSES.ensemble(), FREE, answer=answer, answers=answers)
    return endpoint.compute(request).values.astype(np.float64)


def softmax(scores: np.ndarray) -> np.ndarray:
    exp = np.exp(scores - scores.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


scores_of = st.lists(st.lists(st.floats(-50, 50, width=32), min_size=4, max_size=4), min_size=1, max_size=5)


@given(scores_of, st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_probabilities_are_the_rounded_softmax_and_their_logarithms_are_finite(rows: list[list[float]], n: int) -> None:
    scores = torch.tensor([rows])
    exact = softmax(scores.double().numpy())
    np.testing.assert_allclose(degraded_scores(scores, PROBABILITIES).double().exp(), exact, atol=1e-5)
    logs = degraded_scores(scores, Answers(scores="probabilities", digits=n))
    assert torch.isfinite(logs).all()
    p = logs.double().exp().numpy()
    least, unit = 0.5 * 10.0**-n, 10.0**-n
    whole = p / unit
    assert (np.isclose(p, least, rtol=1e-4) | np.isclose(whole, whole.round(), atol=1e-3 * whole + 1e-4)).all()
    assert (np.abs(p - exact) <= least * 1.001 + 1e-5).all()


@given(scores_of, st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_top_k_tells_the_k_best_and_a_label_the_best_of_what_is_told(rows: list[list[float]], k: int) -> None:
    scores = torch.tensor([rows])
    answers = degraded_scores(scores, Answers(scores="topk", k=k))[0]
    labels = degraded_scores(scores, LABEL, Access.LABELS)[0]
    for row, of_row, label in zip(rows, answers, labels, strict=True):
        order = sorted(range(4), key=lambda c: (-row[c], c))
        assert set(torch.isfinite(of_row).nonzero().flatten().tolist()) == set(order[: min(k, 4)])
        assert torch.isfinite(label).nonzero().flatten().tolist() == order[:1] and label[order[0]] == 0


def test_rounding_comes_before_the_label() -> None:
    scores = torch.tensor([[[1.24, 1.25, 1.24]]])
    rounding = Answers(digits=1)
    assert torch.isfinite(degraded_scores(scores, FULL_ANSWERS, Access.LABELS))[0, 0].tolist() == [False, True, False]
    assert degraded_scores(scores, rounding)[0, 0].tolist() == pytest.approx([1.2, 1.2, 1.2])  # halves to even
    assert torch.isfinite(degraded_scores(scores, rounding, Access.LABELS))[0, 0].tolist() == [True, False, False]
    assert rounded(torch.tensor([-float("inf"), 0.0]), 2, True).tolist() == [-float("inf"), 0.0]


@pytest.mark.parametrize("access", ["LABELS", "TOPK", "SCORES", "FEATURES"])
def test_full_answers_are_the_bits_of_before(tiny: Endpoint, images: Images, access: str) -> None:
    """The endpoint's own product, reduced as under access LABELS and TOPK before there were settings."""
    image_BD = torch.from_numpy(tiny.compute(Request("image_features", images, None, FREE)).values)
    text_PCD = torch.from_numpy(tiny.compute(Request("text_features", None, CLASSES.ensemble(), FREE)).values)
    p, c, d = text_PCD.shape
    flat = (image_BD @ text_PCD.reshape(p * c, d).T) * tiny.model.logit_scale
    scores_PBC = flat.view(-1, p, c).transpose(0, 1).contiguous()
    k = {"LABELS": 1, "TOPK": 5}.get(access, c)
    best = scores_PBC.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    values = {"LABELS": torch.zeros_like(scores_PBC), "TOPK": scores_PBC.log_softmax(-1)}.get(access, scores_PBC)
    expected = torch.full_like(scores_PBC, -float("inf")).scatter(-1, best, values.gather(-1, best))
    answer = Access.SCORES if access == "FEATURES" else Access[access]
    request = Request("scores", images, CLASSES.ensemble(), FREE, answer=answer)
    assert np.array_equal(tiny.compute(request).values, expected.numpy())


@pytest.mark.parametrize(
    ("answers", "access", "outputs"),
    [
        (PROBABILITIES, "SCORES", 40 * 7),
        (Answers(scores="probabilities", digits=3), "SCORES", 40 * 7),
        (TOPK, "TOPK", 40 * 2 * 5),
        (Answers(scores="topk", k=2), "TOPK", 40 * 2 * 2),
        (Answers(scores="topk", k=50), "TOPK", 40 * 2 * 7),
        (TOPK, "LABELS", 40),
        (LABEL, "LABELS", 40),
        (NOISY, "SCORES", 40 * 7),
    ],
    ids=lambda v: v.text if isinstance(v, Answers) else str(v),
)
def test_only_the_outputs_of_a_bill_depend_on_the_answers(
    tiny: Endpoint, ledger: Ledger, images: Images, answers: Answers, access: str, outputs: int
) -> None:
    box = metered(tiny, ledger, TEXT[access], answers)
    values = box.scores(images, CLASSES.ensemble())
    assert box.meter.paid == ledger.trial_bill("s", "t")[Phase.ADAPT] == Bill(2, 40, 14, outputs)
    assert int(torch.isfinite(values).sum()) == outputs // (2 if access == "TOPK" else 1)
    assert box.top_k == answers.k


@pytest.mark.parametrize(
    "answers",
    [
        PROBABILITIES,
        Answers(scores="probabilities", digits=3),
        TOPK,
        LABEL,
        NOISY,
        Answers(noise=0.5, features="int8", images="jpeg90"),
    ],
    ids=lambda a: a.text,
)
def test_a_replay_and_another_endpoint_give_the_same_bits(
    tiny: Endpoint, ledger: Ledger, images: Images, tmp_path: Path, answers: Answers
) -> None:
    access = answers.granted(TEXT["FEATURES"])
    other = Endpoint(model_card("tiny"), tmp_path / "other")
    views = images[:4].views(2)

    def everything(endpoint: Endpoint) -> list[Tensor]:
        box = metered(endpoint, ledger, access, answers)
        values = [box.scores(images, CLASSES.ensemble()), box.scores(views, CLASSES.prompts())]
        return [*values, *([box.image_features(views)] if access.covers(Access.FEATURES) else [])]

    assert all(map(torch.equal, everything(tiny), everything(other)))
    assert ledger.trial_bill("s", "t")[Phase.REPLAY] == Bill()


@pytest.mark.parametrize("kind", ["text", "soft"])
def test_noise_is_the_same_in_every_block_batch_and_population(
    tiny: Endpoint, ledger: Ledger, images: Images, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    context = torch.randn(2, 3, tiny.model.token_dim, generator=torch.Generator().manual_seed(1)) * 0.02
    prompts: Prompts = CLASSES.ensemble() if kind == "text" else CLASSES.soft(context)
    access = Access.SOFT | Access.SCORES

    def noise(box: MeteredBox, some: Images, sets: Prompts) -> Tensor:
        exact = MeteredBox(box.pool, "s", "exact", access, Limits())
        return box.scores(some, sets) - exact.scores(some, sets)

    ledger.reserve("s", "exact", ["ceiling"], Limits(100, 10_000))
    box = metered(tiny, ledger, access, NOISY)
    whole = noise(box, images, prompts)
    assert 0.4 < whole.std() < 0.6 and whole.mean().abs() < 0.1
    assert whole.flatten().unique().numel() > 0.99 * whole.numel()
    second: Prompts = type(prompts)(prompts.texts[1:]) if kind == "text" else CLASSES.soft(context[1:])  # type: ignore[union-attr]
    torch.testing.assert_close(noise(box, images[[3, 1]], second), whole[1:, [3, 1]], atol=1e-5, rtol=0)
    monkeypatch.setattr(client, "BLOCK_BYTES", 4 * 14 * 3)  # blocks of three images
    torch.testing.assert_close(noise(box, images, prompts), whole, atol=1e-5, rtol=0)


def test_noise_on_features_is_that_of_scores_in_cosines(tiny: Endpoint, ledger: Ledger, images: Images) -> None:
    ledger.reserve("s", "exact", ["ceiling"], Limits(100, 10_000))
    noisy = metered(tiny, ledger, TEXT["FEATURES"], Answers(noise=0.2))
    exact = MeteredBox(noisy.pool, "s", "exact", TEXT["FEATURES"], Limits())
    scale = exact.logit_scale
    for of in (lambda box: box.image_features(images), lambda box: box.text_features(CLASSES.ensemble()).flatten(0, 1)):
        told, full = of(noisy), of(exact)
        torch.testing.assert_close(told.norm(dim=-1), torch.ones(len(told)))
        assert float((scale * (told - full)).std()) == pytest.approx(0.2, rel=0.2)
    alone = noisy.image_features(images[[7]])
    torch.testing.assert_close(alone[0], noisy.image_features(images)[7])


def test_gaussian_numbers_are_normal_and_depend_on_the_key_alone() -> None:
    keys = keys_of([str(i) for i in range(300)])
    values = gaussian(keys, 200)
    assert abs(float(values.mean())) < 0.02 and float(values.std()) == pytest.approx(1, abs=0.01)
    assert float((values[:-1] * values[1:]).mean()) == pytest.approx(0, abs=0.02)
    assert torch.equal(gaussian(keys[[5, 2]], 200), values[[5, 2]]) and torch.equal(gaussian(keys, 7), values[:, :7])
    assert set_keys(CLASSES.ensemble()).tolist()[1:] == set_keys(type(CLASSES.prompts())(CLASSES.ensemble().texts[1:]))


@given(st.integers(0, 2**31), st.sampled_from([16, 256, 1024]))
@settings(max_examples=30, deadline=None)
def test_quantised_features_have_unit_length_and_int8_is_within_one_127th(seed: int, width: int) -> None:
    full = torch.nn.functional.normalize(torch.randn(8, width, generator=torch.Generator().manual_seed(seed)), dim=-1)
    int8, binary = quantised(full, "int8"), quantised(full, "binary")
    assert float((int8 - full).abs().max()) <= 1 / 127
    assert torch.equal(quantised(full, "float32"), full)
    for told in (int8, binary):
        torch.testing.assert_close(told.norm(dim=-1), torch.ones(8))
    torch.testing.assert_close(binary, torch.where(full < 0, -1.0, 1.0) / width**0.5)
    steps = (127 * full).round()
    torch.testing.assert_close(int8, steps / steps.norm(dim=-1, keepdim=True))


def test_jpeg_changes_features_is_stored_apart_and_is_applied_at_the_size_of_the_input(
    tiny: Endpoint, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def spied(image: Image.Image, codec: str) -> Image.Image:
        sizes.append((codec, image.size))
        return recoded(image, codec)

    monkeypatch.setattr("pipeline.data.images.recoded", spied)
    plain, coded = (
        tiny.compute(Request("image_features", images.views(1), None, FREE, answers=Answers(images=codec))).values
        for codec in ("float", "jpeg90")
    )
    assert 1e-4 < np.abs(plain - coded).max() < 0.5
    side = tiny.model.preprocess.size  # type: ignore[attr-defined]
    assert ("jpeg90", (side, side)) in sizes
    assert tiny.store("jpeg90").folder != tiny.store().folder == tiny.store("float").folder
    again = tiny.compute(Request("image_features", images[:3].views(1), None, FREE, answers=Answers(images="jpeg90")))
    assert np.array_equal(again.values, coded[:3]) and again.cache_hits == 3


def test_a_view_is_an_8_bit_image_before_it_is_normalised(images: Images) -> None:
    """So an endpoint that takes 8-bit images answers as the full one does, and there is no such setting."""
    rule = Preprocess(32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    for some in (images[:2], images[:2].views(1)):
        image = rule.image(some, 0)
        assert image.mode == "RGB" and np.asarray(image).dtype == np.uint8
        assert torch.equal(rule.normalised(np.asarray(image)), rule.one(some, 0))


@pytest.mark.parametrize(
    ("answers", "granted"),
    [
        (FULL_ANSWERS, "SOFT+FEATURES+GRADIENTS+LORA"),
        (Answers(features="int8"), "SOFT+FEATURES"),
        (Answers(features="binary", noise=0.1), "SOFT+FEATURES"),
        (Answers(digits=2), "SOFT+FEATURES"),
        (PROBABILITIES, "SOFT+SCORES"),
        (TOPK, "SOFT+TOPK"),
        (LABEL, "SOFT+LABELS"),
    ],
    ids=lambda v: v.text if isinstance(v, Answers) else v,
)
def test_answers_leave_less_of_a_grant(answers: Answers, granted: str) -> None:
    assert answers.granted(Access.parse("SOFT+FEATURES+GRADIENTS+LORA")) == Access.parse(granted)
    assert answers.granted(Access.parse("TEXT+LABELS")).covers(Access.parse("TEXT+LABELS"))


@pytest.mark.parametrize(
    ("answers", "access"),
    [(PROBABILITIES, "FEATURES"), (TOPK, "SCORES"), (LABEL, "TOPK"), (LABEL, "SCORES")],
    ids=lambda v: v.text if isinstance(v, Answers) else v,
)
def test_a_call_that_needs_more_than_the_answers_is_refused_and_not_charged(
    tiny: Endpoint, ledger: Ledger, images: Images, answers: Answers, access: str
) -> None:
    box = metered(tiny, ledger, TEXT[access], answers)
    with pytest.raises(AccessDenied, match=f"the model grants SOFT.* with answers {answers.text}"):
        box.image_features(images) if access == "FEATURES" else box.scores(images, CLASSES.prompts())
    assert ledger.charges("s", "t") == []


def test_gradients_are_given_with_full_answers_only(tiny: Endpoint, ledger: Ledger) -> None:
    soft = SoftPrompts(torch.zeros(1, 2, tiny.model.token_dim), ("star",), ".")
    upstream = torch.ones(1, 1, tiny.model.feature_dim)
    white = Access.SOFT | Access.FEATURES | Access.GRADIENTS
    assert metered(tiny, ledger, white, FULL_ANSWERS, "full").text_gradients(soft, upstream).shape == soft.ctx_PLE.shape
    with pytest.raises(AccessDenied, match="with answers logits, int8 features"):
        metered(tiny, ledger, white, Answers(features="int8")).text_gradients(soft, upstream)


def test_the_same_question_with_other_answers_is_another_call(tiny: Endpoint, ledger: Ledger, images: Images) -> None:
    for answers in (FULL_ANSWERS, PROBABILITIES, replace(PROBABILITIES, digits=3)):
        metered(tiny, ledger, TEXT["SCORES"], answers).scores(images, CLASSES.prompts())
    assert ledger.trial_bill("s", "t")[Phase.REPLAY] == Bill.scores(1, 20, 7) * 2


def test_images_that_a_client_made_have_noise_of_their_own_and_are_sent_as_jpeg_too(
    tiny: Endpoint, ledger: Ledger, images: Images
) -> None:
    access = Access.TEXT | Access.PIXELS | Access.SCORES
    base = images[:3]
    side = tiny.info.image_size
    pixels = torch.randint(0, 256, (2, 3, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    made, second = PixelImages(base, pixels), PixelImages(base[[2]], pixels[1:, 2:])
    assert FULL_ANSWERS.granted(access) == access and NOISY.granted(access).covers(access)
    granting = Endpoint(replace(model_card("tiny"), grant="SOFT+PIXELS+FEATURES"), tiny.store().folder.parent)
    ledger.reserve("s", "exact", ["ceiling"], Limits(100, 10_000))
    noisy = metered(granting, ledger, access, NOISY)
    exact = MeteredBox(noisy.pool, "s", "exact", access, Limits())
    prompts = CLASSES.prompts()
    noise = noisy.scores(made, prompts) - exact.scores(made, prompts)
    assert 0.3 < noise.std() < 0.7 and noise.flatten().unique().numel() == noise.numel()
    alone = noisy.scores(second, prompts) - exact.scores(second, prompts)
    torch.testing.assert_close(alone[0, 0], noise[1, 2], atol=1e-4, rtol=0)
    coded = metered(granting, ledger, access, Answers(images="jpeg90"), "coded").scores(made, prompts)
    assert not torch.equal(coded, exact.scores(made, prompts))
