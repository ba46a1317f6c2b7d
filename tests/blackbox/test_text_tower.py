"""The shared-prefix text tower gives open_clip's own features for any request, and refuses what is too long."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from methods.base import Access, Classes, Prompts, SoftPrompts, TextPrompts
from pipeline.bench import reference as oracle
from pipeline.blackbox import model as models
from pipeline.blackbox import text_tower as text
from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.text_tower import SharedPrefixTower, fits
from pipeline.config.card_files import model_card
from pipeline.errors import EndpointRefused

WORDS = ("cat", "star", "house", "umbrella", "telephone", "2", "hand-drawn", "arrow", "left", "café")
EXACT = {"rtol": 1e-5, "atol": 1e-5}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""On a GPU too (`make test-gpu`): models of a card go there by themselves, others are put there."""


@cache
def tiny_net() -> tuple[Any, Any]:
    model = models.load(model_card("tiny"))
    assert isinstance(model, models.OpenClipModel)
    return model.net, model.tokenizer


@cache
def random_net(layer_scale: float | None = None) -> tuple[Any, Any]:
    """A small CLIP of another config: quick GELU, 5 heads, 4 layers, 77 tokens, and weights that were never trained."""
    torch.manual_seed(3)
    net = open_clip.model.CLIP(
        embed_dim=24,
        vision_cfg=open_clip.CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=16, image_size=32),
        text_cfg=open_clip.CLIPTextCfg(width=40, heads=5, layers=4, ls_init_value=layer_scale),
        quick_gelu=True,
    )
    for parameter in net.parameters():  # open_clip starts biases at 0 and gains at 1: nothing may hide behind that
        parameter.data += 0.05 * torch.randn_like(parameter)
    return net.eval().requires_grad_(False).to(DEVICE), open_clip.SimpleTokenizer()


NETS = {"tiny": tiny_net, "quick_gelu": random_net, "layer_scale": lambda: random_net(0.5)}
each_net = pytest.mark.parametrize("net_name", list(NETS))


def tower_of(net_name: str) -> SharedPrefixTower:
    return SharedPrefixTower(*NETS[net_name]())


def reference(net_name: str, texts: tuple[str, ...]) -> Tensor:
    """open_clip's own forward over the whole context length."""
    net, tokenizer = NETS[net_name]()
    return net.encode_text(tokenizer(list(texts)).to(DEVICE))


names = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join), min_size=1, max_size=7)
quick = settings(max_examples=15, deadline=None, derandomize=True)


@each_net
@quick
@given(names=names, template=st.sampled_from(["{}", "a photo of a {}.", "{} icon", "art: {}, a type of thing!"]))
@torch.inference_mode()
def test_text_prompts_are_open_clips_own_features(net_name: str, names: list[str], template: str) -> None:
    prompts = Classes(tuple(names), template).prompts()
    found = tower_of(net_name).encode(prompts)
    torch.testing.assert_close(found[0], reference(net_name, prompts.texts[0]), **EXACT)


paths = pytest.mark.parametrize("path", ["rectangle", "packed", "at_once"])


def by_path(monkeypatch: pytest.MonkeyPatch, path: str, tile: int) -> None:
    """Every request goes this way, in tiles of so many tokens."""
    monkeypatch.setattr(text, "SMALL", float("inf") if path == "rectangle" else -1.0)
    monkeypatch.setattr(text, "AT_ONCE", {DEVICE} if path == "at_once" else set())
    tiles_of(monkeypatch, tile)


def tiles_of(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setitem(text.TILE_TOKENS, DEVICE, tokens)


def randomly(net_name: str, names: list[str], p: int, n_ctx: int, suffix: str) -> SoftPrompts:
    width = NETS[net_name]()[0].token_embedding.weight.shape[1]
    ctx = 0.1 * torch.randn(p, n_ctx, width, generator=torch.Generator().manual_seed(31 * n_ctx + p))
    return SoftPrompts(ctx, tuple(names), suffix)


requests = {
    "names": names,
    "p": st.integers(1, 5),
    "n_ctx": st.integers(0, 8),
    "suffix": st.sampled_from(["", ".", " icon"]),
    "tile": st.sampled_from([1, 7, 16, 33, 60, 1024]),
}
"""Classes, name lengths, populations, context lengths, words after the name, tile boundaries."""


@each_net
@paths
@quick
@given(**requests)
def test_soft_prompts_either_way_in_any_tiles_are_the_papers_loop(
    net_name: str, path: str, names: list[str], p: int, n_ctx: int, suffix: str, tile: int
) -> None:
    prompts = randomly(net_name, names, p, n_ctx, suffix)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        by_path(patch, path, tile)
        found = tower_of(net_name).encode(prompts)
        net, tokenizer = NETS[net_name]()
        torch.testing.assert_close(found, oracle.encode_77(net, tokenizer, prompts), **EXACT)
        torch.testing.assert_close(found, oracle.encode_truncated(net, tokenizer, prompts), **EXACT)


@each_net
@paths
@quick
@given(names=names, p=st.integers(1, 3), tile=requests["tile"])
def test_texts_either_way_in_any_tiles_are_open_clips_own_features(
    net_name: str, path: str, names: list[str], p: int, tile: int
) -> None:
    classes = Classes(tuple(names), "{}", ("a photo of a {}.", "{} icon", "art: {}, a type of thing!")[:p])
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        by_path(patch, path, tile)
        found = tower_of(net_name).encode(classes.ensemble())
    for texts, found_CD in zip(classes.ensemble().texts, found, strict=True):
        torch.testing.assert_close(found_CD, reference(net_name, texts), **EXACT)


BF16 = 0.008
"""The greatest difference of normalised features in bfloat16, whose numbers have 8 bits: a third of it is seen (float16
has 11). Without a context token or the words after the name some number of every class changes by more than 0.013."""


@cache
def half_net(precision: str) -> tuple[Any, Any]:
    model = models.load(replace(model_card("tiny"), precision=precision))
    assert isinstance(model, models.OpenClipModel) and model.text is not None
    assert model.text.dtype == models.PRECISIONS[precision]
    return model.net, model.tokenizer


@pytest.mark.parametrize("precision", ["bf16", "fp16"] if DEVICE == "cuda" else ["bf16"])
@paths
@quick
@given(**requests)
def test_in_half_precision_both_ways_are_near_the_features_in_float32(
    path: str, precision: str, names: list[str], p: int, n_ctx: int, suffix: str, tile: int
) -> None:
    prompts = randomly("tiny", names, p, n_ctx, suffix)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        by_path(patch, path, tile)
        found = normalize(SharedPrefixTower(*half_net(precision)).encode(prompts).float(), dim=-1)
    wanted = normalize(oracle.encode_77(*tiny_net(), prompts), dim=-1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=BF16)


@each_net
@pytest.mark.parametrize("template", ["a photo of a {}.", "{} icon", "an icon of the {}, drawn"])
@torch.inference_mode()
def test_a_soft_prompt_of_the_words_embeddings_is_the_text_prompt(net_name: str, template: str) -> None:
    tower, classes = tower_of(net_name), Classes(WORDS, template)
    soft = tower.encode(classes.soft(tower.embed(classes.context)[None]))
    torch.testing.assert_close(soft, tower.encode(classes.prompts()), **EXACT)
    torch.testing.assert_close(soft[0], reference(net_name, classes.prompts().texts[0]), **EXACT)


@pytest.mark.parametrize("tile", [1, 7, 16, 60, 200])
@torch.inference_mode()
def test_tile_boundaries_do_not_change_the_features(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    tower = tower_of("tiny")
    soft = SoftPrompts(0.1 * torch.randn(5, 3, tower.token_dim, generator=torch.Generator().manual_seed(0)), WORDS)
    words = Classes(WORDS, "a photo of a {}.", ("{}", "the {}")).ensemble()
    prompts: Prompts
    for prompts in (soft, words):
        tiles_of(monkeypatch, 10**9)
        whole = normalize(tower.encode(prompts), dim=-1)
        tiles_of(monkeypatch, tile)
        torch.testing.assert_close(normalize(tower.encode(prompts), dim=-1), whole, rtol=0, atol=1e-6)


@torch.inference_mode()
def test_a_prompt_set_is_the_same_beside_others() -> None:
    tower = tower_of("tiny")
    ctx = 0.1 * torch.randn(6, 4, tower.token_dim, generator=torch.Generator().manual_seed(1))
    population = normalize(tower.encode(SoftPrompts(ctx, WORDS)), dim=-1)
    for i in range(6):
        alone = normalize(tower.encode(SoftPrompts(ctx[i : i + 1], WORDS)), dim=-1)
        torch.testing.assert_close(population[i : i + 1], alone, rtol=0, atol=2e-6)


def test_a_prompt_that_does_not_fit_is_refused_and_never_cut(tiny: Endpoint) -> None:
    length = tiny_net()[0].context_length
    fits_exactly = " ".join(["a"] * (length - 2))
    assert tiny.model.encode_prompts(TextPrompts(((fits_exactly,),))).shape == (1, 1, 192)
    with pytest.raises(EndpointRefused, match=rf"a prompt of {length + 1} tokens \(the model takes {length}\)"):
        tiny.model.encode_prompts(TextPrompts((("short", f"{fits_exactly} a"),)))
    room = torch.zeros(1, length - 3, tiny.info.token_dim)
    assert tiny.model.encode_prompts(SoftPrompts(room, ("a",), "")).shape == (1, 1, 192)
    with pytest.raises(EndpointRefused, match=f"a prompt of {length + 1} tokens"):
        tiny.model.encode_prompts(SoftPrompts(room, ("a",), "."))


def test_no_words_have_no_embeddings_and_words_have_one_row_a_token(tiny: Endpoint) -> None:
    _, tokenizer = tiny_net()
    assert tiny.embed_text("").shape == (0, tiny.info.token_dim)
    assert tiny.embed_text("an umbrella").shape == (len(tokenizer.encode("an umbrella")), tiny.info.token_dim)


# --- models that this forward does not reproduce -------------------------------------------------------------------


def test_only_the_standard_text_tower_fits() -> None:
    net, tokenizer = random_net()
    assert fits(net, tokenizer)
    assert not fits(net, object()), "a tokenizer without a start token"
    assert not fits(object(), tokenizer), "no transformer"

    class Other:
        transformer, attn_mask, positional_embedding = net.transformer, net.attn_mask, net.positional_embedding
        context_length, text_pool_type = net.context_length, "last"

    assert not fits(Other, tokenizer), "pooled elsewhere than at the end token"
    Other.text_pool_type = "argmax"
    assert fits(Other, tokenizer)
    Other.context_length = net.context_length + 1
    assert not fits(Other, tokenizer), "a place more or less than its context has"
    Other.context_length = net.context_length
    Other.attn_mask = None
    assert not fits(Other, tokenizer), "attention that is not causal"
    Other.attn_mask = torch.zeros_like(net.attn_mask)
    assert not fits(Other, tokenizer), "attention to later tokens"

    class Strange:
        transformer, attn_mask = net.transformer, net.attn_mask

    assert not fits(Strange, tokenizer), "no positions of its own"


def test_a_model_that_does_not_fit_takes_whole_strings_and_grants_no_soft_prompts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Endpoint
) -> None:
    monkeypatch.setattr(models, "fits", lambda net, tokenizer: False)
    plain = Endpoint(model_card("tiny"), tmp_path)
    assert Access.SOFT not in plain.info.grant
    assert plain.info.grant.covers(Access.TEXT | Access.FEATURES), "what it still can is still granted"
    prompts = Classes(WORDS, "a photo of a {}.", ("{}", "the {}")).ensemble()
    torch.testing.assert_close(plain.model.encode_prompts(prompts), tiny.model.encode_prompts(prompts), **EXACT)
    with pytest.raises(EndpointRefused, match="strings only"):
        plain.model.encode_prompts(SoftPrompts(torch.zeros(1, 1, 192), ("a",)))
