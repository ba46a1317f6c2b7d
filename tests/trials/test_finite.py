"""NaN and infinity never become a number: they are found where they arise, and named."""

from __future__ import annotations

import ast
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import pipeline
from methods._finite import finite, first_non_finite
from methods._prompt_search import Evolution
from methods.base import Access, SoftPrompts
from pipeline.blackbox.client import Meter, MeteredBox
from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.feature_store import FeatureStore
from pipeline.blackbox.local_pool import LocalPool
from pipeline.blackbox.request import Request, Response
from pipeline.blackbox.weights import check_finite
from pipeline.budget import Limits
from pipeline.cards import EMBEDDED, ModelCard
from pipeline.config.card_files import model_card
from pipeline.config.compose import compose
from pipeline.data.images import Images
from pipeline.data.source import Source
from pipeline.errors import ConfigError, DataError, EndpointRefused, NonFiniteError
from pipeline.files import strict_json
from pipeline.results.row import to_table
from pipeline.results.store import ResultStore
from pipeline.trials.trial import run_trial
from tests.support.lab import STORAGE, Lab
from tests.support.synthetic import make

SOFT = Access.SOFT | Access.FEATURES | Access.GRADIENTS
NAMES = ("ant", "bee", "cat")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_non_finite_element_is_found(value: float) -> None:
    values = torch.zeros(4, 5)
    assert first_non_finite(values) is None
    values[2, 3] = values[3, 1] = value
    assert first_non_finite(values) == (2, 3)
    values[1, 1], values[2, 3], values[3, 1] = math.inf, -math.inf, 0
    assert first_non_finite(values) == (1, 1)


def test_an_overflowing_sum_of_finite_elements_is_accepted() -> None:
    assert first_non_finite(torch.full((3,), 3e38)) is None
    assert first_non_finite(torch.full((3,), 6e4, dtype=torch.float16)) is None
    assert first_non_finite(torch.arange(3)) is None and first_non_finite(torch.empty(0)) is None


def test_json_has_null_for_nan() -> None:
    value = {"a": [1.5, math.nan, (math.inf, "x")], "b": {"c": -math.inf, "d": None, "e": True}}
    assert json.loads(strict_json(value)) == {"a": [1.5, None, [None, "x"]], "b": {"c": None, "d": None, "e": True}}


def test_json_with_numbers_of_a_run_is_written_in_one_place() -> None:
    """Digests of texts and settings, and quoted strings, cannot hold NaN; what is sent over HTTP was checked before."""
    root = Path(pipeline.__file__).parent
    found = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.dumps", "json.dump")
    }
    texts = {
        "commands/data.py",
        "commands/data_add.py",
        "results/comparison.py",
        "results/runs.py",
        "source_code.py",
        "commands/serve.py",
        "sweep/storage_id.py",
        "trials/plan.py",
        "trials/protocol.py",
    }
    sent = {"remote/http_client.py", "serve/app.py"}
    assert found - sent <= {"files.py", "data/index.py", "bench/index.py", "blackbox/feature_store.py", *texts}


# --- weights and settings ------------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = torch.nn.Linear(3, 2)
        self.norm = torch.nn.BatchNorm1d(2)
        self.logit_scale = torch.nn.Parameter(torch.tensor(4.6))
        self.register_buffer("attn_mask", torch.full((2, 2), -math.inf))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda net: net.tower.weight[1].fill_(math.nan), r"weight tower.weight\[1, 0\] of 'f.pt' is nan"),
        (lambda net: net.norm.running_var.fill_(math.inf), r"weight norm.running_var\[0\] of 'f.pt' is inf"),
        (lambda net: net.logit_scale.fill_(math.nan), r"weight logit_scale\[\] of 'f.pt' is nan"),
        (lambda net: net.logit_scale.fill_(100), "logit_scale of 'f.pt' is 100.0: its exp overflows"),
    ],
)
def test_weights_that_are_not_finite_are_named(change: Any, said: str) -> None:
    net, card = Net(), ModelCard(name="m", kind="open_clip", arch="x", weights="f.pt")
    check_finite(card, net)
    with torch.no_grad():
        change(net)
    with pytest.raises(DataError, match=said):
        check_finite(card, net)


def test_the_embedded_model_with_one_nan_does_not_load(tmp_path: Path) -> None:
    card = model_card("tiny")
    weights = load_file(EMBEDDED / card.weights)
    weights["visual.attnpool.v_proj.weight"].view(-1)[7] = math.nan
    save_file(weights, tmp_path / "nan.safetensors")
    card = replace(card, weights=str(tmp_path / "nan.safetensors"), weights_sha256="")
    with pytest.raises(DataError, match=r"visual.attnpool.v_proj.weight\[0, 7\]"):
        Endpoint(card, tmp_path / "features")


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e999"])
def test_settings_that_are_not_finite_are_refused(value: str) -> None:
    for key in ("taskres.alpha", "linear_probe.coarse"):
        given = f"[1.0,{value}]" if key.endswith("coarse") else value
        with pytest.raises(ConfigError):
            compose(["sweep=smoke", "methods=[taskres]", f"method.{key}={given}"]).choice(key.split(".")[0], "icons")


# --- the endpoint --------------------------------------------------------------------------------------------------


class Broken:
    """A model of which one image, or one prompt, gives NaN."""

    def __init__(self, model: Any, image: str = "", prompt: tuple[int, int] | None = None) -> None:
        self.model, self.image, self.prompt = model, image, prompt

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def encode_images(self, images: Images, codec: str = "float") -> Tensor:
        features = self.model.encode_images(images, codec)
        for i, key in enumerate(images.keys):
            if key == self.image:
                features[i, 2] = math.nan
        return features

    def encode_prompts(self, prompts: Any) -> Tensor:
        features = self.model.encode_prompts(prompts).clone()
        if self.prompt is not None and len(features) > self.prompt[0]:
            features[self.prompt][1] = math.inf
        return features

    def text_gradients(self, prompts: Any, upstream: Tensor) -> Tensor:
        gradients = self.model.text_gradients(prompts, upstream)
        gradients[1, 0, 0] = math.nan
        return gradients


@pytest.fixture
def images(icons: Source) -> Images:
    return Images.plain(icons, "test", icons.rows_of("test")[:6], "crop")


def broken(tmp_path: Path, **where: Any) -> Endpoint:
    endpoint = Endpoint(model_card("fake"), tmp_path / "features")
    endpoint.model = Broken(endpoint.model, **where)
    return endpoint


def box_of(lab: Lab, endpoint: Endpoint) -> MeteredBox:
    limits = Limits(1000, 100_000)
    lab.ledger.reserve(STORAGE, "t", ["ceiling"], limits)
    return MeteredBox(LocalPool(endpoint, lab.ledger), STORAGE, "t", SOFT, limits)


def context(p: int) -> SoftPrompts:
    return SoftPrompts(torch.randn(p, 2, 8, generator=torch.Generator().manual_seed(0)), NAMES)


def test_an_image_whose_feature_is_not_finite_is_named_not_stored_and_not_billed(
    lab: Lab, tmp_path: Path, images: Images
) -> None:
    endpoint = broken(tmp_path, image=images.keys[4])
    box = box_of(lab, endpoint)
    for call in (lambda: box.image_features(images), lambda: box.scores(images, context(1))):
        with pytest.raises(NonFiniteError, match=rf"image_features: row {images.rows[4]} of .* has a feature"):
            call()
    assert box.meter == Meter()
    assert all(charge.refunded for charge in lab.ledger.charges(STORAGE, "t"))
    assert not list((tmp_path / "features").rglob("*.arrow"))
    box.image_features(images[:4])
    with pytest.raises(NonFiniteError, match=rf"row {images.rows[4]} of .*"):
        box.image_features(images)
    assert torch.isfinite(box.image_features(images[[0, 1, 2, 3, 5]])).all()


def test_a_view_is_named_with_its_number(lab: Lab, tmp_path: Path, images: Images) -> None:
    views = images.views(2)
    endpoint = broken(tmp_path, image=views.keys[9])
    with pytest.raises(NonFiniteError, match=rf"row {images.rows[3]} of .* \(view 2\) has a feature"):
        box_of(lab, endpoint).image_features(views)


def test_a_candidate_whose_text_feature_is_not_finite_is_named_and_not_billed(
    lab: Lab, tmp_path: Path, images: Images
) -> None:
    box = box_of(lab, broken(tmp_path, prompt=(2, 1)))
    for call in (lambda: box.text_features(context(5)), lambda: box.scores(images, context(5))):
        with pytest.raises(NonFiniteError, match="text_features: prompt set 3 of 5, 'bee', has a value that is NaN"):
            call()
    with pytest.raises(NonFiniteError, match="text_gradients: prompt set 2 of 2 has a value"):
        box.text_gradients(context(2), torch.ones(2, 3, 16))
    assert box.meter == Meter()


def test_a_context_that_is_not_finite_is_refused_with_its_number(lab: Lab, tmp_path: Path, images: Images) -> None:
    box = box_of(lab, broken(tmp_path))
    prompts = context(3)
    prompts.ctx_PLE[1, 0, 4] = math.inf
    with pytest.raises(EndpointRefused, match=r"not finite \(prompt set 2\)"):
        box.scores(images, prompts)
    with pytest.raises(EndpointRefused, match=r"not finite \(prompt set 1\)"):
        box.text_gradients(context(2), torch.full((2, 3, 16), math.nan))


@pytest.mark.parametrize(
    ("kind", "shape", "at", "said"),
    [
        ("scores", (2, 6, 3), (1, 4, 2), "scores: .* at prompt set 2, row {row} of"),
        ("image_features", (6, 16), (4, 0), "image_features: .* at row {row} of"),
        ("text_features", (2, 3, 16), (1, 0, 0), "text_features: .* at prompt set 2"),
    ],
)
def test_responses_are_checked_too(
    lab: Lab, fake: Endpoint, images: Images, kind: str, shape: tuple[int, ...], at: tuple[int, ...], said: str
) -> None:
    class Damaged:
        info = fake.info

        def send(self, request: Request) -> Response:
            values = np.zeros(shape, np.float32)
            values[at] = np.nan
            return Response(values)

        def embed_text(self, text: str) -> np.ndarray:
            raise NotImplementedError

    box = MeteredBox(Damaged(), STORAGE, "t", SOFT, Limits())
    arguments = {"scores": (images, context(2)), "image_features": (images,), "text_features": (context(2),)}[kind]
    with pytest.raises(NonFiniteError, match=said.format(row=images.rows[4])):
        getattr(box, kind)(*arguments)


def test_a_store_neither_takes_nor_serves_a_row_that_is_not_finite(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, "m", 4)
    bad = torch.ones(2, 4)
    bad[1, 2] = math.nan
    with pytest.raises(ValueError, match="not stored"):
        store.add(["a", "b"], bad)
    assert store.read(["a"])[1] == [0]
    with pytest.MonkeyPatch.context() as patch:  # as an older Farebox stored it
        patch.setattr("pipeline.blackbox.feature_store._finite", lambda _: True)
        store.add(["a", "b"], bad)
        assert store.read(["a", "b"])[1] == []
    assert FeatureStore(tmp_path, "m", 4).read(["b"])[1] == [0]


def test_a_trial_on_a_model_that_gives_nan_is_a_failed_row(lab: Lab, tmp_path: Path) -> None:
    spec = lab.spec("zero_shot")
    key = Images.plain(spec.dataset.source, "test", spec.eval_sets[0].rows, "crop").keys[7]
    bad = Lab(tmp_path / "bad", broken(tmp_path, image=key), lab.card)
    (row,) = bad.run(bad.spec("zero_shot"))
    assert (row.status, row.accuracy) == ("failed", None)
    assert row.error is not None and row.error.startswith("NonFiniteError: image_features: row ")
    assert row.evaluate_requests == 0


# --- methods, rows -------------------------------------------------------------------------------------------------


def test_a_candidate_without_a_finite_fitness_stops_the_search() -> None:
    search = Evolution(5, sigma=1.0, popsize=6, bound=5.0, rng=np.random.default_rng(0))
    search.ask()
    with pytest.raises(FloatingPointError, match="fitness of candidate 4 is inf"):
        search.tell(torch.tensor([1.0, 2, 3, math.inf, math.nan, 0]))
    assert finite(torch.tensor(3e38), "loss") == torch.tensor(3e38)
    with pytest.raises(FloatingPointError, match="loss in epoch 3 is nan"):
        finite(torch.tensor(math.nan), "loss in epoch 3")


@pytest.mark.parametrize(
    ("method", "setting"),
    [
        ("taskres", "lr=1e37"),
        ("logit_head", "lr=1e37"),
        ("tip_adapter_f", "lr=1e37"),
        ("tip_adapter", "alpha_max=1e300"),
    ],
)
def test_a_loss_that_overflows_is_named(lab: Lab, method: str, setting: str) -> None:
    spec = lab.spec(method, f"method.{method}.{setting}")
    lab.reserve(spec)
    with pytest.raises(FloatingPointError, match=r"^(loss|a validation logit) .*is (nan|inf)"):
        run_trial(spec, lab.pool, STORAGE, lab.store)
    lab.ledger.release(STORAGE, spec.account)


def test_a_row_has_no_nan(tmp_path: Path) -> None:
    row = make()
    with pytest.raises(ValueError, match="nll is nan"):
        replace(row, nll=math.nan)
    store = ResultStore(tmp_path)
    path = store.write([row])
    table = to_table([row])
    column = table.schema.get_field_index("nll")
    table = table.set_column(column, table.schema.field(column), pa.array([math.nan]))
    with pytest.MonkeyPatch.context() as patch:  # as an older Farebox wrote it
        patch.setattr("pipeline.results.store.to_table", lambda rows: table)
        store.write([row])
    assert len(store.read()) == 0
    (line,) = store.damage()
    assert "nll is nan, not a finite number" in line and str(path) in line
