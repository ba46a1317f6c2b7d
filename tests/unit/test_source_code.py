"""Workers compare their code with the driver's, and a package that shadows ours is named at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import CodeMismatch
from pipeline.source_code import (
    IMAGE_FEATURE_SOURCES,
    NEUTRAL_SOURCES,
    RESULT_SOURCES,
    ROOT,
    ImportedCode,
    check_code,
    code_difference,
    driver_code,
    sources,
)


def test_this_process_imports_the_drivers_code() -> None:
    check_code(driver_code())


def test_other_code_is_refused_and_its_folder_named() -> None:
    with pytest.raises(CodeMismatch, match=r"a worker imports .*, whose code differs from the driver's /elsewhere"):
        check_code(ImportedCode("/elsewhere", "0" * 16))
    ours = driver_code()
    assert "if you edited them during the run" in code_difference(ours, ours._replace(digest="0" * 16))
    assert "finds no packages" in code_difference(ours, ImportedCode("", "0" * 16), node="7")


def test_every_listed_source_exists() -> None:
    for pattern in (*RESULT_SOURCES, *IMAGE_FEATURE_SOURCES, *NEUTRAL_SOURCES):
        assert list(ROOT.glob(pattern)), pattern


def test_what_computes_a_number_is_listed_and_what_records_it_is_not() -> None:
    listed = {path.relative_to(ROOT).as_posix() for path in sources(RESULT_SOURCES)}
    assert {"methods/base.py", "pipeline/blackbox/text.py", "pipeline/data/split.py", "pipeline/scoring.py"} <= listed
    assert not {"pipeline/blackbox/ledger.py", "pipeline/data/report.py", "pipeline/cli.py"} & listed


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
