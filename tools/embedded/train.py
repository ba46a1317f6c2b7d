"""Contrastive pre-training of the tiny CLIP: symmetric InfoNCE with false negatives masked.

Run as its own process (``python -m tools.embedded.train``) by the pipeline, so that the threads' settings
take effect. A checkpoint is written every ``SAVE_EVERY`` steps and a later run goes on from it.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.model import CLIP

from tools.embedded import captions, vocabulary
from tools.embedded.augment import augment
from tools.embedded.drawings import Drawings
from tools.embedded.settings import CONTEXT, SIZE, TRAIN_SEED, WORK

SAMPLES = 350_000
BATCH = 256
PEAK_RATE = 1e-3
FLOOR = 0.01  # of the peak, at the end of the cosine
WARM_STEPS = 60
WEIGHT_DECAY = 0.1
LARGEST_SCALE = 100.0
SAVE_EVERY = 100
BPE = WORK / "tiny_bpe.txt.gz"
CHECKPOINT = WORK / "train.pt"
LOG = WORK / "train.log"


def config(vocabulary_size: int) -> dict[str, Any]:
    """open_clip's description of the architecture."""
    return {
        "embed_dim": 192,
        "vision_cfg": {"image_size": SIZE, "layers": [1, 1, 1, 1], "width": 24, "head_width": 64},
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": vocabulary_size,
            "width": 192,
            "heads": 3,
            "layers": 3,
        },
    }


def encode_text(model: CLIP, ids: torch.Tensor) -> torch.Tensor:
    """Normalised text features, with the padding cut off: attention is causal, so it changes nothing."""
    ends = ids.argmax(1)
    length = int(ends.max()) + 1
    hidden = model.token_embedding(ids[:, :length]) + model.positional_embedding[:length]
    hidden = model.transformer(hidden, attn_mask=model.attn_mask[:length, :length])
    hidden = model.ln_final(hidden)[torch.arange(len(ids)), ends]
    return F.normalize((hidden @ model.text_projection).float(), dim=-1)


def masked_loss(logits: torch.Tensor, also_true: torch.Tensor) -> torch.Tensor:
    """InfoNCE both ways; ``also_true[i, j]``: text j is true of picture i as well, though made for picture j."""
    logits = logits.masked_fill(also_true, -1e4)
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class Batches:
    """Random batches of augmented pictures, captions and the mask of captions true of other pictures."""

    def __init__(self, drawings: Drawings, rng: np.random.Generator) -> None:
        self.rng = rng
        self.pixels = torch.from_numpy(drawings.pixels)
        self.glyph = torch.tensor([r.is_glyph for r in drawings.records])
        self.truths = [captions.truth(r) for r in drawings.records]
        weights = np.array([_weight(r.skin, r.subgroup, t) for r, t in zip(drawings.records, self.truths, strict=True)])
        self.weights = weights / weights.sum()
        self.ids = {p: i for i, p in enumerate(dict.fromkeys(p for t in self.truths for p in t.phrases))}
        longest = max(len(t.phrases) for t in self.truths)
        table = np.full((len(self.truths), longest), -1)
        for row, about in enumerate(self.truths):
            table[row, : len(about.phrases)] = [self.ids[p] for p in about.phrases]
        self.table = torch.from_numpy(table)

    def draw(self) -> tuple[torch.Tensor, list[str], torch.Tensor]:
        rows = self.rng.choice(len(self.truths), BATCH, p=self.weights, replace=False)
        made = [captions.caption(self.truths[i], self.rng) for i in rows]
        stated = torch.tensor([self.ids[phrase] for _, phrase in made])
        also_true = (self.table[rows][:, None, :] == stated[None, :, None]).any(-1)
        also_true &= ~torch.eye(BATCH, dtype=torch.bool)
        images = augment(self.pixels[rows], self.glyph[rows])
        return images.contiguous(memory_format=torch.channels_last), [c for c, _ in made], also_true


def _weight(skin: str, subgroup: str, about: captions.Truth) -> float:
    """Skin tones and country flags are many and alike: drawn less; the few pictures of digits more."""
    if skin:
        return 0.25
    if subgroup == "country-flag":
        return 0.4
    return 2.0 if "digit" in " ".join(about.names) else 1.0


def _optimizer(model: CLIP) -> torch.optim.AdamW:
    decayed = [p for n, p in model.named_parameters() if p.ndim > 1 and "embedding" not in n]
    kept = [p for n, p in model.named_parameters() if p.ndim <= 1 or "embedding" in n]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98))


def _rate(step: int, steps: int) -> float:
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return PEAK_RATE * min(1.0, (step + 1) / WARM_STEPS) * ((1 - FLOOR) * cosine + FLOOR)


def train(drawings: Drawings, out: Path, log: Path) -> None:
    """Trains to ``SAMPLES`` pictures and writes the state dict and its config to ``out``."""
    steps = SAMPLES // BATCH
    tokenize = vocabulary.tokenizer(BPE)
    torch.manual_seed(TRAIN_SEED)
    model = CLIP(**config(tokenize.vocab_size))
    model.train()
    model.visual = model.visual.to(memory_format=torch.channels_last)
    optimizer = _optimizer(model)
    first, wall, cpu = 0, 0.0, 0.0
    if CHECKPOINT.exists():
        saved = torch.load(CHECKPOINT, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first, wall, cpu = saved["step"], saved["wall"], saved["cpu"]
    # The seeds depend on the step where a run starts, so that a resumed run draws new batches.
    torch.manual_seed(TRAIN_SEED + first)
    batches = Batches(drawings, np.random.default_rng([TRAIN_SEED, first]))
    began, began_cpu, smooth = time.time() - wall, time.process_time() - cpu, math.nan
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, steps)
        images, texts, also_true = batches.draw()
        with torch.autocast("cpu", torch.bfloat16):
            image_features = model.encode_image(images)
            text_features = encode_text(model, tokenize(texts))
        image_features = F.normalize(image_features.float(), dim=-1)
        loss = masked_loss(model.logit_scale.exp() * image_features @ text_features.T, also_true)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(LARGEST_SCALE))
        smooth = loss.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss.item()
        done, wall, cpu = step + 1, time.time() - began, time.process_time() - began_cpu
        if done % 50 == 0 or done in (5, 20, steps):
            line = f"step {done}/{steps} loss {smooth:.3f} scale {model.logit_scale.exp():.1f}"
            line += f" samples {done * BATCH} wall {wall:.0f}s cpu {cpu:.0f}s"
            print(line, flush=True)
            with log.open("a") as file:
                file.write(line + "\n")
        if done % SAVE_EVERY == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            part = CHECKPOINT.with_suffix(".part")
            torch.save({**state, "step": done, "wall": wall, "cpu": cpu}, part)
            part.replace(CHECKPOINT)
    torch.save({"config": config(tokenize.vocab_size), "model": model.state_dict()}, out)
    out.with_suffix(".json").write_text(json.dumps({"samples": steps * BATCH, "wall_s": wall, "cpu_s": cpu}))


if __name__ == "__main__":
    train(Drawings.load(WORK / "corpus"), WORK / "trained.pt", LOG)
