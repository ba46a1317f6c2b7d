"""The commands `farebox data check`, `show` and `export-split`."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipeline.config import values as checks
from pipeline.config.card_files import dataset_card
from pipeline.config.files import names
from pipeline.config.plain_yaml import scalar
from pipeline.config.renamed import refuse_renamed
from pipeline.data.contact_sheet import sheet
from pipeline.data.dataset import manifest_of, source_of
from pipeline.data.few_shot import draw
from pipeline.data.inspect import examine
from pipeline.data.layouts.listing import Manifest
from pipeline.data.source import ParquetSource, Source
from pipeline.errors import ConfigError, did_you_mean
from pipeline.files import strict_json, write_atomic
from pipeline.untrusted import text_problem

Echo = Callable[[str], None]
ROOT = {"data.root": ""}


def check(arguments: Namespace, echo: Echo, log: Echo) -> int:
    """Check that a data set is on this machine, can be read and matches its card. Without NAME: check every data set.

    Decodes every image. Exit 0: no findings; 3: findings; 2: a named data set is missing or cannot be read.
    """
    listed, given = key_values(arguments.words, ROOT, ("[NAME ...]",))
    reports = []
    for name in listed or names("dataset"):
        report = examine(dataset_card(name, given["data.root"] or None), not arguments.quick, log)
        reports.append(report)
        if not arguments.json:
            echo(report.text())
    if arguments.json:
        echo(strict_json([report.record() for report in reports], indent=1))
    states = {report.state for report in reports}
    if listed and states & {"missing", "unusable"}:
        return 2
    return 3 if states & {"findings", "unusable"} else 0


def show(arguments: Namespace, echo: Echo, log: Echo) -> int:
    """Draw a contact sheet of the classes with their names and six images of each, 40 classes per page."""
    (name,), given = key_values(arguments.words, ROOT, ("NAME",))
    card = dataset_card(name, given["data.root"] or None)
    image = sheet(source_of(card), card.name, arguments.page)
    out = Path(arguments.out or f"{card.name}.png")
    try:
        image.save(out, "PNG")
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written ({error.strerror})") from error
    echo(f"{out}  ({image.width} x {image.height})")
    return 0


def export_split(arguments: Namespace, echo: Echo, log: Echo) -> int:
    """Write a few-shot draw as JSON: train and val, each a list of [path, label, class name]. Opens no image.

    KEY=VALUE: shots, draw, seed, validation, data.root, data.small_classes, as in conf/base.yaml. The images need not
    be on this machine if the split file is.
    """
    keys = ROOT | {"shots": "16", "draw": "balanced", "seed": "1", "validation": "min4", "data.small_classes": "error"}
    (name,), given = key_values(arguments.words, keys, ("NAME",))
    shots, seed = number("shots", given["shots"], 1), number("seed", given["seed"], 0)
    rule = checks.one_of("validation", given["validation"], ("min4", "none", "full"))
    balanced = checks.one_of("draw", given["draw"], ("balanced", "imbalanced")) == "balanced"
    short = checks.one_of("data.small_classes", given["data.small_classes"], ("error", "take_all"))
    card = dataset_card(name, given["data.root"] or None)
    rows = source_of(card) if card.layout == "parquet" else manifest_of(card)
    if isinstance(rows, Manifest) and rows.split_origin:
        log(f"farebox: the split of {name!r} was {rows.split_origin}")
    drawn = draw(rows, card.name, shots, seed, rule, short, balanced)
    lists = {
        part: [[_path(rows, row), int(rows.labels[row]), rows.classnames[rows.labels[row]]] for row in of_part]
        for part, of_part in (("train", drawn.train), ("val", drawn.val))
    }
    parts = [
        f'"{part}": [\n' + ",\n".join(json.dumps(row, ensure_ascii=False) for row in of_part) + "\n]"
        for part, of_part in lists.items()
    ]
    text = "{" + ",\n".join(parts) + "}\n"
    if not arguments.out:
        echo(text.rstrip())
        return 0
    write_atomic(Path(arguments.out), text.encode())
    echo(f"{arguments.out}: {len(lists['train']):,} train and {len(lists['val']):,} val images")
    return 0


def _path(rows: Manifest | Source, row: int) -> str:
    """Return the path of a row as in the split file; of an image in a table, the file and the row number."""
    if isinstance(rows, Manifest):
        return rows.path(row)
    assert isinstance(rows, ParquetSource)
    return f"{Path(rows.path).name}#{row}"


def key_values(
    arguments: Sequence[str], known: Mapping[str, str], expected: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """Parse the arguments of a command.

    Args:
        arguments: NAME and KEY=VALUE arguments.
        known: The keys with their default values.
        expected: Names of the arguments without `=`, for messages.

    Returns:
        The arguments without `=`, and the value of every key.

    Raises:
        ConfigError: An unknown key, or a wrong number of arguments.
    """
    values, plain = dict(known), []
    for argument in arguments:
        if problem := text_problem(argument):
            raise ConfigError(f"{ascii(argument)[:80]} has {problem}")
        key, is_value, value = argument.partition("=")
        if is_value:
            refuse_renamed("command", key)
        if not is_value:
            plain.append(argument)
        elif key in known:
            values[key] = value
        else:
            raise ConfigError(did_you_mean("key", key, known))
    if len(plain) != len(expected) and not expected[0].startswith("["):
        raise ConfigError(f"expected {' '.join(expected)}, got {' '.join(plain) or 'nothing'}")
    return plain, values


def number(key: str, text: str, minimum: int) -> int:
    """Parse an integer of `minimum` or more. Raises ConfigError otherwise."""
    return checks.whole(key, scalar(text), minimum)
