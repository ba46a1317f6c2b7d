"""The endpoint and its meter: an answer depends on its request alone, and what may not be paid for is not answered."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import time
import tracemalloc
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from methods.base import Access, Bill, Classes, Lora, LowRank, SoftPrompts, TextPrompts
from pipeline.blackbox import client, stored_images
from pipeline.blackbox.client import Meter, MeteredBox
from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.feature_store import FeatureStore
from pipeline.blackbox.local_pool import LocalPool
from pipeline.blackbox.model import device_for
from pipeline.blackbox.request import Kind, Request, Response, price
from pipeline.budget import Limits, Phase
from pipeline.cards import ModelCard
from pipeline.config.card_files import model_card
from pipeline.data.images import Images
from pipeline.data.source import ParquetSource
from pipeline.errors import AccessDenied, BudgetExceeded, ConfigError, DataError, EndpointRefused
from pipeline.files import UNSEALED, seal
from pipeline.ledger.ledger import Ledger
from pipeline.ledger.records import Charge
from tests.support.lab import stored_rows, write_source

FREE = Charge("s", "t", 0, "d", Phase.ADAPT, Bill())
LATER = replace(FREE, call=1)
BLACK = Access.SOFT | Access.FEATURES
ALL = BLACK | Access.GRADIENTS | Access.LORA
PLENTY = Limits(1_000, 100_000)
CLASSES = Classes(("star", "house", "umbrella"), "an icon of a {}.", ("{} icon", "a {}"))


@pytest.fixture
def images(icons: ParquetSource) -> Images:
    return Images.plain(icons, "test", icons.rows_of("test")[:40], "crop")


def metered(
    endpoint: Endpoint,
    ledger: Ledger,
    allotment: Limits = PLENTY,
    access: Access = ALL,
    trial: str = "t",
    meter: Meter | None = None,
) -> MeteredBox:
    ledger.reserve("s", trial, ["ceiling"], allotment)
    return MeteredBox(LocalPool(endpoint, ledger), "s", trial, access, allotment, meter)


def context(endpoint: Endpoint, p: int = 2, length: int = 3, seed: int = 0) -> SoftPrompts:
    g = torch.Generator().manual_seed(seed)
    return SoftPrompts(0.1 * torch.randn(p, length, endpoint.info.token_dim, generator=g), CLASSES.names, ".")


def ask(endpoint: Endpoint, kind: Kind, images: Images | None, prompts: Any = None) -> np.ndarray:
    request = Request(kind, images, prompts, FREE)
    endpoint.check(request)
    return endpoint.compute(request).values.copy()


def fresh(folder: Path, card: ModelCard | None = None) -> Endpoint:
    return Endpoint(card or model_card("tiny"), folder)


# --- an answer depends on its request alone ------------------------------------------------------------------------


def test_image_features_are_the_same_bits_in_any_order_and_company(tmp_path: Path, images: Images) -> None:
    cold = fresh(tmp_path / "a")
    whole = ask(cold, "image_features", images)
    order = np.random.default_rng(0).permutation(40)
    shuffled = fresh(tmp_path / "b")
    for part in (order[:1], order[1:8], order[3:40]):  # overlapping, of many sizes, in another order, from cold
        np.testing.assert_array_equal(ask(shuffled, "image_features", images[part]), whole[part])
    views = images.views(2, seed=5)
    mixed = ask(shuffled, "image_features", views[[70, 3, 41]])
    np.testing.assert_array_equal(mixed, ask(cold, "image_features", views)[[70, 3, 41]])


@pytest.mark.parametrize("soft", [False, True])
def test_scores_are_the_same_bits_alone_after_others_and_from_any_store(
    tmp_path: Path, images: Images, soft: bool
) -> None:
    first = fresh(tmp_path / "a")
    prompts = context(first) if soft else CLASSES.ensemble()
    alone = ask(first, "scores", images, prompts)
    again = ask(first, "scores", images, prompts)

    busy = fresh(tmp_path / "b")
    ask(busy, "image_features", images[5:17].views(1))
    ask(busy, "scores", images[::-1], context(busy, p=4, seed=9))
    ask(busy, "text_features", None, CLASSES.prompts("art of a {}"))
    after_others = ask(busy, "scores", images, prompts)

    warm = fresh(tmp_path / "a")  # a new process over the first one's store
    for found in (again, after_others, ask(warm, "scores", images, prompts)):
        np.testing.assert_array_equal(found, alone)


def test_text_features_do_not_depend_on_what_was_asked_before(tmp_path: Path, tiny: Endpoint) -> None:
    requests = [context(tiny, p, length, seed) for p, length, seed in ((1, 2, 0), (5, 2, 1), (2, 4, 0))]
    one, other = fresh(tmp_path / "a"), fresh(tmp_path / "b")
    forward = [ask(one, "text_features", None, r) for r in requests]
    backward = [ask(other, "text_features", None, r) for r in reversed(requests)]
    for a, b in zip(forward, reversed(backward), strict=True):
        np.testing.assert_array_equal(a, b)


def test_scores_are_the_logit_scale_times_the_features_cosine(tiny: Endpoint, images: Images) -> None:
    image_BD = torch.from_numpy(ask(tiny, "image_features", images))
    text_PCD = torch.from_numpy(ask(tiny, "text_features", None, CLASSES.ensemble()))
    torch.testing.assert_close(image_BD.norm(dim=1), torch.ones(40))
    wanted = tiny.info.logit_scale * torch.einsum("bd,pcd->pbc", image_BD, text_PCD)
    found = torch.from_numpy(ask(tiny, "scores", images, CLASSES.ensemble()))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_what_was_computed_is_told_and_nothing_is_computed_twice(tmp_path: Path, images: Images) -> None:
    endpoint = fresh(tmp_path)
    request = Request("scores", images, CLASSES.prompts(), FREE)
    first, second = endpoint.compute(request), endpoint.compute(replace(request, charge=LATER))
    distinct = len(set(images.keys))
    assert (first.computed_images, first.computed_prompts) == (distinct, 3)
    assert (second.computed_images, second.computed_prompts, second.cache_hits) == (0, 0, 40)
    third = fresh(tmp_path).compute(Request("image_features", images[[1, 2]], None, LATER))
    assert (third.computed_images, third.cache_hits) == (0, 2)


def test_a_repeated_call_tells_the_images_that_were_encoded_for_it(
    tmp_path: Path, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request("image_features", images, None, FREE)
    fresh(tmp_path).compute(replace(request, images=images[:7], charge=LATER))
    first, again = fresh(tmp_path), fresh(tmp_path)  # of two processes
    distinct = len(set(images.keys)) - len(set(images[:7].keys))
    for endpoint in (first, first, again):  # the second answer is from memory, the third from the store
        answer = endpoint.compute(request)
        assert (answer.computed_images, answer.cache_hits) == (distinct, 40 - distinct)
    monkeypatch.setattr(
        "pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    unstored = fresh(tmp_path / "full").compute(request)
    assert unstored.computed_images == len(set(images.keys))
    np.testing.assert_array_equal(unstored.values, answer.values)


def _encode_slowly(folder: Path, images: Images, number: int, barrier: Any, results: Any) -> None:
    """Encode images in parts of 4, as one of several processes that start together."""
    torch.set_num_threads(1)
    stored_images.STORED_AT_ONCE = 4
    endpoint = fresh(folder, model_card("fake"))
    encode = endpoint.model.encode_images

    def slowly(images: Images, codec: str = "float") -> Tensor:
        time.sleep(0.02)
        return encode(images, codec)

    endpoint.model.encode_images = slowly  # type: ignore[method-assign]
    barrier.wait(60)
    answer = endpoint.compute(Request("image_features", images, None, replace(FREE, call=number)))
    results.put((answer.computed_images, answer.values))


def test_processes_that_share_a_store_encode_each_image_once(tmp_path: Path, images: Images) -> None:
    wanted = ask(fresh(tmp_path / "alone", model_card("fake")), "image_features", images)
    fork = multiprocessing.get_context("fork")
    barrier, results = fork.Barrier(4), fork.Queue()
    folder = tmp_path / "shared"
    arguments = [(folder, images, number, barrier, results) for number in range(4)]
    processes = [fork.Process(target=_encode_slowly, args=given) for given in arguments]
    for process in processes:
        process.start()
    answers = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    distinct = set(images.keys)
    assert sum(n for n, _ in answers) == len(distinct)
    assert min(n for n, _ in answers) > 0, "each took a part"
    for _, values in answers:
        np.testing.assert_array_equal(values, wanted)
    assert stored_rows(folder) == len(distinct)


# --- blocks --------------------------------------------------------------------------------------------------------


def test_blocks_are_the_whole_answer_for_one_charge(
    monkeypatch: pytest.MonkeyPatch, tiny: Endpoint, ledger: Ledger, images: Images
) -> None:
    prompts = context(tiny, p=4)
    whole = metered(tiny, ledger, trial="whole").scores(images, prompts)
    monkeypatch.setattr(client, "BLOCK_BYTES", 4 * 4 * 3 * 7)  # seven rows of 4 prompt sets and 3 classes
    box = metered(tiny, ledger, trial="blocks")
    blocks = list(box.score_blocks(images, prompts))
    assert [rows.stop - rows.start for rows, _ in blocks] == [7] * 5 + [5]
    joined = torch.cat([block for _, block in blocks], dim=1)
    torch.testing.assert_close(joined, whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(metered(tiny, ledger, trial="again").scores(images, prompts), joined)
    assert box.meter.bills[Phase.ADAPT] == Bill.scores(4, 40, 3) == ledger.trial_bill("s", "blocks")[Phase.ADAPT]
    assert box.meter.call == 1 == len(ledger.charges("s", "blocks"))


def test_a_call_of_which_only_the_first_block_is_read_is_charged_whole(
    monkeypatch: pytest.MonkeyPatch, tiny: Endpoint, ledger: Ledger, images: Images
) -> None:
    monkeypatch.setattr(client, "BLOCK_BYTES", 1)
    box = metered(tiny, ledger)
    rows, block = next(box.score_blocks(images, CLASSES.prompts()))
    assert rows == slice(0, 1) and block.shape == (1, 1, 3)
    box.image_features(images)
    assert box.meter.bills[Phase.ADAPT] == Bill.scores(1, 40, 3) + Bill.image_features(40, 192)
    assert ledger.trial_bill("s", "t") == box.meter.bills


def test_of_an_answer_in_blocks_the_client_holds_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch, fake: Endpoint, images: Images
) -> None:
    class Zeros:
        info = fake.info

        def send(self, request: Request) -> Response:
            assert request.images is not None
            return Response(np.zeros((200, len(request.images), 3), np.float32))

        def embed_text(self, text: str) -> np.ndarray:
            raise NotImplementedError

    block = 2**20
    monkeypatch.setattr(client, "BLOCK_BYTES", block)
    many = images[[i % len(images) for i in range(16 * block // (4 * 200 * 3))]]
    box = MeteredBox(Zeros(), "s", "t", ALL, Limits())
    tracemalloc.start()
    try:
        blocks = sum(1 for _ in box.score_blocks(many, context(fake, p=200)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert blocks in (16, 17)
    assert peak < 4 * block  # what comes, what is handed out, and the one before that the caller still names


# --- devices and precisions ----------------------------------------------------------------------------------------


def test_a_gpu_is_taken_where_one_is_seen_and_fp32_stays_fp32_there(monkeypatch: pytest.MonkeyPatch) -> None:
    card = model_card("tiny")
    assert device_for(card) == torch.device("cpu")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_for(replace(card, precision="fp16")) == torch.device("cuda")
    assert not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


def test_half_precision_of_a_gpu_is_refused_without_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"fp16 needs a GPU.* use fp32 or bf16"):
        fresh(tmp_path, replace(model_card("tiny"), precision="fp16"))


def test_image_features_in_bfloat16_are_near_those_in_float32_and_stored_apart(
    tmp_path: Path, tiny: Endpoint, images: Images
) -> None:
    half = fresh(tmp_path, replace(model_card("tiny"), precision="bf16"))
    wanted, found = (torch.from_numpy(ask(e, "image_features", images)) for e in (tiny, half))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.02)
    assert not torch.equal(found, wanted)
    assert torch.equal(torch.from_numpy(ask(fresh(tmp_path), "image_features", images)), wanted)


# --- the feature store ---------------------------------------------------------------------------------------------


def store_of(folder: Path, model: str = "m", width: int = 4) -> FeatureStore:
    return FeatureStore(folder, model, width)


def rows_for(keys: list[str], width: int = 4) -> Tensor:
    return torch.stack([torch.full((width,), float(int(key))) for key in keys])


def missing(store: FeatureStore, keys: list[str]) -> list[int]:
    """The positions of the keys that are not stored; those that are must be the right rows."""
    features, absent = store.read(keys)
    present = [i for i in range(len(keys)) if i not in absent]
    assert torch.equal(features[present], rows_for(keys)[present])
    return absent


def test_features_are_shared_by_all_that_open_the_folder(tmp_path: Path) -> None:
    one, other = store_of(tmp_path), store_of(tmp_path)
    assert missing(one, ["1", "2"]) == [0, 1]
    one.add(["1", "2"], rows_for(["1", "2"]))
    assert missing(other, ["2", "3", "1"]) == [1]
    other.add(["3"], rows_for(["3"]))
    assert missing(one, ["3", "3", "1", "4"]) == [3]
    assert len(one) == len(other) == len(list(one.folder.glob("*.features"))) + 1 == 3


def test_a_full_disk_costs_features_their_place_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, row = FeatureStore(tmp_path, "m", 4), torch.ones(1, 4)
    with monkeypatch.context() as full:
        full.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        store.add(["a"], row)
    assert store.read(["a"])[1] == [0] and not list(store.folder.glob("*.tmp"))
    store.add(["a"], row)
    assert store.read(["a"])[1] == [] and torch.equal(store.read(["a"])[0], row)


def test_another_model_has_other_features(tmp_path: Path) -> None:
    store_of(tmp_path).add(["1"], rows_for(["1"]))
    assert missing(store_of(tmp_path, model="n"), ["1"]) == [0]
    assert missing(store_of(tmp_path), ["1"]) == []


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_file_is_removed_and_its_rows_are_computed_again(tmp_path: Path, damage: str) -> None:
    store = store_of(tmp_path)
    store.add(["1", "2"], rows_for(["1", "2"]))
    (path,) = store.folder.glob("*.features")
    store.add(["3"], rows_for(["3"]))
    data = bytearray(path.read_bytes())
    data[data.index(rows_for(["2"]).numpy().tobytes())] ^= 1  # one bit of a feature
    path.unlink()  # a file that is mapped must not change under its readers
    path.write_bytes({"cut": data[:-9], "flipped": data, "empty": b""}[damage])
    again = store_of(tmp_path)
    assert missing(again, ["1", "2", "3"]) == [0, 1]
    assert not path.exists() and len(again) == 1
    again.add(["1", "2"], rows_for(["1", "2"]))
    assert missing(again, ["1", "2", "3"]) == missing(store_of(tmp_path), ["1", "2", "3"]) == []


def test_damage_after_a_file_was_mapped_is_seen_when_its_row_is_read(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    store.add(["1", "2"], rows_for(["1", "2"]))
    (path,) = store.folder.glob("*.features")
    assert missing(store, ["1", "2"]) == []
    at = path.read_bytes().index(rows_for(["2"]).numpy().tobytes())
    with path.open("r+b") as file:  # in place, so that the map sees it
        file.seek(at)
        file.write(b"\xff")
    assert missing(store, ["1"]) == []
    assert missing(store, ["2"]) == [0]
    assert not path.exists()


def test_every_flipped_byte_of_a_feature_file_is_found(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    store.add(["1", "2"], rows_for(["1", "2"]))
    (path,) = store.folder.glob("*.features")
    data = path.read_bytes()
    for at in range(len(data)):
        path.unlink(missing_ok=True)
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        assert missing(store_of(tmp_path), ["1", "2"]) in ([0, 1], [0], [1]), at


def feature_file(model: str = "m", width: int = 4, key: str = "1", checksum: int | None = None) -> bytes:
    """The content of a sealed file with one row of ones."""
    head = f"{UNSEALED} {json.dumps({'model': model, 'width': width})}"
    head += " " * (-(len(head) + 1) % 16) + "\n"
    row, name = np.ones(width, "<f4").tobytes(), hashlib.sha256(key.encode()).digest()[:16]
    stated = zlib.crc32(row, zlib.crc32(name)) if checksum is None else checksum
    return seal(head.encode() + name + np.array([stated], "<u4").tobytes()) + row


def test_a_feature_file_has_the_documented_layout(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    store.add(["1"], rows_for(["1"]))
    assert next(store.folder.glob("*.features")).read_bytes() == feature_file()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"mine",
        feature_file()[:-1],
        feature_file() + bytes(36),
        feature_file(model="n"),
        feature_file(width=3),
        feature_file(checksum=0),
        feature_file().replace(b"farebox-sha256:", b"farebox-sha512:"),
    ],
    ids=["empty", "text", "cut", "longer", "another model", "another width", "a wrong sum", "no checksum"],
)
def test_a_foreign_file_is_never_taken_for_features(tmp_path: Path, content: bytes) -> None:
    store = store_of(tmp_path)
    foreign = store.folder / f"{uuid.uuid4().hex}.features"
    foreign.write_bytes(content)
    assert missing(store, ["1"]) == [0]
    assert not foreign.exists()
    store.add(["1"], rows_for(["1"]))
    assert missing(store, ["1"]) == missing(store_of(tmp_path), ["1"]) == []


def _add_many(folder: Path, first: int) -> None:
    store = store_of(folder)
    for i in range(first, first + 20):
        keys = [str(i), str(i + 1)]
        if absent := [keys[at] for at in missing(store, keys)]:
            store.add(absent, rows_for(absent))


def test_processes_and_threads_may_add_the_same_rows_at_the_same_time(tmp_path: Path) -> None:
    processes = [multiprocessing.get_context("fork").Process(target=_add_many, args=(tmp_path, i)) for i in (0, 5)]
    for process in processes:
        process.start()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(_add_many, itertools.repeat(tmp_path, 4), (0, 0, 3, 10)))
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    keys = [str(i) for i in range(30)]
    store = store_of(tmp_path)
    assert missing(store, [*keys, "31"]) == [30]
    assert len(store) == 31
    assert not list(store.folder.glob("*.tmp"))


def _claim_and_wait(folder: Path, claimed: Any) -> None:
    with store_of(folder).claim(["1", "2"], 2) as keys:
        claimed.put(keys)
        time.sleep(600)


def _claimed(store: FeatureStore, keys: list[str]) -> list[str]:
    with store.claim(keys, 2) as claimed:
        return claimed


def test_a_key_is_claimed_by_one_process_and_free_when_that_is_killed(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    claimed = fork.Queue()
    owner = fork.Process(target=_claim_and_wait, args=(tmp_path, claimed))
    owner.start()
    assert claimed.get(timeout=60) == ["1", "2"]
    store = store_of(tmp_path)
    with store.claim(["1", "2", "3", "4", "5"], 2) as other_work:
        assert other_work == ["3", "4"]
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(_claimed, store, ["1", "2"])
        time.sleep(0.2)
        assert not waiting.done()
        assert owner.pid is not None
        os.kill(owner.pid, signal.SIGKILL)
        assert waiting.result(60) == ["1"]
    owner.join(60)
    assert owner.exitcode == -signal.SIGKILL


def test_without_file_locks_all_keys_are_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.lockf", lambda *_: (_ for _ in ()).throw(OSError(37, "No locks available")))
    with store_of(tmp_path).claim(["1", "2", "3"], 2) as claimed:
        assert claimed == ["1", "2"]


# --- access --------------------------------------------------------------------------------------------------------

TS, TF = Access.TEXT | Access.SCORES, Access.TEXT | Access.FEATURES


def calls(box: MeteredBox, images: Images, endpoint: Endpoint) -> dict[str, Any]:
    factors, labels_B = LowRank(torch.ones(1, 3, 2, 16), torch.ones(1, 3, 16, 2)), torch.zeros(40, dtype=torch.int64)
    change = Lora(factors, factors, 0.1)
    return {
        "text scores": lambda: box.scores(images, CLASSES.prompts()),
        "soft scores": lambda: box.scores(images, context(endpoint)),
        "image features": lambda: box.image_features(images),
        "text features": lambda: box.text_features(CLASSES.prompts()),
        "soft features": lambda: box.text_features(context(endpoint)),
        "embed_text": lambda: box.embed_text("a photo"),
        "gradients": lambda: box.text_gradients(context(endpoint), torch.ones(2, 3, endpoint.info.feature_dim)),
        "changed scores": lambda: box.scores(images, CLASSES.prompts(), change),
        "lora gradients": lambda: box.lora_gradients(images, labels_B, CLASSES.prompts(), change, 0.25, 0),
    }


@pytest.mark.parametrize(
    ("access", "allowed"),
    [
        (TS, {"text scores"}),
        (Access.SOFT | Access.SCORES, {"text scores", "soft scores", "embed_text"}),
        (Access.FEATURES, {"image features"}),
        (TF, {"text scores", "image features", "text features"}),
        (BLACK, {"text scores", "soft scores", "image features", "text features", "soft features", "embed_text"}),
        (Access.SOFT | Access.GRADIENTS, {"gradients", "embed_text"}),
        (TS | Access.LORA, {"text scores", "changed scores", "lora gradients"}),
    ],
    ids=lambda value: value.label if isinstance(value, Access) else "",
)
@pytest.mark.parametrize("by", ["the method declares", "the model grants"])
def test_a_call_beyond_the_access_is_refused_and_costs_nothing(
    fake: Endpoint, features: Path, ledger: Ledger, images: Images, access: Access, allowed: set[str], by: str
) -> None:
    granted = access if by == "the model grants" else ALL
    endpoint = fresh(features, ModelCard(name="fake", kind="fake", grant=granted.label))
    for name in calls(metered(fake, ledger, trial="none"), images, endpoint):
        trial = f"trial of {name}".replace(" ", "-")
        box = metered(endpoint, ledger, access=access if by == "the method declares" else ALL, trial=trial)
        call = calls(box, images, endpoint)[name]
        if name in allowed:
            call()
        else:
            with pytest.raises(AccessDenied, match=f"{by} {re.escape(access.label)}"):
                call()
            assert box.meter == Meter() and ledger.charges("s", trial) == []


# --- refused shapes ------------------------------------------------------------------------------------------------


def test_requests_about_nothing_or_of_wrong_shapes_are_refused_and_cost_nothing(
    tiny: Endpoint, ledger: Ledger, images: Images
) -> None:
    box, width = metered(tiny, ledger), tiny.info.token_dim
    wrong = {
        "no images": lambda: box.scores(images[[]], CLASSES.prompts()),
        "has no images": lambda: box.image_features(images[[]]),
        r"prompt sets of \[\] prompts": lambda: box.scores(images, TextPrompts(())),
        r"prompt sets of \[0\] prompts": lambda: box.text_features(TextPrompts(((),))),
        r"prompt sets of \[1, 2\] prompts": lambda: box.scores(images, TextPrompts((("a",), ("a", "b")))),
        r"context of shape \(0, 2, 192\)": lambda: box.scores(images, SoftPrompts(torch.zeros(0, 2, width), ("a",))),
        r"context of shape \(2, 192\)": lambda: box.scores(images, SoftPrompts(torch.zeros(2, width), ("a",))),
        "for 0 classes": lambda: box.scores(images, SoftPrompts(torch.zeros(1, 2, width), ())),
        r"expected \[P, L, 192\]": lambda: box.scores(images, SoftPrompts(torch.zeros(1, 2, 5), ("a",))),
        r"features of shape \(1, 2, 192\), expected \(1, 1, 192\)": lambda: box.text_gradients(
            SoftPrompts(torch.zeros(1, 2, width), ("a",)), torch.zeros(1, 2, width)
        ),
        "soft prompts only": lambda: box.text_gradients(CLASSES.prompts(), torch.zeros(1, 3, width)),  # type: ignore[arg-type]
        "text features has a value": lambda: box.text_gradients(
            SoftPrompts(torch.zeros(1, 2, width), ("a",)), torch.full((1, 1, width), torch.inf)
        ),
        "not finite": lambda: box.text_features(SoftPrompts(torch.full((1, 2, width), torch.nan), ("a",))),
        "a prompt of 34 tokens": lambda: box.text_features(SoftPrompts(torch.zeros(1, 29, width), ("a a",), ".")),
    }
    for message, call in wrong.items():
        with pytest.raises(EndpointRefused, match=message):
            call()
    with pytest.raises(TypeError, match="expected the task's images, got Tensor"):
        box.image_features(torch.zeros(3, 3))  # type: ignore[arg-type]
    assert box.meter == Meter()
    assert ledger.trial_bill("s", "t")[Phase.ADAPT] == Bill()


def test_an_unreadable_image_is_named_and_its_call_is_paid_back(tiny: Endpoint, ledger: Ledger, tmp_path: Path) -> None:
    source = write_source(tmp_path / "d.parquet", [b"no image"], [0], ["test"], ["thing"])
    box = metered(tiny, ledger)
    with pytest.raises(
        DataError, match=r"row 0 of .*d\.parquet is not a readable image \(8 bytes, no known image format\)"
    ):
        box.image_features(Images.plain(source, "test", np.array([0]), "crop"))
    assert box.meter == Meter()
    assert ledger.trial_bill("s", "t")[Phase.ADAPT] == Bill()
    assert [c.refunded for c in ledger.charges("s", "t")] == [True]


# --- the meter -----------------------------------------------------------------------------------------------------


def test_prices_are_those_of_the_table(images: Images, fake: Endpoint) -> None:
    p, b, c, d = 4, 40, 3, 16
    soft, words = context(fake, p), TextPrompts((CLASSES.names,) * p)
    for prompts in (soft, words):
        assert price("scores", images, prompts, d) == Bill(p, p * b, p * c, p * b * c)
        assert price("text_features", None, prompts, d) == Bill(p, 0, p * c, p * c * d)
    assert price("text_gradients", None, soft, d) == price("text_features", None, soft, d)
    assert price("image_features", images, None, d) == Bill(1, b, 0, b * d)
    assert price("image_features", images.views(5), None, d) == Bill(1, 5 * b, 0, 5 * b * d)


def test_every_call_is_billed_to_its_phase(fake: Endpoint, ledger: Ledger, icons: ParquetSource) -> None:
    box = metered(fake, ledger)
    of = {split: Images.plain(icons, split, icons.rows_of(split)[:6], "crop") for split in ("train", "val", "test")}
    one = Bill.scores(1, 6, 3)
    box.scores(of["train"], CLASSES.prompts())
    box.scores(of["val"], CLASSES.prompts())
    box.scores(of["val"].views(2), CLASSES.prompts())
    box.text_features(CLASSES.prompts())
    box.phase = Phase.CURVE
    box.scores(of["test"], CLASSES.prompts())
    box.phase = Phase.EVALUATE
    box.scores(of["test"], CLASSES.prompts())
    box.scores(of["val"], CLASSES.prompts())
    assert box.meter.bills == {
        Phase.ADAPT: one + Bill.text_features(1, 3, 16),
        Phase.VALIDATE: one + Bill.scores(1, 12, 3),
        Phase.TUNE: Bill(),
        Phase.CURVE: one,
        Phase.EVALUATE: one * 2,
        Phase.REPLAY: Bill(),
    }
    assert ledger.trial_bill("s", "t") == box.meter.bills
    assert box.remaining == (1_000 - 4, 100_000 - 24)
    assert box.meter.call == 7


def test_evaluation_and_curve_are_not_limited(fake: Endpoint, ledger: Ledger, images: Images) -> None:
    box = metered(fake, ledger, Limits(0, 0))
    for box.phase in (Phase.CURVE, Phase.EVALUATE):
        box.scores(images, CLASSES.prompts())
    box.phase = Phase.ADAPT
    with pytest.raises(BudgetExceeded, match="1 requests asked of account 'trial t', which has 0 left"):
        box.scores(images, CLASSES.prompts())


@pytest.mark.parametrize(("limits", "unit"), [(Limits(3, None), "requests"), (Limits(None, 119), "images")])
def test_what_the_allotment_cannot_pay_is_never_sent(
    fake: Endpoint, ledger: Ledger, images: Images, limits: Limits, unit: str
) -> None:
    box = metered(fake, ledger, limits)
    sent: list[Request] = []
    answer = box.pool.send
    box.pool.send = lambda request: (sent.append(request), answer(request))[1]  # type: ignore[method-assign,func-returns-value]
    box.scores(images, CLASSES.ensemble())
    before = box.meter.bills.copy(), box.meter.call, box.remaining
    with pytest.raises(BudgetExceeded) as refused:
        box.scores(images, CLASSES.ensemble())
    assert refused.value.unit == unit
    assert len(sent) == 1 and (box.meter.bills, box.meter.call, box.remaining) == before
    assert len(ledger.charges("s", "t")) == 1


def test_what_the_ledger_refuses_leaves_the_meter_alone(fake: Endpoint, ledger: Ledger, images: Images) -> None:
    ledger.reserve("s", "t", ["ceiling"], Limits(1, 40))  # less than the method was told that it has
    box = MeteredBox(LocalPool(fake, ledger), "s", "t", ALL, PLENTY)
    box.scores(images, CLASSES.prompts())
    with pytest.raises(BudgetExceeded):
        box.scores(images, CLASSES.prompts())
    assert box.meter.bills == ledger.trial_bill("s", "t") and box.meter.call == 1


def test_a_call_that_was_paid_before_is_free_and_billed_logically(
    fake: Endpoint, ledger: Ledger, images: Images
) -> None:
    one = metered(fake, ledger)
    first = one.scores(images, CLASSES.prompts())
    again = metered(fake, ledger, meter=Meter())  # as after a crash without a checkpoint
    assert torch.equal(again.scores(images, CLASSES.prompts()), first)
    assert again.meter.bills == one.meter.bills == ledger.trial_bill("s", "t")
    assert len(ledger.charges("s", "t")) == 1


def test_another_call_under_a_paid_number_is_billed_to_replay(fake: Endpoint, ledger: Ledger, images: Images) -> None:
    metered(fake, ledger).scores(images, CLASSES.prompts())
    again = metered(fake, ledger, meter=Meter())
    again.scores(images, CLASSES.prompts("another {}"))
    one = Bill.scores(1, 40, 3)
    assert again.meter.bills[Phase.ADAPT] == again.meter.bills[Phase.REPLAY] == one
    assert ledger.trial_bill("s", "t") == again.meter.bills


def test_embed_text_is_free_and_takes_no_call_number(fake: Endpoint, ledger: Ledger) -> None:
    box = metered(fake, ledger, Limits(0, 0))
    assert box.embed_text("a photo of").shape == (3, fake.info.token_dim)
    assert box.meter == Meter() and ledger.charges("s", "t") == []


def test_answers_are_the_callers_own(fake: Endpoint, ledger: Ledger, images: Images) -> None:
    box = metered(fake, ledger)
    for call in (
        lambda: box.scores(images, CLASSES.prompts()),
        lambda: box.image_features(images),
        lambda: box.text_features(context(fake)),
        lambda: box.embed_text("a"),
    ):
        first = call()
        wanted = first.clone()
        first.zero_()
        assert torch.equal(call(), wanted)
        assert wanted.dtype == torch.float32 and not wanted.requires_grad


def test_a_context_with_a_gradient_crosses_as_values(fake: Endpoint, ledger: Ledger, images: Images) -> None:
    prompts = context(fake)
    prompts.ctx_PLE.requires_grad_()
    assert not metered(fake, ledger).scores(images, prompts).requires_grad
