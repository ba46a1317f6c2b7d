"""The few-shot draw is CoOp's, pixels are a function of bytes and view alone, the transform is open_clip's own."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.blackbox.endpoint import Endpoint
from pipeline.data.decode import decode
from pipeline.data.few_shot import draw, sample
from pipeline.data.images import Images, Preprocess
from pipeline.data.source import ParquetSource, opened
from pipeline.errors import DataError
from tests.support.lab import encoded, write_source

COOP = Path(__file__).resolve().parents[3] / "shared" / "coop"
needs_coop = pytest.mark.skipif(not COOP.is_dir(), reason=f"no published split files in {COOP}")


def plain(source: ParquetSource, split: str, n: int | None = None, augment: str = "crop_flip") -> Images:
    return Images.plain(source, split, source.rows_of(split)[:n], augment)


# --- the few-shot draw ---------------------------------------------------------------------------------------------


def drawn_digest(rng: random.Random, items: list[list[Any]], n: int) -> str:
    rows = [items[i] for i in sample(rng, [label for _, label, _ in items], n)]
    return hashlib.sha256("".join("\t".join(map(str, row)) + "\n" for row in rows).encode()).hexdigest()


@needs_coop
@pytest.mark.parametrize("name", ["DescribableTextures", "EuroSAT", "OxfordFlowers", "OxfordPets"])
def test_the_draw_equals_the_published_index_files(name: str) -> None:
    published = json.loads((COOP / "few_shot_digests.json").read_text())[name]["few_shot"]
    items = json.loads((COOP / f"split_zhou_{name}.json").read_text())
    assert len(published) == 15
    for key, wanted in published.items():
        shots, seed = (int(part.split("-")[i]) for part, i in zip(key.split("/"), (0, 1), strict=True))
        rng = random.Random(seed)
        assert drawn_digest(rng, items["train"], shots) == wanted["train"], key
        assert drawn_digest(rng, items["val"], min(shots, 4)) == wanted["val"], key


def test_classes_are_drawn_in_order_of_first_appearance() -> None:
    labels = [2, 0, 2, 1, 0, 2, 1, 0]
    rng = random.Random(5)
    wanted = [*rng.sample([0, 2, 5], 2), *rng.sample([1, 4, 7], 2), *rng.sample([3, 6], 2)]
    assert sample(random.Random(5), labels, 2) == wanted


def test_a_split_draws_train_first_and_val_after_it_from_one_generator(icons: ParquetSource) -> None:
    split = draw(icons, "icons", shots=8, seed=3, validation="min4")
    rng = random.Random(3)
    for name, rows, n in (("train", split.train, 8), ("val", split.val, 4)):
        found = icons.rows_of(name)
        assert rows == tuple(found[sample(rng, icons.labels[found].tolist(), n)].tolist())
        labels, counts = np.unique(icons.labels[list(rows)], return_counts=True)
        assert len(labels) == len(icons.classnames) and set(counts) == {n}


def test_validation_does_not_change_the_training_images(icons: ParquetSource) -> None:
    with_val, without = (draw(icons, "icons", 4, 1, rule) for rule in ("min4", "none"))
    assert with_val.train == without.train and without.val == ()
    assert with_val.digest(icons) != without.digest(icons)


@dataclass(frozen=True)
class Rows:
    """Rows with labels and splits: the train rows first, then as many test rows, then four val rows of each class."""

    counts: tuple[int, ...]
    """Train rows of each class."""

    @property
    def classnames(self) -> tuple[str, ...]:
        return tuple(f"class {label}" for label in range(len(self.counts)))

    @property
    def labels(self) -> np.ndarray:
        train = np.random.default_rng(0).permutation(np.repeat(np.arange(len(self.counts)), self.counts))
        return np.concatenate([train, train, np.repeat(np.arange(len(self.counts)), 4)])

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train", "test", "val")

    def rows_of(self, split: str) -> np.ndarray:
        n = sum(self.counts)
        return {"train": np.arange(n), "test": np.arange(n, 2 * n), "val": np.arange(2 * n, len(self.labels))}[split]


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 20), min_size=2, max_size=8).filter(any),
    shots=st.integers(1, 16),
    seed=st.integers(0, 2**63 - 1),
)
def test_an_imbalanced_draw_has_as_many_train_images_as_a_balanced_one(
    counts: list[int], shots: int, seed: int
) -> None:
    source = Rows(tuple(counts))
    split = draw(source, "d", shots, seed, "min4", "take_all", balanced=False)
    assert len(split.train) == len(set(split.train)) == min(shots * len(counts), sum(counts))
    assert set(split.train) <= set(source.rows_of("train").tolist())
    assert set(np.bincount(source.labels[list(split.val)])) == {min(shots, 4)}  # as in a balanced draw
    assert draw(source, "d", shots, seed, "none", "take_all", balanced=False).train == split.train


def test_the_class_shares_of_an_imbalanced_draw_are_uniform_on_the_simplex() -> None:
    source, n_classes, shots = Rows((200,) * 10), 10, 4
    counts = []
    for seed in range(500):
        train = draw(source, "d", shots, seed, "none", balanced=False).train
        counts.append(np.bincount(source.labels[list(train)], minlength=n_classes))
    # all counts with a sum of n are equally likely: P(class missing) and the variance follow
    n = shots * n_classes
    missing = n_classes * (n_classes - 1) / (n + n_classes - 1)
    assert np.mean([(c == 0).sum() for c in counts]) == pytest.approx(missing, abs=0.2)
    variance = shots * (shots + 1) * (n_classes - 1) / (n_classes + 1)
    assert np.var(counts) == pytest.approx(variance, rel=0.1)
    assert np.mean(counts, axis=0) == pytest.approx([shots] * n_classes, abs=0.7)


@pytest.mark.parametrize(
    ("counts", "wanted"),
    [((5, 1), "8 train images requested from 'd', but it has 6: set shots to 3 or fewer"), ((1, 0), "add train")],
)
def test_an_imbalanced_draw_of_too_few_images_says_what_to_type(counts: tuple[int, ...], wanted: str) -> None:
    source = Rows(counts)
    with pytest.raises(DataError) as caught:
        draw(source, "d", 4, 1, "none", balanced=False)
    said = str(caught.value)
    assert wanted in said
    if "set shots to" in said:
        assert len(draw(source, "d", 3, 1, "none", balanced=False).train) == 6
    assert len(draw(source, "d", 4, 1, "none", "take_all", balanced=False).train) == sum(counts)


def test_another_seed_or_shot_count_gives_another_split(icons: ParquetSource) -> None:
    digests = {draw(icons, "icons", shots, seed, "min4").digest(icons) for shots in (1, 4) for seed in (0, 1, 2)}
    assert len(digests) == 6
    assert draw(icons, "icons", 4, 1, "min4").digest(icons) == draw(icons, "icons", 4, 1, "min4").digest(icons)


def test_a_class_with_too_few_images_is_named(tmp_path: Path) -> None:
    image = encoded(Image.new("RGB", (4, 4)))
    splits = ["train"] * 5 + ["val"] * 2
    source = write_source(tmp_path / "d.parquet", [image] * 7, [0, 0, 0, 1, 1, 0, 1], splits, ["ant", "bee"])
    with pytest.raises(DataError, match=r"3 train images a class requested from 'd', but class 'bee' has 2: set"):
        draw(source, "d", 3, 1, "min4")
    with pytest.raises(DataError, match=r"2 val images a class requested from 'd', but class 'ant' has 1"):
        draw(source, "d", 2, 1, "min4")
    assert len(draw(source, "d", 2, 1, "none").train) == 4


@pytest.mark.parametrize(
    ("train", "val", "shots", "wanted"),
    [
        ([3, 2], [3, 3], 3, "'b' has 2: set shots to 2 or fewer, or data.small_classes=take_all"),
        ([3, 0], [3, 3], 1, "'b' has 0: add train images, or remove the class (farebox data check names all)"),
        ([1, 2, 0], [1, 1, 1], 3, "'a' has 1: add train images, or remove the class (far"),
        ([4, 4], [2, 1], 2, "'b' has 1: set shots to 1 or fewer, or validation=none, or data.small_classes=take_all"),
        ([4, 4], [2, 0], 2, "'b' has 0: validation=none"),
        ([6, 5], [0, 0], 4, "'a' has 2: set shots to 2 or fewer, or validation=none, or data.small"),
        ([4, 4], [0, 0], 4, "'a' has 0: set shots to 2 or fewer, or validation=none"),
        ([1, 1], [0, 0], 1, "'a' has 0: validation=none (2 such classes)"),
    ],
)  # fmt: skip
def test_the_advice_about_classes_with_too_few_images_works(
    tmp_path: Path, train: list[int], val: list[int], shots: int, wanted: str
) -> None:
    labels = [y for counts in (train, val) for y, n in enumerate(counts) for _ in range(n)]
    splits = ["train"] * sum(train) + ["val"] * sum(val)
    images = [encoded(Image.new("RGB", (4, 4)))] * len(labels)
    source = write_source(tmp_path / "d.parquet", images, labels, splits, ["a", "b", "c"][: len(train)])
    with pytest.raises(DataError) as caught:
        draw(source, "d", shots, 1, "min4")
    said = str(caught.value)
    assert wanted in said
    if "set shots to" in said:
        draw(source, "d", int(said.split("set shots to ")[1].split()[0]), 1, "min4")
    if "validation=none" in said:
        draw(source, "d", shots, 1, "none")
    if "take_all" in said:
        draw(source, "d", shots, 1, "min4", "take_all")


def test_a_split_that_does_not_exist_is_named_with_those_that_do(tmp_path: Path) -> None:
    source = write_source(tmp_path / "d.parquet", [encoded(Image.new("RGB", (4, 4)))], [0], ["test"], ["ant"])
    with pytest.raises(DataError, match=r"'d' has no train split \(its splits: test\)"):
        draw(source, "d", 1, 1, "min4")


# --- the source ----------------------------------------------------------------------------------------------------


def test_a_missing_or_changed_or_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data file at"):
        ParquetSource(str(tmp_path / "none.parquet"), "0" * 64).labels  # noqa: B018
    path = tmp_path / "bad.parquet"
    path.write_bytes(b"not parquet")
    with pytest.raises(DataError, match="the card says 000000000000"):
        ParquetSource(str(path), "0" * 64).labels  # noqa: B018
    with pytest.raises(DataError, match="not a readable Parquet file"):
        ParquetSource(str(path), hashlib.sha256(b"not parquet").hexdigest()).labels  # noqa: B018


def test_images_are_pickled_by_reference(icons: ParquetSource) -> None:
    images = plain(icons, "test", 100)
    assert len(images.keys) == 100  # opens the file
    payload = pickle.dumps(images)
    assert len(payload) < 5_000
    back = pickle.loads(payload)
    assert back.keys == images.keys and opened(back.source) is opened(icons)


# --- images and views ----------------------------------------------------------------------------------------------


def test_rows_are_selected_in_the_given_order(icons: ParquetSource) -> None:
    images = plain(icons, "test", 20)
    order = torch.tensor([7, 0, 7, 19])
    for rows in (order, order.tolist(), order.numpy()):
        assert images[rows].keys == [images.keys[i] for i in order]
    assert images[5:9].keys == images.keys[5:9]
    assert images[torch.arange(20) < 3].keys == images.keys[:3]
    assert len(images[[]]) == 0


def test_views_are_view_major_and_different_from_each_other(icons: ParquetSource) -> None:
    images = plain(icons, "train", 6)
    views = images.views(3, seed=2)
    assert len(views) == 18
    for v in range(3):
        assert [key.split("/")[0] for key in views[v * 6 : v * 6 + 6].keys] == images.keys
    pixels = Preprocess(32, (0.5,) * 3, (0.5,) * 3).pixels(views)
    assert len({p.numpy().tobytes() for p in pixels}) == 18


def test_views_depend_on_the_seed(icons: ParquetSource) -> None:
    images = plain(icons, "train", 4)
    assert not set(images.views(5, seed=0).keys) & set(images.views(5, seed=1).keys)
    assert images.views(5, seed=1).keys == images.views(5, seed=1).keys
    assert images.views(2, seed=1).keys == images.views(5, seed=1).keys[:8]
    assert images.views(2).digest != images.views(2, seed=1).digest != images.digest


def test_a_view_does_not_depend_on_other_images(icons: ParquetSource) -> None:
    rule = Preprocess(32, (0.5,) * 3, (0.5,) * 3)
    views = plain(icons, "train", 5).views(4, seed=1)
    whole = rule.pixels(views)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rule.pixels(views[order]), whole[order])
    assert torch.equal(rule.pixels(views[[13]]), whole[13:14])
    reversed_first = plain(icons, "train", 5)[[4, 3, 2, 1, 0]].views(4, seed=1)
    assert torch.equal(rule.pixels(reversed_first)[:5], whole[:5].flip(0))


def test_only_crop_flip_flips(tmp_path: Path) -> None:
    left_black = Image.new("RGB", (32, 32), "white")
    left_black.paste("black", (0, 0, 16, 32))
    source = write_source(tmp_path / "d.parquet", [encoded(left_black)], [0], ["train"], ["half"])
    rule = Preprocess(16, (0.0,) * 3, (1.0,) * 3)
    darker_left = {
        augment: [
            bool(p[:, :, 0].mean() < p[:, :, -1].mean())
            for p in rule.pixels(plain(source, "train", 1, augment).views(40))
        ]
        for augment in ("crop", "crop_flip")
    }
    assert all(darker_left["crop"])
    assert 5 < sum(darker_left["crop_flip"]) < 35


def test_views_of_views_and_zero_views_are_rejected(icons: ParquetSource) -> None:
    images = plain(icons, "train", 2)
    with pytest.raises(ValueError, match="already views"):
        images.views(2).views(2)
    with pytest.raises(ValueError, match="0 views requested"):
        images.views(0)


def test_thumbnails_are_grey_means_of_the_plain_image(tmp_path: Path) -> None:
    image = Image.new("L", (4, 4), 0)
    image.paste(200, (0, 0, 2, 4))
    source = write_source(tmp_path / "d.parquet", [encoded(image)], [0], ["train"], ["half"])
    wanted = torch.tensor([[200.0, 0.0, 200.0, 0.0]]) / 255
    torch.testing.assert_close(plain(source, "train").pixels(2), wanted)


# --- the transform -------------------------------------------------------------------------------------------------

SIZES = [(64, 64), (97, 75), (75, 97), (40, 31), (33, 200), (201, 64), (65, 64), (64, 83), (500, 333), (7, 5)]


def resized(icons: ParquetSource, folder: Path) -> ParquetSource:
    """Real images in many sizes."""
    images = [
        encoded(decode(icons.image_bytes(i)).resize(size, Image.Resampling.LANCZOS)) for i, size in enumerate(SIZES)
    ]
    return write_source(folder / "sizes.parquet", images, [0] * len(SIZES), ["test"] * len(SIZES), ["thing"])


def test_the_tiny_models_transform_equals_open_clips(tiny: Endpoint, icons: ParquetSource, tmp_path: Path) -> None:
    rule = tiny.model.preprocess  # type: ignore[attr-defined]
    _, _, theirs = open_clip.create_model_and_transforms("tiny", pretrained=None)
    source = resized(icons, tmp_path)
    images = plain(source, "test")
    for i, pixels in enumerate(rule.pixels(images)):
        torch.testing.assert_close(pixels, theirs(decode(images.bytes_of(i))), rtol=0, atol=1e-5, msg=str(SIZES[i]))


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_other_models_transforms_equal_those_of_open_clip(
    icons: ParquetSource, tmp_path: Path, mode: str, interpolation: str
) -> None:
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    theirs = open_clip.image_transform(
        48, is_train=False, mean=mean, std=std, resize_mode=mode, interpolation=interpolation
    )
    images = plain(resized(icons, tmp_path), "test")
    for i, pixels in enumerate(Preprocess(48, mean, std, mode, interpolation).pixels(images)):
        torch.testing.assert_close(pixels, theirs(decode(images.bytes_of(i))), rtol=0, atol=1e-5, msg=str(SIZES[i]))
