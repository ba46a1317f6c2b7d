"""JSON that cannot contain NaN."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any


def json_value(value: Any) -> Any:
    """Return a value as JSON can hold it: a float that is NaN or infinite becomes None; containers are copied."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: json_value(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [json_value(item) for item in value]
    return value


def strict_json(value: Any, **options: Any) -> str:
    """Serialize to JSON as RFC 8259 defines it: a float that is NaN or infinite becomes null.

    `options` are those of `json.dumps`.
    """
    return json.dumps(json_value(value), allow_nan=False, **options)
