"""The methods, data sets and models that are known, as records."""

from __future__ import annotations

from typing import Any

from methods import all_methods
from pipeline.config import dataset_card, model_card, names
from pipeline.layers import load


def methods() -> list[dict[str, Any]]:
    """One record for each method that conf/method or the registry knows."""
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
    """One record for each data set."""
    keys = ("classes", "train", "val", "test", "shift_of", "template", "licence", "source")
    return [{"dataset": name, **{k: getattr(dataset_card(name), k) for k in keys}} for name in names("dataset")]


def models() -> list[dict[str, Any]]:
    """One record for each model."""
    keys = ("kind", "arch", "weights", "grant", "licence", "note")
    return [{"model": name, **{k: getattr(model_card(name), k) for k in keys}} for name in names("model")]
