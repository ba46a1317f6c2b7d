"""The rules of the house (docs/design.md section 2), each kept by a test."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

import methods
import pipeline
from methods import all_methods
from pipeline import cli, errors
from pipeline.config.card_files import dataset_card, local_card, model_card
from pipeline.config.compose import Config, compose
from pipeline.config.files import UNDESCRIBED, names
from pipeline.config.method_choice import method_choice
from pipeline.data.dataset import source_of
from pipeline.data.layouts.coop import COOP
from pipeline.files import file_sha256
from pipeline.trials.cells import able_with
from pipeline.trials.estimate import estimate

ROOT = Path(__file__).resolve().parents[1]
METHODS, PIPELINE = (sorted((ROOT / folder).rglob("*.py")) for folder in ("methods", "pipeline"))


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def imports(path: Path) -> tuple[str, ...]:
    """Every module that a file imports, at its top or inside a function."""
    names = list[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.append("." * node.level + (node.module or ""))
    return tuple(names)


def importers(package: str) -> set[str]:
    """The files that import a package."""
    return {label(path) for path in (*METHODS, *PIPELINE) if package in {name.split(".")[0] for name in imports(path)}}


# --- who may import what -------------------------------------------------------------------------------------------

CORE = {"torch", "numpy", "cma", "methods"}
OUTSIDE = {"asyncio", "glob", "http", "multiprocessing", "os", "pathlib", "shutil", "socket", "sqlite3", "ssl"} | {
    "subprocess",
    "tempfile",
    "threading",
    "urllib",
}
"""The parts of the standard library that reach files, processes or the network."""


def test_methods_import_no_input_or_output_and_open_no_file() -> None:
    for path in METHODS:
        for name in imports(path):
            top = name.split(".")[0]
            assert top in CORE or (top in sys.stdlib_module_names and top not in OUTSIDE), f"{label(path)}: {name}"
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert "open" not in {call.id for call in calls if isinstance(call, ast.Name)}, label(path)


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        (
            "ray",
            {
                "pipeline/sweep/on_ray.py",
                "pipeline/sweep/ray_session.py",
                "pipeline/blackbox/ray_actors.py",
                "pipeline/sweep/tune_trials.py",
                "pipeline/blackbox/ray_pool.py",
                "pipeline/blackbox/ray_replicas.py",
                "pipeline/blackbox/ray_resources.py",
                "pipeline/bench/actors.py",
                "pipeline/bench/peers.py",
            },
        ),
        ("mlflow", {"pipeline/results/tracking.py", "pipeline/results/tracking_store.py"}),
        ("starlette", {"pipeline/serve/app.py"}),
        ("uvicorn", {"pipeline/serve/server.py"}),
        ("rich", {"pipeline/sweep/live.py"}),
        ("timm", {"pipeline/local/networks.py"}),
        ("aiohttp", {"pipeline/remote/http_client.py"}),
        ("open_clip", {"pipeline/blackbox/architecture.py", "pipeline/blackbox/weights.py"}),
        ("sqlalchemy", {p for p in map(label, PIPELINE) if p.startswith("pipeline/ledger/")}),
        ("omegaconf", {"pipeline/config/files.py", "pipeline/config/method_choice.py"}),
        (
            "matplotlib",
            {
                *(f"pipeline/results/{name}.py" for name in ("drawing", "panels", "plot_labels", "plots", "rank_plot")),
                *(f"pipeline/results/{name}.py" for name in ("answers_plot", "budget_plot")),
                "pipeline/claims/figures.py",
            },
        ),
    ],
)
def test_a_large_dependency_is_imported_in_its_own_place(package: str, allowed: set[str]) -> None:
    assert importers(package) <= allowed
    assert importers(package), "the rule has lost its object"


WITHOUT_RAY = """
import sys
sys.modules["ray"] = sys.modules["mlflow"] = None  # an import of either fails
import tempfile
from pathlib import Path
import torch
torch.set_num_threads(1)
from pipeline.blackbox.endpoint import Endpoint
from pipeline.config.card_files import model_card
from tests.support.lab import Lab, small_data
folder = Path(tempfile.mkdtemp())
lab = Lab(folder / "storage", Endpoint(model_card("fake"), folder / "features"), small_data(folder))
rows = lab.run(lab.spec("logit_head"))
print(rows[0].status, rows[0].requests)
"""


def test_a_trial_runs_without_ray() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_RAY], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["done", "2"], done.stderr


def test_listing_what_exists_loads_neither_ray_nor_mlflow_nor_open_clip() -> None:
    script = (
        "import sys; from pipeline.cli import main; code = main(['methods', '--json']);"
        "print([m for m in ('ray', 'mlflow', 'open_clip') if m in sys.modules], code, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.strip().endswith("[] 0"), done.stderr
    assert {record["method"] for record in json.loads(done.stdout)} >= set(all_methods())


# --- order of imports ------------------------------------------------------------------------------------------------

ORDER = (
    *("pipeline.errors", "methods", "pipeline.untrusted", "pipeline.files", "pipeline.budget", "pipeline.cards"),
    *("pipeline.source_code", "pipeline.console", "pipeline.data.layouts", "pipeline.data", "pipeline.local"),
    *(
        "pipeline.ledger",
        "pipeline.config",
        "pipeline.results",
        "pipeline.results.published",
        "pipeline.blackbox",
        "pipeline.remote",
        "pipeline.serve",
        "pipeline.trials",
        "pipeline.sweep",
    ),
    *("pipeline.commands", "pipeline.bench", "pipeline.claims", "pipeline.cli", "pipeline.submit"),
)
"""Packages and single modules: each imports those before it only."""
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (*METHODS, *PIPELINE)
}


def imported_modules(path: Path) -> set[str]:
    """Modules of `methods` and `pipeline` that a file imports, at its top or inside a function."""
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (members & MODULES.keys()) or {str(node.module)}
    return found & MODULES.keys()


def package(module: str) -> str:
    """The entry of `ORDER` that a module belongs to; empty for the package `pipeline` itself and embedded files."""
    return max((name for name in ORDER if f"{module}.".startswith(f"{name}.")), key=len, default="")


GRAPH = {module: imported_modules(path) - {module} for module, path in MODULES.items()}


def longest_chain(graph: Mapping[str, set[str]]) -> list[str]:
    """The longest chain of imports. AssertionError: there is a cycle."""
    chains: dict[str, list[str]] = {}

    def chain(node: str, above: tuple[str, ...]) -> list[str]:
        assert node not in above, f"a cycle of imports: {' -> '.join((*above[above.index(node) :], node))}"
        if node not in chains:
            below = [chain(other, (*above, node)) for other in sorted(graph.get(node, ()))]
            chains[node] = [node, *max(below, key=len, default=[])]
        return chains[node]

    return max((chain(node, ()) for node in graph), key=len)


def test_every_module_belongs_to_a_place_in_the_order() -> None:
    without = {module for module in MODULES if not package(module)}
    assert without <= {"pipeline", "pipeline.embedded"}


def test_no_import_runs_upward() -> None:
    upward = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in others
        if package(other) not in ("", package(module)) and ORDER.index(package(other)) > ORDER.index(package(module))
    ]
    assert upward == []


def test_no_modules_import_each_other_in_a_cycle() -> None:
    assert longest_chain(GRAPH)


def test_packages_form_at_most_ten_levels() -> None:
    packages = {name for name in ORDER if MODULES.get(name, ROOT).name == "__init__.py"}
    graph: dict[str, set[str]] = {name: set() for name in packages}
    for module, others in GRAPH.items():
        if (upper := package(module)) in packages:
            graph[upper] |= {package(other) for other in others} & packages - {upper}
    assert len(longest_chain(graph)) <= 10


def test_at_most_ten_modules_lie_directly_in_pipeline() -> None:
    assert len(list((ROOT / "pipeline").glob("*.py"))) <= 10


def test_no_module_passes_on_what_it_imports() -> None:
    """One address for each name: `import x as x` and imported names in `__all__` would give it a second."""
    for path in PIPELINE:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom | ast.Import):
                again = [alias.name for alias in node.names if alias.asname == alias.name]
                assert not again, f"{label(path)} imports {again[0]} as itself"
        assert "__all__" not in {
            target.id
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }, label(path)


def drawn_modules() -> list[str]:
    """The modules that the tree of docs/design.md names. A line that starts with a folder sets the folder."""
    (tree,) = re.findall(r"## 2\. Where things are\n\n```\n(.*?)```", (ROOT / "docs/design.md").read_text(), re.DOTALL)
    modules, folder = list[str](), ""
    for line in tree.splitlines():
        if match := re.match(r"(\S+/) ", line):
            folder = match[1]
        modules += [f"{folder}{name}" for name in re.findall(r"\w+\.py", line)]
    return modules


def test_the_tree_of_the_design_page_names_every_module_once_and_no_other() -> None:
    code = {label(path) for path in (*METHODS, *PIPELINE) if path.name != "__init__.py"} | {"farebox.py"}
    assert sorted(drawn_modules()) == sorted(code)


# --- sizes ---------------------------------------------------------------------------------------------------------

LONGEST = {"methods": 200, "pipeline": 320}
"""Most lines of a module, by package."""
SHORTER = {"methods/craft.py": 150, "methods/taskres.py": 150}
"""Fewer lines for methods whose ablations and variants have files of their own."""
LONG_FOR_A_REASON = {
    "methods/base.py": "all that a method sees, on one page",
    "pipeline/cards.py": "every kind of card, on one page",
}


def test_no_module_is_longer_than_allowed() -> None:
    lines = {label(path): len(path.read_text().splitlines()) for path in (*METHODS, *PIPELINE)}
    too_long = {name for name, n in lines.items() if n > SHORTER.get(name, LONGEST[name.split("/")[0]])}
    assert too_long == LONG_FOR_A_REASON.keys()


# --- configuration -------------------------------------------------------------------------------------------------

KEYS: Mapping[str, tuple[str, str]] = {
    "sweep": ("smoke", "sweep"),
    "storage": ("elsewhere", "storage"),
    "label": ("mine", "label"),
    "model": ("fake", "model"),
    "local": ("tiny_local", "local"),
    "answers": ("topk", "answers"),
    "methods": ("[taskres]", "methods"),
    "datasets": ("[emoji]", "datasets"),
    "data.root": ("elsewhere", "data"),
    "data.small_classes": ("take_all", "data"),
    "protocol": ("base_to_new", "protocol"),
    "eval_shift": ("false", "eval_shift"),
    "transfer": ("[emoji]", "transfer"),
    "shots": ("[2]", "shots"),
    "draw": ("imbalanced", "draw"),
    "seeds": ("[9]", "seeds"),
    "hparams": ("paper", "hparams"),
    "views": ("fresh", "views"),
    "validation": ("none", "validation"),
    "curve": ("5", "curve"),
    "budget.requests": ("77", "allotments"),
    "budget.images": ("77", "allotments"),
    "budget.further": ("{zero_shot: [7]}", "further"),
    "budget.sweep.requests": ("77", "sweep_budget"),
    "budget.sweep.images": ("77", "sweep_budget"),
    "budget.global.name": ("team", "global_budget"),
    "budget.global.url": ("sqlite:///x.db", "global_budget"),
    "budget.global.requests": ("77", "global_budget"),
    "budget.global.images": ("77", "global_budget"),
    "budget.usd": ("12.5", "usd"),
    "budget.global.usd": ("12.5", "global_budget"),
    "budget.partial": ("true", "partial"),
    "replicas": ("3", "replicas"),
    "replica_gpus": ("0.5", "replica_gpus"),
    "threads": ("3", "threads"),
    "concurrency": ("3", "concurrency"),
    "address": ("auto", "address"),
    "checkpoint_s": ("3", "checkpoint_s"),
    "trial_timeout_s": ("3", "trial_timeout_s"),
    "on_code_change": ("keep", "on_code_change"),
    "mlflow": ("http://host", "mlflow"),
    "features": ("elsewhere", "features"),
    "records": ("elsewhere", "records"),
    "offline": ("true", "offline"),
    "spend": ("true", "spend"),
    "variants": ("{mine: {method: taskres}}", "variants"),
    "method": ("{zero_shot: {}}", "method"),
}
"""Each key of conf/base.yaml: another value, and the field of Config that it turns."""


def leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_base_yaml_holds_every_key_of_a_run_and_no_other() -> None:
    base = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/base.yaml"))
    assert isinstance(base, dict)
    assert set(leaves(base)) == set(KEYS)
    assert {field for _, field in KEYS.values()} == {f.name for f in dataclasses.fields(Config)}


def test_every_key_of_base_yaml_is_explained_beside_it() -> None:
    text = (ROOT / "conf/base.yaml").read_text()
    for line in text.splitlines():
        if line.strip() and not line.startswith("#") and line.strip() not in ("budget:", "data:"):
            assert " # " in line, line


def test_every_key_changes_its_field_and_no_other() -> None:
    plain = compose(["sweep=smoke", "model=tiny"])
    for key, (value, field) in KEYS.items():
        if key != "sweep":
            changed = compose(["sweep=smoke", "model=tiny", f"{key}={value}"])
            fields = {f.name for f in dataclasses.fields(Config) if getattr(plain, f.name) != getattr(changed, f.name)}
            beside = (
                {"features", "records", "mlflow"} if key == "storage" else set()
            )  # in the storage folder, or beside it
            beside |= {"label"} - ({"label"} if key.split(".")[0] in UNDESCRIBED else set())  # it may not be true now
            assert field in fields and fields <= {field} | beside, key


@pytest.mark.parametrize("path", sorted((ROOT / "conf/method").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_setting_of_a_method_file_is_a_field_of_its_config(path: Path) -> None:
    file = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(file, dict)
    assert set(file) <= {"method", "config", "per_dataset", "tune"}
    info = all_methods()[file.get("method", path.stem)]
    fields = {f.name for f in dataclasses.fields(info.cls.Config)}
    per_dataset = file.get("per_dataset") or {}
    for settings in (file.get("config") or {}, *per_dataset.values(), file.get("tune", {}).get("space", {})):
        assert set(settings) <= fields
    for dataset in ("icons", *per_dataset):
        choice = method_choice(path.stem, dataset, "paper", {})
        wanted = (file.get("config") or {}) | per_dataset.get(dataset, {})
        assert {k: v for k, v in choice.config if k in wanted} == {
            k: tuple(v) if isinstance(v, list) else v for k, v in wanted.items()
        }
        choice.build()


@pytest.mark.parametrize("name", names("sweep"))
def test_every_sweep_composes_and_plans(name: str, tmp_path: Path) -> None:
    config = compose([f"sweep={name}", f"storage={tmp_path}"])
    made = estimate(config)
    able = {method: able_with(config, config.choice(method, "icons").info) for method in config.methods}
    assert {method for method, _ in made.unable} == {m for m, some in able.items() if len(some) < len(config.answers)}
    assert all(able.values())
    allotments = sum(len(config.allotments_of(method)) * len(some) for method, some in able.items())
    cells = allotments * len(config.datasets) * len(config.shots) * len(config.seeds)
    assert len(made.trials) == cells
    if made.exact:
        assert len({t.trial_id for t in made.trials}) == cells
    for trial in made.trials:
        assert trial.cell.allotment.exceeded_unit(trial.bill, trial.bill * 0) is None, trial.cell
    assert not list(tmp_path.iterdir()), "a plan writes nothing"


@pytest.mark.parametrize("name", names("model"))
def test_every_model_card_is_whole(name: str) -> None:
    card = model_card(name)
    assert card.access and card.licence and card.source and card.note
    if card.kind == "open_clip" and card.weights == "openai":
        assert card.arch.endswith("-quickgelu"), "OpenAI's weights were trained with QuickGELU"


@pytest.mark.parametrize("name", names("local"))
def test_every_card_of_a_local_model_is_true_of_its_file(name: str) -> None:
    card = local_card(name)
    assert card.source and card.note
    assert file_sha256(card.file) == card.sha256


# --- data sets -----------------------------------------------------------------------------------------------------

EMBEDDED_SETS = [name for name in names("dataset") if dataset_card(name).layout == "parquet"]


@pytest.mark.parametrize("name", sorted(COOP))
def test_every_card_of_a_published_data_set_says_what_it_is_and_where_it_is_found(name: str) -> None:
    card = dataset_card(name)
    assert card.name == card.layout == name and not card.sha256
    assert card.url.startswith("https://") and card.licence and card.source and card.citation and card.note
    assert card.classes and card.test and bool(card.shift_of) == (not card.train)


@pytest.mark.parametrize("name", EMBEDDED_SETS)
def test_every_data_card_is_true_of_its_file(name: str) -> None:
    card = dataset_card(name)
    source = source_of(card)
    assert card.name == name and card.file.parent == ROOT / "pipeline/embedded"
    assert file_sha256(card.file) == card.sha256
    assert card.licence and card.source and card.citation
    assert len(source.classnames) == len(set(source.classnames)) == card.classes
    assert set(np.unique(source.splits)) <= {"train", "val", "test"}
    for split, count in (("train", card.train), ("val", card.val), ("test", card.test)):
        rows = source.rows_of(split)
        assert len(rows) == count, split
        if count:
            by_class = np.bincount(source.labels[rows], minlength=card.classes)
            assert len(by_class) == card.classes and by_class.min() >= {"train": 32, "val": 4, "test": 20}[split], split
    assert not set(source.keys_of(source.rows_of("train"))) & set(source.keys_of(source.rows_of("test")))


@pytest.mark.parametrize("name", [n for n in EMBEDDED_SETS if dataset_card(n).shift_of])
def test_a_shift_set_has_the_classes_of_its_source_and_only_a_test_split(name: str) -> None:
    card = dataset_card(name)
    assert card.shift_of in names("dataset")
    source = dataset_card(card.shift_of)
    assert source.shift_of is None
    assert source_of(card).classnames == source_of(source).classnames
    assert (card.template, card.templates) == (source.template, source.templates)
    assert (card.train, card.val) == (0, 0)


def test_there_are_four_small_real_data_sets_with_a_shift_pair() -> None:
    cards = [dataset_card(name) for name in EMBEDDED_SETS]
    assert len(cards) >= 4 and any(card.shift_of for card in cards)


# --- methods and their pages ---------------------------------------------------------------------------------------

METHOD_NAMES = frozenset(
    {"bbt", "cbbt", "cbbt_prompt", "coop", "craft", "craft_sequential", "linear_probe", "logit_head", "pixel_nn"}
    | {"taskres", "taskres_enhanced", "taskres_image_side", "taskres_unit", "tip_adapter", "tip_adapter_f"}
    | {"zero_shot", "zero_shot_ensemble", "zs_lp", "clap", "gda", "proker", "ss_text", "ss_text_plus", "score_ridge"}
    | {"sim", "lp_pp", "rla", "lfa", "cross_modal", "label_map", "label_map_topk", "vote", "zip", "sharpzo"}
    | {"blackvip", "vp_spsa", "bar"}
    | {"local_probe", "ares", "clip_lora"}
)
"""Stored results and scripts use these names: none may disappear."""
WITHOUT_A_PAGE: set[str] = {"zero_shot", "zero_shot_ensemble"}
"""They fit nothing. The list can only shrink."""


def test_no_method_name_disappears() -> None:
    assert set(all_methods()) >= METHOD_NAMES


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_a_method_says_what_it_costs_and_has_a_page(name: str) -> None:
    info = all_methods()[name]
    module = importlib.import_module(info.cls.__module__)
    assert module.__doc__ is not None
    assert re.search(r"^Cost: ", module.__doc__, re.MULTILINE), "say in the module's docstring what is asked"
    assert "Shapes: " in module.__doc__
    assert info.summary.endswith(".") and info.version >= 1 and info.paper
    page = ROOT / f"docs/methods/{name}.md"
    assert page.is_file() == (name not in WITHOUT_A_PAGE), page


def test_no_page_is_of_a_method_that_does_not_exist() -> None:
    assert {p.stem for p in (ROOT / "docs/methods").glob("*.md")} <= {*all_methods(), "README"}


@pytest.mark.parametrize("name", sorted(all_methods()))
def test_every_setting_is_explained_on_the_line_below_it(name: str) -> None:
    cls = all_methods()[name].cls
    config = next(c for c in cls.__mro__ if "Config" in vars(c))
    tree = ast.parse(Path(str(importlib.import_module(config.__module__).__file__)).read_text())
    bodies = [
        inner.body
        for outer in ast.walk(tree)
        if isinstance(outer, ast.ClassDef) and outer.name == config.__name__
        for inner in outer.body
        if isinstance(inner, ast.ClassDef) and inner.name == "Config"
    ]
    for body in bodies:
        for node, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign):
                assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant), ast.unparse(node)


# --- errors, words, packages ---------------------------------------------------------------------------------------


def test_the_drawn_tree_of_errors_is_the_tree_of_classes() -> None:
    drawn: dict[str, str] = {}
    parents: list[tuple[int, str]] = [(-1, "FareboxError")]
    for line in str(errors.__doc__).splitlines():
        match = re.match(r"^([ |]*)\+- (\w+)  ", line)
        if match:
            depth, name = len(match[1]), match[2]
            while parents[-1][0] >= depth:
                parents.pop()
            drawn[name] = parents[-1][1]
            parents.append((depth, name))
    real = {
        name: cls.__bases__[0].__name__
        for name, cls in vars(errors).items()
        if isinstance(cls, type) and issubclass(cls, errors.FareboxError) and cls is not errors.FareboxError
    }
    assert drawn == real


VERBS = frozenset(
    {"run", "plan", "status", "leaderboard", "ledger", "sync", "ui", "methods", "datasets", "models", "bench", "claims"}
    | {"data", "budget", "audit", "completion", "merge", "probe", "records", "serve"}
)
"""Scripts rely on them: a verb is added here on purpose, and never taken away."""


def test_the_verbs_of_the_command_line_are_frozen() -> None:
    (verbs,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert frozenset(verbs.choices) == VERBS


def test_another_distributions_package_of_the_same_name_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline.check_packages()
    monkeypatch.setattr(methods.__spec__, "submodule_search_locations", ["/site-packages/methods"])
    with pytest.raises(ImportError, match=r"'methods' comes from /site-packages/methods, not from .*PYTHONPATH"):
        pipeline.check_packages()


def test_the_installed_command_runs(tmp_path: Path) -> None:
    command = Path(sys.executable).parent / "farebox"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run([command, "methods", "--json"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert set(all_methods()) <= {entry["method"] for entry in json.loads(ran.stdout)}


def test_what_is_shipped_is_what_is_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["only-include"] == ["farebox.py", "methods", "pipeline"]
    assert "farebox.py" not in wheel["force-include"], "an editable installation would copy it away from its packages"
    assert project["project"]["scripts"] == {"farebox": "farebox:main"}
    declared = {re.split(r"[\[>=<~! ]", d)[0].lower().replace("-", "_") for d in project["project"]["dependencies"]}
    known_as = {"PIL": "pillow", "open_clip": "open_clip_torch", "yaml": "pyyaml"}
    used = {name.split(".")[0] for path in (*METHODS, *PIPELINE) for name in imports(path) if not name.startswith(".")}
    third_party = {known_as.get(n, n).lower() for n in used if n not in sys.stdlib_module_names} - {
        "methods",
        "pipeline",
    }
    assert third_party <= declared
