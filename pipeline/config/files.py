"""Merge the files of conf/ and the overrides of a command into one mapping, and check each key.

There are three layers, each overriding the one before: base.yaml, the sweep's file, and the overrides.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from methods import all_methods
from pipeline.config import typed_values
from pipeline.config import values as checks
from pipeline.config.plain_yaml import read_file, read_value
from pipeline.config.plugins import with_methods_of_files
from pipeline.config.renamed import refuse_renamed, unknown_method
from pipeline.errors import ConfigError, did_you_mean, first_line
from pipeline.untrusted import text_problem

_CHECKOUT = Path(__file__).resolve().parents[2] / "conf"
_INSTALLED = Path(__file__).resolve().parents[1] / "_conf"
CONF = _CHECKOUT if _CHECKOUT.is_dir() else _INSTALLED

Kind = Literal["sweep", "model", "local", "dataset", "method"]
ALLOW_ENV = "FAREBOX_ALLOW_ENV"
"""Environment variable; 1 allows interpolations such as ${oc.env:NAME} in files."""
REFERENCE = re.compile(r"\$\{([a-z_]+)\}")
"""An interpolation that consists of the name of a top-level key of base.yaml."""
UNDESCRIBED = frozenset(
    {"sweep", "storage", "data", "replicas", "replica_gpus", "threads", "concurrency", "address", "checkpoint_s"}
    | {"trial_timeout_s", "on_code_change", "mlflow", "features", "records", "offline", "spend"}
)
"""Keys that a sweep's label does not describe. An override of any other key drops it, as it may be false."""
LISTS = frozenset(
    {"methods", "datasets", "shots", "seeds", "transfer", "eval_shift", "budget.requests", "budget.images", "answers"}
    | {"hparams"}
)
"""Keys with lists of values, which a command may have without brackets: methods=craft,taskres."""
VALUE_OR_KEYS = frozenset({"answers"})
"""Keys that have a value, a list or keys under it, as in answers=topk and answers.scores=topk."""
FURTHER = "budget.further"
"""Key with a list of allotments for each method name."""
BY_NAME = {"method": "SETTING", "variants": "config.SETTING"}
"""Keys of base.yaml that contain one entry for each method name, and what an entry contains."""


def own_folder(kind: Kind) -> Path:
    """Return the folder of the user's own files: $FAREBOX_CONF, else conf/ of a checkout, else ~/.config/farebox."""
    if own := os.environ.get("FAREBOX_CONF"):
        return Path(own).absolute() / kind
    if CONF == _CHECKOUT:
        return CONF / kind
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "farebox" / kind


def names(kind: Kind) -> list[str]:
    """Return all names of a kind: files of conf/KIND and of the user's own folder, and registered methods."""
    stems = {p.stem for folder in (CONF / kind, own_folder(kind)) for p in folder.glob("*.yaml")}
    return sorted(stems | set(all_methods())) if kind == "method" else sorted(stems)


def file_of(kind: Kind, name: str) -> Path:
    """Return the path of a file by its name; the file need not exist. A name that ends in .yaml is a path itself.

    Raises:
        ConfigError: Both conf/ and the user's own folder have a file of this name.
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
    """Read one file of conf/ or of the user's own folder as plain data.

    Raises:
        ConfigError: There is no such file, or it is not a YAML mapping, or it has interpolations.
    """
    path = file_of(kind, name)
    if kind == "method" and not path.is_file() and name in all_methods():
        return {"method": name}
    if not path.is_file():
        if name.endswith(".yaml"):
            raise ConfigError(f"{kind} {name}: no such file")
        unknown = unknown_method if kind == "method" else partial(did_you_mean, kind)
        raise ConfigError(unknown(name, names(kind)))
    data = read_file(path) or {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds {type(data).__name__}, expected key: value lines")
    if os.environ.get(ALLOW_ENV) != "1":
        _refuse_interpolations(path, data, references=kind == "sweep")
    elif kind != "sweep":  # a sweep's references are resolved after it is merged with base.yaml
        data = _resolved(data)
    return data


def _texts(value: Any) -> Iterator[str]:
    """Yield every text value in nested lists and mappings."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def _interpolates(value: Any) -> bool:
    return any("${" in text for text in _texts(value))


def _refuse_interpolations(path: Path, data: Mapping[str, Any], references: bool) -> None:
    """Raise ConfigError for text such as ${oc.env:HOME}, which would copy the user's environment into a run.

    With `references`, text such as ${sweep}, which refers to another key, is allowed.
    """
    for text in _texts(data):
        if "${" in (REFERENCE.sub("", text) if references else text):
            instead = "type the key on the command line, or " if references else ""
            raise ConfigError(
                f"{path}: {text[:60]!r} has an interpolation, which files may not use: {instead}set {ALLOW_ENV}=1"
            )


def _check_references(where: str, data: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """Raise ConfigError where a value of `data` refers to a key whose value in `others` has an interpolation.

    Such chains could be circular, or grow without bound.
    """
    for text in _texts(data):
        for key in REFERENCE.findall(text):
            if _interpolates(others.get(key)):
                raise ConfigError(f"{where}: {text[:60]!r} refers to {key}, whose value has an interpolation itself")


def _resolved(data: dict[str, Any]) -> dict[str, Any]:
    """Return the data with all interpolations resolved by OmegaConf."""
    if not _interpolates(data):
        return data
    try:
        return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.create(data), resolve=True))
    except (OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"an interpolation cannot be resolved: {first_line(error)}") from error


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Return key=value overrides as one nested mapping. If a key occurs twice, the last value counts."""
    nested: dict[str, Any] = {}
    for override in overrides:
        key, is_value, text = override.partition("=")
        if problem := text_problem(key):
            raise ConfigError(f"{ascii(key)[:80]}: a key has {problem}")
        if not is_value:
            raise ConfigError(f"{override!r} is not key=value; for example: sweep=demo shots=1,16")
        has_list = key in LISTS or key.startswith(f"{FURTHER}.")
        value: Any = _items(key, text) if has_list and _is_plain_list(text) else read_value(key, text)
        for part in reversed(key.split(".")):
            value = {part: value}
        nested = _override(nested, value)
    return nested


def _is_plain_list(text: str) -> bool:
    return "," in text and text[:1] not in ("[", "{", '"', "'")


def _items(key: str, text: str) -> list[Any]:
    """Return the values of a list that is typed without brackets, as in seeds=1,2,3."""
    parts = [part.strip() for part in text.split(",")]
    if "" in parts:
        raise ConfigError(f"{key}={text[:80]}: there is nothing before or after a comma")
    return [read_value(key, part) for part in parts]


def _override(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return both mappings merged key by key; where both have a value that is not a mapping, `above` counts."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = _override(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def merged(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the value of every key of base.yaml after the sweep's file and the overrides are applied.

    Raises:
        ConfigError: Naming the key or the file that is wrong.
    """
    base = cast(dict[str, Any], read_file(CONF / "base.yaml"))
    typed = parse_overrides(overrides)
    sweep = checks.text("sweep", _resolved({"sweep": typed.get("sweep", base["sweep"])})["sweep"])
    file = _sweep(sweep)
    for where, layer in ((f"sweep {sweep!r}", file), ("command", typed)):
        _check_keys(where, layer, base, "")
    result = _override(_override(base, file), typed)
    result["sweep"] = Path(sweep).stem
    if "label" not in typed and not typed.keys() <= UNDESCRIBED:
        result["label"] = ""
    if os.environ.get(ALLOW_ENV) != "1":
        _check_references(f"sweep {sweep!r}", file, {key: value for key, value in file.items() if key not in typed})
    raw = _resolved(result)
    raw["methods"] = with_methods_of_files(checks.name_list("methods", raw["methods"]))
    raw["method"] = _by_method("method", raw["method"], file.get("method"), typed.get("method"), raw, file)
    of_file, of_words = (layer.get("budget", {}).get("further") for layer in (file, typed))
    raw["budget"]["further"] = _by_method(FURTHER, raw["budget"]["further"], of_file, of_words, raw, file)
    return raw


def notes(overrides: Sequence[str]) -> list[str]:
    """Return hints about overrides that often mean something else, one line each."""
    seed = parse_overrides(overrides).get("seeds")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 1 < seed <= 1000:
        return []
    several = ",".join(map(str, range(1, seed + 1))) if seed <= 10 else f"1,2,...,{seed}"
    return [f"seeds={seed} is one seed (number {seed}); for {seed} seeds type seeds={several}"]


def _by_method(
    key: str,
    merged: dict[str, Any],
    of_file: Mapping[str, Any] | None,
    typed: Mapping[str, Any] | None,
    raw: dict[str, Any],
    file: dict[str, Any],
) -> dict[str, Any]:
    """Return the values of a key that has an entry for each method name, for the methods that run.

    Entries in the sweep's file for methods that the command line leaves out are dropped.
    """
    methods = checks.name_list("methods", raw["methods"])
    of_sweep = checks.maybe_names("methods", file.get("methods"))
    for layer, allowed in ((of_file, (*methods, *of_sweep)), (typed, methods)):
        for name in layer or ():
            if name not in allowed:
                raise ConfigError(f"{key}.{name}: " + unknown_method(name, allowed, "method in this sweep"))
    return {name: values for name, values in merged.items() if name in methods}


def _sweep(name: str, parents: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the content of a sweep's file. The sweeps in its `union` are joined, and its own keys override them."""
    if name in parents:
        raise ConfigError(f"sweep {name!r}: its union is circular ({' -> '.join((*parents, name))})")
    own, joined = load("sweep", name), dict[str, Any]()
    for part in checks.maybe_names(f"sweep {name!r}: union", own.pop("union", None)):
        joined = _joined(joined, _sweep(part, (*parents, name)))
    return _override(joined, own)


def _joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Return the union: lists are concatenated without repetitions, mappings joined; else the second value counts."""
    result = dict(first)
    for key, value in second.items():
        old = result.get(key)
        if isinstance(old, list) and isinstance(value, list):
            value = [*old, *(item for item in value if item not in old)]
        elif isinstance(old, dict) and isinstance(value, dict):
            value = _joined(old, value)
        result[key] = value
    return result


def _check_keys(where: str, layer: Mapping[str, Any], known: Mapping[str, Any], prefix: str) -> None:
    """Raise ConfigError for a key that is not in base.yaml, or whose value is a mapping where a value is expected."""
    for key, value in layer.items():
        refuse_renamed(where, f"{prefix}{key}")
        if key not in known:
            raise ConfigError(f"{where}: " + did_you_mean("key", f"{prefix}{key}", [f"{prefix}{k}" for k in known]))
        nested = isinstance(known[key], dict)
        if isinstance(value, dict) != nested and key not in VALUE_OR_KEYS:
            expected = f"keys under it, as in {prefix}{key}.KEY=VALUE" if nested else "a value or a list"
            raise ConfigError(f"{where}: {prefix}{key}={value}: expected {expected}")
        if nested and key not in BY_NAME and f"{prefix}{key}" != FURTHER:
            _check_keys(where, value, known[key], f"{prefix}{key}.")
        for name, settings in value.items() if key in BY_NAME else ():
            if not isinstance(settings, dict):
                raise ConfigError(f"{where}: {key}.{name}={settings}: expected {key}.{name}.{BY_NAME[key]}=VALUE")
