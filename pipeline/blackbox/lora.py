"""Low-rank changes (`methods.base.Lora`) of the attention layers of a network of open_clip.

`merged` adds them to the weights, as scores need them. `beside` computes them beside the weights, where dropout reaches
the input of A alone, as training needs them. A layer is a `nn.MultiheadAttention` of a transformer, or the attention
pool of a ResNet.

Shapes: N sequences, S tokens, W width, r rank, H heads; 3: queries, keys and values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from methods._finite import first_non_finite
from methods._lora import Dropout, low_rank
from methods.base import Lora, TextPrompts
from pipeline.blackbox.request import Request
from pipeline.blackbox.text_tower import merge_heads, split_heads
from pipeline.data.images import Images
from pipeline.errors import EndpointRefused

Add = Callable[[Tensor], Tensor]
"""Returns what is added to the queries, keys and values [N, S, 3 * W] of inputs [N, S, W]."""


def unsuited(net: Any) -> str:
    """Return why the image tower of a network cannot be changed; empty if it can."""
    if type(getattr(net.visual, "attnpool", None)).__name__ == "AttentionPool2d":
        return ""
    blocks = getattr(getattr(net.visual, "transformer", None), "resblocks", ())
    standard = all(type(block).__name__ == "ResidualAttentionBlock" for block in blocks)
    if not blocks or not standard or getattr(net.visual, "attn_pool", None) is not None:
        return "its image tower is neither open_clip's ViT nor a ResNet with an attention pool"
    return ""


def layers(net: Any) -> tuple[list[Any], list[Any]]:
    """Return the attention layers of the image tower and of the text tower, in order."""
    pool = getattr(net.visual, "attnpool", None)
    image = [pool] if pool is not None else [block.attn for block in net.visual.transformer.resblocks]
    return image, [block.attn for block in net.transformer.resblocks]


def shapes(net: Any) -> tuple[tuple[int, int], ...]:
    """Return `BlackBox.lora_shapes` of a network."""
    return tuple((len(tower), _weights(tower[0])[0].shape[1]) for tower in layers(net))


def check(request: Request, expected: tuple[tuple[int, int], ...]) -> None:
    """Raise EndpointRefused if the change of a request, or what `lora_gradients` takes with it, is wrong."""
    lora, images, prompts, step = request.lora, request.images, request.prompts, request.step
    assert lora is not None
    if not isinstance(images, Images):
        raise EndpointRefused("a changed model takes the task's images only, none that you made")
    rank = lora.image.a_n3rW.shape[2] if lora.image.a_n3rW.dim() == 4 else 0
    wanted = [shape for n, w in expected for shape in ((n, 3, rank, w), (n, 3, w, rank))]
    if (found := [tuple(factor.shape) for factor in lora.factors]) != wanted or not rank:
        n_r_w = ", ".join(f"[{n}, 3, r, {w}], [{n}, 3, {w}, r]" for n, w in expected)
        raise EndpointRefused(f"low-rank factors of shapes {found}, expected {n_r_w}")
    if any(first_non_finite(values) is not None for values in (*lora.factors, torch.tensor(lora.scale))):
        raise EndpointRefused("a low-rank factor or its scale has a value that is not finite")
    if request.kind != "lora_gradients":
        return
    if step is None or not isinstance(prompts, TextPrompts) or len(prompts.texts) != 1:
        raise EndpointRefused("lora_gradients takes labels and one set of text prompts")
    labels_B, n_classes = step.labels_B, len(prompts.texts[0])
    if labels_B.dtype != torch.int64 or labels_B.shape != (len(images),):
        kind = f"{str(labels_B.dtype).removeprefix('torch.')} {tuple(labels_B.shape)}"
        raise EndpointRefused(f"labels {kind} for {len(images)} images, expected int64 ({len(images)},)")
    if int(labels_B.min()) < 0 or int(labels_B.max()) >= n_classes or not 0 <= step.dropout < 1:
        raise EndpointRefused(f"expected labels from 0 to {n_classes - 1} and 0 <= dropout < 1")


@contextlib.contextmanager
def merged(net: Any, lora: Lora) -> Iterator[None]:
    """Within the block, the weights of the layers contain the change. Afterwards they are the same bits as before."""
    before: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for layer, a_3rW, b_3Wr in _pairs(net, lora):
            weights = _weights(layer)
            change = (lora.scale * b_3Wr @ a_3rW).flatten(0, 1)
            for weight, part in zip(weights, change.chunk(len(weights)), strict=True):
                before.append((weight, weight.data))
                weight.data = weight.data + part.to(weight)
        yield
    finally:
        for weight, data in before:
            weight.data = data


@contextlib.contextmanager
def beside(net: Any, lora: Lora, dropout: Dropout) -> Iterator[None]:
    """Within the block, the layers compute the change beside their weights, differentiable in its factors."""
    try:
        for layer, a_3rW, b_3Wr in _pairs(net, lora):
            device = _weights(layer)[0].device
            add = partial(_added, a_3rW=a_3rW.to(device), b_3Wr=b_3Wr.to(device), scale=lora.scale, dropout=dropout)
            layer.forward = partial(_block if isinstance(layer, nn.MultiheadAttention) else _pool, layer, add)
        yield
    finally:
        for layer in (layer for tower in layers(net) for layer in tower):
            vars(layer).pop("forward", None)


def _pairs(net: Any, lora: Lora) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Yield each layer with its factors A [3, r, W] and B [3, W, r]."""
    for tower, factors in zip(layers(net), (lora.image, lora.text), strict=True):
        yield from zip(tower, *factors, strict=True)


def _weights(layer: Any) -> list[nn.Parameter]:
    """Return the weights of queries, keys and values, which are one parameter in a transformer."""
    if isinstance(layer, nn.MultiheadAttention):
        return [layer.in_proj_weight]
    return [layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight]


def _added(x_NSW: Tensor, a_3rW: Tensor, b_3Wr: Tensor, scale: float, dropout: Dropout) -> Tensor:
    n, s, _ = x_NSW.shape
    return scale * low_rank(x_NSW.flatten(0, 1), a_3rW, b_3Wr, dropout).transpose(0, 1).reshape(n, s, -1)


def _block(
    layer: Any, add: Add, x_NSW: Tensor, *_: Any, attn_mask: Tensor | None = None, **__: Any
) -> tuple[Tensor, None]:
    """Compute the attention layer of a transformer."""
    qkv = linear(x_NSW, layer.in_proj_weight, layer.in_proj_bias) + add(x_NSW)
    q, k, v = split_heads(layer, qkv)
    return layer.out_proj(merge_heads(scaled_dot_product_attention(q, k, v, attn_mask))), None


def _pool(layer: Any, add: Add, x: Tensor) -> Tensor:
    """Compute the attention pool of a ResNet: the mean of the grid [N, W, height, width] attends to all places."""
    grid_NSW = x.flatten(2).transpose(1, 2)
    x_NSW = torch.cat([grid_NSW.mean(1, keepdim=True), grid_NSW], dim=1) + layer.positional_embedding.to(x.dtype)
    maps = layer.q_proj, layer.k_proj, layer.v_proj
    q, k, v = split_heads(layer, torch.cat([project(x_NSW) for project in maps], dim=-1) + add(x_NSW))
    return layer.c_proj(merge_heads(scaled_dot_product_attention(q[:, :, :1], k, v))[:, 0])
