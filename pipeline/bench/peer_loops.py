"""Plain loops from images to accuracy, with the structure of the code released with three papers.

They do what a user would run instead of a trial: load the model, encode images and class prompts as the released code
does, train, and evaluate on the test images. Nothing is stored between epochs or runs. They use only the model's own
parts; steps and settings are the methods' own (methods/taskres.py, tip_adapter.py and craft.py).

Shapes: N training images, M validation images, B images of a mini-batch, C classes, D feature width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

from methods._prompt_search import PromptSearch
from methods._refiner import Refiner
from methods._training import cosine_lr, warm_cosine_lr
from methods._views import training_views
from methods.base import FewShotTask, torch_generator
from methods.craft import CraFT
from methods.taskres import TaskRes
from methods.tip_adapter import TipAdapterF, grid
from pipeline.bench.reference import CraftLoop
from pipeline.blackbox.model import OpenClipModel
from pipeline.cards import ModelCard
from pipeline.data.images import Images
from pipeline.trials.evaluate import eval_labels
from pipeline.trials.plan import TrialSpec
from pipeline.trials.trial import few_shot_task

BATCH = 256
"""Images of a mini-batch, in training and in evaluation."""


@dataclass
class PlainTrial:
    """A model that was loaded for one run, and the data of a trial."""

    model: OpenClipModel
    task: FewShotTask
    test: Images
    test_labels: Tensor
    rng: np.random.Generator

    @classmethod
    def open(cls, card: ModelCard, spec: TrialSpec) -> PlainTrial:
        """Load the model, and draw the few-shot task of a trial."""
        (test,) = spec.eval_sets
        images = Images.plain(test.dataset.source, "test", test.rows, test.dataset.card.augment)
        labels = eval_labels(test, Counter())
        return cls(OpenClipModel(card), few_shot_task(spec), images, labels, np.random.default_rng(spec.seed))

    @property
    def scale(self) -> float:
        """The model's logit scale."""
        return self.model.logit_scale

    @torch.no_grad()
    def encode_images(self, images: Images) -> Tensor:
        """Decode and encode images in mini-batches; return features [B, D] of unit length."""
        parts = torch.split(torch.arange(len(images)), BATCH)
        pixels = (self.model.preprocess.pixels(images[part]) for part in parts)
        return torch.cat([normalize(self.model.net.encode_image(part), dim=-1) for part in pixels])

    @torch.no_grad()
    def encode_classes(self) -> Tensor:
        """Return the text features [C, D] at the tower's length, with prompts padded to the context length."""
        (texts,) = self.task.classes.prompts().texts
        features: Tensor = self.model.net.encode_text(self.model.tokenizer(list(texts)))
        return features

    def epoch(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield features [B, D] and labels of a new view of each training image, shuffled, in mini-batches."""
        train = self.task.train.images
        assert isinstance(train, Images)
        view, order = train.views(1, seed), torch.randperm(len(train))
        for rows in torch.split(order, BATCH):
            yield self.encode_images(view[rows]), self.task.train.labels[rows]

    def accuracy(self, logits: Callable[[Tensor], Tensor], features: Tensor | None = None) -> float:
        """Return the accuracy in percent on the test images, which are encoded if no features are given."""
        with torch.no_grad():
            found = logits(self.encode_images(self.test) if features is None else features).argmax(-1)
        return 100 * float((found == self.test_labels).double().mean())


def taskres(card: ModelCard, spec: TrialSpec) -> float:
    """Train a residual as TaskRes's train.py does: every epoch encodes every training image anew."""
    trial, c = PlainTrial.open(card, spec), TaskRes.Config()
    text_CD = trial.encode_classes()
    residual_CD = torch.zeros_like(text_CD, requires_grad=True)
    optimizer = torch.optim.Adam([residual_CD], weight_decay=c.weight_decay)
    epochs = 100 if spec.shots <= 4 else 200

    def logits(features_BD: Tensor) -> Tensor:
        return trial.scale * features_BD @ normalize(text_CD + c.alpha * residual_CD, dim=-1).T

    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = warm_cosine_lr(c.lr, c.warmup_lr, epoch, epochs, c.warmup_epochs)
        for features_BD, labels_B in trial.epoch(epoch):
            _step(optimizer, cross_entropy(logits(features_BD), labels_B))
    return trial.accuracy(logits)


def tip_adapter_f(card: ModelCard, spec: TrialSpec) -> float:
    """Train cache keys as Tip-Adapter's main.py does: ten passes make the cache, and every epoch encodes anew."""
    trial, c = PlainTrial.open(card, spec), TipAdapterF.Config()
    task = trial.task
    train, val = task.train.images, task.val.images
    assert isinstance(train, Images) and isinstance(val, Images)
    text_CD = normalize(trial.encode_classes(), dim=-1)
    passes = [trial.encode_images(train.views(1, seed)) for seed in range(10)]
    keys_ND = normalize(torch.stack(passes).mean(0), dim=-1)
    values_NC = one_hot(task.train.labels, len(task.classes)).float()
    val_MD, test_BD = trial.encode_images(val), trial.encode_images(trial.test)
    keys_ND.requires_grad_()

    def logits(features_BD: Tensor, alpha: float = c.init_alpha, beta: float = c.init_beta) -> Tensor:
        cache = torch.exp(-beta * (1 - features_BD @ keys_ND.T)) @ values_NC
        return trial.scale * features_BD @ text_CD.T + alpha * cache

    optimizer = torch.optim.AdamW([keys_ND], lr=c.lr, eps=1e-4)
    steps, done = c.epochs * -(-len(train) // BATCH), 0
    for epoch in range(c.epochs):
        for features_BD, labels_B in trial.epoch(10 + epoch):
            optimizer.param_groups[0]["lr"] = cosine_lr(c.lr, done, steps)
            _step(optimizer, cross_entropy(logits(features_BD), labels_B))
            done += 1
        trial.accuracy(logits, test_BD)  # the released code evaluates after each epoch
    best, chosen = 0.0, (c.init_alpha, c.init_beta)
    with torch.no_grad():
        for beta in grid(c.beta_max, c.n_betas):
            for alpha in grid(c.alpha_max, c.n_alphas):
                found = float((logits(val_MD, alpha, beta).argmax(-1) == task.val.labels).double().mean())
                if found > best:
                    best, chosen = found, (alpha, beta)
    return trial.accuracy(lambda features_BD: logits(features_BD, *chosen), test_BD)


def craft(card: ModelCard, spec: TrialSpec) -> float:
    """Search prompts and train the head as CraFT's main_craft.py does (`CraftLoop`), with as many generations."""
    trial = PlainTrial.open(card, spec)
    assert spec.allotment.requests is not None
    c, model, task = CraFT.Config(), trial.model, trial.task
    search = PromptSearch(task.classes, model.embed_text, c, trial.rng)
    generator = torch_generator(trial.rng)
    head = Refiner(len(task.classes), c, generator)
    train, view, labels = task.train.images, training_views(task, 1), task.train.labels
    assert isinstance(train, Images) and isinstance(view, Images)
    loop = CraftLoop(
        model.net, model.tokenizer, model.preprocess, search.classes, labels, view, search, head, generator
    )
    loop.start()
    generations = spec.allotment.requests // c.popsize
    for generation in range(generations):
        weight = c.kl_weight if generation + 1 <= generations * c.kl_fraction else 0.0
        loop.generation(train.views(1, 1 + generation), weight)
    text_CD = loop.encode_classes(loop.ctx_LE)
    return trial.accuracy(lambda features_BD: head(loop.scores(features_BD, text_CD)))


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


LOOPS: dict[str, Callable[[ModelCard, TrialSpec], float]] = {
    "taskres": taskres,
    "tip_adapter_f": tip_adapter_f,
    "craft": craft,
}
"""By method: a loop that returns the accuracy in percent."""
