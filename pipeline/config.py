"""Configuration: files and key=value words are composed once, on the driver, into frozen plain data.

conf/ holds one small file for each sweep, model, data set and method. Unknown keys and names are refused with the
nearest known one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from methods import all_methods
from methods.base import Access, Method, MethodInfo
from pipeline.blackbox.bill import Limits
from pipeline.errors import ConfigError, did_you_mean

_CHECKOUT = Path(__file__).resolve().parent.parent / "conf"
_INSTALLED = Path(__file__).resolve().parent / "_conf"
CONF = _CHECKOUT if _CHECKOUT.is_dir() else _INSTALLED
EMBEDDED = Path(__file__).resolve().parent / "embedded"

Kind = Literal["sweep", "model", "dataset", "method"]


@dataclass(frozen=True)
class GlobalBudget:
    """A named ceiling that several sweeps may share by pointing at one ledger."""

    name: str | None
    url: str | None
    limits: Limits


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """A model behind the endpoint. See conf/model/*.yaml."""

    name: str
    kind: str
    """fake, embedded or open_clip."""
    arch: str = ""
    """open_clip model name; OpenAI weights need the -quickgelu variants."""
    weights: str = ""
    """open_clip pretrained tag, or a local checkpoint path."""
    weights_sha256: str = ""
    """Expected digest of a local checkpoint; empty: whatever is found, recorded in every row."""
    precision: str = "fp32"
    """fp32, bf16 or fp16; the halves are for CUDA."""
    grant: str = "SOFT+FEATURES"
    """What the endpoint allows, e.g. TEXT+SCORES."""
    licence: str = ""
    source: str = ""
    note: str = ""

    @property
    def access(self) -> Access:
        """The grant as flags."""
        return parse_access(self.grant)


@dataclass(frozen=True, kw_only=True)
class DatasetCard:
    """A data set. See conf/dataset/*.yaml."""

    name: str
    path: str
    sha256: str
    classes: int
    train: int
    val: int
    test: int
    template: str
    templates: tuple[str, ...] = ()
    augment: str = "crop_flip"
    shift_of: str | None = None
    """Set on test-only sets: the data set that methods are fitted on."""
    licence: str = ""
    source: str = ""
    citation: str = ""
    note: str = ""

    @property
    def file(self) -> Path:
        """The Parquet file: as given, or in the embedded package data."""
        path = Path(self.path)
        return path if path.is_absolute() or path.exists() else EMBEDDED / path


@dataclass(frozen=True)
class MethodChoice:
    """A method as a cell names it: a registered method with its resolved settings."""

    name: str
    info: MethodInfo
    config: tuple[tuple[str, Any], ...]

    def build(self) -> Method:
        """A fresh object."""
        return self.info.cls(self.info.cls.Config(**dict(self.config)))


@dataclass(frozen=True)
class Config:
    """A whole run, resolved. Fields are the keys of conf/base.yaml."""

    sweep: str
    storage: Path
    label: str
    model: ModelCard
    methods: tuple[str, ...]
    datasets: tuple[DatasetCard, ...]
    shift: bool
    shots: tuple[int, ...]
    seeds: tuple[int, ...]
    settings: str
    views: int | str
    validation: str
    curve: int
    allotments: tuple[Limits, ...]
    sweep_budget: Limits
    global_budget: GlobalBudget
    partial: bool
    replicas: int | str
    threads: int
    concurrency: int | str
    address: str | None
    checkpoint_s: float
    stale: str
    mlflow: str
    features: Path
    method: Mapping[str, Mapping[str, Any]]

    @property
    def ledger_url(self) -> str:
        """The sweep's own ledger file, unless a shared one is named."""
        return self.global_budget.url or f"sqlite:///{self.storage / 'ledger.db'}"

    def choice(self, name: str, dataset: str) -> MethodChoice:
        """The method `name` with the settings that hold on `dataset`."""
        return method_choice(name, dataset, self.settings, self.method.get(name, {}))


def names(kind: Kind) -> list[str]:
    """Names that conf/KIND/ offers; for methods, also those registered without a file."""
    found = {p.stem for p in (CONF / kind).glob("*.yaml")}
    return sorted(found | set(all_methods())) if kind == "method" else sorted(found)


def load(kind: Kind, name: str) -> dict[str, Any]:
    """One file of conf/, as plain data. A path ending in .yaml is read as it is."""
    path = Path(name) if name.endswith(".yaml") else CONF / kind / f"{name}.yaml"
    if kind == "method" and not path.is_file() and name in all_methods():
        return {"method": name}
    if not path.is_file():
        raise ConfigError(did_you_mean(kind, name, names(kind)))
    try:
        return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(path)) or {})
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error


def model_card(name: str) -> ModelCard:
    """The card of a model; `name` may be a local checkpoint written as ARCH=PATH."""
    return _card(ModelCard, "model", name)


def dataset_card(name: str) -> DatasetCard:
    """The card of a data set."""
    return _card(DatasetCard, "dataset", name)


def _card(cls: type[Any], kind: Kind, name: str) -> Any:
    data = load(kind, name)
    known = {f.name for f in dataclasses.fields(cls)}
    for key in data:
        if key not in known:
            raise ConfigError(f"conf/{kind}/{name}.yaml: " + did_you_mean("key", key, known))
    data = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    try:
        return cls(**{"name": Path(name).stem, **data})
    except TypeError as error:
        raise ConfigError(f"conf/{kind}/{name}.yaml: {error}") from error


def method_choice(name: str, dataset: str, settings: str, overrides: Mapping[str, Any]) -> MethodChoice:
    """Resolve a method name: its file's config, then the paper's per-dataset settings if asked, then overrides."""
    file = load("method", name)
    registered = all_methods()
    base = file.get("method", name)
    if base not in registered:
        raise ConfigError(did_you_mean("method", base, registered))
    info = registered[base]
    values = dict(file.get("config") or {})
    if settings == "paper":
        values |= (file.get("per_dataset") or {}).get(dataset, {})
    values |= overrides
    fields = {f.name: f for f in dataclasses.fields(info.cls.Config)}
    for key in values:
        if key not in fields:
            raise ConfigError(f"method {name!r}: " + did_you_mean("setting", key, fields))
    try:
        typed = OmegaConf.merge(OmegaConf.structured(info.cls.Config), values)
    except OmegaConfBaseException as error:
        raise ConfigError(f"method {name!r}: {str(error).splitlines()[0]}") from error
    resolved = cast(dict[str, Any], OmegaConf.to_container(typed))
    config = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in sorted(resolved.items()))
    return MethodChoice(name, info, config)


def parse_access(text: str) -> Access:
    """Flags from 'SOFT+FEATURES'."""
    access = Access(0)
    for word in text.replace("|", "+").split("+"):
        try:
            access |= Access[word.strip().upper()]
        except KeyError:
            raise ConfigError(did_you_mean("access", word, [str(a.name) for a in Access])) from None
    return access


def compose(words: Sequence[str]) -> Config:
    """The run that these key=value words ask for. Raises ConfigError naming what is wrong."""
    base = cast(DictConfig, OmegaConf.load(CONF / "base.yaml"))
    for word in words:
        if "=" not in word:
            raise ConfigError(f"{word!r} is not key=value; for example: sweep=demo shots=[1,16]")
    try:
        typed = OmegaConf.from_dotlist(list(words))
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"cannot read {' '.join(words)!r}: {error}") from error
    sweep = str(typed.get("sweep", base.sweep))
    layers = [("conf/base.yaml", base), (f"sweep {sweep!r}", OmegaConf.create(load("sweep", sweep))), ("command", typed)]
    for where, layer in layers[1:]:
        _check_keys(where, cast(DictConfig, layer), base, "")
    try:
        merged = cast(DictConfig, OmegaConf.merge(*(layer for _, layer in layers)))
        merged.sweep = Path(sweep).stem
        raw = cast(dict[str, Any], OmegaConf.to_container(merged, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    return _resolve(raw)


def _check_keys(where: str, layer: DictConfig, known: DictConfig, prefix: str) -> None:
    for key, value in layer.items():
        if key not in known:
            raise ConfigError(f"{where}: " + did_you_mean("key", f"{prefix}{key}", [f"{prefix}{k}" for k in known]))
        if isinstance(value, DictConfig) and key != "method" and isinstance(known[key], DictConfig):
            _check_keys(where, value, known[key], f"{prefix}{key}.")


def _resolve(raw: dict[str, Any]) -> Config:
    budget = raw["budget"]
    methods = _many(raw, "methods", str)
    for name in methods:
        load("method", name)
    for name in raw["method"]:
        if name not in methods:
            raise ConfigError(f"method.{name}: " + did_you_mean("method in this sweep", name, methods))
    storage = Path(raw["storage"]).absolute()
    features = Path(raw["features"]).absolute() if raw["features"] else storage.parent / "features"
    config = Config(
        sweep=raw["sweep"],
        storage=storage,
        label=str(raw["label"] or ""),
        model=model_card(str(raw["model"])),
        methods=methods,
        datasets=tuple(dataset_card(n) for n in _many(raw, "datasets", str)),
        shift=bool(raw["shift"]),
        shots=_many(raw, "shots", int),
        seeds=_many(raw, "seeds", int),
        settings=_one_of(raw, "settings", ("default", "paper")),
        views=raw["views"] if raw["views"] == "fresh" else _whole("views", raw["views"], minimum=0),
        validation=_one_of(raw, "validation", ("min4", "none")),
        curve=_whole("curve", raw["curve"], minimum=0),
        allotments=_allotments(budget),
        sweep_budget=Limits(*(_limit(f"budget.sweep.{k}", budget["sweep"][k]) for k in ("requests", "images"))),
        global_budget=GlobalBudget(
            budget["global"]["name"],
            budget["global"]["url"],
            Limits(*(_limit(f"budget.global.{k}", budget["global"][k]) for k in ("requests", "images"))),
        ),
        partial=bool(budget["partial"]),
        replicas=_auto(raw, "replicas"),
        threads=_whole("threads", raw["threads"]),
        concurrency=_auto(raw, "concurrency"),
        address=raw["address"],
        checkpoint_s=float(raw["checkpoint_s"]),
        stale=_one_of(raw, "stale", ("rerun", "keep")),
        mlflow=raw["mlflow"] or f"sqlite:///{storage / 'mlflow.db'}",
        features=features,
        method=raw["method"],
    )
    for card in config.datasets:
        if card.shift_of:
            raise ConfigError(f"{card.name!r} is a test-only set: fit on datasets=[{card.shift_of}] (shift=true scores it)")
    return config


def _allotments(budget: Mapping[str, Any]) -> tuple[Limits, ...]:
    """One allotment; or, where requests or images is a list, one for each point of either list."""
    requests, images = budget["requests"], budget["images"]
    if not isinstance(requests, list) and not isinstance(images, list):
        return (Limits(_limit("budget.requests", requests), _limit("budget.images", images)),)
    points = [Limits(requests=_limit("budget.requests", r)) for r in _as_list(requests)]
    points += [Limits(images=_limit("budget.images", i)) for i in _as_list(images)]
    if not points:
        raise ConfigError("budget.requests and budget.images are empty lists: give at least one point, or null")
    return tuple(dict.fromkeys(points))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _limit(key: str, value: Any) -> int | None:
    return None if value is None else _whole(key, value)


def _whole(key: str, value: Any, minimum: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{key}={value}: expected a whole number of {minimum} or more")
    return value


def _auto(raw: Mapping[str, Any], key: str) -> int | str:
    return "auto" if raw[key] == "auto" else _whole(key, raw[key])


def _one_of(raw: Mapping[str, Any], key: str, allowed: tuple[str, ...]) -> str:
    if raw[key] not in allowed:
        raise ConfigError(f"{key}: " + did_you_mean("choice", str(raw[key]), allowed))
    return str(raw[key])


def _many(raw: Mapping[str, Any], key: str, kind: type[Any]) -> tuple[Any, ...]:
    values = raw[key] if isinstance(raw[key], list) else [raw[key]]
    if not values:
        raise ConfigError(f"{key}=[]: expected at least one")
    if kind is int:
        values = [_whole(key, v, minimum=0 if key == "seeds" else 1) for v in values]
    repeated = [v for v in values if values.count(v) > 1]
    if repeated:
        raise ConfigError(f"{key}: {repeated[0]!r} is listed twice")
    return tuple(kind(v) for v in values)


KINDS = get_args(Kind)
