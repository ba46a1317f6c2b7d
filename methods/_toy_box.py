"""A toy black box, which bills every call and applies the rules of a trial.

Shapes: B images in a call, X pixels of an image, P prompt sets, C classes, D feature width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from methods._answers import answer_of, bill_of, reduced
from methods._lora import Dropout, unpacked
from methods._state import contents
from methods._toy import ToyTowers
from methods.base import TOP_K, Access, Bill, ImageSet, Lora, PixelImages, Prompts, Remaining, SoftPrompts, TextPrompts


class ToyImages:
    """An `ImageSet` over a tensor [B, X] of pixels in [0, 1]. Views add seeded noise.

    `numbers_B` identifies the images of a split; a view has the number of its image. `arrays` lists the sizes that
    `array` was called with, of a set and of all sets that were made from it.
    """

    def __init__(
        self, pixels_BX: Tensor, split: str, numbers_B: Tensor | None = None, arrays: list[int] | None = None
    ) -> None:
        self.pixels_BX, self.split = pixels_BX, split
        self.numbers_B = torch.arange(len(pixels_BX)) if numbers_B is None else numbers_B
        self.arrays = [] if arrays is None else arrays

    def __len__(self) -> int:
        return len(self.pixels_BX)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> ToyImages:
        return ToyImages(self.pixels_BX[rows], self.split, self.numbers_B[rows], self.arrays)

    def views(self, n: int, seed: int = 0) -> ToyImages:
        def view(v: int) -> Tensor:
            g = torch.Generator().manual_seed(1000 * seed + v)
            return (self.pixels_BX + 0.05 * torch.randn(self.pixels_BX.shape, generator=g)).clamp(0, 1)

        return ToyImages(torch.cat([view(v) for v in range(n)]), self.split, self.numbers_B.repeat(n), self.arrays)

    def pixels(self, size: int) -> Tensor:
        return self._resized(size).flatten(1)

    def array(self, size: int) -> Tensor:
        self.arrays.append(size)
        return self._resized(size).repeat(1, 3, 1, 1)

    def _resized(self, size: int) -> Tensor:
        grid_B1SS = self.pixels_BX.view(-1, 1, ToyTowers.SIDE, ToyTowers.SIDE)
        return torch.nn.functional.adaptive_avg_pool2d(grid_B1SS, size)


class ToyBox:
    """A `BlackBox` over `ToyTowers`. It bills and records every call and applies the rules of a trial.

    Calls raise AssertionError if they need more than `access`, exceed `allotment`, or, within `predicting`, are more
    than one pass over the given images. `reads_text_norm` tells whether `text_norm` was read.
    """

    __slots__ = (
        *("_batch", "_prompts", "_sets", "_unseen", "access", "allotment", "bill", "calls", "feature_dim"),
        *("image_size", "logit_scale", "lora_shapes", "reads_text_norm", "token_dim", "top_k", "towers"),
    )

    def __init__(self, access: Access, allotment: Remaining | None = None) -> None:
        self.towers = ToyTowers()
        self.access = access
        self.allotment = allotment or Remaining()
        self.bill = Bill()
        self.calls: list[str] = []
        self.logit_scale, self.reads_text_norm = self.towers.logit_scale, False
        self.token_dim, self.feature_dim, self.image_size = self.towers.E, self.towers.D, self.towers.SIDE
        self.top_k, self.lora_shapes = TOP_K, self.towers.lora_shapes
        self._batch: ToyImages | None = None
        self._unseen, self._prompts, self._sets = set[int](), set[bytes](), 0

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise AssertionError("the method keeps the box: use the box that each call is given; do not store it")

    @property
    def text_norm(self) -> float:
        self.reads_text_norm = True
        return self.towers.text_norm

    @property
    def remaining(self) -> Remaining:
        return self.allotment.minus(self.bill)

    @contextlib.contextmanager
    def predicting(self, images: ImageSet, most_sets: int) -> Iterator[None]:
        """Within the block, allow one pass over `images` with at most `most_sets` different prompt sets.

        Calls in the block are billed but not limited by the allotment.
        """
        assert isinstance(images, ToyImages)
        self._batch, self._unseen = images, set(images.numbers_B.tolist())
        self._prompts, self._sets = set(), most_sets
        before, self.allotment = self.allotment, Remaining()
        try:
            yield
        finally:
            self._batch, self.allotment = None, before

    def _check_pass(self, call: str, images: ToyImages | None, prompts: Prompts | None, n_sets: int = 1) -> None:
        if self._batch is None:
            return
        if images is not None:
            numbers = images.numbers_B.tolist() * n_sets
            known = images.split == self._batch.split and set(numbers) <= set(self._batch.numbers_B.tolist())
            assert known, f"{call} in predict gets images that predict was not given"
            once = len(set(numbers)) == len(numbers) and set(numbers) <= self._unseen
            assert once, f"{call} in predict gets an image twice: a trial charges that to adapt"
            self._unseen -= set(numbers)
        if prompts is not None and (content := contents(prompts)) not in self._prompts:
            self._prompts.add(content)
            self._sets -= len(prompts.ctx_PLE if isinstance(prompts, SoftPrompts) else prompts.texts)
            assert self._sets >= 0, f"{call} in predict gets more prompt sets than the ensemble has: charged to adapt"

    def _pay(self, call: str, bill: Bill, *needed: Access) -> None:
        for access in needed:
            assert self.access.covers(access), f"{call} needs {access.label}, but the access is {self.access.label}"
        self.bill += bill
        self.calls.append(call)
        assert min(self.remaining) >= 0, f"{call} exceeds the allotment {self.allotment}: {self.bill}"

    @staticmethod
    def _kind(prompts: Prompts) -> Access:
        return Access.SOFT if isinstance(prompts, SoftPrompts) else Access.TEXT

    def scores(self, images: ImageSet | PixelImages, prompts: Prompts, lora: Lora | None = None) -> Tensor:
        base, needed = images, [self._kind(prompts), *([Access.LORA] if lora else [])]
        if isinstance(images, PixelImages):
            base, needed = images.base, [*needed, Access.PIXELS]
            pixels = self.towers.grey(images.pixels_PB3SS).squeeze(0)  # [B, X] for one set, else [P, B, X]
        assert isinstance(base, ToyImages)
        if base is images:
            pixels = base.pixels_BX
        self._check_pass("scores", base, prompts, len(pixels) if pixels.dim() == 3 else 1)
        with self.towers.changed(lora) if lora else contextlib.nullcontext():
            image_features, text_PCD = self.towers.image_features(pixels), self.towers.text_features(prompts)
        scores_PBC = self.logit_scale * image_features @ text_PCD.transpose(1, 2)
        p, b, c = scores_PBC.shape
        answer = answer_of(self.access)
        self._pay("scores", bill_of(answer, p, b, c), answer, *needed)
        return reduced(scores_PBC, answer).detach()

    def score_blocks(
        self, images: ImageSet | PixelImages, prompts: Prompts, lora: Lora | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        scores_PBC = self.scores(images, prompts, lora)
        half = max(1, scores_PBC.shape[1] // 2)
        for start in range(0, scores_PBC.shape[1], half):
            rows = slice(start, min(start + half, scores_PBC.shape[1]))
            yield rows, scores_PBC[:, rows]

    def image_features(self, images: ImageSet) -> Tensor:
        assert isinstance(images, ToyImages)
        self._check_pass("image_features", images, None)
        self._pay("image_features", Bill.image_features(len(images), self.feature_dim), Access.FEATURES)
        return self.towers.image_features(images.pixels_BX)

    def text_features(self, prompts: Prompts) -> Tensor:
        self._check_pass("text_features", None, prompts)
        text_PCD = self.towers.text_features(prompts)
        self._pay("text_features", Bill.text_features(*text_PCD.shape), Access.FEATURES, self._kind(prompts))
        return text_PCD

    def text_gradients(self, prompts: SoftPrompts, upstream_PCD: Tensor) -> Tensor:
        assert self._batch is None, "text_gradients in predict: a trial charges that to adapt"
        self._pay("text_gradients", Bill.text_features(*upstream_PCD.shape), Access.GRADIENTS, Access.SOFT)
        return self.towers.text_gradients(prompts, upstream_PCD)

    def lora_gradients(
        self, images: ImageSet, labels_B: Tensor, prompts: TextPrompts, lora: Lora, dropout: float, seed: int
    ) -> tuple[Tensor, ...]:
        assert self._batch is None, "lora_gradients in predict: a trial charges that to adapt"
        assert isinstance(images, ToyImages)
        self._pay("lora_gradients", Bill.lora_gradients(len(images), len(prompts.texts[0])), Access.LORA, Access.TEXT)
        arguments = images.pixels_BX, labels_B, prompts, lora, Dropout.seeded(dropout, seed)
        return unpacked(self.towers.lora_gradients(*arguments), lora)

    def embed_text(self, text: str) -> Tensor:
        assert self.access.covers(Access.SOFT), f"embed_text needs SOFT, but the access is {self.access.label}"
        return self.towers.embed_text(text)
