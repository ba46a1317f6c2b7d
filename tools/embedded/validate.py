"""Reads the val splits, and only these: the choice of each dataset's template, and a control for leaks."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import Compose

from tools.embedded import vocabulary
from tools.embedded.classes import TEMPLATES
from tools.embedded.settings import PACKAGE


@dataclass(frozen=True)
class Shipped:
    """The model as a user gets it: open_clip's own loading code over the shipped files."""

    model: open_clip.CLIP
    preprocess: Compose
    tokenize: open_clip.SimpleTokenizer


def load_shipped(folder: Path = PACKAGE) -> Shipped:
    """The model through ``open_clip.create_model_and_transforms``, tokenizer from the shipped merges."""
    open_clip.add_model_config(folder / "tiny.json")
    weights = str(folder / "tiny.safetensors")
    model, _, preprocess = open_clip.create_model_and_transforms("tiny", pretrained=weights)
    return Shipped(model.eval(), preprocess, vocabulary.tokenizer(folder / "tiny_bpe.txt.gz"))


@dataclass(frozen=True)
class Split:
    """Images and labels of one split."""

    images: list[Image.Image]
    labels: torch.Tensor
    classes: list[str]


def read_split(name: str, split: str) -> Split:
    """One split of a dataset. Nothing here may ask for a test split: accuracies on it are not for the build."""
    if split == "test":
        raise ValueError("the build reads no accuracy on a test split")
    table = pq.read_table(PACKAGE / f"{name}.parquet")
    classes = json.loads(table.schema.metadata[b"classes"])
    table = table.filter(pc.equal(table["split"], split))
    images = [Image.open(io.BytesIO(b)).convert("RGB") for b in table["image"].to_pylist()]
    return Split(images, torch.tensor(table["label"].to_pylist()), classes)


@torch.inference_mode()
def template_accuracies(shipped: Shipped, name: str) -> dict[str, float]:
    """Zero-shot accuracy on val, in percent: each candidate, and the mean of them all (``ensemble``)."""
    val = read_split(name, "val")
    pictures = torch.stack([shipped.preprocess(image) for image in val.images])
    image_features = F.normalize(shipped.model.encode_image(pictures), dim=-1)
    accuracies, every = {}, []
    for template in TEMPLATES[name]:
        texts = shipped.tokenize([template.format(c) for c in val.classes])
        every.append(F.normalize(shipped.model.encode_text(texts), dim=-1))
        accuracies[template] = _accuracy(image_features @ every[-1].T, val.labels)
    together = F.normalize(torch.stack(every).mean(0), dim=-1)
    return {**accuracies, "ensemble": _accuracy(image_features @ together.T, val.labels)}


def pixel_neighbour(name: str) -> float:
    """Accuracy on val, in percent, of the nearest train image by pixels: high where pixels alone solve a task."""
    train, val = (read_split(name, s) for s in ("train", "val"))
    nearest = torch.cdist(_pixels(val), _pixels(train)).argmin(1)
    return 100 * (train.labels[nearest] == val.labels).float().mean().item()


def _pixels(split: Split) -> torch.Tensor:
    small = [np.asarray(i.convert("L").resize((16, 16), Image.Resampling.BOX), np.float32) for i in split.images]
    return torch.from_numpy(np.stack(small)).flatten(1) / 255


def _accuracy(scores: torch.Tensor, labels: torch.Tensor) -> float:
    return 100 * (scores.argmax(1) == labels).float().mean().item()


def run(out: Path) -> None:
    """Writes every figure to ``out`` and prints it."""
    shipped = load_shipped()
    figures = {}
    for name in TEMPLATES:
        figures[name] = {"templates": template_accuracies(shipped, name), "pixel_1nn": pixel_neighbour(name)}
        print(f"  {name}: pixel 1-NN {figures[name]['pixel_1nn']:.1f}")
        for template, accuracy in template_accuracies(shipped, name).items():
            print(f"    {accuracy:5.1f}  {template}")
    out.write_text(json.dumps(figures, indent=1))


def best_template(figures: dict[str, float]) -> str:
    """The best candidate with words before the class name, which soft prompts replace; of equals, the first listed."""
    return max((t for t in figures if t.split("{}")[0].strip() and t != "ensemble"), key=lambda t: figures[t])
