"""`farebox probe`: the noise floor of an endpoint, its identity, and where it cuts texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from methods._toy_box import ToyBox, ToyImages
from methods.base import Access, ImageSet, Prompts, TextPrompts
from pipeline.blackbox.probe import Differences, NoiseFloor, TextEnd, arrangements, measure, text_end
from pipeline.cli import main
from pipeline.commands import probe as command
from pipeline.config.compose import compose
from pipeline.errors import ConfigError, EndpointRefused, EndpointStopped
from pipeline.results import noise_floor
from tests.support.service import fake_card, serving

FEATURES = Access.TEXT | Access.FEATURES
TEXTS = [f"a photo of a {name}" for name in ("cat", "dog", "cup", "box")]


class Noisy(ToyBox):
    """A toy box whose answers depend on the size of the batch, and that cuts or refuses long texts."""

    __slots__ = ("cut", "noise", "refuse")

    def __init__(self, access: Access, noise: float = 0.0, cut: int = 10**6, refuse: int = 10**6) -> None:
        super().__init__(access)
        self.noise, self.cut, self.refuse = noise, cut, refuse

    def _short(self, prompts: Prompts) -> TextPrompts:
        assert isinstance(prompts, TextPrompts)
        if max(len(text.split()) for texts in prompts.texts for text in texts) > self.refuse:
            raise EndpointRefused("a text is too long")
        return TextPrompts(tuple(tuple(" ".join(t.split()[: self.cut]) for t in texts) for texts in prompts.texts))

    def scores(self, images: ImageSet, prompts: Prompts) -> Tensor:
        """Return the scores [P, B, C], with a shift of the first class in calls with few images."""
        values = super().scores(images, self._short(prompts))
        return values + self.noise * (len(images) == 1) * torch.eye(values.shape[-1])[0]

    def text_features(self, prompts: Prompts) -> Tensor:
        """Return the features [P, C, D] of the texts as they are cut."""
        return super().text_features(self._short(prompts))


def toy_images(n: int = 9) -> ToyImages:
    return ToyImages(torch.rand(n, 64, generator=torch.Generator().manual_seed(0)), "train")


def test_every_arrangement_asks_for_each_image_once_and_for_each_prompt() -> None:
    for b in (1, 2, 3, 16):
        some = list(arrangements(b, 8))
        assert len(some) == 5 and some[0] == some[1]
        for arrangement in some:
            assert sorted(i for batch in arrangement.batches for i in batch) == list(range(b))
            assert sorted(arrangement.prompts) == list(range(8))
    assert {len(batch) for one in some for batch in one.batches} >= {1, 3, 16}


def test_the_floor_is_the_largest_difference_to_the_first_answer() -> None:
    forgotten = []
    floor = NoiseFloor(features=Differences())
    measure(floor, Noisy(FEATURES, noise=7.0), toy_images(), TEXTS, lambda: forgotten.append(1))
    assert floor.scores.largest == pytest.approx(7.0, abs=1e-3)
    assert floor.scores.mean == pytest.approx(7.0 * (9 / 5) / (9 * 4), abs=1e-3)  # one call of five, one class of four
    assert floor.features is not None and floor.features.largest < 1e-5
    assert len(forgotten) == 5 and floor.n_images == 9 and 0 < floor.changed <= 9
    exact = NoiseFloor()
    measure(exact, Noisy(Access.TEXT | Access.SCORES), toy_images(), TEXTS, lambda: None)
    assert exact.scores.largest < 1e-4 and exact.changed == 0 and exact.features is None


def test_answers_that_are_not_told_make_no_difference() -> None:
    floor = NoiseFloor()
    measure(floor, Noisy(Access.TEXT | Access.LABELS), toy_images(), TEXTS, lambda: None)
    assert floor.scores.largest == 0 and floor.scores.count > 0


@pytest.mark.parametrize("access", [FEATURES, Access.TEXT | Access.SCORES, Access.TEXT | Access.TOPK])
@pytest.mark.parametrize(
    ("limits", "end"),
    [
        ({"cut": 1}, TextEnd(1, False)),
        ({"cut": 32}, TextEnd(32, False)),
        ({"cut": 77, "refuse": 200}, TextEnd(77, False)),
        ({"refuse": 26}, TextEnd(26, True)),
        ({}, TextEnd(None, False)),
    ],
    ids=str,
)
def test_the_end_of_a_text_is_found(access: Access, limits: dict[str, int], end: TextEnd) -> None:
    assert text_end(Noisy(access, **limits), access, toy_images(1), 1e-6) == end


def test_labels_and_noise_show_refusals_only() -> None:
    labels = Access.TEXT | Access.LABELS
    assert text_end(Noisy(labels, cut=7, refuse=26), labels, toy_images(1), 1e-6) == TextEnd(26, True)
    assert text_end(Noisy(labels, cut=7), labels, toy_images(1), 1e-6) is None
    assert text_end(Noisy(FEATURES, cut=7), FEATURES, toy_images(1), float("inf")) is None


def test_the_embedded_model_is_probed_stored_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=tiny", "datasets=icons,digits", f"storage={tmp_path / 'runs'}"]
    assert main(["probe", *words]) == 0
    printed = capsys.readouterr()
    assert "as its card names it" in printed.out and "changes for 0 of 32 images (0.0%)" in printed.out
    assert "long texts: refused beyond 26 words" in printed.out
    assert "equal questions differ by at most 0, by 0 on average" in printed.out  # features: no batch changes them
    assert main(["probe", *words, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["scores_largest"] < 1e-5 and record["features_largest"] == 0 and record["images"] == 32
    (file,) = (tmp_path / "features" / "probes").iterdir()
    assert file == noise_floor.path_of(tmp_path / "features", [record[name] for name in noise_floor.KEY])
    assert str(tmp_path) not in file.read_text()


def test_a_probe_encodes_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No repetition is answered from a cache or from the feature store of earlier runs."""
    encoded: list[int] = []
    real = command.Endpoint

    class Counting(real):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            inner = self.model.encode_images
            self.model.encode_images = lambda images, codec: encoded.append(len(images)) or inner(images, codec)

    monkeypatch.setattr(command, "Endpoint", Counting)
    for _ in range(2):
        encoded.clear()
        command.probe(compose(["model=fake", "datasets=icons", f"storage={tmp_path / 'runs'}"]))
        assert sum(encoded) == 5 * 16


def test_noise_of_the_answers_is_measured(tmp_path: Path) -> None:
    words = ["model=fake", "datasets=icons", f"storage={tmp_path / 'runs'}"]
    record, _ = command.probe(compose([*words, "answers={noise: 0.5}"]))
    assert 0.5 < record["scores_largest"] < 5 and record["answers"] == "logits, noise 0.5"
    assert "long texts: not measured" in "\n".join(command.lines(record))
    label, _ = command.probe(compose([*words, "answers=label"]))
    assert label["features_largest"] is None and "features: not granted" in list(command.lines(label))


@pytest.mark.parametrize(
    ("word", "says"),
    [("answers=logits,topk", "probe asks for one kind at a time, found 2"), ("model=mine.yaml", "probe needs text")],
)
def test_what_cannot_be_probed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("kind: fake\ngrant: SOFT+GRADIENTS\n")
    with pytest.raises(ConfigError, match=says):
        command.probe(compose(["model=fake", "datasets=icons", word]))


@pytest.mark.parametrize(("fault", "least", "most"), [((), 0.0, 1e-5), (("fault.jitter=0.0001",), 2e-5, 0.001)])
def test_a_remote_model_is_asked_anew_past_its_records(
    tmp_path: Path, card: Path, fault: tuple[str, ...], least: float, most: float
) -> None:
    with serving("model=fake", *fault) as url:
        (tmp_path / "api.yaml").write_text(fake_card(url, "max_text: 60"))
        storage = f"storage={tmp_path / 'sweep'}"
        config = compose([f"model={tmp_path / 'api.yaml'}", f"datasets=[{card}]", storage, "budget.usd=5"])
        first, _ = command.probe(config)
        recorded = sorted(config.records.rglob("*"))
        again, file = command.probe(config)
    assert sorted(config.records.rglob("*")) == recorded and file.is_file()
    for record in (first, again):
        assert least <= record["features_largest"] <= most and record["model_digest"] == record["card_names"]
        assert record["images"] == 16 and record["text_words"] > 60, "longer than max_text of the card"
        (sent,) = record["sent"]
        assert sent.startswith("sent: ") and "by the card's prices" in sent and sent in list(command.lines(record))


def test_a_remote_probe_is_confirmed_paid_and_not_offline(tmp_path: Path, card: Path) -> None:
    (tmp_path / "api.yaml").write_text(fake_card("https://api.example", "max_text: 60"))
    words = [f"model={tmp_path / 'api.yaml'}", f"datasets=[{card}]", f"storage={tmp_path / 'sweep'}"]
    with pytest.raises(ConfigError, match=r"to api\.example, which may cost money: add --spend"):
        command.probe(compose(words))
    with pytest.raises(ConfigError, match="offline=true: probe compares new answers"):
        command.probe(compose([*words, "offline=true"]))
    with serving("model=fake") as url:
        (tmp_path / "api.yaml").write_text(fake_card(url, "max_text: 60"))
        with pytest.raises(EndpointStopped, match="asked of account 'probe'"):
            command.probe(compose([*words, "budget.usd=0.01"]))
