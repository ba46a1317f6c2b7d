"""The key `tune` of a method's file: typed, checked, overridden, and refused where it says nothing that can run."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.compose import compose
from pipeline.config.files import CONF, names
from pipeline.config.method_choice import MethodChoice, method_choice
from pipeline.config.tuning import Tuning
from pipeline.errors import ConfigError

TUNED = [name for name in names("method") if name.endswith("@tuned")]


def choice_of(tune: Any, *words: str) -> MethodChoice:
    """The method `mine`, which is taskres with this `tune`."""
    file = {"method": "taskres", "tune": tune}
    config = compose(["sweep=smoke", "methods=[mine]", f"variants={json.dumps({'mine': file})}", *words])
    return config.choice("mine", "icons")


def test_a_space_has_the_types_of_the_methods_settings() -> None:
    choice = choice_of({"space": {"alpha": [1, 0.5], "epochs": [3, None]}})
    assert choice.tuning == Tuning((("alpha", (1.0, 0.5)), ("epochs", (3, None))), "random", 4, 0.5)
    assert all(isinstance(value, float) for value in choice.tuning.space[0][1])
    assert choice.build({"alpha": 2.0}).config.alpha == 2.0 and choice.build().config.alpha == 0.5
    assert pickle.loads(pickle.dumps(choice)) == choice


def test_overrides_replace_keys_of_tune_and_single_settings_of_the_space() -> None:
    space = {"alpha": [0.1, 0.5], "lr": [0.1, 0.01]}
    words = ["tune.trials=3", "tune.sampler=halving", "tune.share=0.25", "tune.space.lr=[0.2]", "batch_size=8"]
    choice = choice_of({"space": space, "trials": 2}, *(f"method.mine.{word}" for word in words))
    assert choice.tuning == Tuning((("alpha", (0.1, 0.5)), ("lr", (0.2,))), "halving", 3, 0.25)
    assert dict(choice.config)["batch_size"] == 8


def test_trials_are_eight_or_all_settings_and_a_grid_has_all() -> None:
    def trials(space: dict[str, list[float]], **more: Any) -> int:
        tuning = choice_of({"space": space, **more}).tuning
        assert tuning is not None
        return tuning.trials

    assert trials({"alpha": [0.1, 1.0]}) == 3, "0.5, the method's own, is tried too"
    assert trials({"alpha": [0.1, 0.5], "lr": [0.002, 0.02]}) == 4
    assert trials({"alpha": [0.1, 0.5], "lr": [0.001, 0.002, 0.003, 0.004, 0.005]}) == 8
    assert trials({"alpha": [0.1, 0.5], "lr": [0.001, 0.002, 0.003, 0.004, 0.005]}, sampler="grid") == 10


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"space": {"alpha": [0.1]}, "trails": 3}, "method.mine.tune: no key named 'trails'; did you mean 'trials'?"),
        ({"space": {"alhpa": [0.1]}}, "method 'mine': no setting named 'alhpa'; did you mean 'alpha'?"),
        ({"space": {"alpha": ["much"]}}, "method 'mine': Value 'much'"),
        ({"space": {"alpha": 0.1}}, "method.mine.tune.space.alpha=0.1: expected a list of values, as in [0.1, 1.0]"),
        ({"space": {"alpha": []}}, "method.mine.tune.space.alpha=[]: expected a list of values"),
        ({"space": {"alpha": [1, 1.0]}}, "method.mine.tune.space.alpha=[1, 1.0]: a value is listed twice"),
        ({"space": {}}, "method.mine.tune.space: expected at least one setting"),
        ({"trials": 2}, "method.mine.tune.space: expected at least one setting"),
        ({"space": [0.1]}, "method.mine.tune.space=[0.1]: expected keys under it"),
        ({"space": {"alpha": [0.1]}, "sampler": "gird"}, "tune.sampler: no choice named 'gird'; did you mean 'grid'?"),
        ({"space": {"alpha": [0.1]}, "share": 1}, "tune.share=1: expected a number above 0 and below 1"),
        ({"space": {"alpha": [0.1]}, "share": "half"}, "tune.share=half: expected a finite number"),
        ({"space": {"alpha": [0.1]}, "trials": 0}, "tune.trials=0: expected a whole number of 1 or more"),
        ({"space": {"alpha": [0.1]}, "trials": 3}, "tune.trials=3: expected at most 2, the method's own settings"),
        ({"space": {"lr": [0.1]}, "sampler": "grid", "trials": 1}, "tune.trials=1: sampler grid tries all 2 settings"),
    ],
)
def test_a_tune_that_cannot_run_is_refused(tune: Any, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        choice_of(tune)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("method.taskres.tune.trials=3", "method.taskres.tune: the file of 'taskres' has no tune"),
        ("method.taskres.tune=3", "method.taskres.tune: the file of 'taskres' has no tune"),
    ],
)
def test_a_method_without_a_space_cannot_be_tuned_by_an_override(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose(["sweep=smoke", "methods=[taskres]", word]).choice("taskres", "icons")
    assert message in str(refused.value)


def test_a_tuned_method_has_a_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "method").mkdir()
    (tmp_path / "method/gda.yaml").write_text("tune: {space: {alpha: [0.1]}}\n")
    monkeypatch.setenv("FAREBOX_CONF", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^method.gda.tune: a tuned method has a name of its own, such as gda@tune"):
        method_choice("gda", "icons", "default", {})


def test_a_setting_is_left_out_of_the_space_with_null() -> None:
    space = "method.taskres@tuned.tune.space"
    (alpha,) = compose(["methods=taskres@tuned", f"{space}.lr=null"]).choice("taskres@tuned", "icons").tuning.space
    assert alpha[0] == "alpha"
    with pytest.raises(ConfigError, match=rf"^{space}: expected settings; {space}.SETTING=null leaves one out"):
        compose(["methods=taskres@tuned", f"{space}={{}}"]).choice("taskres@tuned", "icons")


@pytest.mark.parametrize("name", TUNED)
def test_every_shipped_space_tries_eight_settings_and_holds_the_methods_own(name: str) -> None:
    choice = method_choice(name, "icons", "default", {})
    assert name == f"{choice.info.name}@tuned" and choice.tuning is not None
    assert (choice.tuning.sampler, choice.tuning.trials, choice.tuning.share) == ("random", 8, 0.5)
    assert all(dict(choice.config)[setting] in values for setting, values in choice.tuning.space)
    assert choice.config == method_choice(choice.info.name, "icons", "default", {}).config


def test_four_tuned_methods_are_shipped_and_planned_beside_the_plain_ones() -> None:
    assert TUNED == ["bbt@tuned", "craft@tuned", "taskres@tuned", "zip@tuned"]
    assert {path.stem for path in (CONF / "method").glob("*@*.yaml")} == set(TUNED)
    config = compose(["sweep=tuned"])
    assert set(config.methods) == {"zero_shot", *TUNED, *(name.removesuffix("@tuned") for name in TUNED)}
    assert config.hparams == ("default", "paper")


# --- default and paper side by side --------------------------------------------------------------------------------


def test_settings_of_a_paper_are_a_choice_of_their_own_only_where_they_differ() -> None:
    config = compose(["sweep=tuned", "hparams=default,paper"])
    assert list(config.choices("craft", "icons")) == ["default"]
    both = config.choices("craft", "eurosat")
    assert list(both) == ["default", "paper"]
    assert (dict(both["default"].config)["sigma"], dict(both["paper"].config)["sigma"]) == (1.0, 0.02)
    assert list(config.choices("craft@tuned", "eurosat")) == ["default"]
    assert list(compose(["sweep=tuned", "hparams=paper"]).choices("craft", "icons")) == ["paper"]
