"""text_norm: the mean length of the text tower's output, stated by a model's card or measured when it is loaded."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from methods._toy import ToyTowers
from methods.base import Classes, Prompts
from pipeline.blackbox import architecture, text_norm
from pipeline.blackbox import model as models
from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.facts import load_network
from pipeline.cards import ModelCard
from pipeline.cli import main
from pipeline.config.card_files import model_card
from pipeline.errors import ConfigError

TINY, FAKE = model_card("tiny"), model_card("fake")


def test_the_value_is_the_mean_length_of_open_clips_own_text_features() -> None:
    net, _ = load_network(TINY, torch.device("cpu"))
    tokens = architecture.tokenizer(TINY)([text_norm.TEMPLATE.format(name) for name in text_norm.NAMES])
    with torch.no_grad():
        lengths_N = torch.tensor([math.sqrt(float((row.double() ** 2).sum())) for row in net.encode_text(tokens)])
    measured = text_norm.measure(models.load(TINY))
    assert measured.value == float(f"{float(lengths_N.mean()):.4g}")
    assert (measured.lowest, measured.highest) == pytest.approx(
        (float(lengths_N.min()), float(lengths_N.max())), rel=1e-5
    )


def test_the_names_are_all_different() -> None:
    assert len(text_norm.NAMES) == len(set(text_norm.NAMES)) == 64


def test_the_embedded_and_the_toy_model_state_what_is_measured() -> None:
    assert TINY.text_norm == text_norm.measure(models.load(TINY)).value
    assert ToyTowers.text_norm == text_norm.measure(models.load(FAKE)).value


def test_the_features_are_the_outputs_at_unit_length() -> None:
    towers, prompts = ToyTowers(), Classes(("ant", "bee"), "a photo of a {}.").prompts()
    outputs = towers.text_outputs(prompts)
    assert torch.equal(towers.text_features(prompts), torch.nn.functional.normalize(outputs, dim=-1))


@pytest.mark.parametrize("card", [TINY, FAKE], ids=["tiny", "fake"])
def test_an_endpoint_takes_the_cards_value_and_measures_it_where_the_card_is_silent(
    card: ModelCard, tmp_path: Path
) -> None:
    measured = text_norm.measure(models.load(card)).value
    assert Endpoint(replace(card, text_norm=None), tmp_path).info.text_norm == measured
    assert Endpoint(replace(card, text_norm=2.5), tmp_path).info.text_norm == 2.5


def test_a_tower_without_finite_outputs_loads_and_has_no_length() -> None:
    class Broken(models.FakeModel):
        def text_norms(self, prompts: Prompts) -> Tensor:
            return super().text_norms(prompts) * math.nan

    assert math.isnan(text_norm.measure(Broken(FAKE)).value)


@pytest.mark.parametrize("value", ["0", "-3.0", ".nan", ".inf", "long"])
def test_a_card_with_another_value_than_a_positive_number_is_refused(value: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"kind: fake\ntext_norm: {value}\n")
    with pytest.raises(ConfigError, match="text_norm"):
        model_card(str(tmp_path / "mine.yaml"))


def test_one_command_measures_it_and_prints_the_line_for_the_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--text-norm", "tiny"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"tiny: {TINY.text_norm} (") and out[-1] == f"text_norm: {TINY.text_norm}"
    assert main(["models", "--text-norm", "fake", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["lowest"] < record["text_norm"] < record["highest"] and record["card"] is None
