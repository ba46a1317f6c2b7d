"""Files of unknown origin: each is read, or refused in one line, and nothing outside of the data set is opened."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.cards import DatasetCard
from pipeline.config.card_files import dataset_card, model_card
from pipeline.config.compose import compose
from pipeline.config.files import load
from pipeline.config.plain_yaml import MAX_BYTES, MAX_DEPTH, read_file
from pipeline.data.dataset import reopen
from pipeline.errors import ConfigError, DataError, FareboxError
from pipeline.untrusted import check_texts, parse_json, read_regular, text_problem
from tests.support.lab import encoded

IMAGE = encoded(Image.new("L", (8, 8), 90))
SPLITS = ("train", "val", "test")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder of each test's own, and no switches."""
    monkeypatch.setenv("FAREBOX_CACHE", str(tmp_path / "cache"))
    for name in ("FAREBOX_FOLLOW_LINKS", "FAREBOX_ALLOW_ENV"):
        monkeypatch.delenv(name, raising=False)


def one_line(error: BaseException) -> str:
    """The message of an error: one line of printable text, of at most 300 characters beside the paths in it."""
    text = str(error)
    assert "\n" not in text and "\x1b" not in text
    text.encode()  # no lone surrogate
    return text


# --- paths -----------------------------------------------------------------------------------------------------------


def split_data(folder: Path, path: str = "0.png", name: str = "cat") -> Path:
    """A data set of one class with a split file; `path` is that of its one test image."""
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    for i in range(3):
        (data / f"{i}.png").write_bytes(IMAGE)
    rows = {split: [[f"{i}.png", 0, name]] for i, split in enumerate(SPLITS)}
    rows["test"] = [[path, 0, name]]
    (data / "split.json").write_text(json.dumps(rows))
    return data / "split.json"


def open_data(path: Path, layout: str = "split_file") -> list[bytes]:
    """All images of a data set."""
    source = reopen(
        DatasetCard(name="own", layout=layout, path=str(path), classes=1, train=1, val=1, test=1, template="a {}")
    )
    return [source.image_bytes(row) for row in range(len(source.labels))]


@pytest.mark.parametrize(
    "path",
    ["../secret.png", "a/../../secret.png", "{outside}/secret.png", "link.png", "folder/secret.png", "../data/0.png"],
)
def test_a_stated_path_that_leads_out_is_refused(tmp_path: Path, path: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for secret in (outside / "secret.png", tmp_path / "secret.png"):
        secret.write_bytes(IMAGE)
    split = split_data(tmp_path, path.format(outside=outside))
    (split.parent / "link.png").symlink_to(outside / "secret.png")
    (split.parent / "folder").symlink_to(outside)
    (split.parent / "a").mkdir()
    with pytest.raises(DataError, match=r"leads out of the data set's folder"):
        open_data(split)


def test_links_that_lead_out_are_followed_on_request_and_paths_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAREBOX_FOLLOW_LINKS", "1")
    (tmp_path / "secret.png").write_bytes(IMAGE)
    split = split_data(tmp_path, "link.png")
    (split.parent / "link.png").symlink_to(tmp_path / "secret.png")
    assert open_data(split) == [IMAGE] * 3
    with pytest.raises(DataError, match="leads out"):
        open_data(split_data(tmp_path, "../secret.png"))


def test_a_data_folder_that_is_a_link_and_links_inside_it_are_fine(tmp_path: Path) -> None:
    split = split_data(tmp_path, "link.png")
    (split.parent / "link.png").symlink_to("1.png")
    (tmp_path / "shortcut").symlink_to(split.parent)
    assert open_data(tmp_path / "shortcut" / "split.json") == [IMAGE] * 3


def fifo(path: Path) -> None:
    os.mkfifo(path)


def listen(path: Path) -> None:
    where = Path.cwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(where)


SPECIAL: dict[str, Callable[[Path], None]] = {
    "FIFO": fifo,
    "socket": listen,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_not_a_file_is_never_opened(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAREBOX_FOLLOW_LINKS", "1")
    split = split_data(tmp_path, "odd.png")
    odd = split.parent / "odd.png"
    SPECIAL[kind](odd)
    with pytest.raises(DataError, match="expected an image file"):
        open_data(split)
    with pytest.raises(OSError, match="not a regular file"):
        read_regular(odd, 100)
    for read in (read_file, lambda path: dataset_card(str(path))):
        odd.rename(card := odd.with_name("odd.yaml"))
        with pytest.raises(ConfigError):
            read(card)
        card.rename(odd)


def test_a_file_that_became_a_fifo_after_it_was_listed_is_refused(tmp_path: Path) -> None:
    split = split_data(tmp_path)
    card = DatasetCard(
        name="own", layout="split_file", path=str(split), classes=1, train=1, val=1, test=1, template="a {}"
    )
    source = reopen(card)
    (split.parent / "0.png").unlink()
    os.mkfifo(split.parent / "0.png")
    with pytest.raises(DataError, match="not a regular file"):
        source.image_bytes(int(source.rows_of("test")[0]))
    with pytest.raises(DataError):
        source.unchecked(source.rows_of("test"))


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match="larger than"):
        read_regular(tmp_path / "large", 2**20)


# --- names and JSON --------------------------------------------------------------------------------------------------

BAD = ["a\0b", "a\x1b[31mb", "a\nb", "a\ud800b", "a\u202eb", "a\u2028b", "\x7f", "a\x85b"]


@pytest.mark.parametrize("name", BAD)
def test_a_name_that_a_terminal_would_obey_is_refused_wherever_it_stands(tmp_path: Path, name: str) -> None:
    messages = []
    for split in (split_data(tmp_path / "name", name=name), split_data(tmp_path / "path", f"{name}.png")):
        with pytest.raises(DataError) as error:
            open_data(split)
        messages.append(one_line(error.value))
    table = pa.table(
        {"image": [IMAGE] * 3, "label": [0] * 3, "split": list(SPLITS)},
    ).replace_schema_metadata({"classes": json.dumps([name])})
    pq.write_table(table, tmp_path / "table.parquet")
    with pytest.raises(DataError) as error:
        open_data(tmp_path / "table.parquet", "table")
    messages.append(one_line(error.value))
    for key in ("name", "template", "licence"):
        card = tmp_path / "card.yaml"
        card.write_text(f"kind: fake\n{key}: {json.dumps(name)}\n")
        if key == "licence" and name == "a\nb":
            continue
        with pytest.raises(ConfigError) as wrong:
            model_card(str(card))
        if key != "template":
            messages.append(one_line(wrong.value))
    with pytest.raises(ConfigError) as typed:
        compose([f"label={name}"])
    messages.append(one_line(typed.value))
    assert all("control character U+" in said or "lone surrogate U+D800" in said for said in messages), messages


def test_names_of_all_scripts_are_fine() -> None:
    for name in ("naïve café", "猫", "кот", "👩‍🚀", "a b", "नमस्ते", "50% #1 {x}"):
        assert text_problem(name) == ""
    with pytest.raises(DataError, match=r"it: 'a\\x00' has the control character U\+0000 at position 2: rename it"):
        check_texts("it", ["fine", "a\0"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 50_000, "nested too deep"),
        (b'{"train": [], "train": []}', "the key 'train' occurs twice"),
        (b'{"train": "\xff"}', "is not valid JSON"),
        (b"\xff\xfe{\0}\0", "is not valid JSON"),
        (b"", "is not valid JSON"),
    ],
)
def test_json_that_is_odd_is_refused_in_one_line(tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as error:
        parse_json(content, "it")
    one_line(error.value)
    data = tmp_path / "data"
    data.mkdir()
    (data / "split.json").write_bytes(content)
    with pytest.raises(DataError) as error:
        open_data(data / "split.json")
    one_line(error.value)


@pytest.mark.parametrize("label", ["1e999", "-1", "99999999999999999999", "[0]", "null", '"\\ud800"'])
def test_a_label_that_is_no_label_is_refused_in_one_line(tmp_path: Path, label: str) -> None:
    split = split_data(tmp_path)
    split.write_text(split.read_text().replace('["0.png", 0', f'["0.png", {label}'))
    with pytest.raises(DataError) as error:
        open_data(split)
    one_line(error.value)


# --- YAML ------------------------------------------------------------------------------------------------------------

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[" * 100_000, f"nested more than {MAX_DEPTH} deep"),
        ("".join(f"{' ' * i}a:\n" for i in range(200)), "nested more than"),
        (BOMB, "anchors and aliases are not read"),
        ("<<: {seeds: [1]}\n", "no key named '<<'"),
        ("seeds: [1]\nseeds: [2]\n", "the key 'seeds' occurs twice"),
        ("budget: {requests: 5, requests: 6}\n", "the key 'requests' occurs twice"),
        ("seeds: !!python/object/apply:os.system ['true']\n", "tags"),
        ("seeds: !!int '1'\n", "tags"),
        ("label: !x y\n", "tags"),
        ("? [a, b]\n: 1\n", "a list or a mapping as a key"),
        ("seeds: [1]\n---\nseeds: [2]\n", "a second document"),
        ("seeds:\n\t- 1\n", "is not valid YAML"),
        ("- 1\n- 2\n", "holds list"),
        ("just text\n", "holds str"),
        ("7\n", "holds int"),
        ('label: "\\0"\n', "control character U+0000"),
        ('label: "\\e[31m"\n', "control character U+001B"),
        ('label: "\\ud800"\n', "lone surrogate U+D800"),
        ('"\\ud800": 1\n', "lone surrogate U+D800"),
        ("label: a\0b\n", "is not valid YAML"),
        ("label: |\n  a\n  b\n", "control character U+000A"),
        (b"label: \xff\n", "cannot be read"),
        (b"\xff\xfel\0a\0", "cannot be read"),
        ("#" * (MAX_BYTES + 1), "cannot be read: larger than 1 MiB"),
    ],
)
def test_yaml_that_is_odd_is_refused_in_one_line(tmp_path: Path, content: str | bytes, reason: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for read in (lambda: compose([f"sweep={path}"]), lambda: dataset_card(str(path)), lambda: model_card(str(path))):
        with pytest.raises(FareboxError) as error:
            read()
        one_line(error.value)
    with pytest.raises(ConfigError) as error:
        compose([f"sweep={path}"])
    assert reason in one_line(error.value)
    assert len(one_line(error.value).replace(str(path), "")) <= 320


@pytest.mark.parametrize("kind", ["sweep", "model", "dataset", "method"])
def test_interpolations_in_files_are_refused_unless_they_are_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("SECRET_OF_MINE", "fake")
    path = tmp_path / "own.yaml"
    secret = "${oc.env:SECRET_OF_MINE}"
    path.write_text(
        {
            "sweep": f"label: {secret}\n",
            "model": f"kind: {secret}\n",
            "dataset": f"path: {secret}\nlayout: folder\nclasses: 1\ntrain: 1\nval: 1\ntest: 1\ntemplate: a {{}}\n",
            "method": f"method: zero_shot\nconfig: {{note: '{secret}'}}\n",
        }[kind]
    )
    read = {
        "sweep": lambda: compose([f"sweep={path}"]).label,
        "model": lambda: model_card(str(path)).kind,
        "dataset": lambda: dataset_card(str(path)).path,
        "method": lambda: load("method", str(path))["config"]["note"],
    }[kind]
    with pytest.raises(
        ConfigError, match=r"has an interpolation, which files may not use.*FAREBOX_ALLOW_ENV=1"
    ) as error:
        read()
    assert "fake" not in str(error.value)
    monkeypatch.setenv("FAREBOX_ALLOW_ENV", "1")
    assert read() == "fake"


@pytest.mark.parametrize(
    "text", ["${oc.env:HOME}", "${oc.env:HOME,x}", "${oc.decode:1}", "${oc.${label}:HOME}", "a ${ oc.env:HOME }", "${"]
)
def test_every_resolver_counts_and_a_reference_to_a_key_does_not(tmp_path: Path, text: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(f"label: '{text}'\n")
    with pytest.raises(ConfigError, match="interpolation"):
        compose([f"sweep={path}"])
    path.write_text("storage: runs/${sweep}-${model}\n")
    assert compose([f"sweep={path}"]).storage.name == "own-tiny"
    path.write_text("label: at ${storage}\n")
    assert compose([f"sweep={path}"]).label == "at runs/own"


def test_a_typed_value_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_MINE", "postgresql://me:password@host/db")
    assert compose(["budget.global.url=${oc.env:SECRET_OF_MINE}"]).ledger_url.endswith("password@host/db")
    with pytest.raises(ConfigError, match="interpolation"):
        compose(["label=${oc.env:NOT_SET_ANYWHERE}"])


@pytest.mark.parametrize(
    "lines",
    [
        "label: ${label}\n",
        "label: ${storage}\nstorage: ${label}\n",
        "label: ${mlflow}${mlflow}\nmlflow: ${storage}${storage}\n",
        "storage: x\nfeatures: ${budget}\n",
        "method: {zero_shot: {a: '${method.zero_shot.b}', b: x}}\nmethods: [zero_shot]\n",
    ],
)
def test_a_chain_of_references_in_a_file_is_refused(tmp_path: Path, lines: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(lines)
    with pytest.raises(ConfigError) as error:
        compose([f"sweep={path}"])
    one_line(error.value)


def test_a_typed_reference_to_itself_is_refused() -> None:
    for words in (["label=${label}"], ["label=${storage}", "storage=${label}"]):
        with pytest.raises(ConfigError) as error:
            compose(words)
        one_line(error.value)
