"""How the papers' code asks its model, written plainly: the slow side of the benches, and the tests' oracle.

Nothing here is fast, and nothing imports what it is compared with but the model's own parts. The source is the code
released with CoOp (arXiv:2109.01134) and CraFT (arXiv:2402.04050): one prompt candidate after the other, every class
prompt padded to the model's context length.

Shapes: P candidates, C classes, L context tokens, E token-embedding width, T the context length, D feature width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from methods.base import SoftPrompts


def encode_77(net: Any, tokenizer: Any, prompts: SoftPrompts) -> Tensor:
    """[P, C, D], not normalised: candidates one by one, each class prompt at the whole context length (77 in CLIP)."""
    ids_CT = token_ids(net, tokenizer, prompts)
    return torch.stack([_encode_one(net, ids_CT, ctx_LE) for ctx_LE in prompts.ctx_PLE])


def encode_truncated(net: Any, tokenizer: Any, prompts: SoftPrompts) -> Tensor:
    """The same, without the positions after the last end-of-text token."""
    ids_CT = token_ids(net, tokenizer, prompts)
    ids_CT = ids_CT[:, : int(ids_CT.argmax(-1).max()) + 1]
    return torch.stack([_encode_one(net, ids_CT, ctx_LE) for ctx_LE in prompts.ctx_PLE])


def token_ids(net: Any, tokenizer: Any, prompts: SoftPrompts) -> Tensor:
    """[C, T]: start, the context's places, class name and suffix, end; 0 after it. In the places stands token 1."""
    names = [f"{name}{prompts.suffix}" for name in prompts.classnames]
    ids_CT = torch.zeros(len(names), net.context_length, dtype=torch.long)
    for row, name in zip(ids_CT, names, strict=True):
        places = [1] * prompts.ctx_PLE.shape[1]
        sequence = [tokenizer.sot_token_id, *places, *tokenizer.encode(name), tokenizer.eot_token_id]
        row[: len(sequence)] = torch.tensor(sequence)
    return ids_CT


def _encode_one(net: Any, ids_CT: Tensor, ctx_LE: Tensor) -> Tensor:
    """[C, D] of one candidate: open_clip's encode_text, with the context put in after the start token."""
    n_places, length = len(ctx_LE), ids_CT.shape[1]
    x_CTW = net.token_embedding(ids_CT)
    x_CTW[:, 1 : 1 + n_places] = ctx_LE
    x_CTW = x_CTW + net.positional_embedding[:length]
    x_CTW = net.ln_final(net.transformer(x_CTW, attn_mask=net.attn_mask[:length, :length]))
    return x_CTW[torch.arange(len(ids_CT)), ids_CT.argmax(-1)] @ net.text_projection
