"""The text tower of open_clip's standard CLIP, without computation that cannot change the features.

Attention is causal, so (1) nothing after a prompt's end-of-text token is computed: suffixes are packed without
padding; (2) the start token and the context, which all classes of a prompt set share, are computed once, and each
class continues from their keys and values; (3) the last block computes the end tokens only.

Shapes: P prompt sets, C classes, L prefix tokens (start + context), S suffix tokens (name, words after it, end),
T packed tokens of a tile, W width, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from methods.base import Prompts, SoftPrompts
from pipeline.errors import EndpointRefused

TILE_TOKENS = {"cpu": 1024, "cuda": 32768}
"""Maximum number of tokens in a forward, by device: it fits a core's caches, or fills a GPU. Tiles are split along
prompt sets, then classes, by the request's shape only."""
AT_ONCE = {"cuda"}
"""Devices on which attention of a packed tile is computed for all lengths together, since launching kernels is slow."""
SMALL = 500e6
"""Multiplications of a prompt set (about 10 ms on one core) up to which its suffixes are padded to the longest: packing
them would save little, and the golden values of the embedded model depend on it to the bit."""


def fits(net: Any, tokenizer: Any) -> bool:
    """Return whether this module reproduces the network's text tower; others encode whole strings through open_clip.

    The mask of a network on the meta device, and a tokenizer that is None, are assumed to be standard.
    """
    blocks = getattr(getattr(net, "transformer", None), "resblocks", ())
    mask, positions = getattr(net, "attn_mask", None), getattr(net, "positional_embedding", ())
    return (
        len(blocks) > 0
        and all(type(b).__name__ == "ResidualAttentionBlock" and not hasattr(b, "ln_1_kv") for b in blocks)
        and getattr(net, "text_pool_type", "argmax") == "argmax"
        and len(positions) == getattr(net, "context_length", None)  # one more position is for a class token
        and mask is not None
        and (mask.is_meta or torch.equal(mask, torch.full_like(mask, -torch.inf).triu(1)))
        and (tokenizer is None or hasattr(tokenizer, "sot_token_id"))
        # argmax pools at the largest id, which must be the end token
        and (tokenizer is None or tokenizer.eot_token_id == tokenizer.vocab_size - 1)
    )


def too_long(tokens: int, context_length: int) -> str:
    """Return the message about a prompt with more tokens than a text tower takes."""
    return f"a prompt of {tokens} tokens (the model takes {context_length}): shorten the class name or the context"


class Group(NamedTuple):
    """Classes whose suffixes have one length S: their indices in the request, token ids, and end positions."""

    rows_C: Tensor
    ids_CS: Tensor
    last_C: Tensor

    def part(self, start: int, stop: int) -> Group:
        """Return a slice of the classes."""
        return Group(*(field[start:stop] for field in self))


class SharedPrefixTower:
    """Encode text or soft prompts as features [P, C, D], not normalised."""

    def __init__(self, net: Any, tokenizer: Any) -> None:
        self.net, self.tokenizer = net, tokenizer
        self.token_dim = int(net.token_embedding.weight.shape[1])
        self.device = net.token_embedding.weight.device
        self.dtype = net.transformer.get_cast_dtype()
        self.params = sum(p.numel() for p in net.transformer.parameters())
        self._tokens = lru_cache(maxsize=2**16)(tokenizer.encode)  # tokenizing ImageNet's names takes 50 ms

    def embed(self, text: str) -> Tensor:
        """Return the token embeddings [L, W] of a text."""
        ids = torch.tensor(self._tokens(text), dtype=torch.long, device=self.device)
        return self.net.token_embedding(ids)

    def encode(self, prompts: Prompts) -> Tensor:
        """Return features [P, C, D]. Raises EndpointRefused for a prompt longer than the context length."""
        if isinstance(prompts, SoftPrompts):
            suffixes = [self._tokens(f"{name}{prompts.suffix}") for name in prompts.classnames]
            return self._encode(prompts.ctx_PLE.to(self.device), suffixes)
        none_1LW = torch.empty(1, 0, self.token_dim, device=self.device)
        return torch.cat([self._encode(none_1LW, [self._tokens(text) for text in texts]) for texts in prompts.texts])

    def encode_whole(self, texts: Sequence[str]) -> Tensor:
        """Return features [C, D] of prompts by the network's own blocks, which share nothing between the prompts."""
        group = self._group(range(len(texts)), [[self.tokenizer.sot_token_id, *self._tokens(text)] for text in texts])
        n = self._checked(group.ids_CS.shape[1])
        x_CSW = self.net.token_embedding(group.ids_CS).to(self.dtype) + self._position(0, n)
        for block in self.net.transformer.resblocks:
            x_CSW = block(x_CSW, attn_mask=self.net.attn_mask[:n, :n])
        return self._pool(x_CSW[torch.arange(len(texts), device=self.device), group.last_C])

    def _encode(self, ctx_PLW: Tensor, suffixes: Sequence[list[int]]) -> Tensor:
        start_1W = self.net.token_embedding.weight[self.tokenizer.sot_token_id][None]
        prefix_PLW = torch.cat([start_1W.expand(len(ctx_PLW), 1, -1), ctx_PLW.to(start_1W.dtype)], dim=1)
        n_prefix = prefix_PLW.shape[1]
        total = self._checked(n_prefix + max(map(len, suffixes)) + 1)
        prefix_PLW = prefix_PLW.to(self.dtype) + self._position(0, n_prefix)
        small = len(suffixes) * (total - n_prefix) * self.params <= SMALL
        if small or ctx_PLW.requires_grad:  # on a GPU the backward pass of `_packed` is not deterministic
            forward, groups, beside = self._rectangle, [self._group(range(len(suffixes)), suffixes)], 0
        else:
            forward, groups, beside = self._packed, self._by_length(suffixes), n_prefix
        room = TILE_TOKENS[self.device.type]
        n_sets = max(1, room // (beside + sum(group.ids_CS.numel() for group in groups)))
        parts = [
            torch.cat([forward(sets_PLW, tile) for tile in _tiles(groups, room - beside)], dim=1)
            for sets_PLW in torch.split(prefix_PLW, n_sets)
        ]
        return torch.cat(parts)[:, torch.cat([group.rows_C for group in groups]).argsort()]

    def _checked(self, tokens: int) -> int:
        """Return the number of tokens of a prompt. Raises EndpointRefused if it exceeds the context length."""
        if tokens > len(self.net.positional_embedding):
            raise EndpointRefused(too_long(tokens, len(self.net.positional_embedding)))
        return tokens

    def _by_length(self, suffixes: Sequence[list[int]]) -> list[Group]:
        rows = sorted(range(len(suffixes)), key=lambda row: len(suffixes[row]))
        return [self._group(list(same), suffixes) for _, same in groupby(rows, lambda row: len(suffixes[row]))]

    def _group(self, rows: Sequence[int], suffixes: Sequence[list[int]]) -> Group:
        end, longest = self.tokenizer.eot_token_id, max(len(suffixes[row]) for row in rows)
        ids = [suffixes[row] + [end] * (longest + 1 - len(suffixes[row])) for row in rows]
        last = [len(suffixes[row]) for row in rows]
        return Group(*(torch.tensor(field, device=self.device) for field in (list(rows), ids, last)))

    def _position(self, start: int, stop: int) -> Tensor:
        return self.net.positional_embedding[start:stop].to(self.dtype)

    def _suffixes(self, group: Group, n_prefix: int, p: int) -> Tensor:
        """Return the suffixes' inputs [P * C, S, W] of the first block."""
        c, n = group.ids_CS.shape
        suffix_CSW = self.net.token_embedding(group.ids_CS).to(self.dtype) + self._position(n_prefix, n_prefix + n)
        return suffix_CSW.expand(p, c, n, -1).reshape(p * c, n, -1)

    def _rectangle(self, prefix_PLW: Tensor, groups: Sequence[Group]) -> Tensor:
        """Return features [P, C, D] of one group, with prefixes and suffixes padded to rectangles."""
        ((group,), p, prefix) = groups, len(prefix_PLW), prefix_PLW
        c, suffix = len(group.ids_CS), self._suffixes(group, prefix_PLW.shape[1], p)
        for block in self.net.transformer.resblocks:
            q, k, v = split_heads(block.attn, _qkv(block, prefix))
            own = split_heads(block.attn, _qkv(block, suffix))
            prefix = _rest(block, prefix, merge_heads(scaled_dot_product_attention(q, k, v, is_causal=True)))
            k, v = (shared.repeat_interleave(c, dim=0) for shared in (k, v))
            suffix = _rest(block, suffix, merge_heads(_continue(k, v, *own)))
        rows = torch.arange(p * c, device=self.device)
        return self._pool(suffix[rows, group.last_C.repeat(p)]).view(p, c, -1)

    def _packed(self, prefix_PLW: Tensor, groups: Sequence[Group]) -> Tensor:
        """Return features [P, C, D], classes in the groups' order; prefixes and suffixes are packed without padding."""
        p, n_prefix, width = prefix_PLW.shape
        parts = [prefix_PLW, *(self._suffixes(group, n_prefix, p) for group in groups)]
        shapes = [(part.shape[0], part.shape[1]) for part in parts]
        x_TW = torch.cat([part.reshape(-1, width) for part in parts])
        *blocks, last_block = self.net.transformer.resblocks
        attend = Attention(shapes, self.device)
        for block in blocks:
            x_TW = _rest(block, x_TW, attend(block, x_TW))
        ends_N = self._ends(groups, p, n_prefix)
        x_NW = _rest(last_block, x_TW[ends_N], attend(last_block, x_TW)[ends_N])
        return self._pool(x_NW).view(p, len(ends_N) // p, -1)

    def _ends(self, groups: Sequence[Group], p: int, n_prefix: int) -> Tensor:
        """Return the positions of the end tokens in a packed tile, ordered by prompt set."""
        ends, used = [], p * n_prefix
        for group in groups:
            c, n = group.ids_CS.shape
            first_PC = used + n * torch.arange(p * c, device=self.device).view(p, c)
            ends.append(first_PC + group.last_C)
            used += p * c * n
        return torch.cat(ends, dim=1).flatten()

    def _pool(self, x_NW: Tensor) -> Tensor:
        pooled_NW, projection = self.net.ln_final(x_NW), self.net.text_projection
        if projection is None:
            return pooled_NW
        return projection(pooled_NW) if isinstance(projection, nn.Linear) else pooled_NW @ projection


class Attention:
    """Attention over a packed tile [T, W], prefixes first, then groups; `shapes` are (sequences, tokens per sequence).

    It is computed group by group without padding, or (AT_ONCE) for all groups together, padded for this operation only:
    a position beyond a prompt's end repeats the end token, and no earlier token attends to it.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], device: torch.device) -> None:
        (p, n_prefix), *suffixes = self.shapes = shapes
        self.at_once = device.type in AT_ONCE
        if not self.at_once:
            return
        longest, places, kept, token = max(s for _, s in suffixes), [], [], p * n_prefix
        within_S = torch.arange(longest)  # indices are computed on the CPU: there are few, and it launches no kernels
        for n, s in suffixes:
            first_PC1 = token + s * torch.arange(n).view(p, -1, 1)
            places.append(first_PC1 + within_S.clamp(max=s - 1))
            kept.append((within_S < s).expand(n // p, -1))
            token += n * s
        places_PCS, kept_PCS = torch.cat(places, dim=1), torch.cat(kept).expand(p, -1, -1)
        back_T = kept_PCS.flatten().nonzero()[places_PCS[kept_PCS].argsort(), 0]
        self.places_PCS, self.back_T = places_PCS.to(device), back_T.to(device)
        self.later_SS = torch.ones(longest, longest, dtype=torch.bool).triu(1).to(device)

    def __call__(self, block: Any, x_TW: Tensor) -> Tensor:
        """Return the output [T, W] of a block's attention."""
        qkv_TV, (p, n_prefix) = _qkv(block, x_TW), self.shapes[0]
        q, k, v = split_heads(block.attn, qkv_TV[: p * n_prefix].view(p, n_prefix, -1))
        prefix_PLW = merge_heads(scaled_dot_product_attention(q, k, v, is_causal=True))
        if self.at_once:
            suffix_PCSW = _continue_all(k, v, qkv_TV[self.places_PCS], self.later_SS)
            return torch.cat([prefix_PLW.flatten(0, 1), suffix_PCSW.flatten(0, 2)[self.back_T]])
        parts, start = [prefix_PLW.flatten(0, 1)], p * n_prefix
        for n, s in self.shapes[1:]:
            own = split_heads(block.attn, qkv_TV[start : start + n * s].view(n, s, -1))
            shared = (t.repeat_interleave(n // p, dim=0) for t in (k, v))
            parts.append(merge_heads(_continue(*shared, *own)).flatten(0, 1))
            start += n * s
        return torch.cat(parts)


def _continue(k: Tensor, v: Tensor, qs: Tensor, ks: Tensor, vs: Tensor) -> Tensor:
    """Return attention of suffixes [N, H, S, W / H] to their prefixes (keys k, values v) and to themselves."""
    ks, vs = (torch.cat(pair, dim=2) for pair in ((k, ks), (v, vs)))
    mask = torch.ones(qs.shape[2], ks.shape[2], dtype=torch.bool, device=qs.device).tril(k.shape[2])
    return scaled_dot_product_attention(qs, ks, vs, attn_mask=mask)


def _continue_all(k: Tensor, v: Tensor, qkv_PCSV: Tensor, later_SS: Tensor) -> Tensor:
    """Return attention [P, C, S, W] of all suffixes to their prefixes (keys k, values v [P, H, L, D]) and themselves.

    A token attends to no later one: `later_SS` is True for those.
    All suffixes of a prompt set meet its prefix in one matrix product, so the prefix is neither repeated for each nor
    joined with the suffix's keys: moving them, and a kernel for long sequences, cost more than these few tokens.
    """
    (p, h, n_prefix, d), (_, c, s, _) = k.shape, qkv_PCSV.shape
    qs, ks, vs = qkv_PCSV.view(p, c, s, 3, h, d).permute(3, 0, 4, 1, 2, 5).contiguous().unbind()
    qs = qs * d**-0.5
    to_prefix = (qs.flatten(2, 3) @ k.transpose(-1, -2)).view(p, h, c, s, n_prefix)
    to_own = (qs @ ks.transpose(-1, -2)).masked_fill(later_SS, -torch.inf)
    weights = torch.cat([to_prefix, to_own], dim=-1).softmax(dim=-1, dtype=torch.float32).to(v.dtype)
    from_prefix = (weights[..., :n_prefix].flatten(2, 3) @ v).view(p, h, c, s, d)
    return (from_prefix + weights[..., n_prefix:] @ vs).permute(0, 2, 3, 1, 4).flatten(3)


def _qkv(block: Any, x: Tensor) -> Tensor:
    return linear(block.ln_1(x), block.attn.in_proj_weight, block.attn.in_proj_bias)


def split_heads(attn: nn.MultiheadAttention, qkv: Tensor) -> tuple[Tensor, ...]:
    """Split [N, S, 3 * W] into queries, keys and values, each [N, H, S, W / H]."""
    n, s, _ = qkv.shape
    return qkv.view(n, s, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind()


def merge_heads(attended_NHSW: Tensor) -> Tensor:
    """Merge the heads of [N, H, S, W / H] into [N, S, W]."""
    return attended_NHSW.transpose(1, 2).flatten(2)


def _rest(block: Any, x: Tensor, merged: Tensor) -> Tensor:
    x = x + block.ls_1(block.attn.out_proj(merged))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def _tiles(groups: Sequence[Group], room: int) -> Iterator[list[Group]]:
    """Yield the groups' classes in order, in tiles of at most `room` suffix tokens and at least one class."""
    tile, left = list[Group](), room
    for group in groups:
        start, (c, n) = 0, group.ids_CS.shape
        while start < c:
            take = min(c - start, max(left // n, 0 if tile else 1))
            if take:
                tile.append(group.part(start, start + take))
                start, left = start + take, left - take * n
            if start < c:
                yield tile
                tile, left = [], room
    yield tile
