"""Compose a run's configuration from files and key=value overrides.

The driver composes once. The result is frozen plain data. Unknown keys and names are rejected with the nearest known
one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.budget import Limits
from pipeline.cards import Answers, DatasetCard, LocalCard, ModelCard
from pipeline.config import answers, typed_values
from pipeline.config import values as checks
from pipeline.config.card_files import dataset_card, local_card, model_card
from pipeline.config.files import merged, names
from pipeline.config.method_choice import MethodChoice, check_method_file, method_choice
from pipeline.config.sqlite_urls import check_sqlite, sqlite_folder
from pipeline.errors import ConfigError


@dataclass(frozen=True)
class GlobalBudget:
    """A named budget that several sweeps share by using one ledger."""

    name: str | None
    url: str | None
    limits: Limits
    usd: int | None
    """In micro-dollars."""


@dataclass(frozen=True)
class DataOptions:
    """Where the data sets are, and what to do about classes with too few images."""

    root: str | None
    small_classes: str
    """error or take_all."""


@dataclass(frozen=True)
class Config:
    """The resolved configuration of a run. The fields are the keys of conf/base.yaml."""

    sweep: str
    storage: Path
    label: str
    model: ModelCard
    local: LocalCard | None
    answers: tuple[Answers, ...]
    """What the endpoint answers; each is an axis value of the sweep, as an allotment is."""
    methods: tuple[str, ...]
    datasets: tuple[DatasetCard, ...]
    data: DataOptions
    protocol: str
    eval_shift: bool | tuple[str, ...]
    transfer: tuple[str, ...]
    shots: tuple[int, ...]
    draw: str
    """balanced or imbalanced."""
    seeds: tuple[int, ...]
    hparams: tuple[str, ...]
    views: int | str
    validation: str
    curve: int
    allotments: tuple[Limits, ...]
    """Allotments of every method."""
    further: Mapping[str, tuple[Limits, ...]]
    """Further allotments of single methods."""
    sweep_budget: Limits
    global_budget: GlobalBudget
    usd: int | None
    """Limit of the sweep's money in micro-dollars."""
    partial: bool
    replicas: int | str
    replica_gpus: float | str
    """GPUs of each replica: 0 < n <= 1, or auto."""
    threads: int
    concurrency: int | str
    address: str | None
    checkpoint_s: float
    trial_timeout_s: float
    on_code_change: str
    mlflow: str
    features: Path
    records: Path
    offline: bool
    spend: bool
    variants: Mapping[str, Mapping[str, Any]]
    method: Mapping[str, Mapping[str, Any]]

    @property
    def ledger_url(self) -> str:
        """URL of the ledger: the sweep's own file, unless budget.global.url names a shared one."""
        return self.global_budget.url or f"sqlite:///{self.storage / 'ledger.db'}"

    def allotments_of(self, method: str) -> tuple[Limits, ...]:
        """Return the allotments of a method: its further ones, then those of every method."""
        return tuple(dict.fromkeys((*self.further.get(method, ()), *self.allotments)))

    def choice(self, name: str, dataset: str, hparams: str | None = None) -> MethodChoice:
        """Return a method with the hyperparameters that it has on a data set, by default under the first `hparams`."""
        some = hparams or self.hparams[0]
        return method_choice(name, dataset, some, self.method.get(name, {}), self.variants.get(name))

    def choices(self, name: str, dataset: str) -> dict[str, MethodChoice]:
        """Return the same under each of `hparams`, without those that are equal to an earlier one."""
        found: dict[str, MethodChoice] = {}
        for hparams in self.hparams:
            choice = self.choice(name, dataset, hparams)
            if choice not in found.values():
                found[hparams] = choice
        return found


def compose(overrides: Sequence[str]) -> Config:
    """Compose the configuration of a run.

    Args:
        overrides: Key=value overrides, as on the command line: ["sweep=demo", "shots=1,16"].

    Raises:
        ConfigError: Naming the key or the file that is wrong.
    """
    return _resolve(merged(overrides))


def check_price(config: Config) -> None:
    """Raise ConfigError if money is limited and the model's card has no price, or is of a model of this machine."""
    key = "budget.usd" if config.usd is not None else "budget.global.usd"
    if config.usd is None and config.global_budget.usd is None:
        return
    http = config.model.http
    if http is None:
        raise ConfigError(f"{key} limits money, and model {config.model.name} costs none: leave it out")
    if http.price is None:
        raise ConfigError(
            f"{key} limits money, and the card of {config.model.name} has no price: add "
            "price: {usd_per_request: X, usd_per_image: X, usd_per_1k_tokens: X, as_of: DATE} (0 for what is free)"
        )
    if http.price.usd_per_1k_tokens and http.max_text is None:
        raise ConfigError(
            f"{key} limits money, and the card of {config.model.name} has a price of tokens without max_text: add "
            "max_text: N, the most characters of a prompt, from which the most tokens follow"
        )


def _resolve(raw: dict[str, Any]) -> Config:
    budget = raw["budget"]
    methods = checks.name_list("methods", raw["methods"])
    variants = _variants(raw["variants"])
    storage = sqlite_folder("storage", typed_values.path("storage", raw["storage"]).absolute())
    data = DataOptions(
        None if raw["data"]["root"] is None else str(typed_values.path("data.root", raw["data"]["root"])),
        checks.one_of("data.small_classes", raw["data"]["small_classes"], ("error", "take_all")),
    )
    model = model_card(checks.text("model", raw["model"]))
    features, records, mlflow = raw["features"], raw["records"], checks.maybe_text("mlflow", raw["mlflow"])
    local = checks.maybe_text("local", raw["local"])
    shots, imbalanced = checks.shots("shots", raw["shots"])
    config = Config(
        sweep=raw["sweep"],
        storage=storage,
        label="" if raw["label"] in (None, "") else checks.text("label", raw["label"]),
        model=model,
        answers=answers.of_config("answers", raw["answers"], model),
        local=None if local is None else local_card(local),
        methods=methods,
        datasets=tuple(dataset_card(n, data.root) for n in checks.name_list("datasets", raw["datasets"])),
        data=data,
        protocol=checks.one_of("protocol", raw["protocol"], ("all_to_all", "base_to_new")),
        eval_shift=checks.flag_or_names("eval_shift", raw["eval_shift"]),
        transfer=checks.maybe_names("transfer", raw["transfer"]),
        shots=shots,
        draw="imbalanced" if imbalanced else checks.one_of("draw", raw["draw"], ("balanced", "imbalanced")),
        seeds=checks.numbers("seeds", raw["seeds"], minimum=0),
        hparams=tuple(
            checks.one_of("hparams", value, ("default", "paper"))
            for value in checks.name_list("hparams", raw["hparams"])
        ),
        views=raw["views"] if raw["views"] == "fresh" else checks.whole("views", raw["views"], minimum=0),
        validation=checks.one_of("validation", raw["validation"], ("min4", "none", "full")),
        curve=checks.whole("curve", raw["curve"], minimum=0),
        allotments=checks.allotments(budget),
        further={
            name: checks.further_allotments(f"budget.further.{name}", own, budget)
            for name, own in budget["further"].items()
        },
        sweep_budget=checks.limits("budget.sweep", budget["sweep"]),
        global_budget=GlobalBudget(
            checks.maybe_text("budget.global.name", budget["global"]["name"]),
            check_sqlite("budget.global.url", checks.maybe_text("budget.global.url", budget["global"]["url"])),
            checks.limits("budget.global", budget["global"]),
            checks.dollars("budget.global.usd", budget["global"]["usd"]),
        ),
        usd=checks.dollars("budget.usd", budget["usd"]),
        partial=checks.flag("budget.partial", budget["partial"]),
        replicas=checks.auto("replicas", raw["replicas"]),
        replica_gpus=checks.gpu_share("replica_gpus", raw["replica_gpus"]),
        threads=checks.whole("threads", raw["threads"]),
        concurrency=checks.auto("concurrency", raw["concurrency"]),
        address=checks.maybe_text("address", raw["address"]),
        checkpoint_s=checks.seconds("checkpoint_s", raw["checkpoint_s"]),
        trial_timeout_s=checks.seconds("trial_timeout_s", raw["trial_timeout_s"]),
        on_code_change=checks.one_of("on_code_change", raw["on_code_change"], ("rerun", "keep")),
        mlflow=checks.tracking_uri("mlflow", check_sqlite("mlflow", mlflow) or f"sqlite:///{storage / 'mlflow.db'}"),
        features=typed_values.path("features", features).absolute() if features else storage.parent / "features",
        records=typed_values.path("records", records).absolute() if records else storage.parent / "records",
        offline=checks.flag("offline", raw["offline"]),
        spend=checks.flag("spend", raw["spend"]),
        variants=variants,
        method=raw["method"],
    )
    if config.draw == "imbalanced" and config.protocol == "base_to_new":
        raise ConfigError("draw=imbalanced: the base classes may have no image: use draw=balanced or all_to_all")
    for card in config.datasets:
        if card.shift_of:
            raise ConfigError(
                f"{card.name!r} is a test-only set: fit on datasets={card.shift_of} (eval_shift=true scores it)"
            )
    return config


def _variants(raw: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Check the method variants that a sweep defines, and return them.

    Raises:
        ConfigError: A variant has the name of a method, or content that a conf/method file may not have.
    """
    for name, file in raw.items():
        checks.card_name("variants", name)
        if name in names("method"):
            raise ConfigError(f"variants.{name}: there is a method of that name: give the variant another")
        check_method_file(f"variants.{name}", file)
    return raw
