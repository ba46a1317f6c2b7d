"""Plain implementations of the papers' code: the baselines of the benchmarks and the reference of tests.

They follow the code released with CoOp (arXiv:2109.01134) and CraFT (arXiv:2402.04050): candidates are encoded one by
one, with every class prompt padded to the model's context length. They use only the model's own parts. Towers compute
on the model's device; the features that a CraFT trial keeps are moved to the CPU, where its search and head are.

Shapes: P candidates, C classes, L context tokens, E token-embedding width, T the context length, D feature width,
N training images, B images of a mini-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, normalize

from methods._prompt_search import PromptSearch
from methods._refiner import Refiner
from methods.base import Classes, SoftPrompts
from pipeline.data.images import Images, Preprocess


def encode_77(net: Any, tokenizer: Any, prompts: SoftPrompts) -> Tensor:
    """Return features [P, C, D], not normalised: candidates one by one, prompts padded to the context length (77)."""
    ids_CT = token_ids(net, tokenizer, prompts)
    return torch.stack([_encode_one(net, ids_CT, ctx_LE) for ctx_LE in prompts.ctx_PLE])


def encode_truncated(net: Any, tokenizer: Any, prompts: SoftPrompts) -> Tensor:
    """Return the same without the positions after the last end-of-text token."""
    ids_CT = token_ids(net, tokenizer, prompts)
    ids_CT = ids_CT[:, : int(ids_CT.argmax(-1).max()) + 1]
    return torch.stack([_encode_one(net, ids_CT, ctx_LE) for ctx_LE in prompts.ctx_PLE])


@dataclass
class CraftLoop:
    """A CraFT trial in the order of the released main_craft.py.

    It starts with three passes over the training images and keeps the last. In a generation, each candidate is encoded
    alone at T tokens and scored on all N images. Then the head is trained for one epoch; each mini-batch encodes images
    and class prompts again. Search and head are the method's own objects, so that both sides have the same candidates.
    It shares two departures that change numbers (docs/methods/craft.md): the prompt is the mean of the search, and the
    head sees scores of normalised features.
    """

    net: Any
    tokenizer: Any
    preprocess: Preprocess
    classes: Classes
    labels_N: Tensor
    fixed_view: Images
    search: PromptSearch
    head: Refiner
    generator: torch.Generator
    """Shuffles the head's mini-batches."""

    def start(self) -> None:
        """Encode the images three times: twice for prompt learners, once for the cache of features."""
        for _ in range(3):
            self.image_ND = self.encode_images(self.fixed_view)

    def generation(self, view: Images, weight: float) -> Tensor:
        """Score and tell, then train the head on `view` with KL weight `weight`; return the fitness [P]."""
        fitness_P = torch.stack([self.fitness(ctx_LE) for ctx_LE in self.search.ask()])
        self.search.tell(fitness_P)
        self.ctx_LE = self.search.mean()
        order_N, size = torch.randperm(len(view), generator=self.generator), self.head.batch_size
        for rows_B in torch.split(order_N, size):
            raw_BC = self.scores(self.encode_images(view[rows_B]), self.encode_classes(self.ctx_LE))
            refined_BC = self.head(raw_BC)
            loss = cross_entropy(refined_BC, self.labels_N[rows_B]) + weight * _kl(raw_BC, refined_BC)
            self.head.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.head.optimizer.step()
        return fitness_P

    @torch.no_grad()
    def fitness(self, ctx_LE: Tensor) -> Tensor:
        """Return CE(raw, y) + weight * KL(refined || raw) of one candidate over all training images."""
        raw_NC = self.scores(self.image_ND, self.encode_classes(ctx_LE))
        return cross_entropy(raw_NC, self.labels_N) + self.head.kl_weight * _kl(self.head(raw_NC), raw_NC)

    def scores(self, image_BD: Tensor, text_CD: Tensor) -> Tensor:
        """Return scores [B, C]: logit scale times cosine."""
        return self.net.logit_scale.exp().cpu() * image_BD @ text_CD.T

    @torch.no_grad()
    def encode_classes(self, ctx_LE: Tensor) -> Tensor:
        """Return normalised class features [C, D]."""
        return normalize(encode_77(self.net, self.tokenizer, self.classes.soft(ctx_LE[None]))[0], dim=-1).cpu()

    @torch.no_grad()
    def encode_images(self, images: Images) -> Tensor:
        """Decode and encode images in batches of the head's size; return features [B, D]."""
        parts = torch.split(torch.arange(len(images)), self.head.batch_size)
        pixels = (self.preprocess.pixels(images[part]).to(self.net.positional_embedding.device) for part in parts)
        return torch.cat([normalize(self.net.encode_image(part), dim=-1).cpu() for part in pixels])


def _kl(p_BC: Tensor, q_BC: Tensor) -> Tensor:
    """Return KL(softmax(p) || softmax(q)), summed over classes and averaged over images."""
    return kl_div(q_BC.log_softmax(-1), p_BC.softmax(-1), reduction="batchmean")


def token_ids(net: Any, tokenizer: Any, prompts: SoftPrompts) -> Tensor:
    """Return token ids [C, T]: start, a 1 for each context token, class name and suffix, end, padded with 0."""
    names = [f"{name}{prompts.suffix}" for name in prompts.classnames]
    ids_CT = torch.zeros(len(names), net.context_length, dtype=torch.long)
    for row, name in zip(ids_CT, names, strict=True):
        places = [1] * prompts.ctx_PLE.shape[1]
        sequence = [tokenizer.sot_token_id, *places, *tokenizer.encode(name), tokenizer.eot_token_id]
        row[: len(sequence)] = torch.tensor(sequence)
    return ids_CT.to(net.positional_embedding.device)


def _encode_one(net: Any, ids_CT: Tensor, ctx_LE: Tensor) -> Tensor:
    """Return features [C, D] of one candidate: open_clip's encode_text with the context after the start token."""
    n_places, length, dtype = len(ctx_LE), ids_CT.shape[1], net.transformer.get_cast_dtype()
    x_CTW = net.token_embedding(ids_CT).to(dtype)
    x_CTW[:, 1 : 1 + n_places] = ctx_LE
    x_CTW = x_CTW + net.positional_embedding[:length].to(dtype)
    x_CTW = net.ln_final(net.transformer(x_CTW, attn_mask=net.attn_mask[:length, :length]))
    return x_CTW[torch.arange(len(ids_CT), device=ids_CT.device), ids_CT.argmax(-1)] @ net.text_projection
