"""A typed value is kept or refused, on the command line and in files: it never becomes another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import typed_values
from pipeline.config.card_files import dataset_card, model_card
from pipeline.config.compose import compose
from pipeline.config.files import notes
from pipeline.config.method_choice import method_choice
from pipeline.config.plain_yaml import read_file, read_value, scalar
from pipeline.errors import ConfigError

TEXT = [
    *("010", "001", "0x10", "0b1", "0o7", "1_0", "1:5", "12:30:45", "1e3", "1.50", ".5", "5.", "+5", "-0", "1-5"),
    *(
        ".inf",
        "-.inf",
        ".nan",
        "inf",
        "nan",
        "1e999",
        "2024-01-01",
        "yes",
        "no",
        "on",
        "off",
        "y",
        "n",
        "None",
        "=",
        "<<",
    ),
    *("99999999999999999999", "9" * 5000, "٣", "１", "1 2", "1,000", "tRue", "???", "!x", "x y"),
]


def test_other_notations_of_numbers_are_text(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    for text in TEXT:
        assert scalar(text) == read_value("key", text) == text
        if text[0] not in "!=?" and len(text) < 1000:
            path.write_text(f"key: {text}\nitems: [{text if ',' not in text else 'x'}]\n{text}: key\n")
            assert read_file(path) == {"key": text, "items": [text if "," not in text else "x"], text: "key"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("0", 0), ("10", 10), ("-3", -3), ("9223372036854775807", 2**63 - 1), ("0.5", 0.5), ("-1.25", -1.25)),
        *(("1e-05", 1e-05), ("1.0", 1.0), ("null", None), ("", None), ("true", True), ("False", False)),
    ],
)
def test_plain_numbers_null_true_and_false_are_themselves(tmp_path: Path, text: str, value: object) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(f"key: {text}\n")
    for found in (scalar(text), read_value("key", text), read_file(path)["key"]):
        assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "a #1",
        "a: b",
        "- a",
        "&a b",
        "*a",
        "!a b",
        "| a",
        "> a",
        "%a",
        "@a",
        "`a",
        "a, b",
        "a]",
        "}",
        "it's",
        "'",
        '"a',
        "~",
        "a ",
        " a",
    ],
)
def test_a_scalar_of_the_command_line_is_taken_character_by_character(text: str) -> None:
    assert read_value("key", text) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[1, 010, yes]", [1, "010", "yes"]),
        ("['a #1', b]", ["a #1", "b"]),
        ("[]", []),
        ("[a,]", ["a"]),
        ("{a: {b: 1e3}}", {"a": {"b": "1e3"}}),
        ("{010: x}", {"010": "x"}),
        ("'10'", "10"),
        ('"a\\tb"', None),
        ("'a' 'b'", "'a' 'b'"),
    ],
)
def test_lists_mappings_and_quoted_text_are_yaml(text: str, value: object) -> None:
    if value is None:
        assert read_value("key", text) == "a\tb"
    else:
        assert read_value("key", text) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1, 2] # all", "'# all' follows the closing bracket"),
        ("[1, 2]x", "cannot read key"),
        ("[1, 2] [3]", "cannot read key"),
        ("[1, 2", "cannot read key=[1, 2"),
        ("[1 #, 2]", "cannot read key"),
        ("{a: 1, a: 2}", "the key 'a' occurs twice"),
        ("[&a 1, *a]", "anchors and aliases"),
        ("[!!int 1]", "tags"),
        ("[a\nb]", "control character U+000A"),
        ("a\x1b[0m", "control character U+001B"),
        ("\udcff", "the byte 0xFF at position 1, which is not UTF-8"),
        ("[" * 1000, "nested more than"),
    ],
)
def test_ambiguous_yaml_is_rejected(text: str, reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_value("key", text)
    assert reason in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 300


# --- where numbers are wanted ----------------------------------------------------------------------------------------


def with_first_method(words: list[str]) -> None:
    config = compose(words)
    config.choice(config.methods[0], "icons")


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("seeds=010", "seeds=010: expected a whole number of 0 or more without leading zeros: type 10"),
        ("seeds=[001,002,010]", "seeds=001: expected a whole number of 0 or more without leading zeros: type 1"),
        ("seeds=[1:5]", "seeds=1:5: expected a whole number of 0 or more; for a range type 1,2,3,4,5"),
        ("shots=1-64", "shots=1-64: expected a whole number of 1 or more; for a range type 1,...,64"),
        ("seeds=1_0", "seeds=1_0: expected a whole number of 0 or more, in decimal digits"),
        ("seeds='3'", "seeds=3: expected a whole number of 0 or more, without quotes"),
        ("seeds=9223372036854775808", "expected a whole number of at most 9,223,372,036,854,775,807"),
        ("budget.requests=1e3", "budget.requests=1e3: expected a whole number"),
        ("views=0x10", "views=0x10: expected a whole number"),
        ("checkpoint_s=.inf", "checkpoint_s=.inf: expected a number of seconds"),
        ("eval_shift=off", "eval_shift=off: expected true or false"),
        ("datasets=[null]", "datasets=None: expected a name"),
        ("datasets=[true]", "datasets=True: expected a name or a path (as a name, write it in quotes)"),
        ("datasets=[1.10]", "no dataset named '1.10'"),
        ("datasets=[2024-01-01]", "no dataset named '2024-01-01'"),
        ("methods=[on]", "no method named 'on'"),
        ("budget.requests=[[1]]", "budget.requests=[1]: expected a whole number of 1 or more"),
        ("budget.images=[{a: 1}]", "budget.images={'a': 1}: expected a whole number of 1 or more"),
        ("datasets=[[icons]]", "datasets=['icons']: expected a name"),
        ("label=false", "label=False: expected a name"),
    ],
)
def test_odd_values_are_refused_with_what_to_type(tmp_path: Path, word: str, reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        with_first_method([word])
    assert reason in str(error.value)
    key, _, value = word.partition("=")
    lines = [f"{' ' * 2 * i}{part}:" for i, part in enumerate(key.split("."))]
    (tmp_path / "own.yaml").write_text("\n".join(lines) + f" {value}\n")
    with pytest.raises(ConfigError) as error:
        with_first_method([f"sweep={tmp_path / 'own.yaml'}"])
    assert reason in str(error.value), "the same in a file"


@pytest.mark.parametrize(
    "value", ["nan", ".nan", "inf", "-.inf", "1e999", "1_0", "010", "0x1", "yes", "true", "٣", "1:5", "???"]
)
@pytest.mark.parametrize("setting", ["alpha", "epochs"])
def test_a_setting_that_would_be_converted_or_is_not_finite_is_refused_by_name(setting: str, value: str) -> None:
    config = compose(["methods=[taskres]", f"method.taskres.{setting}={value}"])
    with pytest.raises(ConfigError, match=f"method 'taskres': .*{setting}"):
        config.choice("taskres", "icons")


def test_settings_are_refused_from_python_and_in_a_methods_file_too(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="alpha=nan: expected a finite number"):
        method_choice("taskres", "icons", "default", {"alpha": float("nan")})
    (tmp_path / "own.yaml").write_text("method: taskres\nconfig: {epochs: 010}\n")
    with pytest.raises(ConfigError, match="epochs=010: expected a finite number in decimal digits"):
        method_choice(str(tmp_path / "own.yaml"), "icons", "default", {})
    for flag in (1, "yes", "true"):
        with pytest.raises(ConfigError, match="enhanced"):
            method_choice("taskres", "icons", "default", {"enhanced": flag})


@pytest.mark.parametrize(("value", "number"), [("1e-1", 0.1), ("0.50", 0.5), (".5", 0.5), ("2", 2.0)])
def test_other_ways_to_write_a_number_are_fine_where_one_is_wanted(value: str, number: float) -> None:
    choice = compose(["methods=[taskres]", f"method.taskres.alpha={value}"]).choice("taskres", "icons")
    assert dict(choice.config)["alpha"] == number
    assert compose([f"checkpoint_s={value}"]).checkpoint_s == number


@pytest.mark.parametrize("label", ["2024-01-01", "yes", "1e5", "007", "a #1", "a: b", "0", "1.10", "???", "'"])
def test_a_label_is_kept_as_it_is_typed(label: str) -> None:
    assert compose([f"label={label}"]).label == label


def test_class_names_and_card_names_are_text(tmp_path: Path) -> None:
    card = tmp_path / "2024.yaml"
    sizes = "classes: 7\ntrain: 1\nval: 1\ntest: 1\ntemplate: a {}\nlayout: folder\npath: /x\n"
    card.write_text(f"name: 010\n{sizes}classnames: [yes, 1, 1.0, 010, 1e5, 2024-01-01, off]\n")
    found = dataset_card(str(card))
    assert (found.name, found.classnames) == ("010", ("yes", "1", "1.0", "010", "1e5", "2024-01-01", "off"))
    card.write_text(sizes)
    assert dataset_card(str(card)).name == "2024"
    for line, reason in (
        ("classnames: [true]", "classnames=True: expected a name or a path (as a name, write it in quotes)"),
        ("classnames: [null]", "classnames=None: expected a name"),
        ("augment: [a]", "augment=['a']: expected a name"),
        ("val: 1_0", "the key 'val' occurs twice"),
        ("bits: 1e1", "bits=1e1: expected a whole number"),
    ):
        card.write_text(f"{sizes}{line}\n")
        with pytest.raises(ConfigError) as error:
            dataset_card(str(card))
        assert reason in str(error.value)
    card.write_text(sizes.replace("val: 1", "val: 010"))
    with pytest.raises(ConfigError, match="val=010: expected a whole number of 0 or more without leading zeros"):
        dataset_card(str(card))
    card.write_text("kind: fake\nnote: |\n  two\n  lines\n")
    assert model_card(str(card)).note == "two\nlines\n"


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["seeds=3"], ["seeds=3 is one seed (number 3); for 3 seeds type seeds=1,2,3"]),
        (["seeds=20"], ["seeds=20 is one seed (number 20); for 20 seeds type seeds=1,2,...,20"]),
        *(
            (words, [])
            for words in (["seeds=1"], ["seeds=[3]"], ["seeds=2024"], [], ["shots=3"], ["seeds=3", "seeds=[3]"])
        ),
    ],
)
def test_one_number_of_seeds_is_explained(words: list[str], lines: list[str]) -> None:
    assert notes(words) == lines


# --- paths and URLs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a #1", "a b", "é", "[a", "1e5", "010", "a;b", "a&b=c", "true.", "~x", "a'b"])
def test_a_storage_is_the_folder_that_was_typed(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if name.startswith(("[", "~")):
        name = f"./{name}"
    assert compose([f"storage={name}"]).storage == tmp_path / name


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = compose(["storage=~/runs", "features=~/features", "data.root=~"])
    assert (config.storage, config.features, config.data.root) == (
        tmp_path / "runs",
        tmp_path / "features",
        str(tmp_path),
    )
    with pytest.raises(ConfigError, match=r"storage=~nobody-here/x: there is no such home folder"):
        compose(["storage=~nobody-here/x"])


@pytest.mark.parametrize("name", ["what? #1", "50%", "a%20b", "a?mode=memory"])
def test_a_storage_that_database_urls_would_move_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"storage=.*cannot be part of this path"):
        compose([f"storage={name}"])


@pytest.mark.parametrize("key", ["budget.global.url", "mlflow"])
@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("sqlite://", "in memory"),
        ("sqlite:///", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("sqlite+pysqlite:///:memory:", "in memory"),
        ("sqlite:///file:x?mode=memory&uri=true", "in memory"),
        ("sqlite:///file::memory:?uri=true", "in memory"),
        ("sqlite:///~/x.db", "whole path"),
        ("sqlite:////tmp/what?/x.db", "whole path"),
        ("sqlite:////tmp/a?b=1/x.db", "whole path"),
        ("sqlite:////tmp/a%20b.db", "whole path"),
    ],
)
def test_a_sqlite_url_that_is_not_its_path_is_refused(key: str, url: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}=.*{reason}"):
        compose([f"{key}={url}"])


@pytest.mark.parametrize(
    "url", ["sqlite:////srv/ledger.db", "sqlite:////srv/a #1.db?timeout=3", "postgresql://me@host/what?sslmode=require"]
)
def test_other_urls_are_taken_as_they_are_typed(url: str) -> None:
    assert compose([f"budget.global.url={url}"]).ledger_url == url


def test_numbers_of_a_card_may_be_written_in_any_decimal_form() -> None:
    hint: Any = tuple[float, ...] | None
    assert typed_values.of_type("mean", ["0.50", 0.4, "1e-1", 1], hint) == (0.5, 0.4, 0.1, 1.0)
    assert typed_values.of_type("mean", None, hint) is None
    for value in ("nan", "1_0", True, [1]):
        with pytest.raises(ConfigError, match="mean="):
            typed_values.of_type("mean", [value], hint)
