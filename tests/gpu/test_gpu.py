"""The endpoint and a whole sweep on a GPU: `make test-gpu`. The suite itself hides GPUs (conftest.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from methods.base import Bill, Classes, Lora, LowRank, SoftPrompts
from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.request import Kind, LoraStep, Request
from pipeline.budget import Phase
from pipeline.config.card_files import model_card
from pipeline.config.files import file_of
from pipeline.data.images import Images
from pipeline.data.source import Source
from pipeline.ledger.records import Charge
from tests.support.command import Running, charges, farebox, kill, ledger_record, records

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.ray,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is seen (make test-gpu shows it to the tests)"),
]

FREE = Charge("s", "t", 0, "d", Phase.ADAPT, Bill())
KINDS: tuple[Kind, ...] = ("scores", "image_features", "text_features", "text_gradients", "lora_gradients")


@pytest.fixture
def images(icons: Source) -> Images:
    return Images.plain(icons, "test", icons.rows_of("test")[:40], "crop")


def answers(endpoint: Endpoint, images: Images, names: tuple[str, ...]) -> dict[Kind, np.ndarray]:
    """Of one request of each kind."""
    generator = torch.Generator().manual_seed(0)
    soft = SoftPrompts(0.1 * torch.randn(3, 4, endpoint.info.token_dim, generator=generator), names)
    upstream_PCD = torch.randn(3, len(names), endpoint.info.feature_dim, generator=generator)
    text = Classes(names, "{} icon").prompts()
    factors = [
        LowRank(*(0.1 * torch.randn(n, 3, *shape, generator=generator) for shape in ((2, w), (w, 2))))
        for n, w in endpoint.info.lora_shapes
    ]
    step = LoraStep(torch.arange(len(images)) % len(names), 0.0, 0)  # each device draws dropout with its own generator
    asked = {
        "scores": Request("scores", images, soft, FREE),
        "image_features": Request("image_features", images, None, FREE),
        "text_features": Request("text_features", None, text, FREE),
        "text_gradients": Request("text_gradients", None, soft, FREE, upstream_PCD),
        "lora_gradients": Request("lora_gradients", images, text, FREE, lora=Lora(*factors, 0.7), step=step),
    }
    return {kind: endpoint.compute(asked[kind]).values for kind in KINDS}


def test_answers_are_those_of_the_cpu_to_rounding_and_the_same_bits_each_time(
    icons: Source, images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card, names = model_card("tiny"), tuple(icons.classnames[:7])
    gpu = Endpoint(card, tmp_path / "features")
    assert gpu.model.device.type == "cuda"
    found = answers(gpu, images, names)
    again = answers(Endpoint(card, tmp_path / "others"), images, names)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        cpu = Endpoint(card, tmp_path / "features")
    assert cpu.model.device.type == "cpu"
    wanted = answers(cpu, images, names)
    assert cpu.store.folder != gpu.store.folder, "features of one device are not another's"
    for kind in KINDS:
        assert np.array_equal(found[kind], again[kind]), kind
        scale = gpu.info.logit_scale if kind == "scores" else 1.0
        np.testing.assert_allclose(found[kind] / scale, wanted[kind] / scale, rtol=1e-3, atol=1e-5, err_msg=kind)
    alone = Endpoint(card, tmp_path / "alone").compute(Request("image_features", images[[3]], None, FREE)).values
    assert np.array_equal(alone[0], found["image_features"][3]), "an image's bits do not depend on its neighbours"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_sweep_on_a_gpu_goes_on_after_kills_and_pays_what_was_predicted(
    precision: str, card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model.yaml"
    model.write_text(file_of("model", "tiny").read_text() + f"precision: {precision}\n")
    words = (
        *("run", "sweep=smoke", f"model={model}", f"datasets=[{card}]", "methods=[zero_shot,craft,cbbt]", "shots=[2]"),
        *("seeds=[1]", "views=3", "budget.requests=600", "method.craft.popsize=6", "checkpoint_s=0.2"),
        *(f"storage={tmp_path / 'gpu'}", f"features={tmp_path / 'features'}", "replicas=2", "concurrency=2"),
    )
    run = Running(*words)
    run.wait_for(lambda: charges(tmp_path / "gpu") > 30, "30 charges")
    kill(run.below("ray::Replica")[0])
    run.wait_for(lambda: list((tmp_path / "gpu" / "checkpoints").glob("*.ckpt")), "a checkpoint")
    run.kill()
    print(farebox(*words).stdout)
    rows = {row["method"]: row for row in records(tmp_path / "gpu")}
    ledger = ledger_record(tmp_path / "gpu")
    print(precision, ledger["phases"], {name: (row["accuracy"], row["requests"]) for name, row in rows.items()})
    assert ledger["open_trials"] == 0
    assert {row["status"] for row in rows.values()} == {"done"}
    assert {row["device"] for row in rows.values()} == {torch.cuda.get_device_name()}

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    on_cpu = [w for w in words if not w.startswith(("model=", "storage=", "replicas="))]
    farebox(*on_cpu, "model=tiny", f"storage={tmp_path / 'cpu'}", "replicas=1")
    quiet = {row["method"]: row for row in records(tmp_path / "cpu")}
    assert {name: row["requests"] for name, row in rows.items()} == {n: row["requests"] for n, row in quiet.items()}
    print({name: row["accuracy"] for name, row in quiet.items()})
    assert abs(rows["zero_shot"]["accuracy"] - quiet["zero_shot"]["accuracy"]) <= 100 * 2 / 60
    for name in ("craft", "cbbt"):  # a search takes another turn at the last bit; it does not lose its way
        assert abs(rows[name]["accuracy"] - quiet[name]["accuracy"]) <= 15
