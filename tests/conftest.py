"""Fixtures for all tests: one thread, a `fake` and a `tiny` endpoint, and a `lab` in which trials run without Ray."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

if os.environ.get("FAREBOX_TEST_DEVICE") != "cuda":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: bit-identity is claimed for the CPU

import pytest
import torch

from methods import BROKEN
from methods.base import REGISTRY
from pipeline.blackbox.endpoint import Endpoint
from pipeline.config.card_files import dataset_card, model_card
from pipeline.config.plugins import PREFIX
from pipeline.data.dataset import source_of
from pipeline.data.source import Source
from tests.support.lab import Lab, small_data
from tests.support.patience import SCALE, patience

torch.set_num_threads(1)  # bit-identity is claimed per thread count, and the machine is shared


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put files with slow tests first, and scale the timeout of every test by FAREBOX_TEST_PATIENCE.

    Those that wait for processes then do so while other workers compute, and none is left for the end.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if SCALE == 1:
        return
    for item in items:
        marker = item.get_closest_marker("timeout")
        seconds = marker.args[0] if marker else float(config.getini("timeout"))
        item.add_marker(pytest.mark.timeout(patience(seconds)), append=False)


@pytest.fixture(scope="session", autouse=True)
def indexes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep indexes of data sets in a folder of the session, in this process and in those that it starts."""
    os.environ["FAREBOX_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ.pop("FAREBOX_DATA", None)


@pytest.fixture(scope="session")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for feature stores, shared by the session's endpoints."""
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="session")
def fake(features: Path) -> Endpoint:
    """The toy endpoint."""
    return Endpoint(model_card("fake"), features)


@pytest.fixture(scope="session")
def tiny(features: Path) -> Endpoint:
    """The embedded CLIP."""
    return Endpoint(model_card("tiny"), features)


@pytest.fixture(scope="session")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The card of a small data set: five icon classes, 8 train, 4 val and 12 test images each."""
    return small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def icons() -> Source:
    """The embedded icons."""
    return source_of(dataset_card("icons"))


@pytest.fixture
def lab(tmp_path: Path, fake: Endpoint, card: Path) -> Iterator[Lab]:
    """A new storage folder with its ledger, over the toy endpoint; the ledger must verify at the end."""
    lab = Lab(tmp_path / "storage", fake, card)
    yield lab
    assert lab.ledger.verify() == []
    lab.ledger.close()


@pytest.fixture
def registry() -> Iterator[None]:
    """Restore the registry, the broken modules and the loaded files."""
    before, broken, modules = dict(REGISTRY), dict(BROKEN), set(sys.modules)
    yield
    for name in [name for name in sys.modules if name not in modules and name.startswith((PREFIX, "methods."))]:
        del sys.modules[name]
    REGISTRY.clear()
    REGISTRY.update(before)
    BROKEN.clear()
    BROKEN.update(broken)
