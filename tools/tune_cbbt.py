"""How CBBT's scaling rule was fixed: validation accuracy for a few values of its constants, with no test image read.

For each embedded data set: 16 shots drawn with seeds that no sweep uses, fitted at the sweeps' allotments, and scored
on those images of the train and val splits that were not drawn. The constants under trial are `min_steps` and
`min_directions` of `cbbt_prompt` (methods/cbbt_prompt.py); everything else is the released setting.

    python -m tools.tune_cbbt [--requests 1000 8000] [--seeds 101 102] [--datasets icons emoji digits]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from methods.base import Bill, Classes, FewShotTask, ImageSet, LabelledImages, Prompts, Remaining
from methods.cbbt_prompt import CBBTPrompt
from pipeline.blackbox.endpoint import Endpoint, Kind, Request, price
from pipeline.budget import Charge, Phase
from pipeline.config.card_files import dataset_card, model_card
from pipeline.data.dataset import source_of
from pipeline.data.few_shot import draw
from pipeline.data.images import Images, as_images

GRID = {
    1000: [(150, 4), (150, 8), (150, 16), (150, 32)],
    8000: [(50, 4), (150, 4), (300, 4), (600, 4)],
}
"""(min_steps, min_directions) tried at each allotment of requests."""


class LocalBox:
    """A BlackBox straight on an endpoint: counted, not recorded."""

    def __init__(self, endpoint: Endpoint, requests: float) -> None:
        self.endpoint, self.allotment, self.bill = endpoint, Remaining(requests), Bill()
        info = endpoint.info
        self.logit_scale, self.token_dim, self.feature_dim = info.logit_scale, info.token_dim, info.feature_dim

    @property
    def remaining(self) -> Remaining:
        return self.allotment.minus(self.bill)

    def _ask(self, kind: Kind, images: ImageSet | None, prompts: Prompts | None) -> Tensor:
        whole = None if images is None else as_images(images)
        self.bill += (bill := price(kind, whole, prompts, self.feature_dim))
        charge = Charge("tune", "tune", 0, "0" * 32, Phase.ADAPT, bill)
        return torch.from_numpy(self.endpoint.compute(Request(kind, whole, prompts, charge)).values)

    def scores(self, images: ImageSet, prompts: Prompts) -> Tensor:
        return self._ask("scores", images, prompts)

    def score_blocks(self, images: ImageSet, prompts: Prompts) -> Iterator[tuple[slice, Tensor]]:
        yield slice(0, len(images)), self.scores(images, prompts)

    def image_features(self, images: ImageSet) -> Tensor:
        return self._ask("image_features", images, None)

    def text_features(self, prompts: Prompts) -> Tensor:
        return self._ask("text_features", None, prompts)

    def embed_text(self, text: str) -> Tensor:
        return torch.from_numpy(self.endpoint.embed_text(text))


def task_of(name: str, seed: int, shots: int = 16) -> tuple[FewShotTask, LabelledImages]:
    """The few-shot task of a seed, and the images of the train and val splits that it leaves."""
    card = dataset_card(name)
    source = source_of(card)
    split = draw(source, name, shots, seed, "none")

    def labelled(which: str, rows: np.ndarray) -> LabelledImages:
        images = Images.plain(source, which, rows, card.augment)
        return LabelledImages(images, torch.from_numpy(source.labels[rows]))

    train = labelled("train", np.asarray(split.train, dtype=np.int64))
    left = np.setdiff1d(np.concatenate([source.rows_of("train"), source.rows_of("val")]), np.asarray(split.train))
    classes = Classes(source.classnames, card.template, card.templates)
    nothing = labelled("val", np.zeros(0, dtype=np.int64))
    return FewShotTask(name, classes, shots, train, nothing), labelled("val", left)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, nargs="+", default=[1000, 8000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102])
    parser.add_argument("--datasets", nargs="+", default=["icons", "emoji", "digits"])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    endpoint = Endpoint(model_card("tiny"), Path(tempfile.mkdtemp()))
    print("dataset  seed requests min_steps min_directions  steps  Q  before  after  loss before/after  seconds")
    for name in asked.datasets:
        for seed in asked.seeds:
            task, held_out = task_of(name, seed)
            for requests in asked.requests:
                for min_steps, min_directions in GRID.get(requests, [(150, 4)]):
                    method = CBBTPrompt(CBBTPrompt.Config(min_steps=min_steps, min_directions=min_directions))
                    box, began, found = LocalBox(endpoint, requests), time.monotonic(), []
                    method.start(task, box, np.random.default_rng(seed))
                    found.append(method.predict(held_out.images, box))
                    box.bill = Bill()
                    while method.step(box):
                        pass
                    found.append(method.predict(held_out.images, box))
                    hits = [100 * (x.argmax(1) == held_out.labels).double().mean().item() for x in found]
                    loss = [torch.nn.functional.cross_entropy(x, held_out.labels).item() for x in found]
                    plan = method.plan
                    print(
                        f"{name:8} {seed:4} {requests:8} {min_steps:9} {min_directions:14} {plan.steps:6} "
                        f"{plan.directions:3} {hits[0]:6.1f} {hits[1]:6.1f}   {loss[0]:5.2f} {loss[1]:5.2f} "
                        f"{time.monotonic() - began:8.0f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
