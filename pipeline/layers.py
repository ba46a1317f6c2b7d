"""The files of conf/ and a command's words as one mapping, each key checked: what config.py resolves.

Three layers, each overriding the one before: base.yaml, the sweep's file, the words.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from methods import all_methods
from pipeline import checks
from pipeline.errors import ConfigError, did_you_mean, first_line

_CHECKOUT = Path(__file__).resolve().parent.parent / "conf"
_INSTALLED = Path(__file__).resolve().parent / "_conf"
CONF = _CHECKOUT if _CHECKOUT.is_dir() else _INSTALLED

Kind = Literal["sweep", "model", "dataset", "method"]
BY_NAME = {"method": "SETTING", "variants": "config.SETTING"}
"""Keys of base.yaml under which a method's name stands, and what under that."""


def own_folder(kind: Kind) -> Path:
    """Where a user's own files of a kind are kept: $FAREBOX_CONF, else conf/ of a checkout, else ~/.config/farebox."""
    if own := os.environ.get("FAREBOX_CONF"):
        return Path(own).absolute() / kind
    if CONF == _CHECKOUT:
        return CONF / kind
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "farebox" / kind


def names(kind: Kind) -> list[str]:
    """Names that conf/KIND/ and the user's own folder offer; for methods, also those registered without a file."""
    found = {p.stem for folder in (CONF / kind, own_folder(kind)) for p in folder.glob("*.yaml")}
    return sorted(found | set(all_methods())) if kind == "method" else sorted(found)


def file_of(kind: Kind, name: str) -> Path:
    """The file of this name, there or not: of conf/, else of the user's own. A path ending in .yaml is itself.

    Raises:
        ConfigError: both have a file of this name, and which one is meant would be a guess.
    """
    if name.endswith(".yaml"):
        return Path(name)
    shipped, own = CONF / kind / f"{name}.yaml", own_folder(kind) / f"{name}.yaml"
    if not shipped.is_file():
        return own
    if own.is_file() and not own.samefile(shipped):
        raise ConfigError(f"two files define {kind} {name!r}: {shipped} and {own}; rename your own")
    return shipped


def load(kind: Kind, name: str) -> dict[str, Any]:
    """One file of conf/ or of the user's own, as plain data."""
    path = file_of(kind, name)
    if kind == "method" and not path.is_file() and name in all_methods():
        return {"method": name}
    if not path.is_file():
        raise ConfigError(did_you_mean(kind, name, names(kind)))
    try:
        data = OmegaConf.to_container(OmegaConf.load(path)) or {}
    except (OmegaConfBaseException, YAMLError, ValueError, OSError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds {type(data).__name__}, expected key: value lines")
    return cast(dict[str, Any], data)


def merged(words: Sequence[str]) -> dict[str, Any]:
    """Every key of base.yaml with the value that counts. Raises ConfigError naming what is wrong."""
    base = cast(DictConfig, OmegaConf.load(CONF / "base.yaml"))
    for word in words:
        if "=" not in word:
            raise ConfigError(f"{word!r} is not key=value; for example: sweep=demo shots=[1,16]")
    try:
        typed = OmegaConf.from_dotlist(list(words))
        sweep = str(typed.get("sweep", base.sweep))
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(f"cannot read {' '.join(words)!r}: {' '.join(str(error).split())}") from error
    chosen = OmegaConf.create(_sweep(sweep))
    known = cast(dict[str, Any], OmegaConf.to_container(base))
    for where, layer in ((f"sweep {sweep!r}", chosen), ("command", typed)):
        _check_keys(where, cast(dict[str, Any], OmegaConf.to_container(layer)), known, "")
    try:
        whole = cast(DictConfig, OmegaConf.merge(base, chosen, typed))
        whole.sweep = Path(sweep).stem
        raw = cast(dict[str, Any], OmegaConf.to_container(whole, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(first_line(error)) from error
    raw["method"] = _settings_of_methods(raw, chosen, typed)
    return raw


def _settings_of_methods(raw: dict[str, Any], chosen: DictConfig, typed: DictConfig) -> dict[str, Any]:
    """The overrides of the methods that run. Those of a sweep file's other methods, which a command left out, rest."""
    methods = checks.words("methods", raw["methods"])
    for layer, offered in ((chosen, (*methods, *chosen.get("methods", ()))), (typed, methods)):
        for name in layer.get("method") or ():
            if name not in offered:
                raise ConfigError(f"method.{name}: " + did_you_mean("method in this sweep", name, offered))
    return {name: settings for name, settings in raw["method"].items() if name in methods}


def _sweep(name: str, inside: tuple[str, ...] = ()) -> dict[str, Any]:
    """A sweep's file. The sweeps that its `union` names are joined, and its own keys override what they say."""
    if name in inside:
        raise ConfigError(f"sweep {name!r}: its union comes back to itself ({' -> '.join((*inside, name))})")
    own, joined = load("sweep", name), dict[str, Any]()
    for part in checks.some_words(f"sweep {name!r}: union", own.pop("union", None)):
        joined = _joined(joined, _sweep(part, (*inside, name)))
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.merge(joined, own)))


def _joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Both: lists one after the other with each item once, mappings key by key; of other values the second counts."""
    found = dict(first)
    for key, value in second.items():
        old = found.get(key)
        if isinstance(old, list) and isinstance(value, list):
            value = [*old, *(item for item in value if item not in old)]
        elif isinstance(old, dict) and isinstance(value, dict):
            value = _joined(old, value)
        found[key] = value
    return found


def _check_keys(where: str, layer: Mapping[str, Any], known: Mapping[str, Any], prefix: str) -> None:
    for key, value in layer.items():
        if key not in known:
            raise ConfigError(f"{where}: " + did_you_mean("key", f"{prefix}{key}", [f"{prefix}{k}" for k in known]))
        nested = isinstance(known[key], dict)
        if isinstance(value, dict) != nested:
            wanted = f"keys under it, as in {prefix}{key}.KEY=VALUE" if nested else "a value or a list"
            raise ConfigError(f"{where}: {prefix}{key}={value}: expected {wanted}")
        if nested and key not in BY_NAME:
            _check_keys(where, value, known[key], f"{prefix}{key}.")
        for name, settings in value.items() if key in BY_NAME else ():
            if not isinstance(settings, dict):
                raise ConfigError(f"{where}: {key}.{name}={settings}: expected {key}.{name}.{BY_NAME[key]}=VALUE")
