"""The files of conf/ and a command's words as one mapping, each key checked: what config.py resolves.

Three layers, each overriding the one before: base.yaml, the sweep's file, the words.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from methods import all_methods
from pipeline.config import typed_values
from pipeline.config import values as checks
from pipeline.config.plain_yaml import read_file, read_value
from pipeline.config.renamed import unknown_method
from pipeline.errors import ConfigError, did_you_mean, first_line
from pipeline.untrusted import text_problem

_CHECKOUT = Path(__file__).resolve().parents[2] / "conf"
_INSTALLED = Path(__file__).resolve().parents[1] / "_conf"
CONF = _CHECKOUT if _CHECKOUT.is_dir() else _INSTALLED

Kind = Literal["sweep", "model", "dataset", "method"]
ALLOW_ENV = "FAREBOX_ALLOW_ENV"
"""Environment variable; 1 allows interpolations such as ${oc.env:NAME} in files."""
REFERENCE = re.compile(r"\$\{([a-z]+)\}")
"""An interpolation that names a key at the top of base.yaml and nothing else."""
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
        return typed_values.path(kind, name)
    shipped, own = CONF / kind / f"{name}.yaml", own_folder(kind) / f"{name}.yaml"
    if not shipped.is_file():
        return own
    if own.is_file() and not own.samefile(shipped):
        raise ConfigError(f"two files define {kind} {name!r}: {shipped} and {own}; rename your own")
    return shipped


def load(kind: Kind, name: str) -> dict[str, Any]:
    """Read one file of conf/ or of the user's own as plain data.

    Raises:
        ConfigError: there is no such file, or it is not a YAML mapping that may be used.
    """
    path = file_of(kind, name)
    if kind == "method" and not path.is_file() and name in all_methods():
        return {"method": name}
    if not path.is_file():
        unknown = unknown_method if kind == "method" else partial(did_you_mean, kind)
        raise ConfigError(unknown(name, names(kind)))
    data = read_file(path) or {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds {type(data).__name__}, expected key: value lines")
    if os.environ.get(ALLOW_ENV) != "1":
        _refuse_interpolation(path, data, references=kind == "sweep")
    elif kind != "sweep":  # a sweep is resolved together with the keys that it leaves to base.yaml
        data = _resolved(data)
    return data


def _refuse_interpolation(path: Path, value: Any, references: bool) -> None:
    """ConfigError for text such as ${oc.env:HOME}, which would put the reader's environment into a run.

    `references`: text such as ${sweep} is allowed, which names another key of the run.
    """
    if isinstance(value, str):
        if "${" in (REFERENCE.sub("", value) if references else value):
            instead = "type the key on the command line, or " if references else ""
            raise ConfigError(
                f"{path}: {value[:60]!r} has an interpolation, which files may not use: {instead}set {ALLOW_ENV}=1"
            )
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _refuse_interpolation(path, item, references)


def _check_references(where: str, value: Any, others: Mapping[str, Any]) -> None:
    """ConfigError where text of a file names a key whose own value in a file has an interpolation.

    Such chains could name themselves, or grow beyond all memory.
    """
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _check_references(where, item, others)
    for key in REFERENCE.findall(value) if isinstance(value, str) else ():
        if _interpolates(others.get(key)):
            raise ConfigError(f"{where}: {value[:60]!r} names {key}, whose value has an interpolation itself")


def _resolved(data: dict[str, Any]) -> dict[str, Any]:
    """The data with its interpolations replaced by OmegaConf, where it has any."""
    if not _interpolates(data):
        return data
    try:
        return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(data), resolve=True))
    except (OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"an interpolation cannot be resolved: {first_line(error)}") from error


def _interpolates(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_interpolates, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and "${" in value


def typed_keys(words: Sequence[str]) -> dict[str, Any]:
    """Return the KEY=VALUE arguments of a command as one nested mapping; of two values for a key the last counts."""
    typed: dict[str, Any] = {}
    for word in words:
        key, is_value, text = word.partition("=")
        if problem := text_problem(key):
            raise ConfigError(f"{ascii(key)[:80]}: a key has {problem}")
        if not is_value:
            raise ConfigError(f"{word!r} is not key=value; for example: sweep=demo shots=[1,16]")
        value = read_value(key, text)
        for part in reversed(key.split(".")):
            value = {part: value}
        typed = _over(typed, value)
    return typed


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both mappings, key by key; where both have a value that is no mapping, that of `above` counts."""
    whole = dict(below)
    for key, value in above.items():
        old = whole.get(key)
        whole[key] = _over(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return whole


def merged(words: Sequence[str]) -> dict[str, Any]:
    """Every key of base.yaml with the value that counts. Raises ConfigError naming what is wrong."""
    base = cast(dict[str, Any], read_file(CONF / "base.yaml"))
    typed = typed_keys(words)
    sweep = checks.text("sweep", _resolved({"sweep": typed.get("sweep", base["sweep"])})["sweep"])
    chosen = _sweep(sweep)
    for where, layer in ((f"sweep {sweep!r}", chosen), ("command", typed)):
        _check_keys(where, layer, base, "")
    whole = _over(_over(base, chosen), typed)
    whole["sweep"] = Path(sweep).stem
    if os.environ.get(ALLOW_ENV) != "1":
        _check_references(f"sweep {sweep!r}", chosen, {key: value for key, value in chosen.items() if key not in typed})
    raw = _resolved(whole)
    raw["method"] = _settings_of_methods(raw, chosen, typed)
    return raw


def notes(words: Sequence[str]) -> list[str]:
    """Lines for stderr about typed values that often mean something else."""
    seed = typed_keys(words).get("seeds")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 1 < seed <= 1000:
        return []
    several = ",".join(map(str, range(1, seed + 1))) if seed <= 10 else f"1,2,...,{seed}"
    return [f"seeds={seed} is one seed (number {seed}); for {seed} seeds type seeds=[{several}]"]


def _settings_of_methods(raw: dict[str, Any], chosen: dict[str, Any], typed: dict[str, Any]) -> dict[str, Any]:
    """The overrides of the methods that run. Those of a sweep file's methods that a command left out are left out."""
    methods = checks.words("methods", raw["methods"])
    of_sweep = checks.some_words("methods", chosen.get("methods"))
    for layer, offered in ((chosen, (*methods, *of_sweep)), (typed, methods)):
        for name in layer.get("method") or ():
            if name not in offered:
                raise ConfigError(f"method.{name}: " + unknown_method(name, offered, "method in this sweep"))
    return {name: settings for name, settings in raw["method"].items() if name in methods}


def _sweep(name: str, inside: tuple[str, ...] = ()) -> dict[str, Any]:
    """A sweep's file. The sweeps that its `union` names are joined, and its own keys override what they say."""
    if name in inside:
        raise ConfigError(f"sweep {name!r}: its union comes back to itself ({' -> '.join((*inside, name))})")
    own, joined = load("sweep", name), dict[str, Any]()
    for part in checks.some_words(f"sweep {name!r}: union", own.pop("union", None)):
        joined = _joined(joined, _sweep(part, (*inside, name)))
    return _over(joined, own)


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
