"""Archives of recorded answers, with which others repeat a paid sweep (`offline=true`) without sending anything.

An archive is a tar file. Its first member is a sealed manifest with the SHA-256 of all others, which unpack into a
folder `records`, to lie beside a storage. The model's card may be among them.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.blackbox.feature_store import SUFFIX, FeatureFile
from pipeline.errors import ConfigError, DamagedFile, DataError, StorageError
from pipeline.files import file_sha256, parse_sealed_json, read_sealed_json, sealed_json
from pipeline.remote.records import IDENTITY

MANIFEST = "records.json"
ROOT = "records"
"""Folder that an archive unpacks into."""
LARGEST_MANIFEST = 2**28


@dataclass(frozen=True)
class Contents:
    """What an archive holds."""

    sources: tuple[str, ...]
    """Whose answers: see `HttpCard.source`."""
    answers: int
    """Recorded rows: features of images and texts, scores of images."""
    files: int
    bytes: int


def pack(records: Path, models: Collection[str], to: Path, card: Path | None = None) -> Contents:
    """Write the recorded answers of models to an archive, after verifying each of them.

    Args:
        records: folder of the recorded answers.
        models: identities of models, as in the column `model_digest` of rows.
        to: the archive.
        card: file of the model's card, which is packed with the answers.

    Raises:
        ConfigError: there are no records of these models, or the archive exists.
        DataError: a record is damaged.
        StorageError: the archive cannot be written.
    """
    if to.exists():
        raise ConfigError(f"to={to}: it exists: name another file, or remove it")
    chosen = dict(_sources(records, models))
    if not chosen:
        raise ConfigError(f"{records} has no answers of the models of this storage: run it first, or set records=DIR")
    files = sorted(path for folder in chosen.values() for path in folder.rglob("*") if _recorded(path))
    answers = sum(_verified_rows(path) for path in files if path.suffix == SUFFIX)
    names = [path.relative_to(records).as_posix() for path in files]
    if card is not None:
        files, names = [*files, card], [*names, card.name]
    listed = [
        {"path": f"{ROOT}/{name}", "bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path, name in zip(files, names, strict=True)
    ]
    manifest = sealed_json({"sources": sorted(chosen), "answers": answers, "files": listed}, indent=1)
    temporary = to.with_name(f".{to.name}.{uuid.uuid4().hex}.tmp")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(temporary, "w") as archive:
            archive.addfile(_member(MANIFEST, len(manifest)), io.BytesIO(manifest))
            for path, entry in zip(files, listed, strict=True):
                with path.open("rb") as file:
                    archive.addfile(_member(str(entry["path"]), path.stat().st_size), file)
        temporary.replace(to)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"{to} cannot be written ({error.strerror or error}): name another file") from error
    return _contents(json.loads(manifest))


def verify(archive: Path) -> Contents:
    """Verify that an archive is whole; nothing is unpacked.

    Raises:
        DataError: it cannot be read, or a file in it is missing, damaged or not listed. The message names it.
    """
    try:
        with tarfile.open(archive, "r:") as tar:
            return _verified(archive, tar)
    except OSError as error:
        raise DataError(f"{archive} cannot be read ({error.strerror or error})") from error
    except tarfile.TarError as error:
        raise DataError(f"{archive} is no archive of recorded answers ({error})") from error


def _verified(archive: Path, tar: tarfile.TarFile) -> Contents:
    members = iter(tar)
    first = next(members, None)
    if first is None or first.name != MANIFEST or not first.isfile() or first.size > LARGEST_MANIFEST:
        raise DataError(f"{archive} is no archive of recorded answers: its first file is not {MANIFEST}")
    try:
        opened = tar.extractfile(first)
        manifest = parse_sealed_json(Path(MANIFEST), opened.read() if opened else b"")
        expected = {entry["path"]: entry["sha256"] for entry in manifest["files"]}
    except (DamagedFile, KeyError, TypeError) as error:
        raise DataError(f"{archive}: its manifest is damaged: {error}") from error
    for member in members:
        if not member.isfile() or member.name not in expected:
            raise DataError(f"{archive}: {member.name[:80]!r} is not in its manifest")
        if _sha256(tar, member) != expected.pop(member.name):
            raise DataError(f"{archive}: {member.name} is damaged: ask for another copy")
    if expected:
        raise DataError(f"{archive}: {len(expected)} files are missing, such as {min(expected)}")
    return _contents(manifest)


def _contents(manifest: dict[str, Any]) -> Contents:
    sizes = [entry["bytes"] for entry in manifest["files"]]
    return Contents(tuple(manifest["sources"]), manifest["answers"], len(sizes), sum(sizes))


def _sources(records: Path, models: Collection[str]) -> Iterator[tuple[str, Path]]:
    """Yield the sources of these models that have records, and their folders."""
    for file in sorted(records.glob(f"*/{IDENTITY}")):
        try:
            source = read_sealed_json(file)["source"]
        except DamagedFile as error:
            raise DataError(str(error)) from error
        if any(model.startswith(f"{source}; ") for model in models):
            yield source, file.parent


def _recorded(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and (path.suffix == SUFFIX or path.name == IDENTITY)


def _verified_rows(path: Path) -> int:
    """Return the number of answers in a file. Raises DataError if one is damaged."""
    with path.open("rb") as opened:
        header = opened.readline(2**16)
    try:
        width = json.loads(header.partition(b" ")[2])["width"]
        file = FeatureFile(path, header, width)
    except (ValueError, KeyError, TypeError, DamagedFile) as error:
        raise DataError(
            f"{path} is damaged ({error}): remove it, and run the sweep again to ask for its answers"
        ) from error
    if file.read(np.arange(len(file.keys))) is None:
        raise DataError(f"{path} is damaged: remove it, and run the sweep again to ask for its answers")
    return len(file.keys)


def _member(name: str, size: int) -> tarfile.TarInfo:
    """Return the entry of a file: equal records give equal archives."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member


def _sha256(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file, digest = tar.extractfile(member), hashlib.sha256()
    while file is not None and (chunk := file.read(2**20)):
        digest.update(chunk)
    return digest.hexdigest()
