"""What a request and a response of the service contain: JSON, with images as base64 and values as base64 of float32.

A request is checked here for types, sizes and counts; the endpoint checks the rest.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from methods.base import Access, TextPrompts

MAX_BODY = 64 * 2**20
"""Maximum size of a request's body in bytes."""
MAX_IMAGES = 2_048
"""Maximum number of images in a request, and of inputs of an OpenAI-style one."""
MAX_VALUES = 2**24
"""Maximum number of values in a response: 64 MiB of float32."""
MAX_TEXT = 4_096
"""Maximum number of characters of a prompt. Text towers read 77 tokens; a longer prompt is rejected by the endpoint."""
ANSWERS = {"scores": Access.SCORES, "topk": Access.TOPK, "labels": Access.LABELS}
"""Values of the key `answer` of a request for scores."""


class ServiceError(Exception):
    """A request that is not answered: the status, a code for programs and a message for people."""

    def __init__(self, status: int, code: str, message: str, retry_after_s: int | None = None) -> None:
        self.status, self.code, self.message, self.retry_after_s = status, code, message, retry_after_s
        super().__init__(message)

    @property
    def record(self) -> dict[str, Any]:
        """The body of the response."""
        return {"error": {"message": self.message, "code": self.code}}


def invalid(message: str, code: str = "invalid_request") -> ServiceError:
    """Return the error for a request of the wrong shape (422)."""
    return ServiceError(422, code, message)


def parse_body(body: bytes) -> dict[str, Any]:
    """Parse the JSON object of a request. Raises ServiceError (400, 422)."""
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ServiceError(400, "invalid_json", f"the body is not JSON ({str(error)[:80]})") from error
    if not isinstance(parsed, dict):
        raise invalid("expected a JSON object")
    return parsed


def check_keys(body: dict[str, Any], *known: str) -> None:
    """Raise ServiceError (422) for a key that the request may not have: it would be ignored silently."""
    for key in body:
        if key not in known:
            raise invalid(f"no key named {key[:60]!r} (known: {', '.join(known)})")


def parse_images(body: dict[str, Any]) -> list[bytes]:
    """Return the encoded images of the key `images`. Raises ServiceError (400, 422)."""
    return [decode_base64(text, f"images[{i}]") for i, text in enumerate(_listed("images", body.get("images")))]


def decode_base64(text: object, where: str) -> bytes:
    """Return the bytes of a base64 text. Raises ServiceError (400, 422); `where` is its place in the request."""
    if not isinstance(text, str):
        raise invalid(f"{where}: expected a text in base64")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ServiceError(400, "invalid_image", f"{where} is not base64") from error


def parse_data_uri(text: str, where: str) -> bytes:
    """Return the bytes of a data URI, `data:image/png;base64,...`. Raises ServiceError (400, 422)."""
    head, comma, data = text.partition(",")
    if not (comma and head.startswith("data:image/") and head.endswith(";base64")):
        raise invalid(f"{where}: expected a data URI, data:image/png;base64,...")
    return decode_base64(data, where)


def parse_prompts(body: dict[str, Any]) -> TextPrompts:
    """Return the prompt sets of the key `prompts`. Raises ServiceError (422)."""
    sets = [
        tuple(check_text(text, f"prompts[{p}][{c}]") for c, text in enumerate(_listed(f"prompts[{p}]", texts, None)))
        for p, texts in enumerate(_listed("prompts", body.get("prompts"), None))
    ]
    if len({len(texts) for texts in sets}) != 1:
        raise invalid("prompts: expected the same number of prompts in every set")
    return TextPrompts(tuple(sets))


def check_text(text: object, where: str) -> str:
    """Return a prompt if it is a text that can be encoded. Raises ServiceError (422)."""
    if not isinstance(text, str) or not text.strip():
        raise invalid(f"{where}: expected a text that is not empty")
    if len(text) > MAX_TEXT:
        raise invalid(f"{where}: {len(text):,} characters, at most {MAX_TEXT:,} are read")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise invalid(f"{where}: has half of a surrogate pair")
    return text


def _listed(key: str, value: object, most: int | None = MAX_IMAGES) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise invalid(f"{key}: expected a list that is not empty")
    if most is not None and len(value) > most:
        raise invalid(f"{key}: {len(value):,} items, at most {most:,} in a request", "too_many")
    return value


def parse_answer(body: dict[str, Any]) -> Access:
    """Return what a request for scores asks for. Raises ServiceError (422)."""
    answer = body.get("answer", "scores")
    if not isinstance(answer, str) or answer not in ANSWERS:
        raise invalid(f"answer: expected one of {', '.join(ANSWERS)}")
    return ANSWERS[answer]


def check_values(*shape: int) -> None:
    """Raise ServiceError (422) if a response of this shape would be too large."""
    if (n := math.prod(shape)) > MAX_VALUES:
        raise invalid(f"the response would have {n:,} values, at most {MAX_VALUES:,}: send fewer", "too_many")


@dataclass(frozen=True)
class EmbeddingsRequest:
    """A request in the style of OpenAI's /v1/embeddings."""

    model: str
    texts: tuple[str, ...]
    images: tuple[bytes, ...]
    """Decoded data URIs; empty for modality text."""
    as_base64: bool


def parse_embeddings(body: dict[str, Any]) -> EmbeddingsRequest:
    """Check a request for embeddings. Raises ServiceError (400, 422)."""
    check_keys(body, "model", "input", "modality", "encoding_format", "user")
    modality, encoding = body.get("modality", "text"), body.get("encoding_format", "float")
    if modality not in ("text", "image"):
        raise invalid("modality: expected text or image")
    if encoding not in ("float", "base64"):
        raise invalid("encoding_format: expected float or base64")
    inputs = [body["input"]] if isinstance(body.get("input"), str) else _listed("input", body.get("input"))
    if modality == "text":
        texts = tuple(check_text(text, f"input[{i}]") for i, text in enumerate(inputs))
        return EmbeddingsRequest(str(body.get("model")), texts, (), encoding == "base64")
    images = tuple(parse_data_uri(str(text), f"input[{i}]") for i, text in enumerate(inputs))
    return EmbeddingsRequest(str(body.get("model")), (), images, encoding == "base64")


def encode_values(identity: str, values: np.ndarray) -> dict[str, Any]:
    """Return the response with these values."""
    return {"identity": identity, "shape": list(values.shape), "dtype": "float32", "data": base64_of(values)}


def base64_of(values: np.ndarray) -> str:
    """Return the little-endian float32 bytes of the values as base64."""
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode()
