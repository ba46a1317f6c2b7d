"""`farebox data add`: look at a user's images and write the card by which runs name them."""

from __future__ import annotations

import json
import re
import uuid
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import checks
from pipeline.cards import EMBEDDED
from pipeline.config import dataset_card, file_of, own_folder
from pipeline.data.card import missing
from pipeline.data.class_names import ends, ids_digest, same_prompt
from pipeline.data.coop import COOP
from pipeline.data.detect import detect
from pipeline.data.index import Index, index_of
from pipeline.data.layouts import READERS, Recipe
from pipeline.data.listing import SPLITS
from pipeline.data.split import draw
from pipeline.data_commands import key_values, number
from pipeline.errors import ConfigError, DataError, did_you_mean
from pipeline.protocol import fitted_columns

Say = Callable[[str], None]
KEYS = {
    "template": "",
    "classnames": "",
    "augment": "",
    "shift_of": "",
    "split_seed": "1",
    "test": "",
    "duplicates": "",
    "layout": "",
}
SHOTS = (16, 8, 4, 2, 1)
"""Numbers of shots that the suggested first run may have."""


@dataclass(frozen=True)
class _Added:
    """What was found at a path, and what the user typed."""

    name: str
    recipe: Recipe
    index: Index
    given: Mapping[str, str]

    @property
    def counts(self) -> dict[str, int]:
        """Images by split."""
        return {split: len(self.index.rows_of(split)) for split in SPLITS}

    def found(self) -> str:
        """Describe the images, for messages."""
        return ", ".join(f"{n:,} {split}" for split, n in self.counts.items())

    def check(self) -> None:
        """Raise DataError when no images can be scored or fitted on."""
        counts, where = self.counts, self.recipe.path
        if not counts["test"]:
            way = "type test=val to score its val images" if counts["val"] else "put some into test/"
            raise DataError(f"{where} has no test images ({self.found()}): {way}, or give class folders alone")
        if not counts["train"] and not self.given["shift_of"]:
            raise DataError(
                f"{where} has test images alone ({self.found()}): say which data set they shift, shift_of=NAME"
            )

    def record(self, card: Path) -> dict[str, Any]:
        """For JSON."""
        contents = self.index.contents
        return {
            "name": self.name,
            "card": str(card),
            "layout": self.recipe.layout,
            "path": self.recipe.path,
            "classes": len(self.index.classnames),
            **self.counts,
            "split": self.index.made or "as its files have it",
            "order": self.index.order,
            "class_ids": self.index.class_ids,
            "classnames": self.index.classnames,
            "skipped": [skipped._asdict() for skipped in contents.skipped],
            "notes": [*contents.notes, *self.notes()],
        }

    def notes(self) -> list[str]:
        """Choices that the user should know of, beside those of the listing."""
        notes, counts = [], self.counts
        if self.given["shift_of"] and (unused := counts["train"] + counts["val"]):
            notes.append(f"only the {counts['test']:,} test images are scored, {unused:,} others are not used")
        if pairs := same_prompt(self.index.classnames):
            first, later = (self.index.classnames[label] for label in pairs[0])
            notes.append(f"pairs of classes with one prompt: {len(pairs):,}, the first is {first!r} and {later!r}")
        return notes


def add(arguments: Namespace, say: Say, aside: Say) -> int:
    """Look at a folder or a file of images, say what is used and what is skipped, and write its card.

    KEY=VALUE: template, classnames (a file, one name a line), augment, shift_of, split_seed, test (val: score the val
    images), duplicates (allow), layout.
    """
    (name, path), given = key_values(arguments.words, KEYS, ("NAME", "PATH"))
    checks.one_of("test", given["test"], ("", "val"))
    checks.one_of("duplicates", given["duplicates"], ("", "allow"))
    card = _card_file(name, arguments.force)
    if given["shift_of"]:
        dataset_card(given["shift_of"])
    recipe = _recipe(Path(path).expanduser().absolute(), given)
    given = _with_defaults(given, recipe.layout)
    aside(f"listing {recipe.path} ...")
    added = _Added(Path(name).stem, recipe, index_of(recipe, anew=True), given)
    if added.index.contents.findings:
        _say_contents(added, aside)
        added.index.contents.check(recipe.path)
    added.check()
    _write_card(card, _card_text(added))
    if arguments.json:
        say(json.dumps(added.record(card), indent=1, ensure_ascii=False))
        return 0
    index, layout = added.index, recipe.layout.replace("_", " ")
    say(f"found: {layout}, {len(index.classnames):,} classes, {added.found()} images")
    say(f"labels: {index.order}: {ends(index.class_ids, index.classnames)}")
    say(f"split: {index.made or 'as its files have it'}")
    _say_contents(added, say)
    prompts = [given["template"].format(c.replace("_", " ")) for c in index.classnames[:3]]
    say(f"prompts: {'; '.join(prompts)}{'; ...' if len(index.classnames) > 3 else ''}")
    say(f"card: {card}   (template and class names are yours to edit)")
    say(f"next: farebox data check {name}")
    if added.counts["train"] and not given["shift_of"]:
        say(f"      farebox run datasets=[{name}] {_first_run(index)}storage=runs/{added.name}")
    return 0


def _recipe(path: Path, given: Mapping[str, str]) -> Recipe:
    layout, where = given["layout"], path
    if not layout:
        layout, where = detect(path)
    elif layout not in READERS:
        raise ConfigError(did_you_mean("layout", layout, READERS))
    classnames = checks.lines("classnames", Path(given["classnames"])) if given["classnames"] else ()
    seed = number("split_seed", given["split_seed"], 0)
    return Recipe(
        layout=layout,
        path=str(where),
        classnames=classnames,
        split_seed=seed,
        test_split=given["test"],
        test_only=bool(given["shift_of"]),
        duplicates=given["duplicates"] == "allow",
    )


def _with_defaults(given: Mapping[str, str], layout: str) -> dict[str, str]:
    """Fill in what was not typed; a published layout has the template of its published card."""
    published = dataset_card(layout) if layout in COOP else None
    return {
        **given,
        "template": given["template"] or (published.template if published else "a photo of a {}."),
        "augment": given["augment"] or (published.augment if published else "crop_flip"),
    }


def _say_contents(added: _Added, say: Say) -> None:
    contents = added.index.contents
    for skipped in contents.skipped:
        say(f"skipped: {skipped}")
    for note in (*contents.notes, *added.notes()):
        say(f"note: {note}")
    for finding in contents.findings[1:]:  # the first one is the error
        say(f"finding: {finding}")


def _first_run(index: Index) -> str:
    """Return the arguments that a first run needs: none where every class has the 16 shots of a sweep."""
    for short_classes in ("error", "take_all"):
        for validation in ("min4", "none"):
            for shots in SHOTS:
                try:
                    draw(index, "", shots, 1, validation, short_classes)
                except DataError:
                    continue
                return (
                    ("" if shots == SHOTS[0] else f"shots=[{shots}] ")
                    + ("" if validation == "min4" else f"validation={validation} ")
                    + ("" if short_classes == "error" else f"data.short_classes={short_classes} ")
                )
    return ""


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
    """Write the card once it can be read, and once its classes are among those of the set that it shifts.

    Raises:
        ConfigError: the card cannot be written, or one of its values is wrong.
        DataError: a class is none of the fitted ones.
    """
    draft = card.with_name(f".{card.stem}.{uuid.uuid4().hex}.yaml")
    try:
        draft.write_text(text)
        new = dataset_card(str(draft))
        if new.shift_of and not missing(fitted := dataset_card(new.shift_of)):
            fitted_columns(fitted, new)
        draft.replace(card)
    except OSError as error:
        raise ConfigError(f"{card} cannot be written ({error.strerror}): set FAREBOX_CONF=DIR") from error
    finally:
        draft.unlink(missing_ok=True)


def _card_text(added: _Added) -> str:
    def line(key: str, value: object) -> str:
        return f"{key}: {json.dumps(value, ensure_ascii=False)}\n"

    recipe, index, given = added.recipe, added.index, added.given
    classes = "".join(
        f"  - {json.dumps(said.replace('_', ' '), ensure_ascii=False)}{'' if said == own else f'  # {own}'}\n"
        for said, own in zip(index.classnames, index.class_ids, strict=True)
    )
    return (
        "# Written by `farebox data add`, to be edited. Every key is explained in docs/data.md.\n"
        + line("name", added.name)
        + line("layout", recipe.layout)
        + line("path", recipe.path)
        + line("classes", len(index.classnames))
        + "".join(line(split, count) for split, count in added.counts.items())
        + (line("split_seed", recipe.split_seed) if index.made else "")
        + line("template", given["template"])
        + line("augment", given["augment"])
        + "".join(line(key, given[key]) for key in ("shift_of", "duplicates") if given[key])
        + (line("test_split", given["test"]) if given["test"] else "")
        + "# The class names below are refused for other classes than those of this digest.\n"
        + line("classes_digest", ids_digest(index.class_ids))
        + "# As prompts have them, in label order; what the files call a class follows #.\nclassnames:\n"
        + classes
    )
