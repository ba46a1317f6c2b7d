"""Compile LaTeX, where it is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

DOCUMENT = r"\documentclass{{article}}\usepackage{{booktabs,graphicx}}\begin{{document}}{}\end{{document}}"


def assert_compiles(tex: str, folder: Path) -> None:
    """Compile a document with these tables and find no error and no line that is too wide. Skip without pdflatex."""
    if shutil.which("pdflatex") is None:
        pytest.skip("pdflatex is not installed")
    (folder / "tables.tex").write_text(DOCUMENT.format(tex))
    command = ["pdflatex", "-interaction=nonstopmode", "-no-shell-escape", "tables.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0 and "\n!" not in done.stdout and "Overfull" not in done.stdout, done.stdout
