"""The protocol of `farebox serve`: features as float32 bytes, so that a served model answers as a local one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from methods.base import Access
from pipeline.remote.adapter import Adapter, Call, OtherModel, WrongAnswer, base64_of, field, float32, shown, size_of

PROTOCOL = 1
"""Version of the protocol."""
ANSWERS = {Access.SCORES: "scores", Access.TOPK: "topk", Access.LABELS: "labels"}
"""What `/v1/scores` is asked to tell."""


class FareboxAdapter(Adapter):
    """POST /v1/image_features, /v1/text_features and /v1/scores; GET /v1/info."""

    whole_texts = True  # the text tower's tiles follow from the shape of the request
    honours_keys = True

    def image_features(self, images: Sequence[bytes]) -> Call:
        """See Adapter.image_features."""
        shape = (len(images), self.card.feature_dim)
        return self._call("image_features", {"images": base64_of(images)}, shape, images=len(images))

    def text_features(self, prompts: Sequence[Sequence[str]]) -> Call:
        """See Adapter.text_features."""
        p, c = len(prompts), len(prompts[0])
        body = {"prompts": [list(texts) for texts in prompts]}
        size = sum(map(size_of, prompts))
        return self._call("text_features", body, (p, c, self.card.feature_dim), texts=p * c, characters=size)

    def scores(self, images: Sequence[bytes], prompts: Sequence[str]) -> Call:
        """See Adapter.scores."""
        answer = next(told for told in ANSWERS if told in self.grant.closure())
        body = {"images": base64_of(images), "prompts": [list(prompts)], "answer": ANSWERS[answer]}
        shape, counts = (1, len(images), len(prompts)), {"images": len(images), "texts": len(prompts)}
        return self._call("scores", body, shape, finite=answer is Access.SCORES, characters=size_of(prompts), **counts)

    def introduction(self) -> Call:
        """Return the call that compares the server's constants with the card's."""
        return Call("/v1/info", None, self._check_info, numbers=0)

    def _call(
        self, name: str, body: dict[str, Any], shape: tuple[int, ...], finite: bool = True, **counts: int
    ) -> Call:
        def parse(answer: Any) -> np.ndarray:
            self._check_identity(field(answer, "identity", str))
            if field(answer, "shape", list) != list(shape) or answer.get("dtype") != "float32":
                raise WrongAnswer(
                    f"it answered {answer.get('dtype')} {answer['shape']}, expected float32 {list(shape)}"
                )
            array = float32(field(answer, "data", str), shape, finite)
            if (array == np.inf).any():
                raise WrongAnswer("its response has a number that is infinite")
            return array.reshape(-1, shape[-1])

        return Call(f"/v1/{name}", body, parse, int(np.prod(shape)), **counts)

    served: str | None = None
    """Identity of the model that answered first."""

    def _check_identity(self, identity: str) -> None:
        if self.served is None:
            self.served = identity
        if identity != self.served:
            raise OtherModel(f"model {shown(identity, 60)} answers, {shown(self.served, 60)} answered before")

    def _check_info(self, info: Any) -> np.ndarray:
        """Compare the server's constants with the card's; return an empty array.

        Raises:
            WrongAnswer: one differs. The message has the line for the card.
        """
        card = self.card
        if field(info, "protocol", int) != PROTOCOL:
            raise WrongAnswer(f"it speaks version {info['protocol']} of the protocol, expected {PROTOCOL}")
        self._check_model(info.get("model"))
        self._check_identity(field(info, "identity", str))
        try:
            grant = Access.parse(field(info, "grant", str))
        except ValueError as error:
            raise WrongAnswer(f"its grant {shown(info['grant'])} is unknown") from error
        if not grant.covers(self.grant):
            raise WrongAnswer(f"it grants {grant.label}, less than the card: expected grant: {grant.label} in the card")
        size = info.get("image_size")  # None: a model that takes images of any size
        if size not in (None, card.image.size):
            raise WrongAnswer(f"its images have size {size}: expected image: {{size: {size}}} in the card")
        if Access.FEATURES in self.grant and (width := field(info, "feature_dim", int)) != card.feature_dim:
            raise WrongAnswer(f"its features have width {width}: expected feature_dim: {width} in the card")
        scale = float(field(info, "logit_scale", (int, float)))
        if not math.isclose(scale, card.logit_scale, rel_tol=1e-6):
            raise WrongAnswer(f"its logit scale is {scale!r}: expected logit_scale: {scale!r} in the card")
        rule = f"resize{card.image.size}-{card.image.interpolation}-{card.image.resize_mode}-"
        if (transform := field(info, "transform", str)).startswith("resize") and not transform.startswith(rule):
            raise WrongAnswer(
                f"its images are made by {shown(transform, 60)}: state resize_mode, interpolation in image"
            )
        return np.empty(0, np.float32)
