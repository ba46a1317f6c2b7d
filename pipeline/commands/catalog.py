"""`farebox methods`, `datasets` and `models`: list what is available, and measure a model's `text_norm`."""

from __future__ import annotations

from typing import Any

from methods import BROKEN, all_methods
from pipeline.config.card_files import dataset_card, model_card
from pipeline.config.files import load, names
from pipeline.files import strict_json


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
    cards = {name: dataset_card(name) for name in names("dataset")}
    return [{"dataset": name, **{key: getattr(card, key) for key in keys}} for name, card in cards.items()]


def models() -> list[dict[str, Any]]:
    """Return one record per model."""
    keys = ("kind", "arch", "weights", "grant", "text_norm", "licence", "note")
    cards = {name: model_card(name) for name in names("model")}
    return [{"model": name, **{key: getattr(card, key) for key in keys}} for name, card in cards.items()]


def text_norm(name: str) -> dict[str, Any]:
    """Load a model and measure its `text_norm`, with the range over the prompts and the value that its card states."""
    from pipeline.blackbox import model, text_norm  # loads open_clip, which a listing does not

    card = model_card(name)
    measured = text_norm.measure(model.load(card))
    return {
        "model": card.name,
        "text_norm": measured.value,
        "lowest": round(measured.lowest, 4),
        "highest": round(measured.highest, 4),
        "prompts": len(text_norm.NAMES),
        "template": text_norm.TEMPLATE,
        "card": card.text_norm,
        "line": f"text_norm: {measured.value}",
    }


def text_norm_text(name: str, as_json: bool) -> str:
    """Measure the `text_norm` of a model; return the record as text or JSON."""
    record = text_norm(name)
    if as_json:
        return strict_json(record, indent=1)
    stated = "its card states no value" if record["card"] is None else f"its card states {record['card']}"
    measured = "{model}: {text_norm} ({lowest} to {highest} over {prompts} prompts, {template!r})".format(**record)
    return f"{measured}\n{stated}\nline for the card:\n{record['line']}"


def broken() -> list[str]:
    """Return one line per module that cannot be imported."""
    return [
        f"{module} cannot be imported ({reason}): its methods are not available" for module, reason in BROKEN.items()
    ]
