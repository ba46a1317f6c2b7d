"""Archives of recorded answers: whole, equal for equal records, and enough to repeat a sweep."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.commands import records as command
from pipeline.errors import ConfigError, DataError
from pipeline.remote.archive import MANIFEST, pack, verify
from pipeline.remote.records import UNTOLD, Records

SOURCE = "adapter model at https://api.example; images png8"
MODEL = f"{SOURCE}; logit_scale 100.0"


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Records of two models: features and scores of one, features of another."""
    folder = tmp_path / "records"
    for source in (SOURCE, "another model"):
        record = Records(folder, source)
        record.features(4).add(["a", "text/b"], np.eye(2, 4, dtype=np.float32))
        record.write_identity({"fingerprint": "A" * 43 + "=", "created": "2026-11-27T00:00:00+00:00"})
    Records(folder, SOURCE).scores("LABELS digest", 3).add(["a"], np.array([[0, -np.inf, -np.inf]], np.float32))
    return folder


def test_minus_infinity_is_recorded_and_damage_is_not_read(records: Path) -> None:
    rows, missing = Records(records, SOURCE).scores("LABELS digest", 3).read(["a", "b"])
    assert rows[0].tolist() == [0, -np.inf, -np.inf] and missing == [1] and np.isfinite(UNTOLD)


def test_an_archive_holds_the_answers_of_the_named_models(tmp_path: Path, records: Path) -> None:
    packed = pack(records, {MODEL, "local model"}, tmp_path / "one.tar")
    assert (packed.sources, packed.answers, packed.files) == ((SOURCE,), 3, 3)
    assert verify(tmp_path / "one.tar") == packed
    pack(records, {MODEL}, tmp_path / "two.tar")
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
    with tarfile.open(tmp_path / "one.tar") as archive:
        archive.extractall(tmp_path / "elsewhere", filter="data")
    assert Records(tmp_path / "elsewhere" / "records", SOURCE).features(4).read(["text/b"])[1] == []
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_nothing_to_pack_is_named(tmp_path: Path, records: Path) -> None:
    with pytest.raises(ConfigError, match="no answers of the models"):
        pack(records, {"local model"}, tmp_path / "one.tar")
    pack(records, {MODEL}, tmp_path / "one.tar")
    with pytest.raises(ConfigError, match="it exists"):
        pack(records, {MODEL}, tmp_path / "one.tar")


def test_a_damaged_record_is_not_packed(tmp_path: Path, records: Path) -> None:
    file = next(path for path in records.rglob("*.features"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    models = {MODEL, "another model; logit_scale 1.0"}
    with pytest.raises(DataError, match="damaged: remove it"):
        pack(records, models, tmp_path / "one.tar")


@pytest.mark.parametrize("part", [b'"answers"', b'"width"', b"/identity.json"])
def test_a_damaged_archive_is_named(tmp_path: Path, records: Path, part: bytes) -> None:
    archive = tmp_path / "one.tar"
    pack(records, {MODEL}, archive)
    content = bytearray(archive.read_bytes())
    content[content.index(part) + 1] ^= 1
    archive.write_bytes(bytes(content))
    with pytest.raises(DataError):
        verify(archive)


def test_a_file_that_is_not_listed_or_is_missing_is_named(tmp_path: Path, records: Path) -> None:
    pack(records, {MODEL}, tmp_path / "one.tar")
    with tarfile.open(tmp_path / "one.tar", "a") as archive:
        archive.add(__file__, "records/more")
    with pytest.raises(DataError, match="'records/more' is not in its manifest"):
        verify(tmp_path / "one.tar")
    pack(records, {MODEL}, tmp_path / "two.tar")
    with tarfile.open(tmp_path / "two.tar") as whole, tarfile.open(tmp_path / "part.tar", "w") as part:
        for member in list(whole)[:-1]:
            part.addfile(member, whole.extractfile(member))
    with pytest.raises(DataError, match="1 files are missing"):
        verify(tmp_path / "part.tar")
    assert MANIFEST in (tmp_path / "part.tar").read_bytes().decode(errors="replace")


@pytest.mark.parametrize(
    ("verb", "words"), [("pack", ["storage=x"]), ("pack", ["to=a", "to=b"]), ("verify", []), ("verify", ["a", "b"])]
)
def test_the_command_says_what_to_type(verb: str, words: list[str]) -> None:
    with pytest.raises(ConfigError, match=f"as in farebox records {verb}"):
        command.run(verb, words)


def test_other_files_are_no_archives(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text")
    for name, says in (("text", "is no archive of recorded answers"), ("missing", "No such file")):
        with pytest.raises(DataError, match=says):
            verify(tmp_path / name)
