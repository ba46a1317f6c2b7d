"""What 8-bit images do to estimated gradients: python -m tests.support.eight_bits prints a table as Markdown.

Each method estimates the gradient at its start twice, along the same directions: with the images that it makes as
floats, and with the same images rounded to 8 bits. One batch of the embedded icons, one image of each class, on `tiny`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from methods._pixel_prompts import PixelPrompt
from methods._spsa import directions, estimated_gradient, one_sided_gradient, sphere_directions
from methods.bar import BAR
from methods.base import Remaining, TaskShape, eight_bits
from methods.blackvip import BlackVIP
from methods.vp_spsa import VPSPSA
from pipeline.blackbox.model import OpenClipModel
from pipeline.config.card_files import model_card
from pipeline.config.compose import compose
from pipeline.trials.plan import make_plan
from pipeline.trials.trial import few_shot_task

PERTURBATIONS = (0.1, 0.03, 0.01, 0.005, 0.001)
N_DIRECTIONS = 10
CASES: tuple[tuple[str, PixelPrompt], ...] = (
    ("blackvip, eps 1", BlackVIP()),
    ("blackvip, eps 0.3", BlackVIP(BlackVIP.Config(prompt_scale=0.3))),
    ("vp_spsa", VPSPSA()),
    ("vp_spsa, init_std 1", VPSPSA(VPSPSA.Config(init_std=1.0))),
    ("bar", BAR()),
)


class Box:
    """The constants that `start` reads; it sends no request."""

    def __init__(self, model: OpenClipModel) -> None:
        self.image_size, self.feature_dim = model.image_size, model.feature_dim


def rows(case: str, method: PixelPrompt, model: OpenClipModel) -> Iterator[tuple[str, float, float, float, float]]:
    """Yield (case, c, share of values that do not change, cosine, relative error of the differences of losses)."""
    task = few_shot_task(
        make_plan(compose(["sweep=smoke", "model=tiny", "datasets=icons", "shots=1", "seeds=1"])).trials[0]
    )
    plan = method.plan(TaskShape.of(task, model.feature_dim), Remaining())
    box: Any = Box(model)
    method.start(task, box, np.random.default_rng(0), plan)
    text_CD = model.encode_prompts(task.classes.prompts())[0]
    read = method.read(task.train.images, training=True)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.preprocess.mean, model.preprocess.std))

    def measured(w_d: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses [2] on float and on 8-bit images, and the 8-bit images."""
        images = method.made(w_d, *read, training=True)
        rounded = eight_bits(images)
        both = torch.cat([images, rounded.float() / 255])
        logits = model.logit_scale * model._tile(list((both - mean) / std)) @ text_CD.T
        return method.losses_of(logits.view(2, len(images), -1), task.train.labels), rounded

    draw = sphere_directions if isinstance(method, BAR) else directions
    u_Jd = draw(N_DIRECTIONS, len(method.w_d), torch.Generator().manual_seed(1))
    at_w = measured(method.w_d)
    for c in (5.0, 1.0, 0.1, 0.01) if isinstance(method, BAR) else PERTURBATIONS:
        plus = [measured(method.w_d + c * u_d) for u_d in u_Jd]
        minus = [at_w] * len(plus) if isinstance(method, BAR) else [measured(method.w_d - c * u_d) for u_d in u_Jd]
        unchanged = np.mean([float((p[1] == m[1]).double().mean()) for p, m in zip(plus, minus, strict=True)])
        up, down = (torch.stack([losses for losses, _ in side], dim=1) for side in (plus, minus))  # [2, J]
        if isinstance(method, BAR):
            g_float, g_8 = (one_sided_gradient(up[k], down[k, 0], u_Jd, c) for k in range(2))
        else:
            g_float, g_8 = (estimated_gradient(up[k], down[k], u_Jd, c) for k in range(2))
        cosine = float(torch.nn.functional.cosine_similarity(g_float, g_8, dim=0))
        float_J, error_J = (up - down)[0], (up - down)[1] - (up - down)[0]
        yield case, c, float(unchanged), cosine, float(error_J.norm() / float_J.norm())


def main() -> None:
    """Print the table as Markdown."""
    torch.set_num_threads(2)
    model = OpenClipModel(model_card("tiny"))
    print("| method | c | values that stay the same | cosine | error of the differences |\n|---|--:|--:|--:|--:|")
    with torch.inference_mode():
        for case, method in CASES:
            for name, c, unchanged, cosine, error in rows(case, method, model):
                print(f"| {name} | {c:g} | {100 * unchanged:.1f} % | {cosine:.3f} | {100 * error:.0f} % |", flush=True)


if __name__ == "__main__":
    main()
