"""Zero-shot image classification in the format of Hugging Face's inference API: probabilities, one image in a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.remote.adapter import Adapter, Call, WrongAnswer, base64_of, log_probabilities, shown, size_of


class HuggingFaceZeroShot(Adapter):
    """POST {inputs, parameters: {candidate_labels, hypothesis_template}} to the URL of the card."""

    most_images = 1

    def scores(self, images: Sequence[bytes], prompts: Sequence[str]) -> Call:
        """See Adapter.scores. The template is a bare {}: without it the server would add words of its own."""
        parameters = {"candidate_labels": list(prompts), "hypothesis_template": "{}"}
        (image,) = base64_of(images)

        def parse(answer: Any) -> np.ndarray:
            if not isinstance(answer, list):
                raise WrongAnswer(f"its response is no list of labels: {shown(answer)}")
            return log_probabilities(answer, prompts)[None]

        size = size_of(prompts)
        body = {"inputs": image, "parameters": parameters}
        return Call("", body, parse, 8 * len(prompts) + size, images=1, texts=len(prompts), characters=size)
