"""Configuration: files and key=value words are composed once, on the driver, into frozen plain data.

conf/ holds one small file for each sweep, model, data set and method. Unknown keys and names are refused with the
nearest known one.
"""

from __future__ import annotations

import dataclasses
import math
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from methods import all_methods
from methods.base import Method, MethodInfo
from pipeline.budget import Limits
from pipeline.cards import EMBEDDED as EMBEDDED
from pipeline.cards import DatasetCard as DatasetCard
from pipeline.cards import ModelCard as ModelCard
from pipeline.cards import check_model
from pipeline.config import typed_values
from pipeline.config import values as checks
from pipeline.config.files import Kind, load, merged
from pipeline.config.files import file_of as file_of
from pipeline.config.files import names as names
from pipeline.config.files import notes as notes
from pipeline.config.files import own_folder as own_folder
from pipeline.config.renamed import unknown_method, unknown_setting
from pipeline.config.sqlite_urls import check_sqlite, sqlite_folder
from pipeline.data.decode import BITS
from pipeline.data.images import AUGMENTATIONS
from pipeline.data.layouts.registry import LAYOUTS
from pipeline.errors import ConfigError, did_you_mean, first_line

PROSE = frozenset(("licence", "source", "url", "citation", "note"))
"""Keys of cards whose text may have several lines."""
METHOD_KEYS = {"method": str, "config": dict, "per_dataset": dict}
"""What a conf/method file holds."""


@dataclass(frozen=True)
class GlobalBudget:
    """A named ceiling that several sweeps may share by pointing at one ledger."""

    name: str | None
    url: str | None
    limits: Limits


@dataclass(frozen=True)
class DataOptions:
    """Where data sets lie, and what is done about classes that are too small."""

    root: str | None
    short_classes: str


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
    data: DataOptions
    protocol: str
    shift: bool | tuple[str, ...]
    transfer: tuple[str, ...]
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
    trial_timeout_s: float
    stale: str
    mlflow: str
    features: Path
    variants: Mapping[str, Mapping[str, Any]]
    method: Mapping[str, Mapping[str, Any]]

    @property
    def ledger_url(self) -> str:
        """The sweep's own ledger file, unless a shared one is named."""
        return self.global_budget.url or f"sqlite:///{self.storage / 'ledger.db'}"

    def choice(self, name: str, dataset: str) -> MethodChoice:
        """The method `name` with the settings that hold on `dataset`."""
        return method_choice(name, dataset, self.settings, self.method.get(name, {}), self.variants.get(name))


def model_card(name: str) -> ModelCard:
    """The card of a model; `name` may be the path of a card of one's own, as in model=my/model.yaml."""
    return check_model(_card(ModelCard, "model", name))


def dataset_card(name: str, root: str | None = None) -> DatasetCard:
    """The card of a data set; `name` may be a path, as in datasets=[my/data.yaml]. Its folder is sought in `root`."""
    card: DatasetCard = _card(DatasetCard, "dataset", name)
    checks.one_of(f"{card.name}: augment", card.augment, tuple(AUGMENTATIONS))
    checks.one_of(f"{card.name}: layout", card.layout, tuple(LAYOUTS))
    checks.one_of(f"{card.name}: test_split", card.test_split, ("", "val"))
    checks.one_of(f"{card.name}: duplicates", card.duplicates, ("", "allow"))
    if card.bits is not None and card.bits not in BITS:
        raise ConfigError(f"{card.name}: bits={card.bits}: expected a whole number from {BITS[0]} to {BITS[-1]}")
    for template in (card.template, *card.templates):
        if template.count("{}") != 1:
            raise ConfigError(f"{card.name}: template {template!r}: expected one {{}} where the class name goes")
    if isinstance(card.classnames, str):
        lines = checks.lines(f"{card.name}: classnames", file_of("dataset", name).parent / card.classnames)
        card = dataclasses.replace(card, classnames=lines)
    for classname in card.classnames:
        checks.text(f"{card.name}: classnames", classname)
    if card.layout == "parquet":
        if not card.sha256 or card.classnames:
            wrong = "has no sha256" if not card.sha256 else "has classnames, which such a file holds itself"
            raise ConfigError(f"{card.name}: layout parquet {wrong}: see docs/data.md, or use layout table")
        return card
    root = root or os.environ.get("FAREBOX_DATA")
    if not root:
        return card
    return dataclasses.replace(card, path=str(typed_values.path("data.root", root).absolute() / card.path))


def _card(cls: type[Any], kind: Kind, name: str) -> Any:
    data = load(kind, name)
    file = file_of(kind, name)
    known = {f.name for f in dataclasses.fields(cls)} - {"card_file"}
    for key in data:
        if key not in known:
            raise ConfigError(f"{file}: " + did_you_mean("key", key, known))
    hints = get_type_hints(cls)
    names_file = data.pop("classnames") if isinstance(data.get("classnames"), str) else None
    for key, value in data.items():
        convert = typed_values.prose if key in PROSE else typed_values.of_type
        data[key] = convert(f"{file}: {key}", value, hints[key])
    if names_file is not None:
        data["classnames"] = checks.text("classnames", names_file)
    data["name"] = checks.card_name(f"{file}: name", file.stem if data.get("name") is None else data["name"])
    try:
        return cls(**data, **({"card_file": str(file)} if cls is DatasetCard else {}))
    except TypeError as error:
        raise ConfigError(f"{file}: {error}") from error


def refuse_same_names(*groups: Sequence[DatasetCard]) -> None:
    """Raise ConfigError when two cards of one run have the same name: rows, draws and predictions are stored by name.

    Names that differ only in case or in Unicode form count as the same. One card may be in several groups (fitted
    sets, shift sets, transfer sets), but only once in each.
    """
    files: dict[str, str] = {}
    for group in groups:
        listed = set[str]()
        for card in group:
            key, file = unicodedata.normalize("NFC", card.name).casefold(), str(Path(card.card_file).resolve())
            if file in listed:
                raise ConfigError(f"data set {card.name!r} is listed twice: {card.card_file}")
            listed.add(file)
            if files.setdefault(key, file) != file:
                raise ConfigError(
                    f"two data sets are named {card.name!r}: {files[key]} and {file}; change the `name:` of one card"
                )


def method_choice(
    name: str, dataset: str, settings: str, overrides: Mapping[str, Any], variant: Mapping[str, Any] | None = None
) -> MethodChoice:
    """Resolve a method name: its file's config, then the paper's per-dataset settings if asked, then overrides.

    `variant`: what stands in the file's place, where a sweep defines the name itself.
    """
    file = _checked(str(file_of("method", name)), load("method", name)) if variant is None else variant
    registered = all_methods()
    base = file.get("method", name)
    if base not in registered:
        raise ConfigError(unknown_method(base, registered))
    info = registered[base]
    values = dict(file.get("config") or {})
    if settings == "paper":
        values |= (file.get("per_dataset") or {}).get(dataset, {})
    values |= overrides
    fields = {f.name: f for f in dataclasses.fields(info.cls.Config)}
    for key in values:
        if key not in fields:
            raise ConfigError(f"method {name!r}: " + unknown_setting(base, key, fields))
    try:
        typed = OmegaConf.merge(OmegaConf.structured(info.cls.Config), values)
    except OmegaConfBaseException as error:
        raise ConfigError(f"method {name!r}: {first_line(error)} (setting {error.full_key})") from error
    resolved = cast(dict[str, Any], OmegaConf.to_container(typed))
    for key, value in values.items():
        typed_values.same_setting(f"method {name!r}: {key}", value, resolved[key])
    config = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in sorted(resolved.items()))
    for key, value in config:
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ConfigError(f"method.{name}.{key}={number}: expected a finite number")
    return MethodChoice(name, info, config)


def _checked(where: str, file: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a conf/method file, or a variant in its place, holds; ConfigError for a key or a value that it cannot."""
    for key, value in file.items():
        if key not in METHOD_KEYS:
            raise ConfigError(f"{where}: " + did_you_mean("key", key, METHOD_KEYS))
        empty = value is None and key != "method"  # `config:` with nothing under it
        if not empty and not isinstance(value, METHOD_KEYS[key]):
            wanted = "a method's name" if key == "method" else "SETTING=VALUE under it"
            raise ConfigError(f"{where}.{key}={value}: expected {wanted}")
    return file


def compose(words: Sequence[str]) -> Config:
    """The run that these key=value words ask for. Raises ConfigError naming what is wrong."""
    return _resolve(merged(words))


def _resolve(raw: dict[str, Any]) -> Config:
    budget = raw["budget"]
    methods = checks.words("methods", raw["methods"])
    variants = _variants(raw["variants"])
    for name in methods:
        if name not in variants:
            load("method", name)
    storage = sqlite_folder("storage", typed_values.path("storage", raw["storage"]).absolute())
    data = DataOptions(
        None if raw["data"]["root"] is None else str(typed_values.path("data.root", raw["data"]["root"])),
        checks.one_of("data.short_classes", raw["data"]["short_classes"], ("error", "take_all")),
    )
    features, mlflow = raw["features"], checks.maybe_text("mlflow", raw["mlflow"])
    config = Config(
        sweep=raw["sweep"],
        storage=storage,
        label="" if raw["label"] in (None, "") else checks.text("label", raw["label"]),
        model=model_card(checks.text("model", raw["model"])),
        methods=methods,
        datasets=tuple(dataset_card(n, data.root) for n in checks.words("datasets", raw["datasets"])),
        data=data,
        protocol=checks.one_of("protocol", raw["protocol"], ("all_to_all", "base_to_new")),
        shift=checks.flag_or_words("shift", raw["shift"]),
        transfer=checks.some_words("transfer", raw["transfer"]),
        shots=checks.numbers("shots", raw["shots"]),
        seeds=checks.numbers("seeds", raw["seeds"], minimum=0),
        settings=checks.one_of("settings", raw["settings"], ("default", "paper")),
        views=raw["views"] if raw["views"] == "fresh" else checks.whole("views", raw["views"], minimum=0),
        validation=checks.one_of("validation", raw["validation"], ("min4", "none", "full")),
        curve=checks.whole("curve", raw["curve"], minimum=0),
        allotments=checks.allotments(budget["requests"], budget["images"]),
        sweep_budget=checks.limits("budget.sweep", budget["sweep"]),
        global_budget=GlobalBudget(
            checks.maybe_text("budget.global.name", budget["global"]["name"]),
            check_sqlite("budget.global.url", checks.maybe_text("budget.global.url", budget["global"]["url"])),
            checks.limits("budget.global", budget["global"]),
        ),
        partial=checks.flag("budget.partial", budget["partial"]),
        replicas=checks.auto("replicas", raw["replicas"]),
        threads=checks.whole("threads", raw["threads"]),
        concurrency=checks.auto("concurrency", raw["concurrency"]),
        address=checks.maybe_text("address", raw["address"]),
        checkpoint_s=checks.seconds("checkpoint_s", raw["checkpoint_s"]),
        trial_timeout_s=checks.seconds("trial_timeout_s", raw["trial_timeout_s"]),
        stale=checks.one_of("stale", raw["stale"], ("rerun", "keep")),
        mlflow=checks.tracking_uri("mlflow", check_sqlite("mlflow", mlflow) or f"sqlite:///{storage / 'mlflow.db'}"),
        features=typed_values.path("features", features).absolute() if features else storage.parent / "features",
        variants=variants,
        method=raw["method"],
    )
    for card in config.datasets:
        if card.shift_of:
            raise ConfigError(
                f"{card.name!r} is a test-only set: fit on datasets=[{card.shift_of}] (shift=true scores it)"
            )
    return config


def _variants(raw: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A sweep's own variants of methods: under names of their own, with the keys of a conf/method file."""
    for name, file in raw.items():
        checks.card_name("variants", name)
        if name in names("method"):
            raise ConfigError(f"variants.{name}: there is a method of that name: give the variant another")
        _checked(f"variants.{name}", file)
    return raw
