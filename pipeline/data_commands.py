"""`farebox data` check, show and export-split: examine a data set, draw its classes, write a few-shot draw."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipeline import checks
from pipeline.config import dataset_card, names
from pipeline.data.card import listing, source_of
from pipeline.data.listing import Rows
from pipeline.data.report import look
from pipeline.data.sheet import sheet
from pipeline.data.source import ParquetSource, Source
from pipeline.data.split import draw
from pipeline.errors import ConfigError, did_you_mean
from pipeline.files import write_atomic
from pipeline.finite import strict_json
from pipeline.plain_yaml import scalar
from pipeline.untrusted import text_problem

Say = Callable[[str], None]
ROOT = {"data.root": ""}


def check(arguments: Namespace, say: Say, aside: Say) -> int:
    """Is it here, whole, and what its card says? Without NAME: every data set that is known.

    Reads every image. Exit 0: all that is here is fine; 3: something was found; 2: a data set that was named is not
    here or cannot be read.
    """
    asked, given = key_values(arguments.words, ROOT, ("[NAME ...]",))
    reports = []
    for name in asked or names("dataset"):
        report = look(dataset_card(name, given["data.root"] or None), not arguments.quick, aside)
        reports.append(report)
        if not arguments.json:
            say(report.text())
    if arguments.json:
        say(strict_json([report.record() for report in reports], indent=1))
    states = {report.state for report in reports}
    if asked and states & {"missing", "unusable"}:
        return 2
    return 3 if states & {"findings", "unusable"} else 0


def show(arguments: Namespace, say: Say, aside: Say) -> int:
    """Draw a sheet of its classes with their names and six images of each, 40 classes a page."""
    (name,), given = key_values(arguments.words, ROOT, ("NAME",))
    card = dataset_card(name, given["data.root"] or None)
    image = sheet(source_of(card), card.name, arguments.page)
    out = Path(arguments.out or f"{card.name}.png")
    try:
        image.save(out, "PNG")
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written ({error.strerror})") from error
    say(f"{out}  ({image.width} x {image.height})")
    return 0


def export_split(arguments: Namespace, say: Say, aside: Say) -> int:
    """Write a few-shot draw as JSON: train and val, each a list of [path, label, class name]. Opens no image.

    KEY=VALUE: shots, seed, validation, data.root, data.short_classes, as in conf/base.yaml. The split file alone is
    enough.
    """
    keys = ROOT | {"shots": "16", "seed": "1", "validation": "min4", "data.short_classes": "error"}
    (name,), given = key_values(arguments.words, keys, ("NAME",))
    shots, seed = number("shots", given["shots"], 1), number("seed", given["seed"], 0)
    rule = checks.one_of("validation", given["validation"], ("min4", "none", "full"))
    short = checks.one_of("data.short_classes", given["data.short_classes"], ("error", "take_all"))
    card = dataset_card(name, given["data.root"] or None)
    rows = source_of(card) if card.layout == "parquet" else listing(card)
    if isinstance(rows, Rows) and rows.made:
        aside(f"farebox: the split of {name!r} was {rows.made}")
    drawn = draw(rows, card.name, shots, seed, rule, short)
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
        say(text.rstrip())
        return 0
    try:
        write_atomic(Path(arguments.out), text.encode())
    except OSError as error:
        raise ConfigError(f"--out {arguments.out} cannot be written ({error.strerror})") from error
    say(f"{arguments.out}: {len(lists['train']):,} train and {len(lists['val']):,} val images")
    return 0


def _path(rows: Rows | Source, row: int) -> str:
    """As the split file has it; of images in a table, the file and the row."""
    if isinstance(rows, Rows):
        return rows.path(row)
    assert isinstance(rows, ParquetSource)
    return f"{Path(rows.path).name}#{row}"


def key_values(
    arguments: Sequence[str], known: Mapping[str, str], wanted: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """Split a command's arguments into those without `=`, as many as wanted, and `known` with the values given.

    Raises:
        ConfigError: an unknown key, or another number of arguments.
    """
    values, plain = dict(known), []
    for word in arguments:
        if problem := text_problem(word):
            raise ConfigError(f"{ascii(word)[:80]} has {problem}")
        key, is_value, value = word.partition("=")
        if not is_value:
            plain.append(word)
        elif key in known:
            values[key] = value
        else:
            raise ConfigError(did_you_mean("key", key, known))
    if len(plain) != len(wanted) and not wanted[0].startswith("["):
        raise ConfigError(f"expected {' '.join(wanted)}, got {' '.join(plain) or 'nothing'}")
    return plain, values


def number(key: str, text: str, minimum: int) -> int:
    """Return a whole number of `minimum` or more from its text. ConfigError otherwise."""
    return checks.whole(key, scalar(text), minimum)
