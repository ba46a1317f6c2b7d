"""Embeddings in the format of OpenAI's API, with images as data URIs: infinity-emb and servers like it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.remote.adapter import Adapter, Call, base64_of, field, float32, in_order, size_of, unit


class OpenAIEmbeddings(Adapter):
    """POST {model, input, modality, encoding_format} to the URL of the card."""

    def image_features(self, images: Sequence[bytes]) -> Call:
        """See Adapter.image_features."""
        uris = [f"data:image/{self.card.image.format};base64,{image}" for image in base64_of(images)]
        return self._call(uris, "image", images=len(images))

    def text_features(self, prompts: Sequence[Sequence[str]]) -> Call:
        """See Adapter.text_features."""
        texts = [text for prompt_set in prompts for text in prompt_set]
        return self._call(texts, "text", texts=len(texts), characters=size_of(texts))

    def _call(self, inputs: Sequence[str], modality: str, **counts: int) -> Call:
        body = {"model": self.card.identity.model, "input": list(inputs), "modality": modality}

        def parse(answer: Any) -> np.ndarray:
            items = in_order(field(answer, "data", list), len(inputs))
            self._check_model(answer.get("model"))
            rows = [float32(field(item, "embedding", (str, list)), (self.card.feature_dim,)) for item in items]
            return unit(np.stack(rows))

        return Call("", body | {"encoding_format": "base64"}, parse, len(inputs) * self.card.feature_dim, **counts)
