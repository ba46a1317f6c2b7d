"""Sealed files: any change of any byte is found before the file is parsed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.errors import DamagedFile, DataError
from pipeline.files import (
    SEAL_KEY,
    UNSEALED,
    check_seal,
    read_sealed,
    read_sealed_json,
    seal,
    sealed_arrow,
    sealed_json,
    write_atomic,
)
from pipeline.untrusted import read_json, read_text


def arrow_bytes() -> bytes:
    schema = pa.schema([("name", pa.string()), ("value", pa.float64())], metadata={SEAL_KEY: UNSEALED})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(pa.table([["a", "b"], [1.0, 62.18]], schema=schema))
    return bytes(sink.getvalue())


@pytest.mark.parametrize(
    "content",
    [arrow_bytes(), json.dumps({SEAL_KEY: UNSEALED, "rows": [1, 2]}).encode(), f"{UNSEALED}\n".encode() + bytes(99)],
    ids=["arrow", "json", "first line"],
)
def test_every_flip_of_every_byte_is_found(tmp_path: Path, content: bytes) -> None:
    sealed, path = seal(content), tmp_path / "file"
    write_atomic(path, sealed)
    assert read_sealed(path) == sealed
    for at in range(len(sealed)):
        for bit in (0x01, 0x20, 0x80):
            damaged = bytearray(sealed)
            damaged[at] ^= bit
            with pytest.raises(DamagedFile, match="is damaged"):
                check_seal(path, bytes(damaged))
    for cut in (0, 1, len(sealed) // 2, len(sealed) - 1):
        with pytest.raises(DamagedFile):
            check_seal(path, sealed[:cut])


def test_a_sealed_arrow_file_stays_readable_by_plain_arrow() -> None:
    assert pa.ipc.open_file(seal(arrow_bytes())).read_all()["value"].to_pylist() == [1.0, 62.18]


def test_a_sealed_file_may_quote_another(tmp_path: Path) -> None:
    inner = seal(f"inner {UNSEALED}".encode())
    outer = seal(f"{UNSEALED}\n".encode() + inner)
    check_seal(tmp_path, outer)
    assert outer.endswith(inner)
    for at in range(len(outer)):
        damaged = bytearray(outer)
        damaged[at] ^= 1
        with pytest.raises(DamagedFile):
            check_seal(tmp_path, bytes(damaged))


def test_content_that_looks_like_an_empty_mark_is_kept(tmp_path: Path) -> None:
    name = f"a class named {UNSEALED}"
    sealed = sealed_arrow(pa.table({"name": [name]}))
    check_seal(tmp_path, sealed)
    assert pa.ipc.open_file(sealed).read_all()["name"].to_pylist() == [name]


def test_what_is_not_a_regular_file_is_damaged(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(DamagedFile, match="is not a regular file"):
            read_sealed(tmp_path / name)


def test_content_is_sealed_once() -> None:
    with pytest.raises(ValueError, match="expected 'farebox-sha256:"):
        seal(b"no mark")
    with pytest.raises(ValueError, match=r"found b'farebox-sha256:[0-9a-f]{64}'"):
        seal(seal(UNSEALED.encode()))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_text_is_read_without_its_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "text").write_bytes('{"a": "\u00e9"}'.encode(encoding))
    assert read_text(tmp_path / "text") == '{"a": "\u00e9"}' and read_json(tmp_path / "text") == {"a": "\u00e9"}


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{}".encode("utf-16"), "it is UTF-16 or binary: save it as UTF-8"),
        ("{}".encode("utf-16-le"), "it is UTF-16 or binary: save it as UTF-8"),
        (b"caf\xe9", "can't decode byte"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer: type git lfs pull"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' occurs twice"),
        (b"{", "is not valid JSON"),
    ],
)
def test_what_is_not_json_in_utf_8_is_refused(tmp_path: Path, content: bytes, line: str) -> None:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(DataError, match=line):
        read_json(tmp_path / "text")


def test_a_sealed_record_comes_back_and_anything_else_is_damaged(tmp_path: Path) -> None:
    path, record = tmp_path / "record.json", {"a": [1, None], "b": "x"}
    for indent in (None, 1):
        path.write_bytes(sealed_json(record, indent))
        assert read_sealed_json(path) == record
    assert sealed_json({"a": float("nan")}) == sealed_json({"a": None})
    path.write_bytes(path.read_bytes().replace(b'"x"', b'"y"'))
    with pytest.raises(DamagedFile, match="does not match its checksum"):
        read_sealed_json(path)
    path.write_bytes(seal(f"[{UNSEALED!r}]".encode()))
    with pytest.raises(DamagedFile, match="not a sealed JSON object"):
        read_sealed_json(path)
