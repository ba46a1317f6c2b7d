"""A toy vision-language model: what `model=fake` serves and what methods are tested on. Its accuracies mean nothing."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from methods._lora import Dropout, loss_and_gradients, low_rank
from methods.base import Lora, LowRank, Prompts, SoftPrompts


class ToyTowers:
    """A smooth, deterministic two-tower model of width D: no weights file, no tokenizer, differentiable in the context.

    Pixels [B, X] and class names meet in a shared space through fixed random maps; a class name's vector is drawn from
    the SHA-256 of the name. `pixels_of(name)` inverts nothing: it places an image near its class on purpose.
    """

    D = 16
    E = 8
    SIDE = 8
    X = SIDE * SIDE
    logit_scale = 20.0
    text_norm = 4.33
    """Mean length of a text feature before normalisation, as `farebox models --text-norm fake` measures it."""
    lora_shapes: tuple[tuple[int, int], ...] = ((1, D), (1, D))
    """A tower ends in one layer, the sum of its input and of three maps of it: zero, plus a low-rank change."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(7)
        self.image_map_XD = torch.randn(self.X, self.D, generator=g) / self.X**0.5
        self.context_map_ED = torch.randn(self.E, self.D, generator=g) / self.E**0.5
        self.gate_ED = torch.randn(self.E, self.D, generator=g) / self.E**0.5
        self._lora: Lora | None = None
        self._dropout: Dropout | None = None

    @staticmethod
    def vector(text: str, width: int) -> Tensor:
        """Return a standard normal vector that depends on the text alone."""
        seed = int.from_bytes(hashlib.sha256(f"{width}/{text}".encode()).digest()[:7], "big")
        return torch.randn(width, generator=torch.Generator().manual_seed(seed))

    def embed_text(self, text: str) -> Tensor:
        """Return token embeddings [L, E]."""
        words = text.split()
        return torch.stack([self.vector(w, self.E) for w in words]) if words else torch.zeros(0, self.E)

    def image_features(self, pixels_BX: Tensor) -> Tensor:
        """Return image features [B, D]."""
        return normalize(self._changed((pixels_BX - 0.5) @ self.image_map_XD * 3, "image"), dim=-1)

    @staticmethod
    def grey(pixels: Tensor) -> Tensor:
        """Return 8-bit images [..., 3, 8, 8] as the model reads them: gray pixels [..., X] in [0, 1]."""
        return (pixels.float() / 255).mean(-3).flatten(-2)

    def text_features(self, prompts: Prompts) -> Tensor:
        """Return text features [P, C, D]."""
        return normalize(self.text_outputs(prompts), dim=-1)

    def text_outputs(self, prompts: Prompts) -> Tensor:
        """Return text features [P, C, D] before normalisation."""
        if isinstance(prompts, SoftPrompts):
            sets = [self._place(ctx_LE, prompts.classnames) for ctx_LE in prompts.ctx_PLE]
        else:
            sets = [torch.stack([self._sentence(t) for t in texts]) for texts in prompts.texts]
        return torch.stack([self._changed(outputs_CD, "text") for outputs_CD in sets])

    def text_gradients(self, prompts: SoftPrompts, upstream_PCD: Tensor) -> Tensor:
        """Return the gradient [P, L, E] with respect to the contexts."""
        with torch.enable_grad():
            ctx_PLE = prompts.ctx_PLE.detach().clone().requires_grad_()
            text_PCD = self.text_features(SoftPrompts(ctx_PLE, prompts.classnames, prompts.suffix))
        return torch.autograd.grad(text_PCD, ctx_PLE, upstream_PCD)[0]

    @contextlib.contextmanager
    def changed(self, lora: Lora, dropout: Dropout | None = None) -> Iterator[None]:
        """Within the block, both towers are changed; `dropout` is applied to the inputs of the change."""
        self._lora, self._dropout = lora, dropout
        try:
            yield
        finally:
            self._lora = self._dropout = None

    def lora_gradients(
        self, pixels_BX: Tensor, labels_B: Tensor, prompts: Prompts, lora: Lora, dropout: Dropout
    ) -> Tensor:
        """Return the loss and the gradients of `BlackBox.lora_gradients`, packed."""

        def loss_of(change: Lora) -> Tensor:
            with self.changed(change, dropout):
                image_BD, text_CD = self.image_features(pixels_BX), self.text_features(prompts)[0]
            return cross_entropy(self.logit_scale * image_BD @ text_CD.T, labels_B)

        return loss_and_gradients(lora, loss_of)

    def _changed(self, x_TD: Tensor, tower: str) -> Tensor:
        if self._lora is None:
            return x_TD
        factors: LowRank = getattr(self._lora, tower)
        return x_TD + self._lora.scale * low_rank(x_TD, factors.a_n3rW[0], factors.b_n3Wr[0], self._dropout).sum(0)

    def _place(self, ctx_LE: Tensor, names: Sequence[str]) -> Tensor:
        class_CD = torch.stack([self.vector(n, self.D) for n in names])
        mean_E = ctx_LE.mean(0) if len(ctx_LE) else ctx_LE.new_zeros(self.E)
        return class_CD * (1 + torch.tanh(mean_E @ self.gate_ED)) + mean_E @ self.context_map_ED

    def _sentence(self, text: str) -> Tensor:
        words = text.rstrip(".").split()
        return self._place(self.embed_text(" ".join(words[:-1]) or "the"), words[-1:])[0]

    def pixels_of(self, name: str, n: int, seed: int, noise: float = 0.35) -> Tensor:
        """Return images [n, X] in [0, 1] whose features lie around the class vector, rotated by a fixed shift."""
        g = torch.Generator().manual_seed(seed)
        wanted_D = self.vector(name, self.D) + 0.8 * self.vector("shift", self.D)
        base_X = torch.linalg.lstsq(self.image_map_XD.T, wanted_D.unsqueeze(1)).solution.squeeze(1)
        base_X = base_X / base_X.abs().max() * 0.3
        return (0.5 + base_X + noise * 0.3 * torch.randn(n, self.X, generator=g)).clamp(0, 1)
