"""Local models: the shipped encoder, cards that are refused before anything is spent, timm's networks, and training."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from pipeline.cards import LocalCard
from pipeline.config.card_files import local_card
from pipeline.config.compose import compose
from pipeline.data.images import Images
from pipeline.data.source import Source
from pipeline.errors import ConfigError, DataError
from pipeline.files import file_sha256
from pipeline.local import encoder as local
from pipeline.local.encoder import TILE, Encoder
from pipeline.local.networks import TINY_INPUT, TinyConv, build
from pipeline.trials.estimate import estimate
from pipeline.trials.plan import make_plan
from tools.embedded import local as training


@pytest.fixture(scope="module")
def shipped() -> Encoder:
    return Encoder(local_card("tiny_local"))


def images(source: Source, n: int, split: str = "train") -> Images:
    return Images.plain(source, split, source.rows_of(split)[:n], "crop")


def card_at(folder: Path, **changes: object) -> Path:
    """A card of a copy of the shipped weights."""
    card = local_card("tiny_local")
    shutil.copy(card.file, folder / "weights.safetensors")
    plain = {k: getattr(card, k) for k in ("arch", "sha256", "licence", "trained_on")}
    content = plain | {"weights": str(folder / "weights.safetensors")} | changes
    OmegaConf.save(OmegaConf.create({k: v for k, v in content.items() if v is not None}), folder / "mine.yaml")
    return folder / "mine.yaml"


def test_features_are_those_of_the_network_on_normalised_pixels(shipped: Encoder, icons: Source) -> None:
    some = images(icons, TILE + 3)
    net = TinyConv()
    net.load_state_dict(load_file(local_card("tiny_local").file), strict=False)
    pixels = np.stack([np.asarray(some.decoded(i), np.float32) / 255 for i in range(len(some))])
    expected = net.eval()(torch.from_numpy(pixels).permute(0, 3, 1, 2) * 2 - 1)
    torch.testing.assert_close(shipped.features(some), expected.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shipped.encode(shipped.pixels(some, shipped.size)), expected, rtol=1e-4, atol=1e-4)


def test_a_feature_depends_on_its_image_alone_to_the_bit(shipped: Encoder, icons: Source) -> None:
    some = images(icons, TILE + 3)
    whole, rows = shipped.features(some), [40 % len(some), 3, 0]
    assert torch.equal(shipped.features(some[rows]), whole[rows])
    assert shipped.features(some[[]]).shape == (0, shipped.feature_dim)
    views = shipped.features(some[:2].views(2))
    assert views.shape == (4, shipped.feature_dim) and not torch.equal(views[:2], views[2:])


def test_the_gradient_of_encode_reaches_the_pixels_and_no_weight(shipped: Encoder) -> None:
    pixels = torch.rand(2, 3, 64, 64, requires_grad=True)
    shipped.encode(pixels).square().sum().backward()
    assert pixels.grad is not None and pixels.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in shipped.net.parameters())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sha256": "0" * 64}, DataError, "its card 0000"),
        ({"weights": "/nowhere/w.safetensors"}, DataError, "there is no weights file /nowhere/w.safetensors"),
        ({"arch": "tiny_con"}, ConfigError, "tiny_conv"),
        ({"arch": "resnet18"}, ConfigError, "do not fit arch 'resnet18'"),
    ],
    ids=["another file", "no file", "unknown arch", "another arch"],
)
def test_a_wrong_card_is_refused_when_the_run_is_planned(
    tmp_path: Path, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    config = compose([f"local={card_at(tmp_path, **changes)}", "methods=local_probe", "datasets=icons", "model=fake"])
    for plan in (make_plan, estimate):
        with pytest.raises(error, match=message) as caught:
            plan(config)
        assert len(str(caught.value)) <= 300 and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["sha256", "arch", "weights", "licence", "trained_on"])
def test_a_card_without_a_required_key_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        compose([f"local={card_at(tmp_path, **{key: None})}"])
    with pytest.raises(ConfigError, match=key):
        compose([f"local={card_at(tmp_path, **{key: ''})}"])
    with pytest.raises(ConfigError, match="tiny_local"):
        compose(["local=tiny_loca"])


def test_weights_that_are_no_numbers_or_no_safetensors_are_refused(tmp_path: Path) -> None:
    card = local_card(str(card_at(tmp_path)))
    weights = load_file(card.file)
    weights["body.0.weight"][0, 0, 0, 0] = torch.nan
    save_file(weights, tmp_path / "nan.safetensors")
    (tmp_path / "text.safetensors").write_text("<html>")
    for name, message in (("nan", "NaN or infinite"), ("text", "no safetensors file")):
        path = tmp_path / f"{name}.safetensors"
        with pytest.raises(ConfigError, match=message):
            Encoder(replace(card, weights=str(path), sha256=file_sha256(path)))


def test_a_network_of_timm_gives_its_own_features_without_the_classifier(tmp_path: Path, icons: Source) -> None:
    import timm

    torch.manual_seed(0)
    whole = timm.create_model("resnet10t", pretrained=False, num_classes=7).eval()
    save_file(whole.state_dict(), tmp_path / "w.safetensors")
    digest = file_sha256(tmp_path / "w.safetensors")
    card = LocalCard(
        name="r", arch="resnet10t", weights=str(tmp_path / "w.safetensors"), sha256=digest, licence="-", trained_on="-"
    )
    encoder = Encoder(card)
    rule, some = build("resnet10t").preprocess, images(icons, 2)
    assert (rule.size, encoder.feature_dim) == (whole.pretrained_cfg["input_size"][1], whole.num_features)
    with torch.no_grad():
        expected = whole.forward_head(whole.forward_features(rule.pixels(some)), pre_logits=True)
    torch.testing.assert_close(encoder.features(some), expected, rtol=1e-4, atol=1e-4)
    assert local.describe(card).params == sum(p.numel() for n, p in whole.named_parameters() if not n.startswith("fc."))


def test_the_shipped_encoder_was_trained_without_val_test_and_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    columns: list[list[str]] = []
    read = training.pq.read_table

    def recorded(path: Path, columns: list[str]) -> object:
        seen.append(columns)
        return read(path, columns=columns)

    seen = columns
    monkeypatch.setattr(training.pq, "read_table", recorded)
    pixels = training.training_pixels()
    assert pixels.shape == (480 + 583 + 706, 3, 64, 64) and pixels.min() >= 0 and pixels.max() <= 1
    assert columns == [["image", "split"]] * 3


def test_training_is_a_function_of_its_seed() -> None:
    pixels = torch.rand(160, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    state = torch.get_rng_state()
    first, again, other = (training.train(pixels, steps=2, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["body.0.weight"], other["body.0.weight"])


def test_the_contrastive_loss_is_that_of_its_definition() -> None:
    g = torch.Generator().manual_seed(2)
    a, b = torch.randn(3, 4, generator=g), torch.randn(3, 4, generator=g)
    z = [v / v.norm() for v in (*a, *b)]
    losses = []
    for i in range(6):
        weights = [float(torch.exp(z[i] @ z[j] / training.TEMPERATURE)) for j in range(6)]
        losses.append(-np.log(weights[(i + 3) % 6] / (sum(weights) - weights[i])))
    assert float(training.contrastive_loss(a, b)) == pytest.approx(float(np.mean(losses)), rel=1e-5)


def test_the_input_of_the_shipped_encoder_is_its_data_sets_size(shipped: Encoder) -> None:
    assert shipped.size == TINY_INPUT.size == training.training_pixels().shape[-1]
    assert local_card("tiny_local").file.stat().st_size < 1_000_000
