"""`farebox data`: bring data of one's own, examine what is there, look at it, and write a few-shot split down."""

from __future__ import annotations

import json
import re
import uuid
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from pipeline import checks, typed_values
from pipeline.cards import EMBEDDED
from pipeline.config import dataset_card, file_of, names, own_folder
from pipeline.data.card import listing, source_of
from pipeline.data.coop import COOP
from pipeline.data.detect import detect
from pipeline.data.index import index_of
from pipeline.data.layouts import Recipe
from pipeline.data.listing import SPLITS, Rows
from pipeline.data.report import look
from pipeline.data.sheet import sheet
from pipeline.data.source import ParquetSource, Source
from pipeline.data.split import draw
from pipeline.errors import ConfigError, DataError, did_you_mean
from pipeline.files import write_atomic
from pipeline.plain_yaml import scalar
from pipeline.untrusted import text_problem

Say = Callable[[str], None]
ROOT = {"data.root": ""}


def add(arguments: Namespace, say: Say, aside: Say) -> int:
    """Look at a folder or a file of images, say what was found, and write the card by which runs name it.

    KEY=VALUE: template, classnames (a file, one name a line), augment, shift_of, split_seed.
    """
    keys = {"template": "a photo of a {}.", "classnames": "", "augment": "crop_flip", "shift_of": "", "split_seed": "1"}
    (name, path), given = _words(arguments.words, keys, ("NAME", "PATH"))
    card = _card_file(name, arguments.force)
    layout, where = detect(typed_values.path("PATH", path).absolute())
    classnames = checks.lines("classnames", Path(given["classnames"])) if given["classnames"] else ()
    recipe = Recipe(layout, str(where), classnames, _number("split_seed", given["split_seed"], 0))
    aside(f"listing {where} ...")
    index = index_of(recipe)
    counts = {split: len(index.rows_of(split)) for split in SPLITS}
    found = ", ".join(f"{n:,} {split}" for split, n in counts.items())
    if not counts["test"]:
        raise DataError(f"{where} has no test images ({found}): put some into test/, or give class folders alone")
    if not counts["train"] and not given["shift_of"]:
        raise DataError(f"{where} has test images alone ({found}): say which data set they shift, shift_of=NAME")
    if given["shift_of"]:
        dataset_card(given["shift_of"])
    _write_card(card, _card_text(Path(name).stem, recipe, index, counts, given))
    say(f"found: {layout.replace('_', ' ')}, {len(index.classnames):,} classes, {found} images")
    say(f"split: {index.made or 'as its files have it'}")
    prompts = [given["template"].format(c.replace("_", " ")) for c in index.classnames[:3]]
    say(f"prompts: {'; '.join(prompts)}{'; ...' if len(index.classnames) > 3 else ''}")
    say(f"card: {card}   (template and class names are yours to edit)")
    say(f"next: farebox data check {name}")
    if counts["train"]:
        say(f"      farebox run datasets=[{name}] {_shots(index)}storage=runs/{Path(name).stem}")
    return 0


def check(arguments: Namespace, say: Say, aside: Say) -> int:
    """Is it here, whole, and what its card says? Without NAME: every data set that is known.

    Reads every image. Exit 0: all that is here is fine; 3: something was found; 2: a data set that was named is not
    here or cannot be read.
    """
    asked, given = _words(arguments.words, ROOT, ("[NAME ...]",))
    reports = []
    for name in asked or names("dataset"):
        report = look(dataset_card(name, given["data.root"] or None), not arguments.quick, aside)
        reports.append(report)
        if not arguments.json:
            say(report.text())
    if arguments.json:
        say(json.dumps([report.record() for report in reports], indent=1))
    states = {report.state for report in reports}
    if asked and states & {"missing", "unusable"}:
        return 2
    return 3 if states & {"findings", "unusable"} else 0


def show(arguments: Namespace, say: Say, aside: Say) -> int:
    """Draw a sheet of its classes with their names and six images of each, 40 classes a page."""
    (name,), given = _words(arguments.words, ROOT, ("NAME",))
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
    (name,), given = _words(arguments.words, keys, ("NAME",))
    shots, seed = _number("shots", given["shots"], 1), _number("seed", given["seed"], 0)
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


def _words(words: Sequence[str], known: Mapping[str, str], wanted: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The words that are no key=value, as many as wanted, and `known` with the values given. ConfigError otherwise."""
    values, plain = dict(known), []
    for word in words:
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


def _number(key: str, text: str, minimum: int) -> int:
    return checks.whole(key, scalar(text), minimum)


def _card_file(name: str, force: bool) -> Path:
    """Where the card of this name goes. ConfigError when the name is taken or cannot be one."""
    if not name.endswith(".yaml") and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ConfigError(f"{name!r} cannot name a data set: use letters, digits, _ and - (or a path ending in .yaml)")
    if name in COOP or (EMBEDDED / f"{name}.parquet").is_file():
        raise ConfigError(f"{name!r} is a data set that comes with Farebox: choose another name")
    card = Path(name) if name.endswith(".yaml") else own_folder("dataset") / f"{name}.yaml"
    if file_of("dataset", name).exists() and not force:
        raise ConfigError(f"{file_of('dataset', name)} is there already: choose another name, or replace it by --force")
    try:
        card.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{card.parent} cannot be made ({error.strerror}): set FAREBOX_CONF=DIR") from error
    return card


def _write_card(card: Path, text: str) -> None:
    """In place once it can be read as a card. ConfigError otherwise."""
    draft = card.with_name(f".{card.stem}.{uuid.uuid4().hex}.yaml")
    try:
        draft.write_text(text)
        dataset_card(str(draft))
        draft.replace(card)
    except OSError as error:
        raise ConfigError(f"{card} cannot be written ({error.strerror}): set FAREBOX_CONF=DIR") from error
    finally:
        draft.unlink(missing_ok=True)


def _card_text(name: str, recipe: Recipe, index: Rows, counts: Mapping[str, int], given: Mapping[str, str]) -> str:
    def line(key: str, value: object) -> str:
        return f"{key}: {json.dumps(value, ensure_ascii=False)}\n"

    made = "" if not index.made else line("split_seed", recipe.split_seed)
    shift = line("shift_of", given["shift_of"]) if given["shift_of"] else ""
    classes = "".join(
        f"  - {json.dumps(said.replace('_', ' '), ensure_ascii=False)}{'' if said == own else f'  # {own}'}\n"
        for said, own in zip(index.classnames, index.class_ids, strict=True)
    )
    return (
        "# Written by `farebox data add`, to be edited. Every key is explained in docs/data.md.\n"
        + line("name", name)
        + line("layout", recipe.layout)
        + line("path", recipe.path)
        + line("classes", len(index.classnames))
        + "".join(line(split, counts[split]) for split in SPLITS)
        + made
        + line("template", given["template"])
        + line("augment", given["augment"])
        + shift
        + "# As prompts have them, in label order; what the files call a class follows #.\nclassnames:\n"
        + classes
    )


def _shots(index: Rows) -> str:
    """The words that a first run needs: none where every class has the 16 shots of a sweep, and its validation."""
    least = {split: _least(index, split) for split in ("train", "val")}
    shots = next(k for k in (16, 8, 4, 2, 1) if k == 1 or least["train"] >= k + (0 if least["val"] else min(k, 4)))
    return "" if shots == 16 else f"shots=[{shots}] "


def _least(index: Rows, split: str) -> int:
    return int(np.bincount(index.labels[index.rows_of(split)], minlength=len(index.classnames)).min())
