"""Workers compare their code with the driver's, and a package that shadows ours is named at once."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from pipeline.blackbox import endpoint, ray_actors
from pipeline.config.card_files import model_card
from pipeline.errors import CodeMismatch, StorageError
from pipeline.source_code import (
    IMAGE_FEATURE_SOURCES,
    NEUTRAL_SOURCES,
    RESULT_SOURCES,
    ROOT,
    ImportedCode,
    check_code,
    code_difference,
    code_probe,
    driver_code,
    sources,
)
from pipeline.sweep import tune_trials
from pipeline.sweep.reservations import pending, stale_line
from pipeline.trials.checkpoint import Checkpoint
from tests.support.lab import Lab, outcome


def test_this_process_imports_the_drivers_code() -> None:
    check_code(driver_code())


def test_other_code_is_refused_and_its_folder_named() -> None:
    with pytest.raises(CodeMismatch, match=r"a worker imports .*, whose code differs from the driver's /elsewhere"):
        check_code(ImportedCode("/elsewhere", "0" * 16))
    ours = driver_code()
    assert "if you edited them during the run" in code_difference(ours, ours._replace(digest="0" * 16))
    assert "finds no packages" in code_difference(ours, ImportedCode("", "0" * 16), node="7")


def test_a_replica_a_ledger_and_a_trials_worker_each_refuse_other_code(tmp_path: Path) -> None:
    other = ImportedCode("/elsewhere", "0" * 16)
    with pytest.raises(CodeMismatch):
        ray_actors.checked(endpoint.Endpoint, other)(model_card("fake"), tmp_path / "features")
    assert not (tmp_path / "features").exists()
    ledger = ray_actors.LedgerActor.__ray_metadata__.modified_class(f"sqlite:///{tmp_path / 'ledger.db'}", other)
    assert isinstance(ledger.verify(), CodeMismatch) and isinstance(ledger.verify(), CodeMismatch)
    worker = object.__new__(tune_trials.TrialRunner.sharing({"code": other}))
    worker.setup({"index": 0})
    assert isinstance(worker.step()[tune_trials.FATAL], CodeMismatch)
    assert worker.reset_config({"index": 1}) and isinstance(worker.step()[tune_trials.FATAL], CodeMismatch)


def test_a_worker_that_cannot_read_the_trials_ends_the_run(tmp_path: Path) -> None:
    worker = object.__new__(
        tune_trials.TrialRunner.sharing({"code": driver_code(), "specs": str(tmp_path / "none.pkl")})
    )
    worker.setup({"index": 0})
    refused = worker.step()[tune_trials.FATAL]
    assert isinstance(refused, StorageError) and "the storage must be at the same path on all nodes" in str(refused)


def test_every_listed_source_exists() -> None:
    for pattern in (*RESULT_SOURCES, *IMAGE_FEATURE_SOURCES, *NEUTRAL_SOURCES):
        assert list(ROOT.glob(pattern)), pattern


def test_what_computes_a_number_is_listed_and_what_records_it_is_not() -> None:
    listed = {path.relative_to(ROOT).as_posix() for path in sources(RESULT_SOURCES)}
    assert {
        "methods/base.py",
        "pipeline/blackbox/text_tower.py",
        "pipeline/data/few_shot.py",
        "pipeline/trials/evaluate.py",
    } <= listed
    assert not {"pipeline/ledger/ledger.py", "pipeline/data/inspect.py", "pipeline/cli.py"} & listed


UNLISTED = {
    **dict.fromkeys(
        [f"config/{n}" for n in ("answers", "card_files", "compose", "files", "http_card", "method_choice", "plugins")],
        "trial id",
    ),
    "config/tuning": "trial id",
    **dict.fromkeys([f"config/{n}" for n in ("plain_yaml", "typed_values", "values")], "trial id"),
    **dict.fromkeys(["cards", "untrusted"], "trial id"),
    **dict.fromkeys([f"results/{n}" for n in ("predictions", "row", "snapshot", "store")], "stores what was computed"),
    **dict.fromkeys(["files", "ledger/records", "trials/checkpoint"], "stores what was computed"),
    **dict.fromkeys(
        ["config/renamed", "config/sqlite_urls", "errors", "ledger/sqlite_file", "trials/prompts", "trials/watchdog"],
        "refuses or passes unchanged",
    ),
    **dict.fromkeys(["source_code"], "names what others computed"),
}
"""Modules of `pipeline` that a trial imports and that no number depends on, with the reason."""
UNLISTED_FILES = {f"pipeline/{name}.py" for name in UNLISTED} | {"methods/_finite.py", "methods/_torch.py"}


def imported(path: str) -> set[str]:
    """Files of `methods` and `pipeline` that a file imports."""
    names = set[str]()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = {f"{name.replace('.', '/')}.py" for name in names if name.split(".")[0] in ("methods", "pipeline")}
    return {file for file in files if (ROOT / file).is_file()}


def listed(patterns: Iterable[str]) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in sources(patterns)}


def test_each_module_that_a_trial_imports_is_in_the_digest_or_known_not_to_matter() -> None:
    found, todo = set[str](), ["pipeline/trials/trial.py", "pipeline/blackbox/endpoint.py"]
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo += imported(path)
    assert found - listed(RESULT_SOURCES) - UNLISTED_FILES == set(), (
        "list them in RESULT_SOURCES, or in UNLISTED with a reason"
    )
    assert found >= UNLISTED_FILES


def test_each_module_that_makes_image_features_is_in_the_stores_name() -> None:
    others = UNLISTED_FILES | {"methods/base.py", "pipeline/blackbox/text_tower.py"}
    others |= {f"pipeline/blackbox/{name}.py" for name in ("facts", "model_facts")}
    others |= {f"pipeline/data/{name}.py" for name in ("file_keys", "source")}
    others |= {"methods/_lora.py", "pipeline/blackbox/lora.py", "pipeline/blackbox/request.py"}  # a changed model's
    used = set[str]().union(*map(imported, listed(IMAGE_FEATURE_SOURCES)))
    assert used - listed(IMAGE_FEATURE_SOURCES) - others == set()


def test_image_features_made_by_other_code_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = endpoint.Endpoint(model_card("fake"), tmp_path).store().folder
    assert endpoint.Endpoint(model_card("fake"), tmp_path).store().folder == one
    monkeypatch.setattr(endpoint, "image_feature_digest", lambda: "other")
    assert endpoint.Endpoint(model_card("fake"), tmp_path).store().folder != one


def test_a_result_of_another_pipeline_is_stale_and_run_again_from_the_start(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("methods=[craft]", "budget.requests=40")
    (spec,) = lab.plan(*words).trials
    rows = lab.run(spec)
    assert rows[0].code_digest == spec.code_digest != ""
    assert pending(lab.plan(*words), lab.store) == ([], {})
    Checkpoint(lab.folder, spec.account).save("a state of the old code")

    monkeypatch.setattr("pipeline.trials.plan.code_digest", lambda: "other")
    plan, keep = lab.plan(*words), lab.plan(*words, "on_code_change=keep")
    (changed,) = plan.trials
    assert changed.trial_id == spec.trial_id and changed.account != spec.account
    assert pending(plan, lab.store) == ([changed], {spec.trial_id: "pipeline"})
    assert pending(keep, lab.store) == ([], {spec.trial_id: "pipeline"})
    again = lab.run(changed)
    assert outcome(again[0]) == outcome(rows[0]) | {"code_digest": "other"}
    assert lab.paid(changed) == lab.paid(spec), "other code asks on an account of its own"
    assert pending(lab.plan(*words), lab.store) == ([], {})


def test_what_changed_is_named() -> None:
    both = stale_line({"a": "pipeline", "b": "craft", "c": "bbt"}, rerun=True)
    assert both == "3 finished trials are stale, the code changed since (method bbt, craft and the pipeline): run again"
    assert stale_line({"a": "pipeline"}, rerun=False).endswith("(the pipeline): kept as they are (on_code_change=keep)")


def test_the_digest_of_both_packages_covers_each_file_its_name_and_a_missing_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("methods", "pipeline"):
        monkeypatch.delitem(sys.modules, name)
    assert code_probe()()[0] == ""
    for name in ("methods", "pipeline"):
        (tmp_path / name / "part").mkdir(parents=True)
        (tmp_path / name / "__init__.py").touch()
    digests = [code_probe()()]
    for edit in ("one = 1\n", "one = 2\n"):
        (tmp_path / "pipeline/part/a.py").write_text(edit)
        digests.append(code_probe()())
    (tmp_path / "pipeline/part/a.py").rename(tmp_path / "pipeline/part/b.py")
    digests.append(code_probe()())
    assert {folders for folders, _ in digests} == {str(tmp_path)}
    assert len({digest for _, digest in digests}) == len(digests)


@pytest.mark.parametrize("package", ["pipeline", "methods"])
@pytest.mark.parametrize("empty", [True, False])
def test_a_package_that_shadows_ours_is_named_in_one_line(tmp_path: Path, package: str, empty: bool) -> None:
    (tmp_path / package).mkdir()
    if not empty:
        (tmp_path / package / "__init__.py").touch()
    script = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import farebox; sys.exit(farebox.main())"
    command = [sys.executable, "-P", "-c", script, "methods"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    if empty:  # a folder without __init__.py never comes before a package
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and f"{package!r} comes from {tmp_path / package}" in done.stderr
