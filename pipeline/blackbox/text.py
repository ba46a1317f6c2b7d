"""The text tower of open_clip's standard CLIP, without the work that cannot change an answer.

Attention is causal, so (1) nothing after the last end-of-text token is computed, and (2) the start token and the
context, which all classes of a prompt set share, are computed once: each class continues from their keys and values.

Shapes: P prompt sets, C classes, L prefix tokens (start + context), S suffix tokens (name, words after it, end),
W width, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from methods.base import Prompts, SoftPrompts
from pipeline.errors import EndpointRefused

TILE_TOKENS = 1024
"""Suffix tokens in one forward at most. Tiles are cut along prompt sets, then classes, by the request's shape alone."""


def fits(net: Any, tokenizer: Any) -> bool:
    """True for the architecture that this forward reproduces; others take whole strings through open_clip."""
    blocks = getattr(getattr(net, "transformer", None), "resblocks", None)
    return (
        blocks is not None
        and all(type(b).__name__ == "ResidualAttentionBlock" and not hasattr(b, "ln_1_kv") for b in blocks)
        and getattr(net, "text_pool_type", "argmax") == "argmax"
        and net.attn_mask is not None
        and hasattr(tokenizer, "sot_token_id")
    )


class SharedPrefixTower:
    """Features [P, C, D], not normalised, of text or soft prompts."""

    def __init__(self, net: Any, tokenizer: Any) -> None:
        self.net, self.tokenizer = net, tokenizer
        self.token_dim = int(net.token_embedding.weight.shape[1])
        self.device = net.token_embedding.weight.device
        self.dtype = net.transformer.get_cast_dtype()

    def embed(self, text: str) -> Tensor:
        """Token embeddings [L, W] of the words."""
        ids = torch.tensor(self.tokenizer.encode(text), dtype=torch.long, device=self.device)
        return self.net.token_embedding(ids)

    def encode(self, prompts: Prompts) -> Tensor:
        """[P, C, D]; a prompt that does not fit the context length is refused, never cut."""
        if isinstance(prompts, SoftPrompts):
            suffixes = [self.tokenizer.encode(f"{name}{prompts.suffix}") for name in prompts.classnames]
            return self._encode(prompts.ctx_PLE.to(self.device), suffixes)
        none_1LW = torch.empty(1, 0, self.token_dim, device=self.device)
        return torch.stack(
            [self._encode(none_1LW, [self.tokenizer.encode(text) for text in texts])[0] for texts in prompts.texts]
        )

    def _encode(self, ctx_PLW: Tensor, suffixes: Sequence[list[int]]) -> Tensor:
        end = self.tokenizer.eot_token_id
        last_C = torch.tensor([len(ids) for ids in suffixes], device=self.device)
        n_suffix = int(last_C.max()) + 1
        ids_CS = torch.full((len(suffixes), n_suffix), end, device=self.device)
        for row, ids in zip(ids_CS, suffixes, strict=True):
            row[: len(ids)] = torch.tensor(ids, device=self.device)
        start_1W = self.net.token_embedding.weight[self.tokenizer.sot_token_id][None]
        prefix_PLW = torch.cat([start_1W.expand(len(ctx_PLW), 1, -1), ctx_PLW.to(start_1W.dtype)], dim=1)
        n_prefix, total = prefix_PLW.shape[1], prefix_PLW.shape[1] + n_suffix
        if total > len(self.net.positional_embedding):
            raise EndpointRefused(
                f"a prompt of {total} tokens (the model takes {len(self.net.positional_embedding)}): "
                "shorten the class name or the context"
            )
        position = self.net.positional_embedding.to(self.dtype)
        prefix_PLW = prefix_PLW.to(self.dtype) + position[:n_prefix]
        suffix_CSW = self.net.token_embedding(ids_CS).to(self.dtype) + position[n_prefix:total]
        rows = []
        for sets in _tiles(len(prefix_PLW), max(1, TILE_TOKENS // ids_CS.numel())):
            parts = [
                self._tile(prefix_PLW[sets], suffix_CSW[classes], last_C[classes])
                for classes in _tiles(len(suffixes), max(1, TILE_TOKENS // n_suffix))
            ]
            rows.append(torch.cat(parts, dim=1))
        return torch.cat(rows)

    def _tile(self, prefix_PLW: Tensor, suffix_CSW: Tensor, last_C: Tensor) -> Tensor:
        (p, n_prefix, width), (c, n_suffix, _) = prefix_PLW.shape, suffix_CSW.shape
        prefix, suffix = prefix_PLW, suffix_CSW.expand(p, c, n_suffix, width).reshape(p * c, n_suffix, width)
        mask = torch.ones(n_suffix, n_prefix + n_suffix, dtype=torch.bool, device=suffix.device).tril(n_prefix)
        for block in self.net.transformer.resblocks:
            q, k, v = _heads(block.attn, block.ln_1(prefix))
            qs, ks, vs = _heads(block.attn, block.ln_1(suffix))
            ks, vs = (torch.cat([shared.repeat_interleave(c, dim=0), own], dim=2) for shared, own in ((k, ks), (v, vs)))
            prefix = _rest(block, prefix, scaled_dot_product_attention(q, k, v, is_causal=True))
            suffix = _rest(block, suffix, scaled_dot_product_attention(qs, ks, vs, attn_mask=mask))
        rows = torch.arange(p * c, device=suffix.device)
        pooled = self.net.ln_final(suffix[rows, last_C.repeat(p)])
        projection = self.net.text_projection
        if projection is not None:
            pooled = projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
        return pooled.view(p, c, -1)


def _heads(attn: nn.MultiheadAttention, x_NTW: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values, each [N, H, T, W / H]."""
    n, t, width = x_NTW.shape
    qkv = linear(x_NTW, attn.in_proj_weight, attn.in_proj_bias)
    return tuple(part.view(n, t, attn.num_heads, -1).transpose(1, 2) for part in torch.split(qkv, width, dim=-1))


def _rest(block: Any, x_NTW: Tensor, attended_NHTW: Tensor) -> Tensor:
    merged = attended_NHTW.transpose(1, 2).flatten(2)
    x_NTW = x_NTW + block.ls_1(block.attn.out_proj(merged))
    return x_NTW + block.ls_2(block.mlp(block.ln_2(x_NTW)))


def _tiles(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))
