"""`farebox methods`, `datasets` and `models`: list what is available."""

from __future__ import annotations

from typing import Any

from methods import all_methods
from pipeline.config.compose import dataset_card, model_card, names
from pipeline.config.files import load


def methods() -> list[dict[str, Any]]:
    """Return one record per registered method and variant."""
    registered = all_methods()
    records = []
    for name in names("method"):
        info = registered[load("method", name).get("method", name)]
        records.append(
            {
                "method": name,
                "access": info.access.label,
                "paper": info.paper,
                "version": info.version,
                "new_classes": info.new_classes,
                "what": info.summary,
            }
        )
    return records


def datasets() -> list[dict[str, Any]]:
    """Return one record per data set."""
    keys = ("classes", "train", "val", "test", "shift_of", "template", "licence", "source")
    return [{"dataset": name, **{k: getattr(dataset_card(name), k) for k in keys}} for name in names("dataset")]


def models() -> list[dict[str, Any]]:
    """Return one record per model."""
    keys = ("kind", "arch", "weights", "grant", "licence", "note")
    return [{"model": name, **{k: getattr(model_card(name), k) for k in keys}} for name in names("model")]
