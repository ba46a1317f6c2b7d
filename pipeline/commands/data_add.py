"""The command `farebox data add`: examine a user's images and write a card for them."""

from __future__ import annotations

import json
import re
import uuid
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cards import EMBEDDED
from pipeline.commands.data import key_values, number
from pipeline.config import values as checks
from pipeline.config.card_files import dataset_card
from pipeline.config.files import file_of, own_folder
from pipeline.data.dataset import missing, open_dataset
from pipeline.data.few_shot import draw
from pipeline.data.index import Index, index_of
from pipeline.data.layouts.class_names import ends, ids_digest, prompt_note
from pipeline.data.layouts.coop import COOP
from pipeline.data.layouts.detect import detect
from pipeline.data.layouts.listing import SPLITS
from pipeline.data.layouts.registry import READERS, LayoutSpec
from pipeline.errors import ConfigError, DataError, did_you_mean
from pipeline.trials.protocol import fitted_columns

Echo = Callable[[str], None]
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
"""Numbers of shots that the suggested first run may use."""


@dataclass(frozen=True)
class _Added:
    """A data set at a path, and the options of the command."""

    name: str
    spec: LayoutSpec
    index: Index
    options: Mapping[str, str]

    @property
    def counts(self) -> dict[str, int]:
        """Number of images by split."""
        return {split: len(self.index.rows_of(split)) for split in SPLITS}

    def counts_text(self) -> str:
        """Return the numbers of images as text."""
        return ", ".join(f"{n:,} {split}" for split, n in self.counts.items())

    def check(self) -> None:
        """Raise DataError when there are no images to score or to fit on."""
        counts, where = self.counts, self.spec.path
        if not counts["test"]:
            way = "type test=val to score its val images" if counts["val"] else "put some into test/"
            raise DataError(
                f"{where} has no test images ({self.counts_text()}): {way}, or use a folder of class folders"
            )
        if not counts["train"] and not self.options["shift_of"]:
            raise DataError(
                f"{where} has only test images ({self.counts_text()}): type shift_of=NAME, the data set "
                "that methods are fitted on"
            )

    def record(self, card: Path) -> dict[str, Any]:
        """Return the data set for JSON."""
        contents = self.index.contents
        return {
            "name": self.name,
            "card": str(card),
            "layout": self.spec.layout,
            "path": self.spec.path,
            "classes": len(self.index.classnames),
            **self.counts,
            "split": self.index.split_origin or "as its files have it",
            "order": self.index.order,
            "class_ids": self.index.class_ids,
            "classnames": self.index.classnames,
            "skipped": [skipped._asdict() for skipped in contents.skipped],
            "notes": [*contents.notes, *self.notes()],
        }

    def notes(self) -> list[str]:
        """Return notes about the options, in addition to those of the listing."""
        notes, counts = [], self.counts
        if self.options["shift_of"] and (unused := counts["train"] + counts["val"]):
            notes.append(f"only the {counts['test']:,} test images are scored, {unused:,} others are not used")
        if note := prompt_note(self.index.classnames):
            notes.append(note)
        return notes


def add(arguments: Namespace, echo: Echo, log: Echo) -> int:
    """Examine a folder or a file of images, report what is used and what is skipped, and write a card.

    KEY=VALUE: template, classnames (a file, one name a line), augment, shift_of, split_seed, test (val: score the val
    images), duplicates (allow), layout.
    """
    (name, path), options = key_values(arguments.words, KEYS, ("NAME", "PATH"))
    checks.one_of("test", options["test"], ("", "val"))
    checks.one_of("duplicates", options["duplicates"], ("", "allow"))
    card = _card_file(name, arguments.force)
    if options["shift_of"]:
        dataset_card(options["shift_of"])
    spec = _layout_spec(Path(path).expanduser().absolute(), options)
    options = _with_defaults(options, spec.layout)
    log(f"listing {spec.path} ...")
    added = _Added(Path(name).stem, spec, index_of(spec, rebuild=True), options)
    if added.index.contents.findings:
        _echo_contents(added, log)
        added.index.contents.check(spec.path)
    added.check()
    _write_card(card, _card_text(added))
    if arguments.json:
        echo(json.dumps(added.record(card), indent=1, ensure_ascii=False))
        return 0
    index, layout = added.index, spec.layout.replace("_", " ")
    echo(f"found: {layout}, {len(index.classnames):,} classes, {added.counts_text()} images")
    echo(f"labels: {index.order}: {ends(index.class_ids, index.classnames)}")
    echo(f"split: {index.split_origin or 'as its files have it'}")
    _echo_contents(added, echo)
    prompts = [options["template"].format(c.replace("_", " ")) for c in index.classnames[:3]]
    echo(f"prompts: {'; '.join(prompts)}{'; ...' if len(index.classnames) > 3 else ''}")
    echo(f"card: {card}   (template and class names are yours to edit)")
    echo(f"next: farebox data check {name}")
    if added.counts["train"] and not options["shift_of"]:
        echo(f"      farebox run datasets={name} {_first_run(index)}storage=runs/{added.name}")
    return 0


def _layout_spec(path: Path, options: Mapping[str, str]) -> LayoutSpec:
    layout, where = options["layout"], path
    if not layout:
        layout, where = detect(path)
    elif layout not in READERS:
        raise ConfigError(did_you_mean("layout", layout, READERS))
    classnames = checks.lines("classnames", Path(options["classnames"])) if options["classnames"] else ()
    seed = number("split_seed", options["split_seed"], 0)
    return LayoutSpec(
        layout=layout,
        path=str(where),
        classnames=classnames,
        split_seed=seed,
        test_split=options["test"],
        test_only=bool(options["shift_of"]),
        duplicates=options["duplicates"] == "allow",
    )


def _with_defaults(options: Mapping[str, str], layout: str) -> dict[str, str]:
    """Fill in what was not typed; a published layout has the template of its published card."""
    published = dataset_card(layout) if layout in COOP else None
    return {
        **options,
        "template": options["template"] or (published.template if published else "a photo of a {}."),
        "augment": options["augment"] or (published.augment if published else "crop_flip"),
    }


def _echo_contents(added: _Added, echo: Echo) -> None:
    contents = added.index.contents
    for skipped in contents.skipped:
        echo(f"skipped: {skipped}")
    for note in (*contents.notes, *added.notes()):
        echo(f"note: {note}")
    for finding in contents.findings[1:]:  # the first one is the error message
        echo(f"finding: {finding}")


def _first_run(index: Index) -> str:
    """Return the overrides that a first run needs; none if every class has 16 images to draw."""
    for small_classes in ("error", "take_all"):
        for validation in ("min4", "none"):
            for shots in SHOTS:
                try:
                    draw(index, "", shots, 1, validation, small_classes)
                except DataError:
                    continue
                return (
                    ("" if shots == SHOTS[0] else f"shots={shots} ")
                    + ("" if validation == "min4" else f"validation={validation} ")
                    + ("" if small_classes == "error" else f"data.small_classes={small_classes} ")
                )
    return ""


def _card_file(name: str, force: bool) -> Path:
    """Return the path of the new card. Raises ConfigError when the name is taken or not valid."""
    if not name.endswith(".yaml") and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ConfigError(f"{name!r} cannot name a data set: use letters, digits, _ and - (or a path ending in .yaml)")
    if name in COOP or (EMBEDDED / f"{name}.parquet").is_file():
        raise ConfigError(f"{name!r} is a data set that comes with Farebox: choose another name")
    card = Path(name) if name.endswith(".yaml") else own_folder("dataset") / f"{name}.yaml"
    if file_of("dataset", name).exists() and not force:
        raise ConfigError(f"{file_of('dataset', name)} already exists: choose another name, or replace it with --force")
    try:
        card.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{card.parent} cannot be made ({error.strerror}): set FAREBOX_CONF=DIR") from error
    return card


def _write_card(card: Path, text: str) -> None:
    """Write the card, after checking that it can be read and that the classes of a shift set are fitted ones.

    Raises:
        ConfigError: The card cannot be written, or one of its values is wrong.
        DataError: A class of a shift set is not among the fitted ones.
    """
    draft = card.with_name(f".{card.stem}.{uuid.uuid4().hex}.yaml")
    try:
        draft.write_text(text)
        new = dataset_card(str(draft))
        if new.shift_of and not missing(fitted := dataset_card(new.shift_of)):
            fitted_columns(open_dataset(fitted), open_dataset(new))
        draft.replace(card)
    except OSError as error:
        raise ConfigError(f"{card} cannot be written ({error.strerror}): set FAREBOX_CONF=DIR") from error
    finally:
        draft.unlink(missing_ok=True)


def _card_text(added: _Added) -> str:
    def line(key: str, value: object) -> str:
        return f"{key}: {json.dumps(value, ensure_ascii=False)}\n"

    spec, index, options = added.spec, added.index, added.options
    classes = "".join(
        f"  - {json.dumps(name.replace('_', ' '), ensure_ascii=False)}{'' if name == own else f'  # {own}'}\n"
        for name, own in zip(index.classnames, index.class_ids, strict=True)
    )
    return (
        "# Written by `farebox data add`, to be edited. Every key is explained in docs/data.md.\n"
        + line("name", added.name)
        + line("layout", spec.layout)
        + line("path", spec.path)
        + line("classes", len(index.classnames))
        + "".join(line(split, count) for split, count in added.counts.items())
        + (line("split_seed", spec.split_seed) if index.split_origin else "")
        + line("template", options["template"])
        + line("augment", options["augment"])
        + "".join(line(key, options[key]) for key in ("shift_of", "duplicates") if options[key])
        + (line("test_split", options["test"]) if options["test"] else "")
        + "# The class names below are refused for other classes than those of this digest.\n"
        + line("classes_digest", ids_digest(index.class_ids))
        + "# As prompts have them, in label order; what the files call a class follows #.\nclassnames:\n"
        + classes
    )
