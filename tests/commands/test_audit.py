"""`farebox audit`: the table, full records, unknown names, and the page that is made from the same data."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pipeline.cli import main
from pipeline.commands.audit import WIDTH, select
from pipeline.results.releases import releases
from tests.support.audit_page import PAGE, written
from tests.support.command import ROOT, here


def test_the_table_has_a_line_for_each_release_and_fits() -> None:
    lines = here("audit").splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert [line.split()[0] for line in lines[1 : len(releases()) + 1]] == list(releases())
    (tip,) = (line for line in lines if line.startswith("tip_adapter_f "))
    assert tip.split()[1:6] == ["test", "whole", "split", "1", "102"]


def test_a_name_prints_the_full_record_with_places() -> None:
    text = here("audit", "ares", "CBBT")
    assert max(map(len, text.splitlines())) <= WIDTH
    for said in ("commit 063bd53", "src/reprogram.py", "Apache-2.0", "commit 528eb2e", "192,750"):
        assert said in text
    for release in select(["ares", "cbbt"]):
        for note in release.notes:
            assert note.what.split()[0] in text and note.file in " ".join(text.split())


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("craft", ["craft"]),
        ("CraFT", ["craft"]),
        ("logit_head", ["craft"]),
        ("craft_no_kl", ["craft"]),
        ("coop_4", ["coop"]),
        ("Tip-Adapter-F", ["tip_adapter_f"]),
        ("arXiv:2109.01134", ["coop", "linear_probe"]),
        ("2404.02285", ["lp_pp"]),
        ("LP++", ["lp_pp"]),
    ],
)
def test_releases_are_found_by_method_variant_title_and_paper(word: str, found: list[str]) -> None:
    assert [release.name for release in select([word])] == found
    assert [release.name for release in select([word, word])] == found


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("taskrse", "no release named 'taskrse'; did you mean 'taskres'?"),
        ("pixel_nn", "pixel_nn has no released code to audit"),
        ("+", "no release named '+'"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(
    word: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", word]) == 2
    line = capsys.readouterr().err
    assert says in line and line.count("\n") == 1 and len(line) <= 300


def test_json_has_every_field_of_every_record() -> None:
    found = json.loads(here("audit", "--json"))
    assert [record["name"] for record in found] == list(releases())
    for record, release in zip(found, releases().values(), strict=True):
        assert record["cost"] | {"dataset": "eurosat", "shots": 16} == record["cost"]
        assert record["cost"]["requests"] == release.cost.requests
        assert [note["file"] for note in record["notes"]] == [note.file for note in release.notes]
    assert json.loads(here("audit", "zip", "--json")) == [record for record in found if record["name"] == "zip"]


def test_the_table_loads_neither_torch_nor_ray() -> None:
    script = (
        "import sys; from pipeline.cli import main; code = main(['audit']) + main(['audit', 'taskres', '--json']);"
        "print([m for m in ('ray', 'mlflow', 'torch') if m in sys.modules], code, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.strip().endswith("[] 0"), done.stderr


def test_the_page_is_made_from_the_data() -> None:
    assert PAGE.read_text(encoding="utf-8") == written(), "run: python -m tests.support.audit_page"
