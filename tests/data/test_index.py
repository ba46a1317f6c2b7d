"""A data set is listed once and again after a change; opening it costs the same however large it is."""

from __future__ import annotations

import os
import pickle
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cards import DatasetCard
from pipeline.config.card_files import dataset_card
from pipeline.data import index
from pipeline.data.dataset import _SOURCES, check_card, reopen, source_of
from pipeline.data.few_shot import draw
from pipeline.data.file_keys import MANY, RECORD, FileKeyCache
from pipeline.data.indexed_source import FileSource
from pipeline.data.layouts.registry import LayoutSpec
from pipeline.data.listed_files import ListedFiles
from pipeline.data.source import Source, content_key
from pipeline.errors import DataError
from tests.support import miniature
from tests.support.miniature import picture, put


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has indexes of its own."""
    monkeypatch.setenv("FAREBOX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def made(root: Path, name: str) -> DatasetCard:
    miniature.make(root, name)
    return dataset_card(str(miniature.card(root, name, root / "card.yaml")), str(root))


def fresh(card: DatasetCard) -> FileSource:
    """The source as another process opens it."""
    spec = LayoutSpec(card.layout, card.path, card.classnames, card.split_seed)
    return FileSource(spec, index.index_of(spec).digest)


class Counter:
    """How often a function was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, where: object, name: str) -> None:
        self.calls, real = 0, getattr(where, name)

        def counted(*args: object, **options: object) -> object:
            self.calls += 1
            return real(*args, **options)

        monkeypatch.setattr(where, name, counted)


# --- listed once ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["imagenet", "dtd", "fgvc_aircraft"])
def test_a_folder_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    card = made(tmp_path, name)
    walks = Counter(monkeypatch, index, "read")
    first, second = fresh(card), fresh(card)
    assert first == second and walks.calls == 1
    assert first.labels.tolist() == second.labels.tolist()


def test_the_digest_does_not_depend_on_the_path(tmp_path: Path) -> None:
    card = made(tmp_path / "here", "imagenet")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    moved = dataset_card(str(tmp_path / "there/card.yaml"), str(tmp_path / "there"))
    assert fresh(card).digest == fresh(moved).digest
    assert fresh(card) != fresh(moved)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("imagenet", lambda f: put(f / f"images/train/{miniature.WNIDS[0]}/new.JPEG")),
        ("imagenet", lambda f: (f / f"images/val/{miniature.WNIDS[0]}/{miniature.WNIDS[0]}_0.JPEG").unlink()),
        ("imagenet", lambda f: miniature.text(f / "classnames.txt", *(f"{wnid} crane" for wnid in miniature.WNIDS))),
        ("dtd", lambda f: miniature.with_split_file(f, "images", "split_zhou_DescribableTextures.json", OTHER)),
        ("fgvc_aircraft", lambda f: miniature.text(f / "images_variant_val.txt", "0000001 707-320")),
    ],
    ids=["image added", "image removed", "class renamed", "split file", "official list"],
)  # fmt: skip
def test_a_change_is_detected(tmp_path: Path, name: str, change: object) -> None:
    card = made(tmp_path, name)
    before = fresh(card)
    change(Path(card.path))  # type: ignore[operator]
    after = fresh(card)
    assert after.digest != before.digest
    with pytest.raises(DataError, match="was changed after the run was planned: type the same command again"):
        FileSource(before.spec, before.digest).labels  # noqa: B018


OTHER = miniature.split_of(lambda c, i, _: f"{c}/{i}.jpg", ["banded", "dotted"])


@pytest.mark.parametrize("suffix", [".json", ".arrow"])
def test_an_index_with_a_flipped_byte_is_rebuilt(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, suffix: str
) -> None:
    card = made(tmp_path, "dtd")
    before = fresh(card)
    labels = before.labels.tolist()
    (path,) = (cache / "index").glob(f"*{suffix}")
    data = path.read_bytes()
    for at in range(0, len(data), len(data) // 40):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x04]) + data[at + 1 :])
        caplog.clear()
        after = fresh(card)
        assert after == before and after.labels.tolist() == labels
        (line,) = caplog.messages
        assert str(path) in line and line.endswith("the index is rebuilt")
        assert path.read_bytes() == data or suffix == ".json"
    for damaged in (b"", b"damage", data[:-1]):
        path.write_bytes(damaged)
        assert fresh(card) == before


def table(root: Path) -> DatasetCard:
    """A data set of 12 images in one Parquet file."""
    images = [picture(str(i), "PNG") for i in range(12)]
    columns = {"image": images, "label": ["cat", "dog"] * 6, "split": ["train"] * 4 + ["val"] * 4 + ["test"] * 4}
    pq.write_table(pa.table(columns), root / "own.parquet")
    return DatasetCard(
        name="own", layout="table", path=str(root / "own.parquet"), classes=2, train=4, val=4, test=4, template="a {}"
    )  # fmt: skip


def test_a_damaged_image_of_a_table_is_detected_when_it_is_read(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    card = table(tmp_path)
    _SOURCES.clear()
    source = source_of(card)
    images = [source.image_bytes(row) for row in range(12)]
    (path,) = (cache / "index").glob("*.images")
    data = path.read_bytes()
    assert data == b"".join(images)
    for at in (0, len(images[0]) + 5, len(data) - 1):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert [source.image_bytes(row) for row in range(12)] == images
        assert path.read_bytes() == data
    assert caplog.text.count("the index is rebuilt") == 3
    path.write_bytes(data[: len(data) // 2])  # cut under a reader
    assert [source.image_bytes(row) for row in range(12)] == images
    path.unlink()
    _SOURCES.clear()
    assert source_of(card).image_bytes(3) == images[3]


def test_the_index_of_another_data_set_is_not_used(tmp_path: Path, cache: Path) -> None:
    one, other = made(tmp_path / "one", "dtd"), made(tmp_path / "other", "imagenet")
    first, second = fresh(one).index.file, fresh(other).index.file
    wanted = fresh(one).labels.tolist()
    first.write_bytes(second.read_bytes())
    assert fresh(one).labels.tolist() == wanted


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = made(tmp_path, "dtd")
    monkeypatch.setenv("FAREBOX_CACHE", "/dev/null/cache")
    with pytest.raises(DataError, match=r"index of .* cannot be written to /dev/null/cache .*: set FAREBOX_CACHE="):
        fresh(card)


def test_a_source_is_small_when_it_is_pickled(tmp_path: Path) -> None:
    source = fresh(made(tmp_path, "imagenet"))
    source.keys_of(source.rows_of("test"))
    sent = pickle.dumps(source)
    assert len(sent) < 1_000
    assert pickle.loads(sent).keys_of([0]) == source.keys_of([0])


# --- what is known of a file ----------------------------------------------------------------------------------------


def test_an_image_is_read_once_for_its_key_and_again_after_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = made(tmp_path, "dtd")
    reads = Counter(monkeypatch, FileSource, "image_bytes")
    rows = fresh(card).rows_of("test")
    keys = fresh(card).keys_of(rows)
    assert reads.calls == len(rows) == 4
    assert keys == [content_key(fresh(card).image_bytes(row)) for row in rows]
    reads.calls = 0
    assert fresh(card).keys_of(rows) == keys and reads.calls == 0
    source = fresh(card)
    path = Path(source.where(rows[1]))
    same_size = bytearray(path.read_bytes())
    same_size[-3] ^= 1
    path.write_bytes(same_size)
    os.utime(path, ns=(1, 1))
    changed = fresh(card).keys_of(rows)
    assert reads.calls == 1 and [a == b for a, b in zip(keys, changed, strict=True)] == [True, False, True, True]


def test_an_image_that_changed_under_the_same_size_and_mtime_is_rejected(tmp_path: Path) -> None:
    card = made(tmp_path, "dtd")
    old = fresh(card).keys_of([0])
    path = Path(fresh(card).where(0))
    data, before = path.read_bytes(), path.stat()
    path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    source = fresh(card)
    assert source.keys_of([0]) == old
    with pytest.raises(DataError, match="was changed since it was hashed"):
        source.image_bytes(0)
    assert fresh(card).keys_of([0]) == [content_key(path.read_bytes())]


def test_a_plan_reads_only_used_images_and_the_next_plan_reads_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = made(tmp_path, "dtd")
    reads = Counter(monkeypatch, FileSource, "image_bytes")
    check_card(card)
    split = draw(source_of(card), "dtd", 1, 1, "min4")
    split.digest(source_of(card))
    assert reads.calls == 4 + 2 + 2  # test, one shot and one for val of two classes
    check_card(card)
    split.digest(source_of(card))
    assert reads.calls == 8


def test_reopening_a_data_set_reads_its_index_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = made(tmp_path, "dtd")
    builds, readings = Counter(monkeypatch, index, "_build"), Counter(monkeypatch, index, "_cached")
    source = reopen(card)
    assert (builds.calls, readings.calls) == (1, 2)  # the cached index, and the one that was built
    assert reopen(card) is source is source_of(card)
    assert (builds.calls, readings.calls) == (1, 3)


def test_a_dataset_is_pickled_as_its_card_and_rejected_after_a_change(tmp_path: Path) -> None:
    card = made(tmp_path, "dtd")
    dataset = check_card(card)
    sent = pickle.dumps(dataset)
    assert len(sent) < 2_000 and pickle.loads(sent) == dataset
    assert pickle.loads(sent).source is dataset.source
    miniature.with_split_file(Path(card.path), "images", "split_zhou_DescribableTextures.json", OTHER)
    _SOURCES.clear()
    with pytest.raises(DataError, match="was changed after the run was planned: type the same command again"):
        pickle.loads(sent).source  # noqa: B018


def test_a_file_with_another_size_than_indexed_is_named_and_listed_again(tmp_path: Path) -> None:
    card = made(tmp_path, "dtd")
    source = fresh(card)
    path = Path(source.where(0))
    path.write_bytes(picture("another", "PNG"))
    with pytest.raises(DataError, match="was changed since it was indexed: type the same command again"):
        source.keys_of([0])
    assert fresh(card).digest != source.digest
    path.unlink()
    with pytest.raises(DataError, match=r"cannot be read \(No such file or directory\): restore it"):
        source.image_bytes(0)


def test_record_files_are_merged_and_a_damaged_one_is_ignored(tmp_path: Path) -> None:
    folder = tmp_path / "known"
    records = np.zeros(MANY + 2, RECORD)
    records["row"], records["size"], records["mtime"] = np.arange(MANY + 2), 5, 9
    for i in range(MANY + 2):
        FileKeyCache(folder, 100).add(records[i : i + 1])
    (folder / "0.records").write_bytes(b"damage")
    sizes, mtimes = np.full(MANY + 2, 5), np.full(MANY + 2, 9)
    assert (FileKeyCache(folder, 100).find(records["row"], sizes, mtimes)["mtime"] == 9).all()
    assert len(list(folder.glob("*.records"))) <= 3
    assert (FileKeyCache(folder, 100).find(records["row"], sizes + 1, mtimes)["mtime"] == 0).all()


def test_a_record_file_with_a_flipped_byte_is_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "known"
    record = np.array([(1, 5, 9, True, 0, 0)], RECORD)
    FileKeyCache(folder, 3).add(record)
    (path,) = folder.iterdir()
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert FileKeyCache(folder, 3).find(np.array([1]), np.array([5]), np.array([9]))["mtime"].tolist() == [0]
        assert not path.exists()
    assert "removed, its images are hashed again" in caplog.text


def test_records_are_kept_in_memory_if_their_folder_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    there = FileKeyCache(Path("/dev/null/known"), 3)
    record = np.array([(1, 5, 9, True, 0, 0)], RECORD)
    there.add(record)
    assert "images are checked again the next time" in caplog.text
    assert there.find(np.array([1]), np.array([5]), np.array([9]))["readable"].all()


# --- size -----------------------------------------------------------------------------------------------------------


def many(root: Path, n: int) -> DatasetCard:
    """n images in ten class folders, all links of a few files."""
    seed = root / "seed"
    seed.mkdir(parents=True)
    (seed / "image").write_bytes(picture("one"))
    for c in range(10):
        folder = root / f"train/class{c}"
        folder.mkdir(parents=True)
        for i in range(n // 10):
            os.link(seed / "image", folder / f"{i:06d}.png")
    test = root / "test"
    for c in range(10):
        put(test / f"class{c}/0.png")
    shutil.rmtree(seed)
    return DatasetCard(
        name="many", layout="folder", path=str(root), classes=10, train=n, val=0, test=10, template="a {}"
    )  # fmt: skip


def work(card: DatasetCard, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int, int]:
    """Files looked at by the first start and by the second, and the second's memory, bytes at its peak."""
    looks, sizes = Counter(monkeypatch, Path, "stat"), Counter(monkeypatch, ListedFiles, "size")
    fresh(card)
    first, looks.calls, sizes.calls = looks.calls + sizes.calls, 0, 0
    tracemalloc.start()
    source: Source = fresh(card)
    draw(source, "many", 16, 1, "min4")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return first, looks.calls + sizes.calls, peak


def test_listing_is_linear_and_a_cached_index_reads_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (work(many(tmp_path / str(n), n), monkeypatch) for n in (2_000, 20_000))
    assert large[0] - small[0] == pytest.approx(18_000, abs=10)  # one look a file
    assert large[1] == small[1] < 100
    assert large[2] < 20_000 * 200
