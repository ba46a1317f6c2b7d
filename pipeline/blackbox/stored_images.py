"""Read the features of images from a store; encode those that neither it has nor another process encodes now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.blackbox.feature_store import FeatureStore, MemoryStore

STORED_AT_ONCE = 256
"""Maximum number of new images that a replica encodes before it stores them: what others wait for, and what is lost if
it is killed."""


@dataclass(frozen=True)
class ImageRows:
    """Features of a set of images."""

    features_BD: Tensor
    """On the model's device."""
    calls: Counter[str]
    """Number of distinct images by the call that they were encoded for."""

    @property
    def nbytes(self) -> int:
        """Bytes of the features."""
        return self.features_BD.nbytes


def read_or_encode(
    keys: Sequence[str],
    store: FeatureStore | MemoryStore,
    encode: Callable[[list[int]], Tensor],
    call: str,
    device: torch.device | str,
) -> ImageRows:
    """Return the features of images, and store those that are new.

    Args:
        keys: keys of the B images.
        store: where features are stored.
        encode: returns the features of the images in these rows.
        call: the call that they are encoded for, in characters of a file name.
        device: where the features are returned.
    """
    features, missing = store.read(keys)
    first: dict[str, int] = {}
    for i in missing:
        first.setdefault(keys[i], i)
    left, n_encoded = list(first), 0
    while left:
        with store.claim(left, STORED_AT_ONCE) as claimed:
            stored, absent = store.read(claimed)
            if absent:
                new = [first[claimed[i]] for i in absent]
                stored[absent] = encode(new)
                store.add([keys[i] for i in new], stored[absent], call)
                n_encoded += len(new)
        features[[first[key] for key in claimed]] = stored
        done = set(claimed)
        left = [key for key in left if key not in done]
    features[missing] = features[[first[keys[i]] for i in missing]]
    calls = store.calls(list(dict.fromkeys(keys)))
    calls[call] = max(calls[call], n_encoded)  # on a full disk nothing is stored
    return ImageRows(features.to(device), calls)
