"""A subset of CLIP's byte-pair vocabulary, enough for the words of the corpus.

The full vocabulary would be two thirds of the model. The subset keeps the first merges of CLIP's list and
every merge that spelling the corpus's words needs, in their order: words of the corpus get the same pieces
as with the full list, other words fall into smaller pieces.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import regex
from open_clip.tokenizer import SimpleTokenizer

from tools.embedded.settings import CONTEXT

FIRST_MERGES = 500  # kept whatever the corpus says, to spell words that it does not have
FRAME_WORDS = (
    "a an the of in on at or and with is it this that photo picture image icon emoji symbol pictogram drawing "
    "sketch logo sign handwritten written digit number letter showing black white grey colour color outline "
    "filled flat style small large round good bad clean blurry low resolution type object centered . , : ;"
)


def tokenizer(path: Path) -> SimpleTokenizer:
    """open_clip's own tokenizer over the given merges."""
    return SimpleTokenizer(bpe_path=str(path), context_length=CONTEXT)


def build(phrases: Iterable[str], path: Path) -> int:
    """Writes the subset for the words in ``phrases`` and returns the vocabulary's size."""
    full = SimpleTokenizer()
    words = {word for phrase in [FRAME_WORDS, *phrases] for word in phrase.lower().split()}
    used: set[tuple[str, str]] = set()
    for word in words:
        for piece in regex.findall(full.pat, word):
            used |= _merges("".join(full.byte_encoder[b] for b in piece.encode()), full.bpe_ranks)
    ranked = sorted(full.bpe_ranks.items(), key=lambda item: item[1])
    kept = [pair for pair, rank in ranked if len(pair) == 2 and (rank < FIRST_MERGES or pair in used)]
    text = "#version: 0.2, a subset of CLIP's merges\n" + "\n".join(" ".join(pair) for pair in kept)
    # mtime=0: the same merges give the same bytes.
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    size: int = tokenizer(path).vocab_size
    return size


def _merges(piece: str, ranks: dict[tuple[str, str], int]) -> set[tuple[str, str]]:
    """The merges that the byte-pair algorithm applies to one word."""
    symbols = [*piece[:-1], piece[-1] + "</w>"]
    used: set[tuple[str, str]] = set()
    while len(symbols) > 1:
        pairs = list(pairwise(symbols))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        used.add(best)
        merged: list[str] = []
        for symbol in symbols:
            # ``merged[-1]`` may be a symbol just merged, which never equals best[0]: it is longer.
            if merged and (merged[-1], symbol) == best:
                merged[-1] += symbol
            else:
                merged.append(symbol)
        symbols = merged
    return used
