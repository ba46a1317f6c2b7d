"""Images that a method makes, sent to `farebox serve`: scored, billed and recorded as a local model's are scored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import farebox
from methods.base import Classes, PixelImages, eight_bits
from pipeline.errors import AccessDenied, EndpointRefused
from pipeline.remote.call_log import total_of
from pipeline.results.store import ResultStore
from tests.support.lab import run_here
from tests.support.service import call, serving

CLASSES = Classes(("star", "house", "umbrella"), "an icon of a {}.", ("{} icon", "a {}"))
ONE, TWO = CLASSES.prompts(), CLASSES.ensemble()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving("model=tiny") as address:
        yield address


def card_of(folder: Path, url: str, grant: str) -> Path:
    info = call(f"{url}/v1/info")[1]
    assert info["grant"] == "TEXT+PIXELS+FEATURES"
    facts = (f"feature_dim: {info['feature_dim']}", f"logit_scale: {info['logit_scale']!r}", "text_norm: 18.25")
    lines = ("kind: http", f"url: {url}", "adapter: farebox", f"grant: {grant}", "image: {size: 64}", *facts)
    path = folder / "api.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("grant", ["TEXT+PIXELS+FEATURES", "TEXT+PIXELS+SCORES"])
def test_sets_of_images_have_the_scores_of_a_local_model(tmp_path: Path, url: str, card: Path, grant: str) -> None:
    words = ("budget.requests=null", f"datasets=[{card}]", "shots=1", "seeds=1")
    images = farebox.few_shot_task(*words, "model=tiny", f"storage={tmp_path / 'local'}").train.images
    noise = 0.2 * torch.randn(2, len(images), 3, 64, 64, generator=torch.Generator().manual_seed(0))
    pair = PixelImages(images, eight_bits((images.array(64) + noise).clamp(0, 1)))
    single = PixelImages(images, pair.pixels[0])
    for sent, prompts in ((pair, TWO), (pair, ONE), (single, TWO)):
        told = []
        for place in ("model=tiny", f"model={card_of(tmp_path, url, grant)}"):
            with farebox.open_box(*words, place, f"storage={tmp_path / 'one'}") as box:
                told.append(box.scores(sent, prompts))
                assert told[-1].shape == (2, len(images), 3)
        if "FEATURES" in grant:
            assert torch.equal(*told)
        else:
            torch.testing.assert_close(*told, rtol=1e-5, atol=1e-4)


def rows(storage: Path) -> dict[str, tuple[Any, ...]]:
    """What must not depend on where the model runs: results, and the bill of every phase."""
    table = ResultStore(storage).read().to_pylist()
    units = ("requests", "images", "prompts", "outputs")
    bills = [key for key in table[0] if key.endswith(units) and not key.startswith(("http_", "computed_"))]
    return {
        row["method"]: tuple(row[key] for key in ("status", "accuracy", "nll", "predictions_digest", *bills))
        for row in table
    }


def test_methods_that_make_images_run_as_on_a_local_model_and_again_offline(
    tmp_path: Path, url: str, card: Path
) -> None:
    own = ("methods=[blackvip,bar,vp_spsa]", "shots=2", "seeds=1", "budget.requests=20", "eval_shift=false")
    words = ("sweep=smoke", f"datasets=[{card}]", *own)
    served = (*words, f"model={card_of(tmp_path, url, 'TEXT+PIXELS+FEATURES')}")
    run_here(*words, "model=tiny", f"storage={tmp_path / 'local'}")
    run_here(*served, f"storage={tmp_path / 'remote'}")
    local = rows(tmp_path / "local")
    assert local.keys() == {"blackvip", "bar", "vp_spsa"} and {row[0] for row in local.values()} == {"done"}
    assert rows(tmp_path / "remote") == local
    bill = total_of(tmp_path / "remote")
    assert bill.images > sum(row["images"] for row in ResultStore(tmp_path / "remote").read().to_pylist()) > 0
    run_here(*served, f"storage={tmp_path / 'again'}", "offline=true")
    assert rows(tmp_path / "again") == local and total_of(tmp_path / "again").calls == 0


def test_what_the_card_does_not_grant_or_the_model_does_not_take_is_refused(
    tmp_path: Path, url: str, card: Path
) -> None:
    words = ("budget.requests=null", f"datasets=[{card}]", "shots=1", "seeds=1", f"storage={tmp_path / 'one'}")
    images = farebox.few_shot_task(*words, "model=tiny").train.images
    refused = r"expected uint8 \[P, B, 3, 64, 64\]"
    model = f"model={card_of(tmp_path, url, 'TEXT+PIXELS+FEATURES')}"
    with farebox.open_box(*words, model) as box, pytest.raises(EndpointRefused, match=refused):
        box.scores(PixelImages(images, eight_bits(images.array(32))), ONE)
    denied = r"needs TEXT\+PIXELS\+SCORES"
    model = f"model={card_of(tmp_path, url, 'TEXT+FEATURES')}"
    with farebox.open_box(*words, model) as box, pytest.raises(AccessDenied, match=denied):
        box.scores(PixelImages(images, eight_bits(images.array(64))), ONE)
