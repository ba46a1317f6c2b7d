"""Writes what ships: the model's files, the dataset cards, the notice and the digests."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from tools.embedded.classes import TEMPLATES
from tools.embedded.fetch import sha256
from tools.embedded.settings import CARDS, PACKAGE
from tools.embedded.train import BPE
from tools.embedded.validate import best_template

NOTICE = Path(__file__).parent / "licences" / "NOTICE.md"


@dataclass(frozen=True)
class Origin:
    """What a card says of a dataset beyond its figures."""

    title: str
    licence: str
    source: str
    citation: str
    shift_of: str | None = None


ORIGINS = {
    "icons": Origin(
        "Icons of everyday things and interface symbols; one class for each thing.",
        "Apache-2.0",
        "Material Design Icons 6.9.96, from qtawesome 1.4.2 (PyPI)",
        "Pictogrammers, Material Design Icons",
    ),
    "icons_outline": Origin(
        "The classes of icons in another style: thin outlines. A shift test set.",
        "MIT",
        "Tabler Icons (outline), from pytablericons 1.0.1 (PyPI)",
        "P. Kuna, Tabler Icons",
        shift_of="icons",
    ),
    "emoji": Origin(
        "Emoji in two styles, flat and 3D; a class is one or more Unicode subgroups.",
        "MIT",
        "Fluent Emoji, from fluentui-emoji 1.3.0 (npm)",
        "Microsoft, Fluent Emoji",
    ),
    "emoji_contrast": Origin(
        "The test concepts of emoji in the black, high-contrast style. A shift test set.",
        "MIT",
        "Fluent Emoji (high contrast), from fluentui-emoji 1.3.0 (npm)",
        "Microsoft, Fluent Emoji",
        shift_of="emoji",
    ),
    "digits": Origin(
        "Handwritten digits, enlarged from 8x8.",
        "CC-BY-4.0",
        "Optical Recognition of Handwritten Digits (UCI), test part, from scikit-learn",
        "E. Alpaydin and C. Kaynak (1998), Optical Recognition of Handwritten Digits, UCI Machine Learning Repository",
    ),
}


def model(trained: Path, folder: Path) -> None:
    """Half-precision weights, open_clip's config and the tokenizer's merges."""
    saved = torch.load(trained, weights_only=True)
    state = {k: v.half() if v.is_floating_point() else v for k, v in saved["model"].items()}
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "tiny.safetensors")
    (folder / "tiny.safetensors").chmod(0o644)
    (folder / "tiny.json").write_text(json.dumps(saved["config"], indent=2) + "\n")
    shutil.copyfile(BPE, folder / "tiny_bpe.txt.gz")


def cards(figures: Path) -> None:
    """One card a dataset, with the template chosen on val."""
    chosen = json.loads(figures.read_text())
    CARDS.mkdir(parents=True, exist_ok=True)
    for name, origin in ORIGINS.items():
        fit = origin.shift_of or name
        template = best_template(chosen[fit]["templates"])
        (CARDS / f"{name}.yaml").write_text(_card(name, origin, template, TEMPLATES[fit]))


def _card(name: str, origin: Origin, template: str, templates: tuple[str, ...]) -> str:
    path = PACKAGE / f"{name}.parquet"
    table = pq.read_table(path, columns=["split"])
    metadata = {k.decode(): v.decode() for k, v in table.schema.metadata.items()}
    counts = {s: pc.sum(pc.equal(table["split"], s)).as_py() for s in ("train", "val", "test")}
    values = {
        "name": name,
        "path": path.name,
        "sha256": sha256(path),
        "classes": len(json.loads(metadata["classes"])),
        **counts,
        "template": template,
        "templates": list(templates),
        "augment": "crop",  # no flip: a mirrored digit or arrow is another thing
        "licence": origin.licence,
        "source": origin.source,
        "citation": origin.citation,
        "note": metadata["note"],
        "shift_of": origin.shift_of,
    }
    lines = [f"# {origin.title}"]
    for key, value in values.items():
        if isinstance(value, list):
            lines += [f"{key}:", *(f"  - {json.dumps(item)}" for item in value)]
        else:
            # A JSON scalar is a YAML scalar, so quoting is settled.
            lines.append(f"{key}: {json.dumps(value)}")
    return "\n".join(lines) + "\n"


def notice_and_digests() -> None:
    """The notice, and the sha256 of every shipped file but the digests themselves."""
    shutil.copyfile(NOTICE, PACKAGE / "NOTICE.md")
    files = sorted(p for p in PACKAGE.iterdir() if p.is_file() and p.suffix not in (".py", ".pyc"))
    digests = {p.name: sha256(p) for p in files if p.name != "digests.json"}
    (PACKAGE / "digests.json").write_text(json.dumps(digests, indent=2) + "\n")
