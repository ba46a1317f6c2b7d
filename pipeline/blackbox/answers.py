"""What an endpoint tells of its scores and features (`pipeline.cards.Answers`, docs/answers.md).

Shapes: P prompt sets, B images in a call, C classes, D feature width.

Scores pass these steps in this order; each is left out where the settings do not ask for it:

    noise -> log probabilities -> the k best -> rounding -> label

Features: noise -> quantisation; they have unit length after each. Everything is a function of the request's content:
a replay gives the same bits, and an image has the same noise in each block and batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from methods._answers import best_of, reduced
from methods.base import Access, Prompts, SoftPrompts
from pipeline.blackbox.request import Request, prompt_counts, prompts_digest
from pipeline.cards import Answers
from pipeline.data.images import Images
from pipeline.data.made_images import MadeImages

INT8 = 127
"""Largest value of a quantised component."""


def told_scores(scores_PBC: Tensor, request: Request) -> Tensor:
    """Return what a `scores` request is told of the scores [P, B, C]."""
    settings = request.answers
    if settings.noise:
        assert request.images is not None and request.prompts is not None
        keys_PB = _mixed(set_keys(request.prompts)[:, None] ^ image_keys(request.images))
        noise_PBC = gaussian(keys_PB, scores_PBC.shape[-1]).to(scores_PBC)
        scores_PBC = scores_PBC + settings.noise * noise_PBC
    return degraded_scores(scores_PBC, settings, request.answer)


def degraded_scores(scores_PBC: Tensor, settings: Answers, answer: Access = Access.SCORES) -> Tensor:
    """Apply all steps but the noise to scores [P, B, C].

    Probabilities are returned as logarithms, which are logits up to a constant for each image.
    """
    is_top_k = answer is Access.TOPK or settings.scores == "topk"
    probabilities, told_PBC = is_top_k or settings.scores == "probabilities", scores_PBC
    if probabilities:
        told_PBC = told_PBC.log_softmax(-1)
    if is_top_k:
        told_PBC = best_of(told_PBC, scores_PBC, settings.k)
    if settings.digits is not None:
        told_PBC = rounded(told_PBC, settings.digits, probabilities)
    return reduced(told_PBC, answer) if answer is Access.LABELS else told_PBC


def rounded(values: Tensor, digits: int, probabilities: bool) -> Tensor:
    """Round values, or the probabilities whose logarithms they are, to decimals; -inf (not told) stays.

    A probability that is rounded to 0 counts as half a unit of the last decimal, so that its logarithm is finite.
    """
    exact = values.double()
    if not probabilities:
        return exact.round(decimals=digits).to(values)
    told = exact.exp().round(decimals=digits).clamp(min=0.5 * 10.0**-digits).log()
    return torch.where(values == -math.inf, exact, told).to(values)


def told_features(features: Tensor, request: Request, logit_scale: float) -> Tensor:
    """Return what a request is told of the features [B, D] of its images or [P, C, D] of its prompts."""
    settings = request.answers
    if settings.noise:
        if request.images is not None:
            keys = image_keys(request.images)[0]
        else:
            assert request.prompts is not None
            _, c = prompt_counts(request.prompts)
            keys = _mixed(set_keys(request.prompts)[:, None] ^ _mixed(np.arange(c, dtype=np.uint64)))
        noise = gaussian(keys, features.shape[-1]).to(features)
        features = normalize(features + settings.noise / logit_scale * noise, dim=-1)
    return quantised(features, settings.features)


def quantised(features: Tensor, form: str) -> Tensor:
    """Return unit vectors [..., D] of components of 8 bits (int8), of their signs (binary), or unchanged (float32)."""
    if form == "int8":
        return normalize((INT8 * features).round(), dim=-1)
    return normalize(torch.where(features < 0, -1.0, 1.0), dim=-1) if form == "binary" else features


def keys_of(texts: Sequence[str]) -> np.ndarray:
    """Return a number [n] of 64 bits for each text."""
    digests = b"".join(hashlib.sha256(text.encode()).digest()[:8] for text in texts)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def image_keys(images: Images | MadeImages) -> np.ndarray:
    """Return a number [P, B] of 64 bits for each image: by its content key, or its pixels if a client made it."""
    if isinstance(images, MadeImages):
        return np.stack([keys_of([pixels.tobytes().hex() for pixels in some]) for some in images.pixels_PB3SS])
    return keys_of(images.keys)[None]


def set_keys(prompts: Prompts) -> np.ndarray:
    """Return a number [P] of 64 bits for each prompt set: equal sets have equal numbers in every call."""
    p, _ = prompt_counts(prompts)
    if isinstance(prompts, SoftPrompts):
        singles: list[Prompts] = [
            SoftPrompts(prompts.ctx_PLE[i : i + 1], prompts.classnames, prompts.suffix) for i in range(p)
        ]
    else:
        singles = [type(prompts)((texts,)) for texts in prompts.texts]
    return keys_of([prompts_digest(single) for single in singles])


def gaussian(keys: np.ndarray, width: int) -> Tensor:
    """Return standard normal numbers [..., width] that the keys [...] determine, whatever is in one call."""
    step = np.uint64(0x9E3779B97F4A7C15)
    bits = _mixed(keys[..., None] + step * np.arange(1, width + 1, dtype=np.uint64))
    uniform = ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52  # above 0 and below 1
    return torch.special.ndtri(torch.from_numpy(uniform))


def _mixed(x: np.ndarray) -> np.ndarray:
    """Mix the bits of 64-bit numbers: the output function of SplitMix64 (Steele et al., OOPSLA 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
