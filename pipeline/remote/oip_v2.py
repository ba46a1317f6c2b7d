"""Features by the Open Inference Protocol, version 2: KServe, Triton, OpenVINO.

The protocol says how tensors are sent, not which: the card's `tensors` names the models and tensors of the server. Its
image model takes base64-encoded images, its text model strings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import numpy as np

from pipeline.cards import ModelCard
from pipeline.remote.adapter import (
    Adapter,
    Call,
    OtherModel,
    WrongAnswer,
    base64_of,
    field,
    float32,
    shown,
    size_of,
    unit,
)


class OpenInference(Adapter):
    """POST /v2/models/NAME/infer with a BYTES tensor [B]; the response has an FP32 tensor [B, D]."""

    def __init__(self, card: ModelCard) -> None:
        super().__init__(card)
        assert self.card.tensors is not None
        self.tensors = self.card.tensors

    def image_features(self, images: Sequence[bytes]) -> Call:
        """See Adapter.image_features."""
        return self._call(self.tensors.image_model, self.tensors.image_input, base64_of(images), images=len(images))

    def text_features(self, prompts: Sequence[Sequence[str]]) -> Call:
        """See Adapter.text_features."""
        texts = [text for prompt_set in prompts for text in prompt_set]
        counts = {"texts": len(texts), "characters": size_of(texts)}
        return self._call(self.tensors.text_model, self.tensors.text_input, texts, **counts)

    def _call(self, model: str, tensor: str, data: Sequence[str], **counts: int) -> Call:
        inputs = [{"name": tensor, "shape": [len(data)], "datatype": "BYTES", "data": list(data)}]
        body = {"inputs": inputs, "outputs": [{"name": self.tensors.output}]}
        shape = (len(data), self.card.feature_dim)

        def parse(answer: Any) -> np.ndarray:
            if isinstance(answer, dict) and answer.get("model_name", model) != model:
                raise OtherModel(f"{shown(answer['model_name'])} answered, the card expects {model}")
            outputs = field(answer, "outputs", list)
            found = [o for o in outputs if isinstance(o, dict) and o.get("name") == self.tensors.output]
            if len(found) != 1 or found[0].get("datatype") != "FP32" or found[0].get("shape") != list(shape):
                raise WrongAnswer(f"its response has no FP32 tensor {self.tensors.output!r} of shape {list(shape)}")
            return unit(float32(field(found[0], "data", list), shape))

        return Call(f"/v2/models/{quote(model, safe='')}/infer", body, parse, shape[0] * shape[1], **counts)
