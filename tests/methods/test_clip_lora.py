"""CLIP-LoRA, and the changed models behind it: right, metered, the same bits again, and granted by name only."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, normalize

from methods._lora import Dropout
from methods._toy_box import ToyBox
from methods._toy_task import SHAPES, fit, toy_task
from methods.base import Access, Bill, Classes, Lora, LowRank, PixelImages, Remaining, TextPrompts
from methods.clip_lora import CLIPLoRA
from pipeline.blackbox import architecture, lora
from pipeline.blackbox.client import MeteredBox
from pipeline.blackbox.endpoint import Endpoint
from pipeline.blackbox.model import OpenClipModel
from pipeline.blackbox.request import LoraStep, call_digest
from pipeline.blackbox.text_tower import SharedPrefixTower
from pipeline.budget import Limits, Phase
from pipeline.cards import Answers, ModelCard
from pipeline.cli import main
from pipeline.config.card_files import model_card
from pipeline.data.images import Images
from pipeline.data.source import Source
from pipeline.errors import BudgetExceeded, ConfigError, EndpointRefused, NonFiniteError
from pipeline.results.comparison import access_class
from pipeline.trials.plan import announcements
from tests.support.lab import Lab, box_over

WHITE = Access.TEXT | Access.SCORES | Access.LORA
NAMES = ("star", "house", "hand-drawn umbrella")
PROMPTS = TextPrompts((tuple(f"an icon of a {name}." for name in NAMES),))
TEXTS = ("star", "a hand-drawn star", "two")
CONTEXT = 7
"""Tokens of the longest of these texts, start and end included: open_clip's own forward computes no more than those."""


@pytest.fixture
def white(tiny: Endpoint, tmp_path: Path) -> Iterator[MeteredBox]:
    """A metered white box over the embedded model."""
    with box_over(tiny, tmp_path, WHITE) as box:
        yield box


@pytest.fixture
def images(icons: Source) -> Images:
    return Images.plain(icons, "train", icons.rows_of("train")[:12], "crop")


def random_lora(shapes: tuple[tuple[int, int], ...], seed: int = 0, size: float = 0.3, rank: int = 2) -> Lora:
    g = torch.Generator().manual_seed(seed)

    def tower(n: int, w: int) -> LowRank:
        a, b = torch.randn(n, 3, rank, w, generator=g), torch.randn(n, 3, w, rank, generator=g)
        return LowRank(a / w**0.5, size * b)

    return Lora(*(tower(n, w) for n, w in shapes), scale=0.7)


def network(vision: dict[str, Any]) -> Any:
    """A small CLIP with random weights and two text layers."""
    torch.manual_seed(3)
    net = open_clip.model.CLIP(
        embed_dim=24,
        vision_cfg=open_clip.CLIPVisionCfg(image_size=32, **vision),
        text_cfg=open_clip.CLIPTextCfg(width=32, heads=2, layers=2, context_length=CONTEXT),
    )
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return net.eval().requires_grad_(False)


NETWORKS = {
    "vit": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "resnet": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 32},
}
each_network = pytest.mark.parametrize("vision", list(NETWORKS.values()), ids=list(NETWORKS))


# --- a changed network ---------------------------------------------------------------------------------------------


@each_network
def test_merged_weights_give_what_is_computed_beside_them(vision: dict[str, Any]) -> None:
    net, tokenizer = network(vision), open_clip.SimpleTokenizer()
    change, pixels = random_lora(lora.shapes(net)), torch.randn(5, 3, 32, 32)
    with lora.merged(net, change):
        image, text = net.encode_image(pixels), net.encode_text(tokenizer(list(TEXTS), CONTEXT))
    with lora.beside(net, change, Dropout.seeded(0.0, 0)):
        beside = net.encode_image(pixels), SharedPrefixTower(net, tokenizer).encode_whole(TEXTS)
    for found, expected, plain in zip(
        beside, (image, text), (net.encode_image(pixels), net.encode_text(tokenizer(list(TEXTS), CONTEXT))), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert (expected - plain).abs().max() > 0.01


@each_network
def test_a_network_has_its_own_bits_again_after_a_change(vision: dict[str, Any]) -> None:
    net = network(vision)
    change, before = random_lora(lora.shapes(net)), copy.deepcopy(net.state_dict())
    for context in (lora.merged(net, change), lora.beside(net, change, Dropout.seeded(0.5, 0))):
        with pytest.raises(KeyboardInterrupt), context:
            raise KeyboardInterrupt
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
        assert not any("forward" in vars(layer) for tower in lora.layers(net) for layer in tower)


class PlainAttention(nn.Module):
    """An attention layer with LoRA and dropout, map by map and head by head, as the LoRA paper writes it."""

    def __init__(self, layer: Any, a_3rW: Tensor, b_3Wr: Tensor, scale: float, rate: float, g: torch.Generator) -> None:
        super().__init__()
        self.layer, self.a_3rW, self.b_3Wr, self.scale, self.rate, self.g = layer, a_3rW, b_3Wr, scale, rate, g

    def projected(self, x_NSW: Tensor) -> list[Tensor]:
        """Queries, keys and values."""
        n, s, w = x_NSW.shape
        kept = (torch.rand(3, n * s, w, generator=self.g) >= self.rate).view(3, n, s, w)
        if isinstance(self.layer, nn.MultiheadAttention):
            weights, biases = self.layer.in_proj_weight.chunk(3), self.layer.in_proj_bias.chunk(3)
        else:
            maps = self.layer.q_proj, self.layer.k_proj, self.layer.v_proj
            weights, biases = tuple(m.weight for m in maps), tuple(m.bias for m in maps)
        return [
            x_NSW @ weights[i].T
            + biases[i]
            + self.scale * (kept[i] * x_NSW / (1 - self.rate)) @ self.a_3rW[i].T @ self.b_3Wr[i].T
            for i in range(3)
        ]

    def attended(self, x_NSW: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.projected(x_NSW)
        width = q.shape[-1] // self.layer.num_heads
        heads = []
        for h in range(self.layer.num_heads):
            own = slice(h * width, (h + 1) * width)
            scores = q[..., own] @ k[..., own].transpose(1, 2) / math.sqrt(width)
            heads.append((scores if mask is None else scores + mask).softmax(-1) @ v[..., own])
        return torch.cat(heads, -1)

    def forward(self, x: Tensor, *_: Any, attn_mask: Tensor | None = None, **__: Any) -> Any:
        if isinstance(self.layer, nn.MultiheadAttention):
            return self.layer.out_proj(self.attended(x, attn_mask)), None
        tokens = x.flatten(2).permute(0, 2, 1)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + self.layer.positional_embedding
        return self.layer.c_proj(self.attended(tokens, None)[:, 0])


def plain_loss(net: Any, leaves: list[Tensor], change: Lora, pixels: Tensor, labels_B: Tensor, rate: float) -> Tensor:
    """The loss of a copy of the network whose attention layers are `PlainAttention`."""
    net, g = copy.deepcopy(net), torch.Generator().manual_seed(11)
    image_a, image_b, text_a, text_b = leaves
    if hasattr(net.visual, "attnpool"):
        net.visual.attnpool = PlainAttention(net.visual.attnpool, image_a[0], image_b[0], change.scale, rate, g)
    else:
        for i, block in enumerate(net.visual.transformer.resblocks):
            block.attn = PlainAttention(block.attn, image_a[i], image_b[i], change.scale, rate, g)
    for i, block in enumerate(net.transformer.resblocks):
        block.attn = PlainAttention(block.attn, text_a[i], text_b[i], change.scale, rate, g)
    image_BD = normalize(net.encode_image(pixels), dim=-1)
    text_CD = normalize(net.encode_text(open_clip.SimpleTokenizer()(list(TEXTS), CONTEXT)), dim=-1)
    return cross_entropy(20.0 * image_BD @ text_CD.T, labels_B)


@each_network
@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_gradients_are_those_of_a_plain_lora(vision: dict[str, Any], rate: float) -> None:
    net, g = network(vision), torch.Generator().manual_seed(5)
    pixels, labels_B = torch.randn(4, 3, 32, 32, generator=g), torch.tensor([0, 2, 1, 1])
    change = random_lora(lora.shapes(net))
    tower = SharedPrefixTower(net, open_clip.SimpleTokenizer())
    leaves = [factor.clone().requires_grad_() for factor in change.factors]
    with lora.beside(net, Lora(LowRank(*leaves[:2]), LowRank(*leaves[2:]), change.scale), Dropout.seeded(rate, 11)):
        image_BD, text_CD = net.encode_image(pixels), tower.encode_whole(TEXTS)
    loss = cross_entropy(20.0 * normalize(image_BD, dim=-1) @ normalize(text_CD, dim=-1).T, labels_B)
    others = [factor.clone().requires_grad_() for factor in change.factors]
    expected = plain_loss(net, others, change, pixels, labels_B, rate)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    pairs = torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, others)
    for found, wanted in zip(*pairs, strict=True):
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_layers_and_numbers_are_those_of_the_paper_on_its_backbone() -> None:
    card = ModelCard(name="own", kind="open_clip", arch="ViT-B-16-quickgelu", weights="openai")
    net = architecture.build(card, True, torch.device("meta"))
    assert lora.shapes(net) == ((12, 768), (12, 512))
    assert sum(6 * 2 * n * w for n, w in lora.shapes(net)) == 184_320


# --- the method ----------------------------------------------------------------------------------------------------


def functional_loop(model: OpenClipModel, images: Images, labels_N: Tensor, names: Classes, steps: int) -> list[Tensor]:
    """CLIP-LoRA without dropout on the embedded model: autograd through merged weights, torch's own scheduler."""

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model.net

        def forward(self, rows: Tensor) -> Tensor:
            image_BD = normalize(self.net.encode_image(model.preprocess.pixels(images[rows])), dim=-1)
            text_CD = normalize(self.net.encode_text(model.tokenizer(list(names.prompts().texts[0]))), dim=-1)
            return cross_entropy(model.logit_scale * image_BD @ text_CD.T, labels_N[rows])

    keys = [[f"net.visual.attnpool.{m}_proj.weight" for m in "qkv"]]
    keys += [[f"net.transformer.resblocks.{i}.attn.in_proj_weight"] for i in range(3)]
    module, g = Loss(), torch.Generator().manual_seed(int(np.random.default_rng(4).integers(2**63 - 1)))
    weights, factors = dict(module.named_parameters()), list[Tensor]()
    for n, w in ((1, 768), (3, 192)):
        a = (torch.rand(n, 3, 2, w, generator=g) * 2 - 1) / w**0.5
        factors += [a.requires_grad_(), torch.zeros(n, 3, w, 2, requires_grad=True)]
    optimizer = torch.optim.AdamW(factors, lr=2e-4, weight_decay=1e-2)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-6)
    batches = list[Tensor]()
    for _ in range(steps):
        batches = batches or list(torch.split(torch.randperm(len(labels_N), generator=g), 5))
        rows = batches.pop(0)
        torch.randint(2**62, (), generator=g)  # the seed of a dropout that is not used
        layers = [*zip(factors[0], factors[1], strict=True), *zip(factors[2], factors[3], strict=True)]
        changed = {
            key: weights[key] + part
            for layer_keys, (a_3rW, b_3Wr) in zip(keys, layers, strict=True)
            for key, part in zip(layer_keys, (b_3Wr @ a_3rW / 2**0.5).flatten(0, 1).chunk(len(layer_keys)), strict=True)
        }
        optimizer.zero_grad()
        functional_call(module, changed, (rows,)).backward()
        optimizer.step()
        cosine.step()
    return [factor.detach() for factor in factors]


def test_steps_are_those_of_a_plain_loop_on_the_embedded_model(
    tiny: Endpoint, images: Images, white: MeteredBox
) -> None:
    assert isinstance(tiny.model, OpenClipModel)
    names, labels_N = Classes(NAMES, "an icon of a {}."), torch.arange(12) % 3
    task, _ = toy_task(views=0)
    task = replace(task, classes=names, shots=1, train=task.train._replace(images=images, labels=labels_N))
    method = CLIPLoRA(CLIPLoRA.Config(dropout=0.0, batch_size=5, steps_per_shot=4))
    fit(method, task, white, seed=4)
    expected = functional_loop(tiny.model, images, labels_N, names, steps=4)
    assert white.meter.paid == Bill(4, 2 * (5 + 5 + 2 + 5), 2 * 3 * 4, 2 * 3 * 17)
    for found, wanted, key in zip(method.lora.factors, expected, method.deployed(), strict=True):
        maps = slice(2, 3) if key == "image_b_n3Wr" else slice(None)
        # gradients of the pool's queries and keys are near Adam's epsilon here: a step follows their rounding
        torch.testing.assert_close(found.detach()[:, maps], wanted[:, maps], rtol=1e-3, atol=2e-6, msg=key)
    own = Lora(LowRank(*expected[:2]), LowRank(*expected[2:]), 2**-0.5)
    prompts = names.prompts()
    start, end, plain = (white.scores(images, prompts, change) for change in (None, method.lora, own))
    torch.testing.assert_close(end, plain, rtol=1e-5, atol=1e-4)
    assert (end - start).abs().max() > 0.01


@pytest.mark.parametrize("shots", [1, 2, 16])
def test_the_published_schedule_is_500_steps_a_shot(shots: int) -> None:
    shape = replace(SHAPES[1], shots=shots, n_train=10 * shots)
    assert CLIPLoRA().plan(shape, Remaining()).steps == 500 * shots
    eurosat = CLIPLoRA().plan(SHAPES[1], Remaining()).bill
    assert (eurosat.requests, eurosat.images) == (8_000, 2 * 8_000 * 32)


def test_an_allotment_pays_for_as_many_steps_as_fit_and_a_last_batch_is_not_dropped() -> None:
    shape = replace(SHAPES[1], n_train=70, n_classes=10)  # batches of 32, 32 and 6
    for images, steps in ((63, 0), (64, 1), (139, 2), (140, 3), (203, 3), (204, 4), (279, 5), (280, 6)):
        plan = CLIPLoRA().plan(shape, Remaining(math.inf, images))
        assert plan.steps == steps and plan.bill.requests == steps, images
        rows = sum(itertools.islice(itertools.cycle([32, 32, 6]), steps))
        assert plan.bill == Bill(steps, 2 * rows, 2 * 10 * steps, 2 * 10 * rows)
    assert CLIPLoRA().plan(shape, Remaining(5, math.inf)).steps == 5


def test_the_cosine_is_stretched_over_the_steps_that_are_paid_for(monkeypatch: pytest.MonkeyPatch) -> None:
    rates, step = list[float](), torch.optim.AdamW.step
    record = lambda self, *a: (rates.append(self.param_groups[0]["lr"]), step(self, *a))[1]  # noqa: E731
    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    fit(CLIPLoRA(), toy_task()[0], ToyBox(WHITE, Remaining(requests=5)))
    assert rates == pytest.approx([1e-6 + 199e-6 * (1 + math.cos(math.pi * i / 5)) / 2 for i in range(5)], rel=1e-6)


def test_the_papers_template_is_a_setting() -> None:
    task, _ = toy_task()
    task = replace(task, classes=replace(task.classes, template="the {}."))
    for paper, template in ((False, "the {}."), (True, "a photo of a {}.")):
        method = CLIPLoRA(CLIPLoRA.Config(paper_init=paper))
        method.begin(task, ToyBox(WHITE), np.random.default_rng(0))
        assert method.classes.template == template and method.notes["published_steps"] == 500 * task.shots


# --- at the endpoint -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fake", "tiny"])
def test_a_change_of_zero_gives_the_bits_of_the_model_and_another_change_leaves_no_trace(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, images: Images
) -> None:
    endpoint: Endpoint = request.getfixturevalue(name)
    with box_over(endpoint, tmp_path, WHITE) as box:
        plain = box.scores(images, PROMPTS)
        assert torch.equal(box.scores(images, PROMPTS, random_lora(box.lora_shapes, size=0.0)), plain)
        change = random_lora(box.lora_shapes)
        changed = box.scores(images, PROMPTS, change)
        assert (changed - plain).abs().max() > 0.1
        assert torch.equal(box.scores(images, PROMPTS, change), changed)
        assert torch.equal(box.scores(images, PROMPTS), plain)
        alone = box.scores(images[[7]], PROMPTS, change)
        torch.testing.assert_close(alone, changed[:, [7]], rtol=1e-5, atol=1e-5)
        assert box.meter.paid == Bill.scores(1, 12, 3) * 5 + Bill.scores(1, 1, 3)
        hits = box.meter.cache_hits
        assert hits >= 12, "only plain scores are stored"
        assert box.meter.computed_images == 5 * 12 + 1 - hits


@pytest.mark.parametrize("name", ["fake", "tiny"])
def test_gradients_are_the_same_bits_again_and_differ_by_every_argument(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, images: Images
) -> None:
    endpoint: Endpoint = request.getfixturevalue(name)
    labels_B = torch.arange(12) % 3
    with box_over(endpoint, tmp_path, WHITE) as box:
        change = random_lora(box.lora_shapes)
        arguments = (images, labels_B, PROMPTS, change, 0.25, 7)
        loss, *gradients = box.lora_gradients(*arguments)
        assert [g.shape for g in gradients] == [f.shape for f in change.factors] and loss.shape == ()
        again = box.lora_gradients(*arguments)
        assert all(torch.equal(x, y) for x, y in zip((loss, *gradients), again, strict=True))
        variants: dict[int, Any] = {
            0: images[list(range(11, -1, -1))],
            1: (labels_B + 1) % 3,
            2: TextPrompts((tuple(f"{name} icon" for name in NAMES),)),
            3: random_lora(box.lora_shapes, seed=1),
            4: 0.5,
            5: 8,
        }
        for place, other in variants.items():
            different = box.lora_gradients(*arguments[:place], other, *arguments[place + 1 :])  # type: ignore[arg-type]
            assert not torch.equal(different[1], gradients[0]), place
        assert box.meter.paid == Bill.lora_gradients(12, 3) * 8
        assert box.meter.computed_images == 8 * 24 and not any(f.requires_grad for f in change.factors)


def test_a_gradient_is_that_of_finite_differences(white: MeteredBox, images: Images) -> None:
    labels_B, change = torch.arange(12) % 3, random_lora(white.lora_shapes)

    def loss_at(factors: list[Tensor]) -> float:
        scores_BC = white.scores(images, PROMPTS, Lora(LowRank(*factors[:2]), LowRank(*factors[2:]), change.scale))[0]
        return float(cross_entropy(scores_BC.double(), labels_B))

    _, *gradients = white.lora_gradients(images, labels_B, PROMPTS, change, 0.0, 0)
    for i, gradient in enumerate(gradients):
        direction = gradient / gradient.norm()
        up, down = list(change.factors), list(change.factors)
        up[i], down[i] = up[i] + 0.01 * direction, down[i] - 0.01 * direction
        slope = (loss_at(up) - loss_at(down)) / 0.02
        assert slope == pytest.approx(float(gradient.norm()), rel=0.03)


def test_equal_calls_have_equal_digests_and_every_argument_is_part_of_them(images: Images, fake: Endpoint) -> None:
    change, labels_B = random_lora(fake.info.lora_shapes), torch.arange(12) % 3

    def digest(change: Lora | None, step: LoraStep | None) -> str:
        return call_digest("lora_gradients", images, PROMPTS, lora=change, step=step)

    step = LoraStep(labels_B, 0.25, 7)
    assert digest(change, step) == digest(copy.deepcopy(change), LoraStep(labels_B.clone(), 0.25, 7))
    others = [replace(change, scale=0.5), replace(change, text=LowRank(change.text.a_n3rW, change.text.b_n3Wr + 1e-6))]
    others += [replace(change, image=change.text, text=change.image)]
    steps = [replace(step, labels_B=labels_B + 1), replace(step, dropout=0.5), replace(step, seed=8)]
    digests = [digest(change, step), *(digest(c, step) for c in others), *(digest(change, s) for s in steps)]
    assert len({*digests, digest(change, None), digest(None, None)}) == 9


def test_a_step_is_charged_before_it_is_computed(
    fake: Endpoint, tmp_path: Path, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed, compute = list[str](), Endpoint.compute
    monkeypatch.setattr(Endpoint, "compute", lambda self, r: (computed.append(r.kind), compute(self, r))[1])
    with box_over(fake, tmp_path, WHITE, reserved=Limits(9, 2 * 12 * 3 - 1)) as box:
        arguments = images, torch.zeros(12, dtype=torch.int64), PROMPTS, random_lora(box.lora_shapes), 0.25, 7
        for _ in range(2):
            box.lora_gradients(*arguments)
        with pytest.raises(BudgetExceeded, match="images"):
            box.lora_gradients(*arguments)
    assert computed == ["lora_gradients"] * 2
    assert box.meter.paid == Bill.lora_gradients(12, 3) * 2 == Bill(2, 2 * 2 * 12, 2 * 2 * 3, 2 * 2 * 36)


def test_a_call_that_gives_nan_is_refunded(
    fake: Endpoint, tmp_path: Path, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    with box_over(fake, tmp_path, WHITE) as box:
        change = random_lora(box.lora_shapes)
        huge = Lora(LowRank(change.image.a_n3rW, 3e38 * change.image.b_n3Wr.sign()), change.text, change.scale)
        labels_B = torch.zeros(12, dtype=torch.int64)
        with pytest.raises(NonFiniteError, match="lora_gradients: the loss or a gradient is NaN or infinite"):
            box.lora_gradients(images, labels_B, PROMPTS, huge, 0.0, 0)
        assert box.meter.paid == Bill()


def test_wrong_changes_labels_and_prompts_are_refused_and_cost_nothing(white: MeteredBox, images: Images) -> None:
    good, labels_B = random_lora(white.lora_shapes), torch.arange(12) % 3
    nan = replace(good, text=LowRank(good.text.a_n3rW * torch.nan, good.text.b_n3Wr))
    soft = Classes(NAMES, "a {}.").soft(torch.zeros(1, 2, 192))
    white.access |= Access.SOFT | Access.PIXELS
    made = PixelImages(images, torch.zeros(12, 3, 64, 64, dtype=torch.uint8))
    wrong = {
        r"factors of shapes .*, expected \[1, 3, r, 768\], \[1, 3, 768, r\], \[3, 3, r, 192\]": lambda: white.scores(
            images, PROMPTS, replace(good, image=good.text)
        ),
        "expected .* r, 768": lambda: white.scores(images, PROMPTS, random_lora(white.lora_shapes, rank=0)),
        "not finite": lambda: white.scores(images, PROMPTS, nan),
        "scale has a value": lambda: white.scores(images, PROMPTS, replace(good, scale=math.inf)),
        "task's images only": lambda: white.scores(made, PROMPTS, good),
        "no images": lambda: white.lora_gradients(images[[]], labels_B[:0], PROMPTS, good, 0.0, 0),
        r"labels int64 \(11,\) for 12 images": lambda: white.lora_gradients(images, labels_B[1:], PROMPTS, good, 0, 0),
        "labels float32": lambda: white.lora_gradients(images, labels_B.float(), PROMPTS, good, 0, 0),
        "labels from 0 to 2": lambda: white.lora_gradients(images, labels_B + 1, PROMPTS, good, 0, 0),
        "0 <= dropout < 1": lambda: white.lora_gradients(images, labels_B, PROMPTS, good, 1.0, 0),
        "one set of text prompts": lambda: white.lora_gradients(images, labels_B, soft, good, 0, 0),  # type: ignore[arg-type]
        "labels and one set": lambda: white.lora_gradients(
            images, labels_B, TextPrompts(PROMPTS.texts * 2), good, 0, 0
        ),
    }
    for message, call in wrong.items():
        with pytest.raises(EndpointRefused, match=message):
            call()
    with pytest.raises(TypeError, match="expected Lora, got tuple"):
        white.scores(images, PROMPTS, good.factors)  # type: ignore[arg-type]
    assert white.meter.paid == Bill()


# --- grants, plans and trials --------------------------------------------------------------------------------------


def test_it_is_granted_by_name_only_and_stands_in_the_section_of_white_boxes(tiny: Endpoint) -> None:
    assert access_class(WHITE.label) == access_class("SOFT+FEATURES+GRADIENTS") == "white box"
    everything = ~Access.LORA
    assert not everything.covers(Access.LORA) and not Access.LORA.covers(Access.SCORES)
    assert not Answers(digits=3).granted(~Access(0)).covers(Access.LORA)
    for name in ("tiny", "fake", "vit_b16", "vit_b32", "rn50"):
        assert model_card(name).access.covers(WHITE)
    ungranted = Endpoint(replace(model_card("fake"), grant="SOFT+PIXELS+FEATURES+GRADIENTS"), None)
    assert ungranted.info.lora_shapes == () and tiny.info.lora_shapes == ((1, 768), (3, 192))


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"arch": "coca_ViT-B-32", "weights": "laion2b_s13b_b90k"}, "its text tower takes prompts as strings only"),
        ({"arch": "convnext_base", "weights": "laion400m_s13b_b51k"}, "its image tower is neither open_clip's ViT nor"),
        ({"arch": "ViT-B-32-quickgelu", "weights": "openai", "precision": "bf16"}, "gradients need fp32, not bf16"),
    ],
)
def test_a_plan_refuses_a_model_that_cannot_be_changed_in_one_line(
    keys: dict[str, str], reason: str, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(architecture, "cached_file", lambda settings: None)
    lines = {"kind": "open_clip", "grant": "SOFT+FEATURES+GRADIENTS+LORA", **keys}
    (tmp_path / "mine.yaml").write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    model = f"model={tmp_path / 'mine.yaml'}"
    plan = lab.plan(model, "methods=[clip_lora,zero_shot]")
    assert [name for name, _ in plan.unable] == ["clip_lora"] and not plan.config.model.access.covers(Access.LORA)
    assert any("LORA" in line and "not granted" in line for line in announcements(plan))
    with pytest.raises(ConfigError, match=f"clip_lora needs .*LORA, mine grants .*not granted: {reason}"):
        lab.plan(model, "methods=[clip_lora]")


def test_a_plan_refuses_a_remote_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    card = "kind: http\nurl: http://127.0.0.1:9/v1\nadapter: farebox\nlogit_scale: 20.0\nfeature_dim: 192\n"
    card += (
        "identity: {model: m}\nimage: {size: 64}\nprice: {usd_per_request: 0, usd_per_image: 0, as_of: 2026-11-01}\n"
    )
    for grant, message in (("TEXT+SCORES", "clip_lora needs"), ("TEXT+SCORES+LORA", "LORA cannot be had over HTTP")):
        (tmp_path / "api.yaml").write_text(f"{card}grant: {grant}\n")
        assert main(["plan", "sweep=smoke", "model=api.yaml", "methods=[clip_lora]"]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and "\n" not in error


def test_a_trial_is_paid_as_predicted_and_says_that_it_is_white_box(lab: Lab) -> None:
    spec = lab.spec("clip_lora", "budget.requests=7", "budget.images=null", "method.clip_lora.batch_size=9")
    (row,) = lab.run(spec)
    assert row.status == "done" and row.access == "TEXT+SCORES+LORA"
    rows = 2 * (9 + 9 + 2) + 9
    assert lab.paid(spec) == spec.predicted == Bill(7, 2 * rows, 2 * 5 * 7, 2 * 5 * rows)
    assert lab.bills(spec)[Phase.EVALUATE] == Bill.scores(1, 60, 5)
    assert json.loads(row.notes)["steps"] == 7
