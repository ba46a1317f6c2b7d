"""Methods from outside the package: files, installed plug-ins, and modules that cannot be imported."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import methods
from methods import BROKEN, all_methods
from pipeline.config.compose import compose
from pipeline.errors import ConfigError
from pipeline.source_code import method_digest
from pipeline.sweep.storage_id import new_id, write_id
from pipeline.trials.plan import make_plan
from tests.support.command import ROOT, here
from tests.support.lab import Lab
from tests.support.plugin import MEAN_METHOD

pytestmark = pytest.mark.usefixtures("registry")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mean.py"
    path.write_text(MEAN_METHOD)
    return path


def test_a_method_of_a_file_runs_with_its_settings_and_beside_others(lab: Lab, file: Path) -> None:
    plan = lab.plan(f"methods=[{file},taskres]", "method.feature_mean.mix=0.25")
    mine, other = plan.trials
    assert (mine.choice.name, other.choice.name) == ("feature_mean", "taskres")
    assert dict(mine.choice.config) == {"mix": 0.25}
    (row,) = lab.run(mine)
    assert row.status == "done" and row.method == "feature_mean" and row.method_digest == mine.method_digest


def test_a_method_of_a_file_is_rebuilt_where_the_file_is_missing(lab: Lab, file: Path, tmp_path: Path) -> None:
    spec = lab.spec(str(file))
    (tmp_path / "trial.pickle").write_bytes(pickle.dumps(spec))
    file.unlink()
    script = (
        "import pickle, sys; spec = pickle.load(open(sys.argv[1], 'rb')); method = spec.choice.build();"
        "print(type(pickle.loads(pickle.dumps(method))) is spec.choice.info.cls, spec.choice.name)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "trial.pickle")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", "feature_mean"], done.stderr


def test_an_edited_file_is_loaded_again_and_has_another_digest(lab: Lab, file: Path) -> None:
    first = lab.spec(str(file))
    assert lab.spec(str(file)).choice.info is first.choice.info
    file.write_text(MEAN_METHOD.replace("mix: float = 0.5", "mix: float = 0.75"))
    second = lab.spec(str(file))
    assert dict(second.choice.config) == {"mix": 0.75} and second.method_digest != first.method_digest


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def broken(:", r"mean.py cannot be imported \(SyntaxError"),
        ("raise SystemExit(3)", r"mean.py cannot be imported \(SystemExit: 3"),
        ("import no_such_package", r"mean.py cannot be imported \(ModuleNotFoundError: No module named 'no_such_pa"),
        ("x = 1", r"mean.py registers no method"),
        (MEAN_METHOD.replace('name="feature_mean"', 'name="taskres"'), "two methods are named 'taskres'"),
    ],
)
def test_a_file_that_cannot_be_used_stops_a_plan_and_no_results(
    lab: Lab, file: Path, source: str, message: str
) -> None:
    file.write_text(source)
    with pytest.raises(ConfigError, match=message):
        make_plan(compose([*lab.words, f"methods=[{file}]"]))
    BROKEN.clear()
    lab.run(lab.spec("taskres"))
    write_id(lab.folder, new_id(lab.folder))
    assert "taskres" in here("leaderboard", f"storage={lab.folder}", f"methods=[{file}]")


def test_a_missing_file_is_named(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone.py cannot be read .*expected a Python file"):
        lab.plan(f"methods=[{tmp_path / 'gone.py'}]")


def test_a_module_that_cannot_be_imported_disables_its_own_methods_only(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "unfinished.py").write_text(MEAN_METHOD + "\nassert False, 'not ready'\n")
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    registered = all_methods()
    assert "feature_mean" not in registered and "taskres" in registered
    assert BROKEN == {"methods.unfinished": "AssertionError: not ready"}
    assert lab.run(lab.spec("taskres"))[0].status == "done"
    with pytest.raises(ConfigError, match=r"no method named 'feature_mean': methods.unfinished cannot be imported"):
        lab.plan("methods=[feature_mean]")
    assert "craft" in here("methods")
    assert "methods.unfinished cannot be imported (AssertionError: not ready)" in capsys.readouterr().err


def test_the_digest_of_an_installed_plug_in_covers_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "other_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "helper.py").write_text("X = 1\n")
    (package / "mean.py").write_text("from other_package import helper\n" + MEAN_METHOD)
    info_folder = tmp_path / "other_package-1.0.dist-info"
    info_folder.mkdir()
    (info_folder / "METADATA").write_text("Metadata-Version: 2.1\nName: other-package\nVersion: 1.0\n")
    (info_folder / "entry_points.txt").write_text("[farebox.methods]\nmean = other_package.mean\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    info = all_methods()["feature_mean"]
    assert info.cls.__module__ == "other_package.mean"
    before = method_digest(info)
    (package / "helper.py").write_text("X = 2\n")
    method_digest.cache_clear()
    assert method_digest(info) != before
    for name in [name for name in sys.modules if name.startswith("other_package")]:
        del sys.modules[name]


def test_a_method_of_a_console_is_refused_with_what_to_type() -> None:
    script = MEAN_METHOD + (
        "from pipeline.errors import ConfigError\nfrom pipeline.source_code import method_digest\n"
        "try:\n    method_digest(FeatureMean.info)\nexcept ConfigError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "FeatureMean is defined in a notebook or a console: save it to a file" in done.stdout, done.stderr
