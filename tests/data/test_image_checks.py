"""The check of a data set's images before a run: it decodes what a run decodes, once, and the run agrees with it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.blackbox.endpoint import Endpoint
from pipeline.cards import DatasetCard
from pipeline.config.card_files import dataset_card
from pipeline.data import images, source
from pipeline.data.dataset import check_card, reopen, source_of
from pipeline.data.images import Images
from pipeline.data.inspect import examine
from pipeline.data.source import Source
from pipeline.errors import ConfigError, DataError
from tests.support.lab import encoded, write_card, write_source

SPLITS = ["train"] * 4 + ["val"] * 4 + ["test"] * 4
GOOD = encoded(Image.new("L", (8, 8), 200))
CUT = encoded(Image.effect_noise((40, 40), 90))[:-200]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of each test's own."""
    monkeypatch.setenv("FAREBOX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make(folder: Path, kind: str, content: list[bytes], bits: int | None = None) -> DatasetCard:
    """A card of 12 images of two classes, as files or as rows of a table."""
    where = folder / "images"
    if kind == "folder":
        for i, (data, split) in enumerate(zip(content, SPLITS, strict=True)):
            path = where / split / f"class{i % 2}" / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    else:
        where = folder / "images.parquet"
        table = pa.table({"image": content, "label": [f"class{i % 2}" for i in range(12)], "split": SPLITS})
        pq.write_table(table, where)
    sizes = dict.fromkeys(("train", "val", "test"), 4)
    return DatasetCard(name="own", layout=kind, path=str(where), classes=2, template="a {}", bits=bits, **sizes)


def new_process() -> None:
    """Forget what this process has opened."""
    source._opened.cache_clear()


def decoded_by(monkeypatch: pytest.MonkeyPatch, card: DatasetCard) -> int:
    """How many images a new look at a data set decodes."""
    calls: list[bytes] = []
    examine = images.examine
    with monkeypatch.context() as patch:
        patch.setattr(images, "examine", lambda data, bits: calls.append(data) or examine(data, bits))
        check_card(card)
    return len(calls)


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_an_image_is_decoded_by_the_first_check_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    card = make(tmp_path, kind, [GOOD] * 12)
    assert [decoded_by(monkeypatch, card) for _ in range(2)] == [4, 0]
    new_process()
    assert decoded_by(monkeypatch, card) == 0
    monkeypatch.setattr("pipeline.data.file_keys.RULES", -1)
    new_process()
    assert decoded_by(monkeypatch, card) == 4, "another version of the decoder"


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_an_image_that_cannot_be_decoded_is_named_by_every_check(tmp_path: Path, kind: str) -> None:
    card = make(tmp_path, kind, [GOOD] * 11 + [CUT])
    name = "images/test/class1/11.png" if kind == "folder" else "images.parquet#11 of"
    for _ in range(2):
        with pytest.raises(DataError, match=rf"data set 'own': .*{name}.* is not a readable image \(.*truncated"):
            check_card(card)
    report = examine(card, True, print)
    assert report.state == "findings" and len(report.unreadable) == 1 and name in report.unreadable[0]


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_the_error_while_encoding_names_the_image_too(tmp_path: Path, kind: str, fake: Endpoint) -> None:
    card = make(tmp_path, kind, [GOOD] * 11 + [CUT])
    own = source_of(card)
    with pytest.raises(DataError, match=r"11.* is not a readable image \(.* bytes, image file is truncated"):
        fake.model.encode_images(Images.plain(own, "test", own.rows_of("test"), "crop"))


# --- bits of 16-bit images -------------------------------------------------------------------------------------------


def deep(peak: int) -> bytes:
    """A 16-bit grey image from black to `peak`."""
    return encoded(Image.fromarray(np.linspace(0, peak, 64).astype(np.uint16).reshape(8, 8)))


@pytest.mark.parametrize("kind", ["folder", "table"])
@pytest.mark.parametrize(("peak", "bits"), [(1023, 10), (4000, 12), (16_383, 14), (32_767, 15), (200, 8), (90, 8)])
def test_16_bit_images_that_use_fewer_bits_are_rejected(tmp_path: Path, kind: str, peak: int, bits: int) -> None:
    card = make(tmp_path, kind, [deep(peak)] + [deep(peak // 2)] * 11)
    with pytest.raises(DataError, match=rf"'own': the greatest value of its 16-bit images is {peak:,} of 65,535.*"):
        check_card(card)
    report = examine(card, True, print)
    assert f"set bits: {bits} in its card" in report.findings[0]
    for stated in (bits, 16):
        said = dataclasses.replace(card, bits=stated)
        check_card(said)
        assert not any("16-bit" in finding for finding in examine(said, True, print).findings)


def test_the_maximum_value_is_that_of_the_whole_data_set(tmp_path: Path) -> None:
    check_card(make(tmp_path, "folder", [deep(60_000)] + [deep(4000)] * 11))


def test_8_bit_images_do_not_count_towards_the_maximum_value(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is 4,000 of 65,535"):
        check_card(make(tmp_path, "folder", [GOOD] * 11 + [deep(4000)]))


def test_bits_are_part_of_the_digest_and_of_feature_keys(tmp_path: Path) -> None:
    found: list[tuple[Source, Images]] = []
    for bits in (None, 12, 16):
        own = reopen(make(tmp_path, "folder", [deep(4000)] * 12, bits))
        found.append((own, Images.plain(own, "test", own.rows_of("test"), "crop")))
    assert len({own.digest for own, _ in found}) == 3
    assert len({key for _, of in found for key in of.keys}) == 3
    assert len({of.digest for _, of in found}) == 3
    peaks = [np.asarray(of.decoded(0)).max() for _, of in found]
    assert peaks == [4000 >> 8, 4000 >> 4, 4000 >> 8]


def test_bits_must_be_from_8_to_16(tmp_path: Path) -> None:
    own = write_source(tmp_path / "own.parquet", [deep(4000)] * 12, [0, 1] * 6, SPLITS, ["a", "b"])
    sizes = {"classes": 2, "train": 4, "val": 4, "test": 4}
    card = dataset_card(str(write_card(tmp_path, own, bits=12, **sizes)))
    check_card(card)
    assert source_of(card).digest != own.digest
    for bits in (7, 17, "twelve"):
        with pytest.raises(ConfigError, match=rf"bits={bits}: expected a whole number"):
            dataset_card(str(write_card(tmp_path, own, bits=bits, **sizes)))


def test_embedded_sets_are_checked_without_being_decoded_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = dataset_card("digits")
    new_process()
    assert decoded_by(monkeypatch, card) == card.test
    new_process()
    assert decoded_by(monkeypatch, card) == 0
