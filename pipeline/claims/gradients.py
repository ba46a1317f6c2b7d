"""Compare CBBT's estimated gradient with the true gradient, which white-box access gives.

The gradients are taken with respect to the learned token, at the prompt where CBBT starts, on the training images of a
trial. The cosine between them is measured by number of directions Q at CBBT's step h = 1/d, and by h at the paper's Q.
For a smooth loss and a small h, the squared cosine of Q random directions in d dimensions is near Q / (Q + d + 1).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from methods._spsa import one_sided_gradient, sphere_directions
from methods._training import mean_cross_entropy, with_context
from methods.base import torch_generator
from pipeline.blackbox.endpoint import Endpoint
from pipeline.config.compose import compose
from pipeline.data.images import as_images
from pipeline.trials.plan import TrialSpec, make_plan
from pipeline.trials.trial import few_shot_task

DIRECTIONS = (1, 4, 16, 64, 256)
STEPS = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Step h in units of 1/d."""
REPEATS = 4
"""Independent estimates per trial and number of directions."""


class Start:
    """Loss on the training images of a trial as a function of the last context token, at CBBT's starting point."""

    def __init__(self, spec: TrialSpec, endpoint: Endpoint) -> None:
        task = few_shot_task(spec)
        self.model, self.labels_N = endpoint.model, task.train.labels
        self.classes = with_context(task.classes)
        self.ctx_LE = self.model.embed_text(self.classes.context)
        self.image_ND = self.model.encode_images(as_images(task.train.images))
        self.d = self.ctx_LE.shape[1]

    def losses(self, offsets_PE: Tensor) -> Tensor:
        """Return losses [P] for offsets [P, E] of the token."""
        ctx_PLE = self.ctx_LE.repeat(len(offsets_PE), 1, 1)
        ctx_PLE[:, -1] += offsets_PE
        text_PCD = self.model.encode_prompts(self.classes.soft(ctx_PLE)).cpu()
        return mean_cross_entropy(self.model.logit_scale * self.image_ND @ text_PCD.transpose(1, 2), self.labels_N)

    def gradient(self) -> Tensor:
        """Return the true gradient with respect to the token, [E]."""
        prompts = self.classes.soft(self.ctx_LE[None])
        text_PCD = self.model.encode_prompts(prompts).cpu().clone().requires_grad_()
        loss = cross_entropy(self.model.logit_scale * self.image_ND @ text_PCD[0].T, self.labels_N)
        (upstream_PCD,) = torch.autograd.grad(loss, text_PCD)
        return self.model.text_gradients(prompts, upstream_PCD)[0, -1]

    def estimates(self, q: int, h: float, times: int, generator: torch.Generator) -> Tensor:
        """Return gradient estimates [times, E], each from q directions of its own."""
        u_Qd = sphere_directions(q * times, self.d, generator)
        losses_P = self.losses(torch.cat([torch.zeros(1, self.d), h * u_Qd]))
        each = zip(losses_P[1:].view(times, q), u_Qd.view(times, q, self.d), strict=True)
        return torch.stack([one_sided_gradient(some, losses_P[0], u_qd, h) for some, u_qd in each])


def cosines(overrides: Sequence[str]) -> dict[str, Any]:
    """Return mean cosines over data sets per seed: `by_directions` at h = 1/d, `by_step` at 256 directions; and `d`."""
    torch.set_num_threads(1)  # the estimate's rounding depends on it
    with tempfile.TemporaryDirectory() as folder:
        config = compose(["sweep=cbbt_claims", *overrides, "methods=cbbt_prompt", f"storage={folder}/storage"])
        endpoint = Endpoint(config.model, Path(folder) / "features")
        starts = [(spec.seed, Start(spec, endpoint)) for spec in make_plan(config).trials]
    d = starts[0][1].d
    cosines_of: dict[str, dict[str, dict[int, list[float]]]] = {"by_directions": {}, "by_step": {}}
    for seed, start in starts:
        generator, true_E = torch_generator(np.random.default_rng(seed)), start.gradient()
        for axis, points in (
            ("by_directions", [(str(q), q, 1 / d) for q in DIRECTIONS]),
            ("by_step", [(str(step), DIRECTIONS[-1], step / d) for step in STEPS]),
        ):
            for label, q, h in points:
                cosine = cosine_similarity(start.estimates(q, h, REPEATS, generator), true_E[None]).mean()
                cosines_of[axis].setdefault(label, {}).setdefault(seed, []).append(float(cosine))
    by_seed = {
        axis: {label: [float(np.mean(v)) for v in seeds.values()] for label, seeds in points.items()}
        for axis, points in cosines_of.items()
    }
    return {"d": d, **by_seed}
