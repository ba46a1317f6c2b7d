"""Trains the local encoder on the pixels of the embedded training images, without class names (SimCLR).

Two random appearances of one image are positives, those of the other images in the batch negatives. Neither labels nor
val or test images are read. One thread and one seed give the same bytes on one machine.
"""

from __future__ import annotations

import io
import math
import time
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.local.networks import TINY, TINY_DIM, TINY_INPUT, TinyConv
from tools.embedded.fetch import sha256
from tools.embedded.settings import PACKAGE, ROOT, TRAIN_SEED

DATASETS = ("digits", "emoji", "icons")
WEIGHTS = PACKAGE / "tiny_local.safetensors"
CARD = ROOT / "conf" / "local" / "tiny_local.yaml"
STEPS = 1000
BATCH = 128
PEAK_RATE = 2e-3
WARM_STEPS = 20
WEIGHT_DECAY = 1e-2
TEMPERATURE = 0.2
PROJECTED = 64  # width of the projection that the loss is computed on; it is not kept


def training_pixels() -> Tensor:
    """The training images of every data set as RGB in [0, 1], [N, 3, 64, 64]."""
    arrays = []
    for name in DATASETS:
        table = pq.read_table(PACKAGE / f"{name}.parquet", columns=["image", "split"])
        images = table.filter(pc.equal(table["split"], "train"))["image"].to_pylist()
        arrays += [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def appearance(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images [B, 3, S, S] moved, scaled, turned, blurred and recoloured at random; never mirrored.

    What lies outside of a small image continues its border, or has one random colour.
    """
    count = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    def chance(probability: float) -> Tensor:
        return uniform(0, 1, 1, 1, 1) < probability

    turn, size, stretch = uniform(-0.25, 0.25), 1 / uniform(0.5, 1.3), uniform(0.9, 1.1)
    shift = uniform(-0.15, 0.15, 2)
    top = torch.stack([size * stretch * turn.cos(), -size * turn.sin(), shift[:, 0]], 1)
    bottom = torch.stack([size * turn.sin(), size / stretch * turn.cos(), shift[:, 1]], 1)
    grid = F.affine_grid(torch.stack([top, bottom], 1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    outside = (grid.abs().amax(-1) > 1).unsqueeze(1) & chance(0.5)
    moved = torch.where(outside, uniform(0, 1, 3, 1, 1), moved)
    coarse = F.interpolate(F.avg_pool2d(moved, 2), scale_factor=2, mode="bilinear", align_corners=False)
    moved = torch.where(chance(0.3), coarse, moved)
    moved = torch.where(chance(0.3), moved.mean(1, keepdim=True).expand_as(moved), moved)
    moved = torch.where(chance(0.3), 1 - moved, moved)
    moved = (moved - 0.5) * uniform(0.6, 1.2, 1, 1, 1) + 0.5 + uniform(-0.15, 0.15, 3, 1, 1)
    return moved.clamp(0, 1)


def contrastive_loss(first: Tensor, second: Tensor) -> Tensor:
    """NT-Xent of Chen et al., SimCLR, arXiv:2002.05709, equation 1, over both orders; inputs [B, P]."""
    both = F.normalize(torch.cat([first, second]), dim=-1)
    logits = (both @ both.T / TEMPERATURE).fill_diagonal_(-1e9)
    count = len(first)
    return F.cross_entropy(logits, torch.cat([torch.arange(count, 2 * count), torch.arange(count)]))


def train(pixels: Tensor, steps: int = STEPS, seed: int = TRAIN_SEED) -> TinyConv:
    """The encoder after ``steps`` steps, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = TinyConv()
        head = nn.Sequential(nn.Linear(TINY_DIM, TINY_DIM), nn.ReLU(), nn.Linear(TINY_DIM, PROJECTED))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (TINY_INPUT.mean, TINY_INPUT.std))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=PEAK_RATE, weight_decay=WEIGHT_DECAY)
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = PEAK_RATE * min(1.0, (step + 1) / WARM_STEPS) * cosine
        rows = torch.randperm(len(pixels), generator=generator)[:BATCH]
        views = torch.cat([appearance(pixels[rows], generator) for _ in range(2)])
        first, second = head(encoder((views - mean) / std)).chunk(2)
        loss = contrastive_loss(first, second)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"  step {step + 1}/{steps} loss {loss.item():.3f}", flush=True)
    return encoder.eval()


def run(out: Path = WEIGHTS) -> None:
    """Trains in one thread and writes the weights."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    began = time.time()
    try:
        encoder = train(training_pixels())
    finally:
        torch.set_num_threads(threads)
    kept = {k: v.contiguous() for k, v in encoder.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(kept, out)
    out.chmod(0o644)
    print(f"  {sum(v.numel() for v in kept.values()):,} numbers in {time.time() - began:.0f} s")


def card() -> None:
    """Writes the card of the encoder."""
    CARD.parent.mkdir(parents=True, exist_ok=True)
    CARD.write_text(
        "# A tiny local encoder for the embedded data sets: three convolutions, 196,576 parameters.\n"
        f"arch: {TINY}\n"
        f"weights: {WEIGHTS.name}\n"
        f"sha256: {sha256(WEIGHTS)}\n"
        "licence: Apache-2.0; training images under the licences in pipeline/embedded/NOTICE.md\n"
        "trained_on: the pixels of the training images of digits, emoji and icons, without class names (SimCLR)\n"
        "source: make embedded\n"
        "note: it has seen the training images of the embedded data sets, the few-shot ones among them; nothing else\n"
    )
