"""blackvip, vp_spsa and bar against the networks and loops that their papers state, and their published schedules."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from methods import all_methods
from methods._coordinator import Decoder, RandomEncoder, ThumbnailEncoder, trigger_width
from methods._pixel_prompts import CLIP_MEAN, CLIP_STD, PixelPrompt, per_channel
from methods._spsa import directions, one_sided_gradient, sphere_directions
from methods._toy import ToyTowers
from methods._toy_box import ToyBox, ToyImages
from methods._toy_task import fitted, logits_of, predict, toy_task
from methods.bar import BAR
from methods.base import Bill, Remaining, TaskShape
from methods.blackvip import BlackVIP
from methods.testing import contract
from methods.vp_spsa import VPSPSA
from pipeline.config.method_choice import method_choice

EUROSAT = TaskShape(
    n_classes=10, n_train=160, n_val=40, shots=16, views=10, fresh_views=False, n_templates=1, feature_dim=512
)
NAMES = ("blackvip", "vp_spsa", "bar")


class TestRandomEncoder(contract("blackvip")):  # type: ignore[misc]
    def build(self) -> BlackVIP:
        return BlackVIP(BlackVIP.Config(random_encoder=True, batch_size=16, epochs=8))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the coordinator -------------------------------------------------------------------------------------------------


def decoder_of_the_paper(trigger: int) -> nn.Module:
    """The decoder as torch's layers, in the order in which the release lists them."""
    layers: list[nn.Module] = []
    for n_in, n_up, n_out in ((32, 64, 64), (64, 64, 32), (32, 32, 32), (32, 32, 16)):
        layers += [nn.ConvTranspose2d(n_in, n_up, 2, 2, groups=n_in), nn.ConvTranspose2d(n_up, n_out, 1, bias=False)]
        layers += [nn.BatchNorm2d(n_out), nn.GELU()]
    module = nn.Module()
    module.trigger = nn.Parameter(torch.zeros(trigger))
    module.body = nn.Sequential(*layers, nn.ConvTranspose2d(16, 3, 2, 2, bias=False))
    return module


def test_the_decoder_of_images_of_side_224_has_9920_parameters_of_which_800_are_the_trigger() -> None:
    assert trigger_width(224) == 800
    decoder = Decoder(224, 800)
    paper = sum(p.numel() for p in decoder_of_the_paper(800).parameters())
    assert len(decoder.initial(generator())) == paper == 9920
    assert len(Decoder(224, 0).initial(generator())) == 9120  # without a trigger: the release's coordinator_init
    code_BZ = torch.randn(2, 768, generator=generator())
    assert decoder(decoder.initial(generator()), code_BZ, training=False).shape == (2, 3, 224, 224)


@pytest.mark.parametrize("size", [64, 96])
def test_prompts_and_running_statistics_are_those_of_torchs_layers(size: int) -> None:
    trigger, side = trigger_width(size), size // 32
    decoder, paper = Decoder(size, trigger), decoder_of_the_paper(trigger)
    for step in range(3):
        w_d = decoder.initial(generator(step))
        nn.utils.vector_to_parameters(w_d, paper.parameters())
        code_BZ = torch.randn(5, 32 * side**2 - trigger, generator=generator(step))
        for training in (True, False):
            paper.train(training)
            x = torch.cat([code_BZ, paper.trigger.expand(5, -1)], 1).view(5, 32, side, side)
            torch.testing.assert_close(decoder(w_d, code_BZ, training), paper.body(x), rtol=1e-4, atol=1e-5)
    norms = [layer for layer in paper.body if isinstance(layer, nn.BatchNorm2d)]
    for ours, theirs in zip(decoder.statistics, norms, strict=True):
        torch.testing.assert_close(ours.mean, theirs.running_mean, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ours.variance, theirs.running_var, rtol=1e-4, atol=1e-6)


def test_the_decoder_starts_as_torchs_layers_do() -> None:
    torch.manual_seed(0)
    paper, decoder = decoder_of_the_paper(800), Decoder(224, 800)
    pieces = decoder.initial(generator()).split([p.numel() for p in paper.parameters()])
    assert pieces[0].min() >= 0 and pieces[0].max() <= 0.1 and abs(pieces[0].mean() - 0.05) < 0.005
    for piece, theirs in zip(pieces[1:], list(paper.parameters())[1:], strict=True):
        if theirs.numel() > 500:
            assert piece.abs().max() == pytest.approx(float(theirs.detach().abs().max()), rel=0.02)
            assert piece.std() == pytest.approx(float(theirs.detach().std()), rel=0.1)
        elif theirs.std() == 0:
            assert torch.equal(piece, theirs.flatten())  # scale and shift of a batch normalization


def test_a_prompt_of_another_side_is_the_average_of_the_next_larger_one() -> None:
    small, large, code = Decoder(48, 10), Decoder(64, 10), torch.randn(2, 118, generator=generator())
    w_d = large.initial(generator())
    torch.testing.assert_close(
        small(w_d, code, False), nn.functional.adaptive_avg_pool2d(large(w_d, code, False), 48), rtol=0, atol=0
    )


def test_the_release_s_encoder_is_five_pairs_of_convolutions_with_batch_normalization() -> None:
    encoder, layers = RandomEncoder(64, generator()), list[nn.Module]()
    for n_in, n_mid, n_out in ((3, 32, 32), (32, 32, 64), (64, 64, 64), (64, 64, 128), (128, 128, 32)):
        layers += [nn.Conv2d(n_in, n_mid, 3, 1, 1), nn.Conv2d(n_mid, n_out, 2, 2, bias=False)]
        layers += [nn.BatchNorm2d(n_out), nn.GELU()]
    paper = nn.Sequential(*layers)
    with torch.no_grad():
        for k, weights in enumerate(encoder.weights):
            for theirs, ours in zip(
                (paper[4 * k].weight, paper[4 * k].bias, paper[4 * k + 1].weight), weights, strict=True
            ):
                theirs.copy_(ours)
        x = torch.randn(4, 3, 64, 64, generator=generator(1))
        for _ in range(10):  # a step of the release has ten passes
            wanted = paper(x)
        torch.testing.assert_close(encoder(x, 10), wanted.flatten(1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(encoder(x, 0), paper.eval()(x).flatten(1), rtol=1e-3, atol=1e-4)


def test_thumbnails_are_projected_without_learning() -> None:
    encoder, x = ThumbnailEncoder(5, generator()), torch.randn(3, 3, 64, 64, generator=generator(1))
    blocks = x.view(3, 3, 8, 8, 8, 8).mean((3, 5)).flatten(1)
    torch.testing.assert_close(encoder(x, 10), blocks @ encoder.projection_XZ)
    assert torch.equal(encoder(x, 10), encoder(x, 0))


# --- whole steps -----------------------------------------------------------------------------------------------------


def rounded(images: Tensor) -> Tensor:
    return torch.floor(images * 255 + 0.5) / 255


class Loop:
    """A fit in plain loops, one image set at a time, with torch's layers; only the random draws are the method's."""

    def __init__(self, method: PixelPrompt) -> None:
        self.w = method.w_d.clone()
        self.towers, self.m = ToyTowers(), torch.zeros_like(self.w)

    def loss(self, w: Tensor, images: ToyImages, labels: Tensor) -> Tensor:
        made = rounded(self.made(w, images))
        text_CD = self.towers.text_features(toy_task()[0].classes.prompts())[0]
        features = self.towers.image_features(made.mean(1).flatten(1))
        return self.loss_of(self.towers.logit_scale * features @ text_CD.T, labels)

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels)

    def made(self, w: Tensor, images: ToyImages) -> Tensor:
        raise NotImplementedError

    def spsa(
        self, i: int, p_Jd: Tensor, lr: float, c: float, gamma: float, beta: float, batch: tuple[ToyImages, Tensor]
    ) -> None:
        a_i, c_i, g = lr / (i + 1) ** 0.4, c / i**gamma, torch.zeros_like(self.w)
        for p in p_Jd:
            up, down = self.loss(self.w + c_i * p, *batch), self.loss(self.w - c_i * p, *batch)
            g += (up - down) / (2 * c_i * p) / len(p_Jd)
        self.m = g if i == 1 else beta * self.m + g
        self.w = self.w - a_i * (g + beta * self.m)


class CoordinatorLoop(Loop):
    def __init__(self, method: BlackVIP) -> None:
        super().__init__(method)
        self.paper, self.projection = decoder_of_the_paper(16), method.encoder.tensors()["projection_XZ"]
        self.scale = method.config.prompt_scale

    def made(self, w: Tensor, images: ToyImages) -> Tensor:
        x = images.pixels_BX.view(-1, 1, 8, 8).expand(-1, 3, 8, 8)
        code = ((x - per_channel(CLIP_MEAN)) / per_channel(CLIP_STD)).flatten(1) @ self.projection
        nn.utils.vector_to_parameters(w, self.paper.parameters())
        z = torch.cat([code, self.paper.trigger.expand(len(x), -1)], 1).view(-1, 32, 1, 1)
        with torch.no_grad():
            prompt = self.paper.body(z).view(-1, 3, 8, 4, 8, 4).mean((3, 5))
        return (x + self.scale * per_channel(CLIP_STD) * prompt).clamp(0, 1)


class BorderLoop(Loop):
    def made(self, w: Tensor, images: ToyImages) -> Tensor:
        x = images.pixels_BX.view(-1, 1, 8, 8).repeat(1, 3, 1, 1)
        cells = [(row, column) for row in range(8) for column in range(8) if {row, column} & {0, 7}]
        for channel, values in enumerate(w.view(3, -1)):
            for (row, column), value in zip(cells, values, strict=True):
                x[:, channel, row, column] += CLIP_STD[channel] * value
        return x.clamp(0, 1)


class FrameLoop(Loop):
    def made(self, w: Tensor, images: ToyImages) -> Tensor:
        small = nn.functional.adaptive_avg_pool2d(images.pixels_BX.view(-1, 1, 8, 8), 6)
        out = (1 / (1 + torch.exp(-w.view(3, 8, 8)))).repeat(len(small), 1, 1, 1)
        out[:, :, 1:7, 1:7] = small
        return out

    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        p = logits.softmax(1)[torch.arange(len(labels)), labels]
        return -((1 - p) ** 2 * p.log()).mean()


def follow(method: PixelPrompt, loop: type[Loop], fresh: bool, steps: int = 4) -> None:
    """Run steps of the method and of the loop side by side."""
    task = toy_task(fresh_views=fresh)[0]
    box = ToyBox(method.info.access, Remaining(requests=10 * steps))
    method.begin(task, box, np.random.default_rng(3))
    other, images, order = loop(method), task.train.images, Tensor()
    state = torch.Generator()
    state.set_state(method.generator.get_state())
    for i in range(1, steps + 1):
        draw = sphere_directions if isinstance(method, BAR) else directions
        u_Jd = draw(method.config.n_directions, len(method.w_d), state)  # type: ignore[attr-defined]
        epoch, part = divmod(i - 1, 2)  # 20 images: two batches of 8, the last 4 are dropped
        if part == 0:
            order = torch.randperm(20, generator=state)
        rows_B = order[8 * part : 8 * part + 8]
        view = images.views(1, seed=epoch + 1 if fresh else 0)[rows_B]
        assert isinstance(view, ToyImages)
        batch = view, task.train.labels[rows_B]
        if isinstance(method, BAR):
            decay = 0.9 * method.published
            a_i = 4.9 * (1 - min(i, decay) / decay) ** 0.9 + 0.1
            at_w, g = other.loss(other.w, *batch), torch.zeros_like(other.w)
            for u in u_Jd:
                g += len(u) / 5 * u * (other.loss(other.w + 2 * u, *batch) - at_w) / 2
            other.w = other.w - a_i * g
        else:
            c = method.config
            assert isinstance(c, BlackVIP.Config | VPSPSA.Config)
            other.spsa(i, u_Jd, c.lr, c.perturbation, c.perturbation_decay, c.momentum, batch)
        method.step(box)
        torch.testing.assert_close(method.w_d, other.w, rtol=1e-3, atol=1e-3 * float(other.w.abs().max()))
        other.w = method.w_d.clone()  # one 8-bit value that rounds otherwise would move the later steps apart
    assert box.calls == ["scores"] * steps


@pytest.mark.parametrize("fresh", [False, True])
def test_four_steps_of_blackvip_are_those_of_the_loop(fresh: bool) -> None:
    # The perturbation is large: an 8-bit value that rounds otherwise in the loop then moves the estimate by little.
    follow(BlackVIP(BlackVIP.Config(batch_size=8, perturbation=0.2, prompt_scale=0.7)), CoordinatorLoop, fresh)


@pytest.mark.parametrize("fresh", [False, True])
def test_four_steps_of_vp_spsa_are_those_of_the_loop(fresh: bool) -> None:
    follow(VPSPSA(VPSPSA.Config(batch_size=8, init_std=0.5, perturbation=0.3, lr=1.0)), BorderLoop, fresh)


@pytest.mark.parametrize("fresh", [False, True])
def test_four_steps_of_bar_are_those_of_the_loop(fresh: bool) -> None:
    follow(BAR(BAR.Config(batch_size=8, perturbation=2.0)), FrameLoop, fresh)


def test_the_mean_of_many_one_sided_estimates_is_the_gradient_of_a_linear_function() -> None:
    d, n = 6, 20_000
    slope_d = torch.randn(d, generator=generator(2))
    u_nd = sphere_directions(n, d, generator(4))
    assert torch.allclose(u_nd.norm(dim=1), torch.ones(n))
    each = torch.stack(
        [one_sided_gradient(2 + 0.3 * u_1d @ slope_d, torch.tensor(2.0), u_1d, 0.3) for u_1d in u_nd.split(1)]
    )
    assert ((each.mean(0) - slope_d).abs() < 4 * each.std(0) / n**0.5).all()


def test_ten_passes_of_a_step_move_the_running_statistics_and_prediction_moves_none() -> None:
    task, test = toy_task()
    method, box = BlackVIP(BlackVIP.Config(epochs=1)), ToyBox(BlackVIP.info.access)
    method.begin(task, box, np.random.default_rng(0))
    assert torch.equal(method.decoder.statistics[0].mean, torch.zeros(64))
    moves, call = [], method.decoder.__call__
    method.decoder = type(
        "Counting",
        (),
        {
            "__call__": lambda _, w, z, training: moves.append(training) or call(w, z, training),
            "statistics": method.decoder.statistics,
        },
    )()  # type: ignore[assignment]
    method.step(box)
    assert moves == [True] * 10 and method.decoder.statistics[0].mean.abs().max() > 0
    before = [part.mean.clone() for part in method.decoder.statistics]
    moves.clear()
    predict(method, test.images)
    assert moves == [False] * len(test.labels)
    assert all(torch.equal(a, b.mean) for a, b in zip(before, method.decoder.statistics, strict=True))


# --- schedule, cost and start ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dataset", "n_train", "requests", "images"),
    [
        ("blackvip", "eurosat", 160, 50_000, 6_400_000),
        ("blackvip", "dtd", 752, 250_000, 32_000_000),
        ("blackvip", "sun397", 6352, 490_000, 62_720_000),
        ("blackvip", "imagenet", 16_000, 625_000, 80_000_000),
        ("vp_spsa", "eurosat", 160, 50_000, 6_400_000),
        ("bar", "eurosat", 160, 30_000, 3_840_000),
        ("bar", "stanford_cars", 3136, 360_000, 46_080_000),
    ],
)
def test_the_published_schedule(name: str, dataset: str, n_train: int, requests: int, images: int) -> None:
    method = method_choice(name, dataset, "paper", {}).build()
    shape = replace(EUROSAT, n_train=n_train)
    for allotment in (Remaining(), Remaining(requests, images)):
        bill = method.bill(shape, allotment)
        assert (bill.requests, bill.images) == (requests, images)
        assert (bill.prompts, bill.outputs) == (10 * requests, 10 * images)
    sets = 6 if name == "bar" else 10
    assert method.bill(shape, Remaining(requests=requests - 1)).requests == requests - sets


@pytest.mark.parametrize(
    ("n_train", "remaining", "steps"),
    [
        (160, Remaining(), 100),
        (256, Remaining(), 200),
        (160, Remaining(requests=800), 80),
        (256, Remaining(images=256_000), 200),
        (160, Remaining(images=1279), 0),
        (16, Remaining(images=2000), 12),  # fewer images than one batch
    ],
)
def test_steps_and_bill_of_the_default_schedule(n_train: int, remaining: Remaining, steps: int) -> None:
    bill, batch = BlackVIP().bill(replace(EUROSAT, n_train=n_train), remaining), min(128, n_train)
    assert bill == Bill.scores(10, batch, 10) * steps


@pytest.mark.parametrize("name", NAMES)
def test_paper_settings_differ_from_the_defaults_in_what_the_page_says(name: str) -> None:
    default, paper = (dict(method_choice(name, "eurosat", hparams, {}).config) for hparams in ("default", "paper"))
    changed = {key: paper[key] for key in paper if paper[key] != default[key]}
    assert (
        changed
        == {
            "blackvip": {"epochs": 5000, "perturbation": 0.005, "perturbation_decay": 0.2, "prompt_scale": 0.4},
            "vp_spsa": {"epochs": 5000, "perturbation": 0.005, "init_std": 1.0},
            "bar": {"epochs": 5000, "perturbation": 0.01, "min_lr": 0.01},
        }[name]
    )


def test_numbers_learned_at_side_224() -> None:
    box = ToyBox(VPSPSA.info.access)
    box.image_size = 224
    for name, learned in (("blackvip", 9920), ("vp_spsa", 69_840), ("bar", 150_528)):
        method = all_methods()[name].cls()
        method.begin(toy_task()[0], box, np.random.default_rng(0))
        assert method.trainable_params == learned
        if isinstance(method, BAR):
            assert (method.inner.start, method.inner.stop) == (15, 209)


def test_vp_spsa_starts_at_the_plain_images_and_the_release_at_random() -> None:
    task, test = toy_task()
    plain = test.images.array(8)
    for std in (0.0, 1.0):
        method = VPSPSA(VPSPSA.Config(init_std=std))
        method.begin(task, ToyBox(VPSPSA.info.access), np.random.default_rng(0))
        made = method.made(method.w_d, plain, training=False)
        assert torch.equal(made, plain) == (std == 0)
        assert torch.equal(made[:, :, 1:-1, 1:-1], plain[:, :, 1:-1, 1:-1])


def test_bar_puts_the_smaller_image_into_a_frame_and_learns_from_there() -> None:
    task, test = toy_task(shots=16)
    losses = []
    for epochs in (1, 100):
        method = BAR(BAR.Config(epochs=epochs))
        fitted(method, task)
        losses.append(float(cross_entropy(logits_of(method, test.images), test.labels)))
    assert losses[1] < 0.6 * losses[0]
