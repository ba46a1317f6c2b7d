"""The count of images to encode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.feature_store import FeatureStore
from pipeline.config.card_files import model_card
from pipeline.sweep.images_left import ImagesLeft, images_of
from tests.support.lab import Lab, stored_rows


def over(endpoint: Endpoint, trials: Any) -> ImagesLeft:
    """Count with the stores of an endpoint, each opened anew as the driver does."""

    def store(codec: str) -> FeatureStore:
        of_endpoint = endpoint.store(codec)
        assert isinstance(of_endpoint, FeatureStore)
        model = (of_endpoint.folder / "model.txt").read_text().removesuffix("\n")
        opened = FeatureStore(of_endpoint.folder.parent, model, of_endpoint.feature_dim)
        assert opened.folder == of_endpoint.folder
        return opened

    return ImagesLeft(trials, store)


def new_endpoint(lab: Lab, tmp_path: Path) -> Endpoint:
    lab.pool.endpoint = endpoint = Endpoint(model_card("fake"), tmp_path / "features")
    return endpoint


def test_the_images_of_a_trial_are_counted_as_it_encodes_them(lab: Lab, tmp_path: Path) -> None:
    endpoint = new_endpoint(lab, tmp_path)
    specs = [lab.spec("zero_shot"), lab.spec("taskres")]
    images = over(endpoint, specs)
    images.count()
    keys = {key for spec in specs for _, some in images_of(spec) for key in some().keys}
    assert images.total == images.left == len(keys) > 60
    lab.run(specs[0])
    images.refresh()
    assert images.left == len(keys) - 60  # its test images; those that taskres trains on are left
    lab.run(specs[1])
    images.refresh()
    assert (images.total, images.left) == (len(keys), 0)
    assert stored_rows(tmp_path / "features") == len(keys)


def test_images_that_are_stored_before_are_not_to_be_encoded(lab: Lab, tmp_path: Path) -> None:
    endpoint = new_endpoint(lab, tmp_path)
    lab.run(lab.spec("taskres"))
    images = over(endpoint, [lab.spec("taskres"), lab.spec("zero_shot")])
    images.count()
    assert (images.total, images.left) == (0, 0)


def test_images_of_an_ended_trial_are_not_left(lab: Lab, tmp_path: Path) -> None:
    spec = lab.spec("taskres")
    images = over(new_endpoint(lab, tmp_path), [spec])
    images.count()
    images.ended(spec)
    images.refresh()
    assert images.total > 0 and images.left == 0


def test_images_that_are_not_stored_are_not_counted(lab: Lab) -> None:
    assert not list(images_of(lab.spec("vp_spsa")))
    images = ImagesLeft([lab.spec("zero_shot")], lambda codec: None)  # the store is on another machine
    images.count()
    assert (images.total, images.left) == (0, 0)
