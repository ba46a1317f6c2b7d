"""Checks what ships, and stops with the first thing that is wrong. Reads no accuracy on a test split."""

from __future__ import annotations

import io
import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from open_clip.model import CLIP
from PIL import Image

from tools.embedded import datasets, dedupe, train, validate
from tools.embedded.augment import normalise
from tools.embedded.drawings import Drawings
from tools.embedded.fetch import sha256
from tools.embedded.publish import ORIGINS
from tools.embedded.settings import CARDS, JITTER_SEED, LEAST, NEAR, PACKAGE, SIZE

SCHEMA = pa.schema([("image", pa.binary()), ("label", pa.int32()), ("split", pa.string()), ("group", pa.string())])
MOST_BYTES = 10_000_000  # of all Parquet files together


def require(condition: bool, message: str) -> None:
    """Stops the build with the message unless the condition holds."""
    if not condition:
        raise SystemExit(f"check failed: {message}")


def files(trained: Path, figures: Path) -> None:
    """What can be told from the shipped files: digests, cards, splits, images, the model, the templates."""
    _digests()
    chosen = json.loads(figures.read_text())
    for name in ORIGINS:
        table = pq.read_table(PACKAGE / f"{name}.parquet")
        _splits(name, table)
        _card(name, table, chosen)
    total = sum(p.stat().st_size for p in PACKAGE.glob("*.parquet"))
    require(total <= MOST_BYTES, f"the datasets take {total} bytes")
    _model(trained)


def duplicates(held_out: Drawings, corpus: Drawings) -> None:
    """No near-duplicates between corpus and datasets, nor between splits; the files are rebuilt and compared."""
    seen = dedupe.thumbnails(corpus.pixels)
    built = datasets.build(held_out, corpus)
    for name, dataset in built.items():
        _same_as_shipped(dataset)
        every = dataset.thumbs("train", "val", "test")
        near = dedupe.rows_near(every, seen, NEAR)
        require(not near, f"{name}: {len(near)} images are near the pre-training corpus")
        shift_of = ORIGINS[name].shift_of
        fit = built[shift_of].thumbs("train", "val", "test") if shift_of else dataset.thumbs("train", "val")
        near = dedupe.rows_near(dataset.thumbs("test"), fit, NEAR)
        require(not near, f"{name}: {len(near)} test images are near an image that methods may fit on")
        if not shift_of:
            near = dedupe.rows_near(dataset.thumbs("val"), dataset.thumbs("train"), NEAR)
            require(not near, f"{name}: {len(near)} val images are near a train image")
        removed = f"{dataset.removed} near-duplicates removed ({dataset.known} of the corpus)"
        print(f"  {name}: {removed}, none left over the splits or from the corpus")


def _digests() -> None:
    listed = json.loads((PACKAGE / "digests.json").read_text())
    for name, digest in listed.items():
        require(sha256(PACKAGE / name) == digest, f"{name} is not the file in digests.json")
    names = {"tiny.safetensors", "tiny.json", "tiny_bpe.txt.gz", "tiny_local.safetensors", "NOTICE.md"}
    names |= {f"{n}.parquet" for n in ORIGINS}
    require(set(listed) == names, f"digests.json lists {sorted(listed)}")


def _splits(name: str, table: pa.Table) -> None:
    require(table.schema.remove_metadata() == SCHEMA, f"{name}: schema {table.schema}")
    metadata = table.schema.metadata
    require(metadata[b"jitter_seed"] == str(JITTER_SEED).encode(), f"{name}: jitter seed")
    class_count = len(json.loads(metadata[b"classes"]))
    rows = table.to_pydict()
    counts = Counter(zip(rows["split"], rows["label"], strict=True))
    wanted = ("test",) if ORIGINS[name].shift_of else ("train", "val", "test")
    require(set(rows["split"]) == set(wanted), f"{name}: splits {set(rows['split'])}")
    for split in wanted:
        for label in range(class_count):
            count = counts[split, label]
            require(count >= LEAST[split], f"{name}: class {label} has {count} {split} images")
    splits_of: dict[str, set[str]] = defaultdict(set)
    for group, split in zip(rows["group"], rows["split"], strict=True):
        splits_of[group].add(split)
    crossing = [g for g, s in splits_of.items() if len(s) > 1]
    require(not crossing, f"{name}: groups cross splits: {crossing[:5]}")
    for image in rows["image"]:
        require(Image.open(io.BytesIO(image)).size == (SIZE, SIZE), f"{name}: an image is not {SIZE}x{SIZE}")


def _card(name: str, table: pa.Table, chosen: dict[str, Any]) -> None:
    card: Any = OmegaConf.load(CARDS / f"{name}.yaml")
    require(card.sha256 == sha256(PACKAGE / card.path), f"{name}: the card has another sha256")
    counts = Counter(table["split"].to_pylist())
    require(all(card[s] == counts[s] for s in LEAST), f"{name}: the card has other counts")
    require(card.classes == len(json.loads(table.schema.metadata[b"classes"])), f"{name}: the card's classes")
    best = validate.best_template(chosen[card.shift_of or name]["templates"])
    require(card.template == best, f"{name}: the template is not the one that val chose")


def _same_as_shipped(dataset: datasets.Dataset) -> None:
    """The shipped rows are those that the code builds, image for image."""
    rows = pq.read_table(PACKAGE / f"{dataset.name}.parquet").to_pydict()
    same = rows["label"] == dataset.labels and rows["split"] == dataset.splits and rows["group"] == dataset.groups
    require(same, f"{dataset.name}: the shipped rows are not those that the code builds")
    require(rows["image"] == datasets.images(dataset), f"{dataset.name}: the shipped images are not those built")


@torch.inference_mode()
def _model(trained: Path) -> None:
    """open_clip's loading code gives the features of the training side, up to half precision."""
    shipped = validate.load_shipped()
    saved = torch.load(trained, weights_only=True)
    own = CLIP(**saved["config"]).eval()
    own.load_state_dict(saved["model"])
    val = validate.read_split("emoji", "val")
    pictures = torch.stack([shipped.preprocess(image) for image in val.images])
    arrays = torch.from_numpy(np.stack([np.asarray(i) for i in val.images])).permute(0, 3, 1, 2).float() / 255
    require(torch.allclose(pictures, normalise(arrays), atol=1e-5), "open_clip's preprocessing is not the training's")
    texts = shipped.tokenize([f"an emoji of a {c}" for c in val.classes])
    pairs = (
        (shipped.model.encode_image(pictures), own.encode_image(pictures)),
        (shipped.model.encode_text(texts), train.encode_text(own, texts)),
    )
    for ours, theirs in pairs:
        least = F.cosine_similarity(ours, theirs, dim=-1).min().item()
        require(least > 0.9999, f"features differ from the training side's: cosine {least}")
