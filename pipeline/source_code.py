"""Digests of the source code. Rows record them, and each worker compares its own with the driver's."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from methods.base import MethodInfo
from pipeline.errors import CodeMismatch, ConfigError

ROOT = Path(__file__).resolve().parent.parent
"""The folder that contains the packages `methods` and `pipeline`."""
RESULT_SOURCES = (
    *("methods/base.py", "methods/_answers.py", "methods/_lora.py", "methods/_toy.py", "methods/_state.py"),
    *("pipeline/budget.py", "pipeline/blackbox/*.py", "pipeline/data/**/*.py", "pipeline/local/*.py"),
    *("pipeline/remote/*.py", "pipeline/trials/*.py"),
)
"""Sources that can change a number of a row, except those of the method. Editing one makes finished trials stale."""
NEUTRAL_SOURCES = frozenset(
    {f"pipeline/blackbox/{name}.py" for name in ("local_pool", "probe", "replica_queue")}
    | {f"pipeline/blackbox/ray_{name}.py" for name in ("actors", "pool", "replicas", "resources")}
    | {f"pipeline/data/{name}.py" for name in ("inspect", "contact_sheet")}
    | {f"pipeline/remote/{name}.py" for name in ("archive", "call_log", "http_client", "limiter")}
    | {f"pipeline/remote/{name}.py" for name in ("opening", "permission", "wallet")}
    | {f"pipeline/trials/{name}.py" for name in ("checkpoint", "estimate", "prompts", "watchdog")}
)
"""Files that match these patterns and cannot change a number: they forward, print, draw, estimate or check."""
IMAGE_FEATURE_SOURCES = (
    *("methods/_toy.py", "pipeline/blackbox/model.py", "pipeline/blackbox/architecture.py"),
    *("pipeline/blackbox/checkpoint_files.py", "pipeline/blackbox/facts.py", "pipeline/blackbox/weights.py"),
    *("pipeline/blackbox/torchscript.py", "pipeline/data/decode.py", "pipeline/data/images.py"),
)
"""Sources that compute a stored feature from the bytes of an image."""


class ImportedCode(NamedTuple):
    """The copies of `methods` and `pipeline` that a process imports."""

    folders: str
    """The folders that contain them, separated by commas."""
    digest: str
    """SHA-256 over all their Python files."""


@cache
def code_digest() -> str:
    """Return the digest of `RESULT_SOURCES`, as rows record it. It is computed once in a process."""
    return _digest(RESULT_SOURCES)


@cache
def image_feature_digest() -> str:
    """Return the digest of `IMAGE_FEATURE_SOURCES`, which is part of the name of a feature store."""
    return _digest(IMAGE_FEATURE_SOURCES)


@cache
def driver_code() -> ImportedCode:
    """Return the packages of this process. They are hashed once, so a file edited later counts as other code."""
    return ImportedCode(*code_probe()())


def check_code(expected: ImportedCode) -> None:
    """Verify that this process imports the same code as the driver.

    Raises:
        CodeMismatch: a Python file of either package differs.
    """
    difference = code_difference(expected, ImportedCode(*code_probe()()))
    if difference:
        raise CodeMismatch(difference)


def code_difference(expected: ImportedCode, actual: ImportedCode, node: str = "") -> str:
    """Return a line that describes how a worker's code differs from the driver's; empty if it does not."""
    if actual.digest == expected.digest:
        return ""
    where = f"a worker on node {node}" if node else "a worker"
    if not actual.folders:
        return (
            f"{where} finds no packages methods and pipeline; install the driver's version ({expected.folders}) there"
        )
    if actual.folders == expected.folders:
        remedy = "copy the driver's files to that node, or, if you edited them during the run, run the command again"
    else:
        remedy = "update that folder, or remove it from PYTHONPATH"
    return f"{where} imports {actual.folders}, whose code differs from the driver's {expected.folders}; {remedy}"


def code_probe() -> Callable[[], tuple[str, str]]:
    """Return a function that finds and hashes the packages a process would import.

    The function is local and uses the standard library only: Ray sends it by value, so it works on a node whose
    packages are missing or are other ones.
    """

    def probe() -> tuple[str, str]:
        import hashlib
        import importlib.util
        from pathlib import Path

        content, folders = hashlib.sha256(), set()
        for name in ("methods", "pipeline"):
            spec = importlib.util.find_spec(name)
            for place in (spec.submodule_search_locations or ()) if spec else ():
                package = Path(place).resolve()
                folders.add(str(package.parent))
                for path in sorted(package.rglob("*.py")):
                    data = path.read_bytes()
                    content.update(f"{name}/{path.relative_to(package).as_posix()} {len(data)}\n".encode() + data)
        return ", ".join(sorted(folders)), content.hexdigest()[:16]

    return probe


def sources(patterns: Iterable[str]) -> list[Path]:
    """Return the files that match these patterns (relative to `ROOT`), sorted, without `NEUTRAL_SOURCES`."""
    paths = {path for pattern in patterns for path in ROOT.glob(pattern)}
    return sorted(path for path in paths if path.relative_to(ROOT).as_posix() not in NEUTRAL_SOURCES)


def _digest(patterns: Iterable[str]) -> str:
    content = hashlib.sha256()
    for path in sources(patterns):
        data = path.read_bytes()
        content.update(f"{path.relative_to(ROOT).as_posix()} {len(data)}\n".encode() + data)
    return content.hexdigest()[:16]


def texts_digest(texts: Sequence[str]) -> str:
    """Return the digest of a sequence of texts; empty for none."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16] if texts else ""


@cache
def method_digest(info: MethodInfo) -> str:
    """Return the digest of a method's module and of the modules of `methods/` that it imports, except `base`.

    For a method of another package, all Python files of that package are part of it.
    """
    folder, done, todo = ROOT / "methods", set[Path](), _own_files(info.cls)
    h = hashlib.sha256()
    while todo:
        path = todo.pop()
        if path in done or not path.is_file():
            continue
        done.add(path)
        source = path.read_text()
        h.update(source.encode())
        todo += [folder / f"{part}.py" for part in sorted(_imported_parts(source) - {"base"})]
    return h.hexdigest()[:16]


def _own_files(cls: type) -> list[Path]:
    try:
        file, top = Path(inspect.getfile(cls)), sys.modules[cls.__module__.partition(".")[0]]
    except (TypeError, OSError) as error:
        raise ConfigError(
            f"method {cls.__name__} is defined in a notebook or a console: save it to a file, methods=my/method.py"
        ) from error
    if top.__name__ == "methods" or not hasattr(top, "__path__"):
        return [file]
    return sorted((path for folder in top.__path__ for path in Path(folder).rglob("*.py")), reverse=True)


def _imported_parts(source: str) -> set[str]:
    """Return the modules of `methods/` that this source imports, in any way."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ["methods" if node.level else "", node.module or ""]))
            names += [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return {name.split(".")[1] for name in names if name.startswith("methods.")}
