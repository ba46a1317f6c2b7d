"""The file `storage_id`, and which folders are copies. Runs of copies: tests/faults/test_shared_budget.py."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.errors import ConfigError, DamagedFile
from pipeline.sweep import storage_id
from pipeline.sweep.storage_id import FILE, is_copy, moved_here, new_id, read_id, write_id


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    folder = tmp_path / "storage"
    folder.mkdir()
    write_id(folder, new_id(folder, ("first", "second")))
    return folder


def copied(folder: Path) -> bool:
    """Whether a folder is a copy, by its own file."""
    identity = read_id(folder)
    return is_copy(folder, identity, identity.path, identity.host)


def test_a_damaged_byte_never_changes_the_id(storage: Path) -> None:
    identity, whole, rng = read_id(storage), (storage / FILE).read_bytes(), random.Random(1)
    assert identity.copied_from == ("first", "second") and identity.path == str(storage)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= rng.randrange(1, 256)
        (storage / FILE).write_bytes(damaged)
        assert read_id(storage) == identity


@pytest.mark.parametrize("content", [b"", b"0a1b2c3d4e5f\n", b"\x00" * 400, b"{}\n{}\n", b"[" * 100_000])
def test_a_file_with_both_lines_damaged_is_reported_in_one_line(
    storage: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (storage / FILE).write_bytes(content)
    with pytest.raises(DamagedFile, match="storage_id is damaged"):
        read_id(storage)
    for verb in ("ledger", "status"):
        assert main([verb, f"storage={storage}"]) == 3
        assert capsys.readouterr().err.count("\n") == 1
    (storage / FILE).unlink()
    (storage / FILE).mkdir()
    with pytest.raises(DamagedFile, match="cannot be read"):
        read_id(storage)


def test_a_folder_without_an_id_is_not_a_storage(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no sweep at"):
        read_id(tmp_path)


def test_a_folder_is_a_copy_while_the_original_exists(storage: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(storage, copy)
    assert copied(copy) and not copied(storage)
    (tmp_path / "link").symlink_to(storage)
    assert not copied(tmp_path / "link")
    storage.rename(tmp_path / "away")
    assert not copied(copy)
    storage.mkdir()
    assert not copied(copy)
    write_id(storage, new_id(storage))  # another storage took its place
    assert not copied(copy)
    (storage / FILE).write_bytes(b"damaged")  # it may be the original
    assert copied(copy)


def test_a_folder_on_another_machine_is_recognised_by_its_inode(
    storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(storage, tmp_path / "copy")
    monkeypatch.setattr(storage_id, "host_name", lambda: "another")
    assert not copied(storage)  # both machines mount it
    assert copied(tmp_path / "copy")
    identity = read_id(storage)
    assert moved_here(storage, identity) == replace(identity, host="another")
