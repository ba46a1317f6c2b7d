"""Images that a client made: what they cost, what the endpoint computes from them, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from methods.base import Access, Bill, Classes, PixelImages, SoftPrompts, eight_bits
from pipeline.blackbox import client
from pipeline.blackbox.client import Meter, MeteredBox
from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.local_pool import LocalPool
from pipeline.blackbox.request import Request, call_digest
from pipeline.budget import Limits, Phase
from pipeline.config.card_files import model_card
from pipeline.data.images import Images, Preprocess
from pipeline.data.made_images import MadeImages
from pipeline.data.source import ParquetSource
from pipeline.errors import AccessDenied, EndpointRefused, NonFiniteError
from pipeline.ledger.ledger import Ledger

NEEDED = Access.TEXT | Access.PIXELS | Access.SCORES
PLENTY = Limits(1_000, 100_000)
CLASSES = Classes(("star", "house", "umbrella"), "an icon of a {}.", ("{} icon", "a {}"))
ONE, TWO = CLASSES.prompts(), CLASSES.ensemble()


@pytest.fixture
def images(icons: ParquetSource) -> Images:
    return Images.plain(icons, "train", icons.rows_of("train")[:6], "crop_flip")


@pytest.fixture
def box(tiny: Endpoint, ledger: Ledger) -> MeteredBox:
    return metered(tiny, ledger)


def metered(endpoint: Endpoint, ledger: Ledger, access: Access = NEEDED, trial: str = "t") -> MeteredBox:
    ledger.reserve("s", trial, ["ceiling"], PLENTY)
    return MeteredBox(LocalPool(endpoint, ledger), "s", trial, access, PLENTY)


def noisy(images: Images, n_sets: int, size: int = 64) -> PixelImages:
    """Sets of the images with different noise."""
    noise = 0.2 * torch.randn(n_sets, len(images), 3, size, size, generator=torch.Generator().manual_seed(0))
    return PixelImages(images, eight_bits((images.array(size) + noise).clamp(0, 1)))


# --- arrays and 8 bits -----------------------------------------------------------------------------------------------


def test_an_array_is_the_models_8_bit_image_divided_by_255(images: Images) -> None:
    for some in (images, images.views(2, seed=3)):
        array = some.array(64)
        assert array.shape == (len(some), 3, 64, 64) and array.dtype == torch.float32
        rule = Preprocess(64, (0.5,) * 3, (0.5,) * 3)
        wanted = np.stack([np.asarray(rule.image(some, i)) for i in range(len(some))]).transpose(0, 3, 1, 2)
        assert np.array_equal(eight_bits(array).numpy(), wanted)
        assert torch.equal(array, torch.from_numpy(wanted.astype(np.float32) / 255))


def test_eight_bits_round_to_the_nearest_value_and_keep_each_of_the_256() -> None:
    values = torch.arange(256) / 255
    assert torch.equal(eight_bits(values), torch.arange(256, dtype=torch.uint8))
    assert eight_bits(torch.tensor([0.49 / 255, 0.51 / 255, 254.4 / 255])).tolist() == [0, 1, 254]
    for wrong in (-1e-6, 1.00001, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="outside"):
            eight_bits(torch.tensor([0.5, wrong]))


@pytest.mark.parametrize(
    "shape", [(5, 3, 64, 64), (2, 5, 3, 64, 64), (6, 1, 64, 64), (6, 3, 64, 32), (6, 64), (2, 2, 6, 3, 8, 8)]
)
def test_pixels_of_another_shape_or_type_are_not_images(images: Images, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        PixelImages(images, torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(ValueError, match="expected uint8"):
        PixelImages(images, torch.zeros(6, 3, 64, 64))


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("views", [False, True])
def test_the_plain_array_sent_back_has_the_bits_of_the_plain_image(
    box: MeteredBox, images: Images, views: bool
) -> None:
    some = images.views(2) if views else images
    plain = box.scores(some, TWO)
    sent = box.scores(PixelImages(some, eight_bits(some.array(box.image_size))), TWO)
    assert box.image_size == 64 and torch.equal(sent, plain)


def test_each_set_is_scored_under_its_prompts_and_one_of_either_under_all(box: MeteredBox, images: Images) -> None:
    sets = noisy(images, 2)
    singles = [PixelImages(images, pixels) for pixels in sets.pixels]
    wanted = torch.stack([box.scores(single, TWO) for single in singles])  # [set, prompt set, B, C]
    close = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(box.scores(sets, TWO), torch.stack([wanted[0, 0], wanted[1, 1]]), **close)
    torch.testing.assert_close(box.scores(sets, ONE), torch.stack([box.scores(s, ONE)[0] for s in singles]), **close)
    assert not torch.allclose(wanted[0], wanted[1], atol=0.05)
    images_of_sets = torch.cat([single.pixels for single in singles])
    twice = PixelImages(images[[*range(6), *range(6)]], images_of_sets)
    torch.testing.assert_close(box.scores(twice, ONE).view(2, 6, 3), box.scores(sets, ONE), **close)


def test_a_call_costs_one_request_per_set_and_a_row_per_image_and_set(box: MeteredBox, images: Images) -> None:
    for pixels, prompts, bill in (
        (noisy(images, 4), ONE, Bill(4, 24, 12, 72)),
        (noisy(images, 2), TWO, Bill(2, 12, 6, 36)),
        (noisy(images, 1), TWO, Bill(2, 12, 6, 36)),
    ):
        before = box.meter.paid
        scores = box.scores(pixels, prompts)
        assert scores.shape == (bill.requests, 6, 3)
        assert box.meter.paid == before + bill
    assert box.meter.computed_images == (4 + 2 + 1) * 6 and box.meter.cache_hits == 0


def test_a_call_on_images_made_from_validation_images_is_billed_to_validate(box: MeteredBox, images: Images) -> None:
    box.scores(noisy(replace(images, split="val"), 2), ONE)
    assert box.meter.bills[Phase.VALIDATE] == Bill(2, 12, 6, 36) and box.meter.bills[Phase.ADAPT] == Bill()


def test_features_of_made_images_are_not_stored(tmp_path: Path, ledger: Ledger, images: Images) -> None:
    endpoint = Endpoint(model_card("tiny"), tmp_path)
    box = metered(endpoint, ledger)
    first, again = (box.scores(noisy(images, 2), ONE) for _ in range(2))
    assert torch.equal(first, again) and box.meter.computed_images == 24
    assert len(endpoint.store()) == 0


def test_blocks_by_the_bytes_of_a_request_are_one_charge_and_give_the_same_scores(
    box: MeteredBox, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = noisy(images, 3)
    whole = box.scores(sets, ONE)
    row = 3 * 3 * 64 * 64
    monkeypatch.setattr(client, "BLOCK_BYTES", 4 * row + 1)
    sent: list[int] = []
    send = box.pool.send
    monkeypatch.setattr(box.pool, "send", lambda request: sent.append(len(request.images)) or send(request))
    blocks = {rows.start: block for rows, block in box.score_blocks(sets, ONE)}
    assert sent == [4, 2] and list(blocks) == [0, 4]
    torch.testing.assert_close(torch.cat(list(blocks.values()), dim=1), whole)
    assert box.meter.call == 2 and box.meter.paid == Bill(3, 18, 9, 54) * 2
    monkeypatch.setattr(client, "BLOCK_BYTES", row - 1)
    with pytest.raises(EndpointRefused, match=f"one image in all sets has {row:,} bytes.*send fewer sets"):
        box.scores(sets, ONE)


def test_a_block_of_the_papers_size_has_at_most_64_mebibytes() -> None:
    sizes = [rows.stop - rows.start for rows in client._blocks(128, 10 * 10, sent=10 * 3 * 224 * 224)]
    assert sizes == [44, 44, 40] and client.BLOCK_BYTES >= 44 * 10 * 3 * 224 * 224


# --- identity --------------------------------------------------------------------------------------------------------


def test_calls_differ_by_pixels_shape_and_base(images: Images) -> None:
    sets = noisy(images, 2)
    changed = sets.pixels.clone()
    changed[1, 5, 2, 63, 63] ^= 1
    variants: list[Images | MadeImages] = [images]
    variants += [MadeImages.of(PixelImages(images, pixels)) for pixels in (sets.pixels, changed, sets.pixels[0])]
    variants.append(MadeImages.of(PixelImages(images[[1, 0, 2, 3, 4, 5]], sets.pixels)))
    variants.append(MadeImages(images, sets.pixels.numpy().reshape(1, 12, 3, 64, 64)))
    digests = [call_digest("scores", some, ONE) for some in variants]
    assert len(set(digests)) == len(variants)
    assert call_digest("scores", MadeImages.of(PixelImages(images, sets.pixels.clone())), ONE) == digests[1]


def test_what_is_sent_is_a_copy(images: Images) -> None:
    sets = noisy(images, 1)
    made = MadeImages.of(sets)
    before = made.digest
    sets.pixels.zero_()
    assert made.digest == before and made.pixels_PB3SS.any()


# --- refusals --------------------------------------------------------------------------------------------------------


def test_wrong_sizes_numbers_of_sets_and_calls_are_refused_and_cost_nothing(box: MeteredBox, images: Images) -> None:
    three = SoftPrompts(torch.zeros(3, 2, 1), CLASSES.names)
    for pixels, prompts, error in (
        (noisy(images, 2, size=32), ONE, r"pixels \(2, 6, 3, 32, 32\) of uint8, expected uint8 \[P, B, 3, 64, 64\]"),
        (noisy(images, 2), three, "2 sets of images and 3 prompt sets, expected equal numbers, or one of either"),
        (PixelImages(images[[]], torch.zeros(0, 3, 64, 64, dtype=torch.uint8)), ONE, "no images"),
        (PixelImages(images, torch.zeros(0, 6, 3, 64, 64, dtype=torch.uint8)), ONE, "no images"),
    ):
        with pytest.raises(EndpointRefused, match=error) as refused:
            box.scores(pixels, prompts)
        assert len(str(refused.value)) <= 300
    with pytest.raises(TypeError, match="expected the task's images, got PixelImages"):
        box.image_features(noisy(images, 1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected the task's images, got str"):
        box.scores(PixelImages("abcdef", noisy(images, 1).pixels), ONE)  # type: ignore[arg-type]
    assert box.meter == Meter()


def test_the_endpoint_refuses_features_of_made_images(tiny: Endpoint, images: Images, ledger: Ledger) -> None:
    charge = metered(tiny, ledger)._charged("scores", images, ONE).charge
    for request in (
        Request("image_features", MadeImages.of(noisy(images, 1)), None, charge),
        Request("scores", MadeImages(images, np.zeros((1, 6, 3, 64, 64), np.float32)), ONE, charge),
    ):
        with pytest.raises(EndpointRefused, match=r"task's images only|float32, expected uint8"):
            tiny.check(request)


@pytest.mark.parametrize("by", ["the method declares", "the model grants"])
def test_pixels_need_their_access(features: Path, ledger: Ledger, images: Images, by: str) -> None:
    some = Access.SOFT | Access.FEATURES | Access.GRADIENTS
    declares, grants = (some, NEEDED) if by == "the method declares" else (NEEDED, some)
    endpoint = Endpoint(replace(model_card("fake"), grant=grants.label), features)
    box = metered(endpoint, ledger, declares)
    with pytest.raises(AccessDenied, match=f"TEXT.PIXELS.SCORES, {by}"):
        box.scores(noisy(images, 1, size=box.image_size), ONE)
    assert box.meter == Meter() and box.image_size == 8


def test_a_feature_that_is_not_finite_names_the_base_image(
    tiny: Endpoint, ledger: Ledger, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(pixels: np.ndarray, codec: str) -> Tensor:
        features = torch.ones(len(pixels), tiny.info.feature_dim)
        features[8, 0] = torch.nan
        return features

    monkeypatch.setattr(tiny.model, "encode_pixels", broken)
    box = metered(tiny, ledger)
    with pytest.raises(NonFiniteError, match="an image made from .*" + images.where(2).split()[-1]):
        box.scores(noisy(images, 2), ONE)  # row 8 of 12 is image 2 of the second set
    assert box.meter == Meter()


def test_the_toy_model_reads_8_bit_images_as_gray(fake: Endpoint, ledger: Ledger, images: Images) -> None:
    box = metered(fake, ledger)
    gray = np.stack([np.asarray(images.decoded(i).convert("L").resize((8, 8))) for i in range(len(images))])
    pixels = torch.from_numpy(np.repeat(gray[:, None], 3, axis=1).copy())
    assert torch.equal(box.scores(PixelImages(images, pixels), ONE), box.scores(images, ONE))
