"""Former names of keys, methods and settings. They are refused with an error that gives the present name."""

from __future__ import annotations

from collections.abc import Iterable

from methods import BROKEN
from pipeline.errors import ConfigError, did_you_mean

KEYS = {
    "settings": "hparams",
    "stale": "on_code_change",
    "shift": "eval_shift",
    "data.short_classes": "data.small_classes",
}
"""Former keys of base.yaml and their present names."""
METHODS = {"craft_apart": "craft_sequential", "taskres_image": "taskres_image_side"}
"""Former name of a method: its present name."""
SETTINGS = {
    "bound": "z_bound",
    "directions": "n_directions",
    "kl_share": "kl_fraction",
    "learned_tokens": "n_ctx",
    "n": "kl_fraction",
    "paper_start": "paper_init",
    "second_ask": "prompt_from_extra_population",
    "std": "projection_std",
    "weight": "kl_weight",
}
"""Former name of a setting: its present name. It applies to methods that have the present name."""
CHANGED_VALUES = {"n": "kl_fraction=1/n"}
"""Settings whose values changed with the name."""
METHODS_OF_SETTINGS = {
    ("craft", "together"): "craft_sequential",
    ("taskres", "base_epochs"): "taskres_enhanced",
    ("taskres", "base_lr"): "taskres_enhanced",
    ("taskres", "enhanced"): "taskres_enhanced",
    ("taskres", "image_side"): "taskres_image_side",
}
"""Former setting of a method: the method that took its place."""


def refuse_renamed(where: str, key: str) -> None:
    """Raise ConfigError for a former key; the message has its present name."""
    if key in KEYS:
        raise ConfigError(f"{where}: {key} was renamed to {KEYS[key]}")


def unknown_method(name: str, known: Iterable[str], kind: str = "method") -> str:
    """Return the error message for an unknown method name."""
    if name in METHODS:
        return f"method {name!r} was renamed: use {METHODS[name]!r}"
    broken = "; ".join(
        why if file.endswith(".py") else f"{file} cannot be imported ({why})" for file, why in BROKEN.items()
    )
    return f"no method named {name!r}: {broken}" if broken else did_you_mean(kind, name, known)


def unknown_setting(method: str, setting: str, known: Iterable[str]) -> str:
    """Return the error message for an unknown setting of a registered method."""
    if other := METHODS_OF_SETTINGS.get((method, setting)):
        return f"setting {setting!r} was removed: use the method {other!r}"
    if (new := SETTINGS.get(setting)) in set(known):
        values = CHANGED_VALUES.get(setting)
        return f"setting {setting!r} was renamed: use {new!r}" + (f" ({values})" if values else "")
    return did_you_mean("setting", setting, known)
