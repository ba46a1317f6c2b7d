"""A method does today what it did when its golden values were reviewed."""

from __future__ import annotations

import json

import pytest

from methods import all_methods
from tests.support.golden import FOLDER, record

ADVICE = "intended? then raise the method's version, run `make golden`, and say why in the commit"


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_a_method_gives_its_golden_values(name: str) -> None:
    path = FOLDER / f"{name}.json"
    assert path.exists(), f"no golden values of {name}: run `make golden`"
    wanted, got = json.loads(path.read_text()), record(name)
    wanted_logits, got_logits = wanted.pop("logits"), got.pop("logits")
    wanted_accuracy, got_accuracy = wanted.pop("accuracy"), got.pop("accuracy")
    got = json.loads(json.dumps(got))
    for key, value in wanted["notes"].items():
        if isinstance(value, float):  # measured of features, whose last bits are the processor's
            assert got["notes"].pop(key) == pytest.approx(value, rel=1e-3), ADVICE
    exact = {k: v for k, v in wanted["notes"].items() if not isinstance(v, float)}
    assert got == wanted | {"notes": exact}, ADVICE
    assert got_accuracy == pytest.approx(wanted_accuracy, abs=1.01), ADVICE  # one of the 100 toy images may tip
    for got_row, wanted_row in zip(got_logits, wanted_logits, strict=True):
        assert got_row == pytest.approx(wanted_row, rel=2e-3, abs=2e-2), ADVICE


def test_no_golden_file_is_left_over() -> None:
    assert {p.stem for p in FOLDER.glob("*.json")} == set(all_methods())
