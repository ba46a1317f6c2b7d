"""A remote endpoint: a model that answers over HTTP, behind the interface of the local one.

Its methods may be called by several threads. Calls, records and the log are used in the event loop of one thread; what
is computed on this side (views, their encoding, products of features) is computed in others.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from methods._answers import answer_of, reduced
from methods.base import Access, Prompts, TextPrompts
from pipeline.blackbox.endpoint import check_pixels, check_prompt_count, paired_scores
from pipeline.blackbox.request import (
    REMOTE,
    ModelInfo,
    Request,
    Response,
    access_of,
    check_shapes,
    prompt_counts,
    prompts_digest,
)
from pipeline.cards import ModelCard
from pipeline.data.images import Images
from pipeline.data.made_images import MadeImages
from pipeline.errors import AccessDenied, EndpointRefused
from pipeline.remote.adapter import Call
from pipeline.remote.adapters import adapter_of
from pipeline.remote.asking import Asker, Items
from pipeline.remote.call_log import CallLog
from pipeline.remote.http_client import HttpClient, Payer
from pipeline.remote.permission import secret
from pipeline.remote.pictures import Pictures
from pipeline.remote.records import Records
from pipeline.remote.wallet import NoWallet, Wallet

T = TypeVar("T")


class RemoteEndpoint:
    """An endpoint (see `local_pool.EndpointLike`) whose answers come from its records or over HTTP.

    Args:
        card: card of kind http.
        records: folder of the recorded answers.
        storage: folder of the sweep, for the log of calls; None to keep it in memory.
        offline: answer from the records only.
        wallet: pays in money.

    Raises:
        ConfigError: the environment has no key.
        StorageError: records or log cannot be used.
    """

    def __init__(
        self,
        card: ModelCard,
        records: Path,
        storage: Path | None = None,
        offline: bool = False,
        wallet: Wallet | None = None,
    ) -> None:
        assert card.http is not None
        self.card, self.http, self.grant = card, card.http, card.access
        self.adapter, self.pictures = adapter_of(card), Pictures(card.http.image)
        self.records, self.log = Records(records, card.http.source), CallLog(storage)
        key = "" if offline else secret(card.http)
        self.client = HttpClient(card.http, self.adapter, key, wallet or NoWallet(), self.log)
        self.asker = Asker(card, self.adapter, self.client, self.records, offline)
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="http", daemon=True).start()

    @property
    def info(self) -> ModelInfo:
        """The model's constants, as the card states them."""
        return ModelInfo(
            identity=self.http.model_identity,
            logit_scale=self.http.logit_scale,
            text_norm=self.card.text_norm or float("nan"),
            token_dim=0,
            feature_dim=self.http.feature_dim,
            image_size=self.http.image.size,
            grant=self.grant,
            precision=self.card.precision,
            transform=self.http.transform,
            device=f"{REMOTE}{self.http.host}",
        )

    def check(self, request: Request) -> None:
        """Validate a request before it is charged.

        Raises:
            AccessDenied: the card does not grant the access that the request needs.
            EndpointRefused: a shape is wrong, there are too many prompts, or one is longer than `max_text`.
        """
        needed = access_of(request.kind, request.images, request.prompts, request.answer, request.lora)
        if not self.grant.covers(needed):
            raise AccessDenied(f"the call needs {needed.label}, the model grants {self.grant.label}")
        check_shapes(request.images, request.prompts)
        if isinstance(request.images, MadeImages):
            check_pixels(request.kind, request.images.pixels_PB3SS, self.http.image.size)
        if request.prompts is None:
            return
        texts = _texts(request.prompts)
        check_prompt_count(request.prompts, self.http.feature_dim)
        most = self.http.max_text
        if most is not None and (long := next((t for prompt_set in texts for t in prompt_set if len(t) > most), None)):
            raise EndpointRefused(
                f"the prompt {long[:40]!r}... has {len(long)} characters, max_text of the card allows {most}: the "
                "server would cut it"
            )

    def compute(self, request: Request) -> Response:
        """Return the response to a checked request. Equal requests give equal bits, since answers are recorded.

        Raises:
            FareboxError: see `HttpClient.send`.
        """
        block = request.images.digest[:16] if request.images is not None else ""
        payer = Payer(f"{request.charge.id}/{block}", request.charge)
        if request.kind == "text_features":
            assert request.prompts is not None
            text_PCD, n_prompts = self._text(request.prompts, payer)
            return Response(text_PCD, computed_prompts=n_prompts, http=self._bill(payer))
        assert request.images is not None
        n_prompts, n_sets = 0, _set_count(request.images)
        if request.kind == "image_features" or Access.FEATURES in self.grant:
            values, n_images = self._image(request.images, payer)
            if request.kind == "scores":
                assert request.prompts is not None
                text_PCD, n_prompts = self._text(request.prompts, payer)
                image_PBD = torch.from_numpy(values).view(n_sets, len(request.images), -1)
                scores_PBC = paired_scores(image_PBD, torch.from_numpy(text_PCD), self.http.logit_scale)
                values = reduced(scores_PBC, request.answer).numpy()
        else:
            assert request.prompts is not None
            scores_PBC, n_images = self._scores(request.images, _texts(request.prompts), payer)
            values = _told(scores_PBC, request.answer).numpy()
        hits = max(0, n_sets * len(request.images) - n_images)
        return Response(values, n_images, n_prompts, hits, http=self._bill(payer))

    def embed_text(self, text: str) -> np.ndarray:
        """Raise AccessDenied: nothing gives token embeddings over HTTP."""
        raise AccessDenied(f"embed_text needs SOFT, the model grants {self.grant.label}")

    def forget(self, records: Path) -> None:
        """Record answers in another folder, so that those of the present one are asked for again."""
        self.records = Records(records, self.http.source)

    def close(self) -> None:
        """Close the connections and end the thread."""
        self._run(self.client.close())
        self.log.close()
        self.loop.call_soon_threadsafe(self.loop.stop)

    def _image(self, images: Images | MadeImages, payer: Payer) -> tuple[np.ndarray, int]:
        """Return the features [B, D] of images, of all sets [P * B, D], and how many were asked for."""

        async def call_of(part: Sequence[int]) -> Call:
            return await self._encoded(images, part, self.adapter.image_features)

        items = Items(images.keys, call_of, self._most_images, images.where, "images")
        return self._run(self._features(items, payer))

    def _text(self, prompts: Prompts, payer: Payer) -> tuple[np.ndarray, int]:
        """Return the features [P, C, D] of prompts, and how many were asked for."""
        sets, whole = _texts(prompts), self.adapter.whole_texts
        texts = [text for prompt_set in sets for text in prompt_set]
        digest = prompts_digest(prompts)
        keys = [f"texts/{digest}/{i}" for i in range(len(texts))] if whole else [f"text/{text}" for text in texts]

        async def call_of(part: Sequence[int]) -> Call:
            return self.adapter.text_features(sets if whole else [[texts[i] for i in part]])

        most = len(texts) if whole else self.http.batch.texts
        items = Items(keys, call_of, most, lambda i: f"prompt {texts[i][:40]!r}", "texts", whole)
        rows, asked = self._run(self._features(items, payer))
        return rows.reshape(*prompt_counts(prompts), -1), asked

    async def _features(self, items: Items, payer: Payer) -> tuple[np.ndarray, int]:
        """Return the features of images or texts as rows, and how many were asked for."""
        return await self.asker.rows(self.records.features(self.http.feature_dim), items, payer)

    def _scores(self, images: Images | MadeImages, sets: Sequence[Sequence[str]], payer: Payer) -> tuple[Tensor, int]:
        """Return the scores [P, B, C] that the server tells, and for how many images it was asked."""
        keys, level, n_sets, b = images.keys, answer_of(self.grant).label, _set_count(images), len(images)

        async def of_set(p: int) -> tuple[np.ndarray, int]:
            texts, first = sets[p if len(sets) > 1 else 0], p * b if n_sets > 1 else 0
            store = self.records.scores(f"{level} {prompts_digest(TextPrompts((tuple(texts),)))}", len(texts))

            async def call_of(part: Sequence[int]) -> Call:
                rows = [first + i for i in part]
                return await self._encoded(images, rows, lambda files: self.adapter.scores(files, texts))

            items = Items(keys[first : first + b], call_of, self._most_images, images.where, "images")
            return await self.asker.rows(store, items, payer)

        async def of_all() -> list[tuple[np.ndarray, int]]:
            return await asyncio.gather(*map(of_set, range(max(n_sets, len(sets)))))

        results = self._run(of_all())
        return torch.from_numpy(np.stack([rows for rows, _ in results])), sum(asked for _, asked in results)

    async def _encoded(
        self, images: Images | MadeImages, part: Sequence[int], make: Callable[[list[bytes]], Call]
    ) -> Call:
        """Return the call for some of the images, which another thread encodes."""
        return make(await self.loop.run_in_executor(None, self.pictures.encoded, images, part))

    @property
    def _most_images(self) -> int:
        return min(self.http.batch.images, self.adapter.most_images or self.http.batch.images)

    def _bill(self, payer: Payer) -> Any:
        async def bill() -> Any:
            return self.log.bill(payer.request)

        return self._run(bill())

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop of the thread; return its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()


def _set_count(images: Images | MadeImages) -> int:
    """Return P: the number of sets of images."""
    return images.n_sets if isinstance(images, MadeImages) else 1


def _texts(prompts: Prompts) -> tuple[tuple[str, ...], ...]:
    assert isinstance(prompts, TextPrompts)  # no card of kind http grants SOFT
    return prompts.texts


def _told(scores_PBC: Tensor, answer: Access) -> Tensor:
    """Reduce what a server tells to an answer. Told top-k probabilities are not made to sum to 1 again."""
    if answer is Access.TOPK and scores_PBC.isneginf().any():
        return scores_PBC
    return reduced(scores_PBC, answer)
