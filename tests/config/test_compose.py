"""Configuration: what a user writes is resolved and typed, and what is wrong is named with what was meant."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from methods import all_methods
from methods.base import Access
from pipeline.budget import Limits
from pipeline.config import renamed
from pipeline.config.card_files import dataset_card, model_card
from pipeline.config.compose import Config, compose
from pipeline.config.files import CONF, load, names
from pipeline.config.method_choice import method_choice
from pipeline.errors import ConfigError
from pipeline.trials.protocol import eval_cards
from tests.support.lab import write_card, write_source


def smoke(*words: str) -> Config:
    return compose(["sweep=smoke", *words])


# --- names ---------------------------------------------------------------------------------------------------------


def with_first_method(config: Config) -> None:
    """Resolve the first method: commands that only read results compose without knowing the methods."""
    config.choice(config.methods[0], "icons")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("shot=[1]", "command: no key named 'shot'; did you mean 'shots'?"),
        ("budget.request=5", "no key named 'budget.request'; did you mean 'budget.requests'?"),
        ("budget.sweep.image=5", "no key named 'budget.sweep.image'; did you mean 'budget.sweep.images'?"),
        ("methods=[zero_shto]", "no method named 'zero_shto'; did you mean 'zero_shot'?"),
        ("datasets=[icon]", "no dataset named 'icon'; did you mean 'icons'?"),
        ("model=tinny", "no model named 'tinny'; did you mean 'tiny'?"),
        ("model=tiny.yaml", "model tiny.yaml: no such file"),
        ("sweep=smok", "no sweep named 'smok'; did you mean 'smoke'?"),
        ("method.taskrse.alpha=1", "method.taskrse: no method in this sweep named 'taskrse'; did you mean 'taskres'?"),
        ("method.bbt.sigma=1", "no method in this sweep named 'bbt'"),
        ("hparams=papers", "hparams: no choice named 'papers'; did you mean 'paper'?"),
        ("validation=min5", "validation: no choice named 'min5'; did you mean 'min4'?"),
        ("on_code_change=keeps", "on_code_change: no choice named 'keeps'; did you mean 'keep'?"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_one(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        with_first_method(compose(["sweep=smoke", word] if not word.startswith("sweep=") else [word]))
    assert message in str(error.value)


@pytest.mark.parametrize(("old", "new"), renamed.KEYS.items())
def test_a_former_key_is_rejected_with_its_present_name(old: str, new: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^command: {old} was renamed to {new}$"):
        compose(["sweep=smoke", f"{old}=x"])
    sweep = tmp_path / "mine.yaml"
    sweep.write_text(f"{{{old.replace('.', ': {')}: x{'}' * (1 + old.count('.'))}")
    with pytest.raises(ConfigError, match=f"mine.yaml': {old} was renamed to {new}$"):
        compose([f"sweep={sweep}"])


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("taskres", {"alhpa": 1}, "method 'taskres': no setting named 'alhpa'; did you mean 'alpha'?"),
        ("taskres", {"alpha": "much"}, "method 'taskres': Value 'much'"),
        ("taskres", {"epochs": 1.5}, "method 'taskres': Value '1.5'"),
        ("nothing", {}, "no method named 'nothing'"),
    ],
)
def test_an_unknown_or_mistyped_setting_is_named(name: str, overrides: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        method_choice(name, "icons", "default", overrides)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("craft", {"std": 1.0}, "method 'craft': setting 'std' was renamed: use 'projection_std'"),
        ("craft", {"n": 1}, "method 'craft': setting 'n' was renamed: use 'kl_fraction' (kl_fraction=1/n)"),
        ("craft_no_kl", {"second_ask": True}, "setting 'second_ask' was renamed: use 'prompt_from_extra_population'"),
        ("craft", {"together": False}, "setting 'together' was removed: use the method 'craft_sequential'"),
        ("bbt", {"bound": 1.0}, "method 'bbt': setting 'bound' was renamed: use 'z_bound'"),
        ("bbt", {"weight": 1.0}, "method 'bbt': no setting named 'weight'"),
        ("logit_head", {"kl_share": 1.0}, "setting 'kl_share' was renamed: use 'kl_fraction'"),
        ("cbbt", {"directions": 4}, "method 'cbbt': setting 'directions' was renamed: use 'n_directions'"),
        ("cbbt_prompt", {"learned_tokens": 4}, "setting 'learned_tokens' was renamed: use 'n_ctx'"),
        ("cbbt_prompt", {"paper_start": True}, "setting 'paper_start' was renamed: use 'paper_init'"),
        ("taskres", {"image_side": True}, "setting 'image_side' was removed: use the method 'taskres_image_side'"),
        ("taskres", {"base_lr": 0.1}, "setting 'base_lr' was removed: use the method 'taskres_enhanced'"),
        ("taskres_image", {}, "method 'taskres_image' was renamed: use 'taskres_image_side'"),
        ("craft_apart", {}, "method 'craft_apart' was renamed: use 'craft_sequential'"),
    ],
)
def test_a_former_name_is_refused_with_the_present_one(name: str, overrides: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        method_choice(name, "icons", "default", overrides)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "word", ["methods=[craft_apart]", "method.craft_apart.lr=1", "variants={mine: {method: craft_apart}}"]
)
def test_a_former_method_name_is_refused_wherever_it_is_given(word: str) -> None:
    words = [word, "methods=[mine]"] if word.startswith("variants") else [word]
    with pytest.raises(ConfigError, match="method 'craft_apart' was renamed: use 'craft_sequential'"):
        with_first_method(compose(["sweep=smoke", *words]))


def test_former_names_lead_to_names_that_exist() -> None:
    settings = {f.name for info in all_methods().values() for f in dataclasses.fields(info.cls.Config)}
    assert set(renamed.SETTINGS.values()) <= settings
    assert {*renamed.METHODS.values(), *renamed.METHODS_OF_SETTINGS.values()} <= set(all_methods())
    assert not set(renamed.METHODS) & set(names("method"))


def test_an_unknown_key_in_a_sweep_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("seedz: [1]\n")
    with pytest.raises(ConfigError, match=r"mine.yaml': no key named 'seedz'; did you mean 'seeds'"):
        compose([f"sweep={path}"])


def test_a_sweep_file_of_ones_own_is_read_and_named_after_its_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("seeds: [7]\nmethods: [taskres]\nbudget:\n  requests: 50\n")
    config = compose([f"sweep={path}", "shots=2"])
    assert (config.sweep, config.seeds, config.shots, config.storage.name) == ("mine", (7,), (2,), "mine")
    assert config.allotments == (Limits(50),)


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "a: &b *c"])
def test_a_file_that_is_not_a_yaml_mapping_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.yaml"):
        compose([f"sweep={path}"])


# --- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", ["0", "-5", "1.5", "1e3", "true", "many", "[1,0]", "[10,-1]", "[true]", "99999999999999999999"]
)
@pytest.mark.parametrize("key", ["budget.requests", "budget.images"])
def test_a_budget_must_be_a_whole_number_of_one_or_more(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=r"budget|a limit of 99,999"):
        smoke(f"{key}={value}")


@pytest.mark.parametrize("key", ["budget.sweep.requests", "budget.sweep.images", "budget.global.requests"])
@pytest.mark.parametrize("value", ["0", "2.5", "true", "[5]"])
def test_a_ceiling_is_one_whole_number(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}=.*: expected a whole number of 1 or more"):
        smoke(f"{key}={value}")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("shots", "'shots' is not key=value"),
        ("shots=[1", "cannot read shots=[1: "),
        ("shots=[]", "shots=[]: expected at least one"),
        ("shots=[0]", "shots=0: expected a whole number of 1 or more"),
        ("shots=[1.5]", "shots=1.5: expected a whole number"),
        ("shots={a: 1}", "shots={'a': 1}: expected a value or a list"),
        ("seeds=[-1]", "seeds=-1: expected a whole number of 0 or more"),
        ("seeds=[true]", "seeds=True: expected a whole number"),
        ("views=some", "views=some: expected a whole number of 0 or more"),
        ("curve=-1", "curve=-1: expected a whole number of 0 or more"),
        ("threads=0", "threads=0: expected a whole number of 1 or more"),
        ("replicas=0", "replicas=0: expected a whole number of 1 or more"),
        ("replica_gpus=2", "replica_gpus=2: expected auto, or a number above 0 and up to 1"),
        ("replica_gpus=0", "replica_gpus=0: expected auto"),
        ("concurrency=half", "concurrency=half: expected a whole number"),
        ("eval_shift=maybe", "eval_shift=maybe: expected true or false"),
        ("budget.partial=1", "budget.partial=1: expected true or false"),
        ("checkpoint_s=soon", "checkpoint_s=soon: expected a number of seconds"),
        ("checkpoint_s=-1", "checkpoint_s=-1: expected a number of seconds"),
        ("storage=", "storage=None: expected a name or a path"),
        ("storage=[a,b]", "storage=['a', 'b']: expected a name or a path"),
        ("storage=${nothing}", "Interpolation key 'nothing' not found"),
        ("budget=5", "budget=5: expected keys under it, as in budget.KEY=VALUE"),
        ("budget.global=team", "budget.global=team: expected keys under it"),
        ("method=taskres", "method=taskres: expected keys under it"),
        ("method.taskres=1", "method.taskres=1: expected method.taskres.SETTING=VALUE"),
        ("methods=[taskres,taskres]", "methods: 'taskres' is listed twice"),
        ("datasets=[icons,icons]", "datasets: 'icons' is listed twice"),
        ("seeds=[1,2,1]", "seeds: 1 is listed twice"),
        ("shots=[4,4]", "shots: 4 is listed twice"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        smoke(word)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_single_value_is_read_as_a_list_of_one() -> None:
    config = smoke("shots=4", "seeds=0", "methods=taskres", "datasets=digits")
    assert (config.shots, config.seeds, config.methods) == ((4,), (0,), ("taskres",))
    assert [card.name for card in config.datasets] == ["digits"]


def test_later_overrides_take_precedence_over_earlier_ones_and_over_the_sweep() -> None:
    config = smoke("shots=[1,2]", "shots=[4]", "budget.images=7")
    assert config.shots == (4,)
    assert config.allotments == (Limits(300, 7),)


# --- budgets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "points"),
    [
        (["budget.requests=8000"], [Limits(8000)]),
        (["budget.requests=null"], [Limits()]),
        (["budget.requests=100", "budget.images=900"], [Limits(100, 900)]),
        (["budget.requests=[100,1000]"], [Limits(100), Limits(1000)]),
        (["budget.requests=[100]", "budget.images=[null,9000]"], [Limits(100), Limits(100, 9000)]),
        (["budget.requests=[1,2]", "budget.images=[8,9]"], [Limits(1, 8), Limits(1, 9), Limits(2, 8), Limits(2, 9)]),
        (["budget.requests=null", "budget.images=[5000,9000]"], [Limits(None, 5000), Limits(None, 9000)]),
    ],
)
def test_a_list_makes_the_budget_an_axis_of_every_combination(words: list[str], points: list[Limits]) -> None:
    assert smoke(*words).allotments == tuple(points)


@pytest.mark.parametrize("key", ["budget.requests", "budget.images"])
def test_an_axis_without_points_or_with_one_twice_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}=\[\]: expected at least one"):
        smoke(f"{key}=[]")
    with pytest.raises(ConfigError, match=f"{key}: 100 is listed twice"):
        smoke(f"{key}=[100,7,100]")


def test_the_ledger_is_in_the_storage_unless_a_url_names_a_shared_one(tmp_path: Path) -> None:
    assert smoke(f"storage={tmp_path}").ledger_url == f"sqlite:///{tmp_path}/ledger.db"
    shared = smoke("budget.global.url=sqlite:////srv/ledger.db", "budget.global.name=team", "budget.global.images=9")
    assert shared.ledger_url == "sqlite:////srv/ledger.db"
    assert (shared.global_budget.name, shared.global_budget.limits) == ("team", Limits(None, 9))


# --- methods -------------------------------------------------------------------------------------------------------


def test_settings_are_typed_by_the_methods_config() -> None:
    config = dict(method_choice("taskres", "icons", "default", {"alpha": 1, "epochs": "7"}).config)
    assert config["alpha"] == 1.0 and isinstance(config["alpha"], float)
    assert config["epochs"] == 7
    built = method_choice("taskres", "icons", "default", {"alpha": 1}).build()
    assert isinstance(built.config, all_methods()["taskres"].cls.Config) and built.config.alpha == 1.0


def test_per_dataset_settings_apply_only_with_hparams_paper() -> None:
    plain = all_methods()["taskres"].cls.Config()
    for dataset, settings, alpha in (
        ("oxford_flowers", "paper", 1.0),
        ("oxford_flowers", "default", plain.alpha),  # type: ignore[attr-defined]
        ("icons", "paper", plain.alpha),  # type: ignore[attr-defined]
    ):
        assert dict(method_choice("taskres", dataset, settings, {}).config)["alpha"] == alpha
    overridden = method_choice("taskres", "oxford_flowers", "paper", {"alpha": 0.25})
    assert dict(overridden.config)["alpha"] == 0.25, "the command has the last word"


def test_a_variant_is_a_file_that_names_a_method_and_settings(tmp_path: Path) -> None:
    path = tmp_path / "taskres_wide.yaml"
    path.write_text("method: taskres\nconfig: {alpha: 2.0}\n")
    choice = method_choice(str(path), "icons", "default", {})
    assert choice.info.name == "taskres" and dict(choice.config)["alpha"] == 2.0
    path.write_text("method: taskrse\n")
    with pytest.raises(ConfigError, match="no method named 'taskrse'; did you mean 'taskres'"):
        method_choice(str(path), "icons", "default", {})


VARIANT = "variants={slow: {method: taskres, config: {alpha: 0.1, epochs: 7}}}"


def test_a_sweep_may_define_variants_of_its_own() -> None:
    config = smoke(VARIANT, "methods=[taskres,slow]", "method.slow.alpha=0.2")
    assert config.methods == ("taskres", "slow")
    choice = config.choice("slow", "digits")
    assert (choice.name, choice.info.name) == ("slow", "taskres")
    settings = dict(choice.config)
    assert (settings["alpha"], settings["epochs"]) == (0.2, 7), "overrides reach it as they reach any method"
    assert dict(config.choice("taskres", "digits").config)["epochs"] is None


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "variants={craft: {method: taskres}}",
            "variants.craft: there is a method of that name: give the variant anot",
        ),
        ("variants={mine: {methd: taskres}}", "variants.mine: no key named 'methd'; did you mean 'method'?"),
        ("variants={mine: {config: 3}}", "variants.mine.config=3: expected SETTING=VALUE under it"),
        ("variants.mine=3", "variants.mine=3: expected variants.mine.config.SETTING=VALUE"),
        ("variants={mine: {method: taskrse}}", "no method named 'taskrse'; did you mean 'taskres'"),
        ("variants={mine: {method: taskres, config: {alhpa: 1}}}", "no setting named 'alhpa'; did you mean 'alpha'?"),
    ],
)
def test_an_invalid_variant_is_rejected(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        smoke(word, "methods=[mine]").choice("mine", "digits")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: taskres\nconfg: {alpha: 0.1}\n", "no key named 'confg'; did you mean 'config'?"),
        ("method: taskres\nconfig: 3\n", "own.yaml.config=3: expected SETTING=VALUE under it"),
        ("method:\n", "own.yaml.method=None: expected a method's name"),
    ],
)
def test_a_methods_file_is_checked_as_a_variant_is(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        method_choice(str(tmp_path / "own.yaml"), "digits", "default", {})
    (tmp_path / "own.yaml").write_text("method: taskres\nconfig:\n")
    assert method_choice(str(tmp_path / "own.yaml"), "digits", "default", {}).info.name == "taskres"


# --- cards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["icons_outline", "emoji_contrast"])
def test_a_shift_set_cannot_be_fitted_on(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{name}' is a test-only set: fit on datasets={name.split('_')[0]} "):
        smoke(f"datasets=[{name}]")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clases": 3}, "no key named 'clases'; did you mean 'classes'?"),
        ({}, "missing 4 required keyword-only arguments: 'classes', 'train', 'val', and 'test'"),
        ({"augment": "crop-flip"}, "augment: no choice named 'crop-flip'; did you mean 'crop_flip'?"),
        ({"template": "a photo"}, "template 'a photo': expected one {} where the class name goes"),
        ({"templates": ["{} {}"]}, "template '{} {}': expected one {}"),
    ],
)
def test_a_wrong_data_card_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    source = write_source(tmp_path / "mine.parquet", [b""], [0], ["test"], ["thing"])
    sizes = {"classes": 1, "train": 0, "val": 0, "test": 1} if "template" in str(change) or "augment" in change else {}
    with pytest.raises(ConfigError) as error:
        dataset_card(str(write_card(tmp_path, source, **sizes, **change)))
    assert message in str(error.value)


def test_a_model_card_of_ones_own_is_read_and_its_grant_checked(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("kind: fake\ngrant: text + scores\n")
    card = model_card(str(path))
    assert (card.name, card.access) == ("mine", Access.TEXT | Access.SCORES)
    path.write_text("kind: fake\ngrant: SOFT+SCORE\n")
    with pytest.raises(
        ConfigError, match="grant: unknown access 'SCORE'; expected TEXT, SOFT, PIXELS, LABELS, TOPK, SCORES"
    ):
        model_card(str(path)).access  # noqa: B018


# --- sweeps that build on others -----------------------------------------------------------------------------------


def test_a_union_joins_lists_and_its_own_keys_override(tmp_path: Path) -> None:
    first, second, both = (tmp_path / f"{name}.yaml" for name in ("first", "second", "both"))
    first.write_text("methods: [zero_shot, craft]\nshots: [1, 2]\nviews: 3\nmethod:\n  craft: {sigma: 0.5}\n")
    second.write_text("methods: [zero_shot, taskres]\nshots: [2, 4]\nviews: 5\nmethod:\n  craft: {popsize: 8}\n")
    both.write_text(f"union: [{first}, {second}]\nseeds: [7]\nshots: [16]\n")
    config = compose([f"sweep={both}"])
    assert (config.sweep, config.methods) == ("both", ("zero_shot", "craft", "taskres"))
    assert (config.shots, config.seeds, config.views) == ((16,), (7,), 5)
    settings = dict(config.choice("craft", "icons").config)
    assert (settings["sigma"], settings["popsize"]) == (0.5, 8)
    above = tmp_path / "above.yaml"
    above.write_text(f"union: {both}\nseeds: [1]\n")
    assert compose([f"sweep={above}"]).methods == config.methods, "a union of a union"


def test_a_union_that_is_circular_or_names_an_unknown_sweep_is_rejected(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(f"union: [{two}]\n")
    two.write_text(f"union: [{one}]\n")
    with pytest.raises(ConfigError, match=r"its union is circular \(.*one.yaml -> .*two.yaml -> .*one.yaml\)"):
        compose([f"sweep={one}"])
    one.write_text("union: [demoo]\n")
    with pytest.raises(ConfigError, match="no sweep named 'demoo'; did you mean 'demo'"):
        compose([f"sweep={one}"])
    with pytest.raises(ConfigError, match="command: no key named 'union'"):
        smoke("union=[demo]")


def test_a_sweeps_settings_of_a_method_that_the_command_leaves_out_are_left_out_too(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("methods: [bbt, craft]\nmethod:\n  bbt: {sigma: 0.5}\n")
    assert compose([f"sweep={mine}", "methods=[craft]"]).method == {}
    with pytest.raises(ConfigError, match=r"method\.bbt: no method in this sweep named 'bbt'"):
        compose([f"sweep={mine}", "methods=[craft]", "method.bbt.sigma=1"])
    mine.write_text("methods: [bbt]\nmethod:\n  btb: {sigma: 0.5}\n")
    with pytest.raises(ConfigError, match=r"method\.btb: no method in this sweep named 'btb'; did you mean 'bbt'"):
        compose([f"sweep={mine}"])


ELEVEN = (
    *("imagenet", "caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101", "fgvc_aircraft"),
    *("sun397", "dtd", "eurosat", "ucf101"),
)


@pytest.mark.parametrize(
    ("sweep", "methods", "shots", "seeds", "limits"),
    [
        ("craft_paper", ("zero_shot", "bbt", "craft"), (1, 2, 4, 8, 16), (1, 2, 3), (Limits(),)),
        ("taskres_paper", ("zero_shot", "taskres"), (1, 2, 4, 8, 16), (1, 2, 3), (Limits(),)),
        ("cbbt_paper", ("zero_shot", "cbbt_prompt", "cbbt"), (16,), (1,), (Limits(),)),
    ],
)
def test_a_papers_sweep_is_its_grid(
    sweep: str, methods: tuple[str, ...], shots: tuple[int, ...], seeds: tuple[int, ...], limits: tuple[Limits, ...]
) -> None:
    config = compose([f"sweep={sweep}"])
    assert (config.methods, config.shots, config.seeds, config.allotments) == (methods, shots, seeds, limits)
    assert tuple(card.name for card in config.datasets) == ELEVEN
    assert (config.model.name, config.hparams, config.validation, config.views) == ("rn50", ("paper",), "none", "fresh")
    for name in methods[1:]:
        if name != "taskres":
            assert dict(config.choice(name, "dtd").config)["paper_init"] is True


def test_the_papers_sweep_is_the_union_of_theirs_under_one_meter() -> None:
    config = compose(["sweep=paper"])
    parts = [compose([f"sweep={name}_paper"]) for name in ("craft", "taskres", "cbbt")]
    for key in ("methods", "datasets", "shots", "seeds"):
        united = {item for part in parts for item in getattr(part, key)}
        assert set(getattr(config, key)) - united <= {"logit_head"}, "the reference that gains are measured from"
        assert united <= set(getattr(config, key))
    assert config.allotments == (Limits(8000), Limits(8000, 256_000))
    for part in parts:
        for name in part.methods:
            assert config.choice(name, "oxford_flowers") == part.choice(name, "oxford_flowers")


# --- names of cards and stores -------------------------------------------------------------------------------------


def named(folder: Path, file: str, name: str, **changes: Any) -> Path:
    """A card that is never opened."""
    numbers = {"classes": 2, "train": 4, "val": 4, "test": 4}
    lines = {"path": "x.parquet", "sha256": "a" * 64, "template": "a {}", **numbers, **changes, "name": name}
    (folder / file).write_text(json.dumps(lines))
    return folder / file


@pytest.mark.parametrize("words", [["datasets=[{a},{b}]"], ["transfer=[{b}]"], ["transfer=[{c}]", "eval_shift=[{s}]"]])
@pytest.mark.parametrize("second", ["mine", "Mine"])
def test_two_cards_of_one_name_are_refused_and_both_files_are_named(
    tmp_path: Path, words: list[str], second: str
) -> None:
    files = {
        "a": named(tmp_path, "a.yaml", "mine"),
        "b": named(tmp_path, "b.yaml", second),
        "s": named(tmp_path, "s.yaml", "other", shift_of="mine"),
        "c": named(tmp_path, "c.yaml", "other"),
    }
    config = smoke(f"datasets=[{files['a']}]", "eval_shift=false", *(word.format(**files) for word in words))
    with pytest.raises(ConfigError) as error:
        eval_cards(config)
    assert ".yaml and /" in str(error.value) and "change the `name:` of one card" in str(error.value)


@pytest.mark.parametrize(
    ("kind", "word"), [("dataset", "datasets=[icons]"), ("model", "model=fake"), ("method", "methods=[craft]")]
)
def test_an_own_file_with_the_name_of_a_shipped_one_is_refused_not_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, word: str
) -> None:
    monkeypatch.setenv("FAREBOX_CONF", str(tmp_path))
    own = tmp_path / kind / f"{word.split('=')[1].strip('[]')}.yaml"
    own.parent.mkdir()
    with_first_method(smoke(word))
    own.write_text("x: 1")
    with pytest.raises(ConfigError, match=f"two files define {kind} .*{own}; rename your own"):
        with_first_method(smoke(word))


def test_a_card_may_be_named_once_in_a_list_and_again_in_another(tmp_path: Path) -> None:
    a, b = named(tmp_path, "a.yaml", "mine"), named(tmp_path, "b.yaml", "other")
    eval_cards(smoke(f"datasets=[{a},{b}]", f"transfer=[{a},{b}]", "eval_shift=false"))
    with pytest.raises(ConfigError, match="'mine' is listed twice"):
        eval_cards(smoke(f"datasets=[{a},{tmp_path}/../{tmp_path.name}/a.yaml]", "eval_shift=false"))


def test_a_set_that_a_fit_would_score_twice_is_refused_before_anything_is_spent(tmp_path: Path) -> None:
    a, s = named(tmp_path, "a.yaml", "mine"), named(tmp_path, "s.yaml", "shifted", shift_of="mine")
    with pytest.raises(ConfigError, match=r"transfer: 'shifted' is a shift set of 'mine'.* eval_shift=false"):
        eval_cards(smoke(f"datasets=[{a}]", f"eval_shift=[{s}]", f"transfer=[{s}]"))
    (other,) = eval_cards(smoke(f"datasets=[{a}]", "eval_shift=false", f"transfer=[{s}]"))["mine"]
    assert other[0] == "transfer"


@pytest.mark.parametrize("name", ["", " ", "a\nb", "\x1b[2J", "all", " a", "数" * 50, True, "\u202e"])
def test_a_name_that_tables_or_files_cannot_hold_is_refused(tmp_path: Path, name: Any) -> None:
    with pytest.raises(ConfigError, match=r"a\.yaml(: name| is not valid YAML: .*control character)"):
        dataset_card(str(named(tmp_path, "a.yaml", name)))


@pytest.mark.parametrize(
    "uri", ["runs/mlflow", "/abs", "file:///abs/runs", "file:/abs", "foo://x", "sqlite://", "sqlite:///:memory:"]
)
def test_an_mlflow_store_that_cannot_keep_runs_is_refused_before_a_run(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="mlflow=") as error:
        smoke(f"mlflow={uri}")
    assert len(str(error.value)) <= 300 and "sqlite" in str(error.value)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    if "abs" in uri or uri.startswith("runs"):
        assert smoke(f"mlflow={uri}").mlflow == uri


@pytest.mark.parametrize("uri", ["http://h:5000", "databricks", "postgresql+psycopg://u:p@h/n", "sqlite:////x/y.db"])
def test_an_mlflow_store_that_can_is_taken_as_it_is(uri: str) -> None:
    assert smoke(f"mlflow={uri}").mlflow == uri


@pytest.mark.parametrize(
    "word", ["methods=taskres", "datasets=icons", "shots=2", "seeds=7", "budget.requests=9", "views=2"]
)
def test_a_label_is_dropped_when_an_override_may_make_it_false(word: str) -> None:
    assert compose(["sweep=smoke"]).label == "The toy model: these numbers mean nothing."
    assert compose(["sweep=smoke", "storage=x", "replicas=1", "mlflow=http://h", "data.root=/d"]).label
    assert compose(["sweep=smoke", word]).label == ""
    assert compose(["sweep=smoke", word, "label=mine"]).label == "mine"


def test_lists_need_no_brackets() -> None:
    config = smoke(
        "methods=zero_shot,craft", "datasets=icons,digits", "shots=1,16", "seeds=1,2,3", "transfer=emoji,digits"
    )
    assert (config.methods, config.shots, config.seeds) == (("zero_shot", "craft"), (1, 16), (1, 2, 3))
    assert [card.name for card in config.datasets] == ["icons", "digits"] and config.transfer == ("emoji", "digits")
    assert smoke("budget.requests=100, null").allotments == (Limits(100), Limits())
    assert smoke("eval_shift=icons_outline,emoji_contrast").eval_shift == ("icons_outline", "emoji_contrast")
    assert smoke('label="a,b"').label == "a,b" and smoke("label=a,b").label == "a,b"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("seeds=1,", "seeds=1,: there is nothing before or after a comma"),
        ("seeds=1,02", "seeds=02: expected a whole number of 0 or more without leading zeros: type 2"),
        ("shots=1,yes", "shots=yes: expected a whole number"),
        ("seeds=1,1", "seeds: 1 is listed twice"),
        ("methods=craft,,bbt", "there is nothing before or after a comma"),
    ],
)
def test_values_between_commas_are_checked_as_others(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        smoke(word)


def test_single_methods_may_have_further_allotments() -> None:
    config = smoke("methods=zero_shot,craft", "budget.requests=300", "budget.further.craft=50,300,100")
    assert config.allotments_of("craft") == (Limits(50), Limits(300), Limits(100))
    assert config.allotments_of("zero_shot") == (Limits(300),)
    with pytest.raises(ConfigError, match=r"budget\.further\.bbt: no method in this sweep named 'bbt'"):
        smoke("methods=craft", "budget.further.bbt=5")
    with pytest.raises(ConfigError, match=r"budget\.further\.craft\.requests=0: expected a whole number of 1 or more"):
        smoke("methods=craft", "budget.further.craft=0")
    assert compose(["sweep=demo", "methods=bbt"]).further == {}


def test_further_allotments_of_a_method_may_be_in_image_rows() -> None:
    config = smoke("methods=gda,craft", "budget.requests=300", "budget.further.gda.images=40,80")
    assert config.allotments_of("gda") == (Limits(300, 40), Limits(300, 80), Limits(300))
    assert config.allotments_of("craft") == (Limits(300),)
    both = smoke("methods=gda", "budget.images=[null,9]", "budget.further.gda={requests: [5, 6], images: 7}")
    assert both.further["gda"] == (Limits(5, 7), Limits(6, 7))
    alone = smoke("methods=gda", "budget.images=[null,9]", "budget.further.gda=5")
    assert alone.further["gda"] == (Limits(5), Limits(5, 9))
    for word, said in (
        ("budget.further.gda.image=9", r"budget\.further\.gda: no choice named 'image'"),
        ("budget.further.gda.images=0", r"budget\.further\.gda\.images=0: expected a whole number of 1 or more"),
    ):
        with pytest.raises(ConfigError, match=said):
            smoke("methods=gda", word)


def test_imbalanced_shots_are_16_for_each_class_in_the_mean() -> None:
    assert (smoke("shots=4").shots, smoke("shots=4").draw) == ((4,), "balanced")
    assert (smoke("shots=imbalanced").shots, smoke("shots=imbalanced").draw) == ((16,), "imbalanced")
    assert (smoke("shots=1,4", "draw=imbalanced").shots, smoke("draw=imbalanced").draw) == ((1, 4), "imbalanced")
    with pytest.raises(ConfigError, match="draw: no choice named 'unbalanced'"):
        smoke("draw=unbalanced")
    for words in ("imbalance", "imbalanced,16"):
        with pytest.raises(ConfigError, match="expected a whole number of 1 or more, or shots=imbalanced alone"):
            smoke(f"shots={words}")
    with pytest.raises(ConfigError, match="draw=imbalanced: the base classes may have no image"):
        smoke("shots=imbalanced", "protocol=base_to_new")


# --- ranges of settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("craft.popsize=1", "expected a whole number of 2 or more"),
        ("craft.sigma=0", "expected a number above 0"),
        ("craft.lr=-1", "expected a number of 0 or more"),
        ("craft.kl_fraction=2", "expected a number from 0 to 1"),
        ("taskres.batch_size=0", "expected a whole number of 1 or more"),
        ("coop.epochs=-3", "expected a whole number of 1 or more"),
        ("zip.n_directions=0", "expected a whole number of 1 or more"),
        ("cross_modal.batch_sizes=[8,0]", "expected a whole number of 1 or more"),
        ("craft@tuned.tune.space.sigma=[-1]", "expected a number above 0"),
    ],
)
def test_a_setting_out_of_its_range_is_refused_in_the_plan(word: str, message: str) -> None:
    method = word.partition(".")[0]
    with pytest.raises(ConfigError) as refused:
        compose([f"methods={method}", f"method.{word}"]).choice(method, "icons")
    assert f"method.{method}." in str(refused.value) and str(refused.value).endswith(message)


def test_zero_and_negative_settings_are_accepted_where_they_mean_something() -> None:
    words = ("taskres.alpha=0", "craft.generations=0", "cbbt.n_directions=0", "linear_probe.coarse=[-6.0]")
    for word in words:
        method = word.partition(".")[0]
        assert compose([f"methods={method}", f"method.{word}"]).choice(method, "icons")


def test_every_shipped_method_and_paper_setting_is_in_its_range() -> None:
    for name in (path.stem for path in (CONF / "method").glob("*.yaml")):
        for dataset in ("icons", *(load("method", name).get("per_dataset") or {})):
            for hparams in ("default", "paper"):
                assert method_choice(name, dataset, hparams, {})
