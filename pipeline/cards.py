"""Cards: what is known of a model or of a data set before either is opened. Read by config.py from conf/."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from methods.base import Access
from pipeline import checks
from pipeline.errors import ConfigError

EMBEDDED = Path(__file__).resolve().parent / "embedded"
INPUT_KEYS = ("mean", "std", "interpolation", "resize_mode")
"""Keys of a model card that override the model's input rule."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """A model behind the endpoint. See conf/model/*.yaml."""

    name: str
    kind: str
    """fake, embedded or open_clip."""
    arch: str = ""
    """open_clip model name; OpenAI weights need the -quickgelu variants."""
    weights: str = ""
    """open_clip pretrained tag, or a local checkpoint path."""
    weights_sha256: str = ""
    """Expected digest of a local checkpoint; empty: whatever is found, recorded in every row."""
    precision: str = "fp32"
    """fp32, bf16 or fp16; the halves are for CUDA."""
    grant: str = "SOFT+FEATURES"
    """What the endpoint allows, e.g. TEXT+SCORES."""
    mean: tuple[float, float, float] | None = None
    """Mean of the red, green and blue pixels that the model expects, in [0, 1]; null: see docs/models.md."""
    std: tuple[float, float, float] | None = None
    """Their standard deviation, in (0, 1]; null likewise."""
    interpolation: str | None = None
    """bicubic or bilinear; null likewise."""
    resize_mode: str | None = None
    """shortest (resize the short side, crop the centre) or squash (resize both sides); null likewise."""
    quick_gelu: bool | None = None
    """Whether the network computes QuickGELU; null: as its architecture says."""
    licence: str = ""
    source: str = ""
    note: str = ""

    @property
    def access(self) -> Access:
        """The grant as flags."""
        return checks.access("grant", self.grant)


def check_model(card: ModelCard) -> ModelCard:
    """The card with its input rule as numbers. ConfigError names the key whose value cannot be meant."""
    where = f"model {card.name!r}"
    for key in fields(card):
        value = getattr(card, key.name)
        if key.type == "str" and not isinstance(value, str):
            raise ConfigError(f"{where}: {key.name}: {value}: expected text (put it in quotes)")
    if card.quick_gelu is not None:
        checks.flag(f"{where}: quick_gelu", card.quick_gelu)
    if card.interpolation is not None:
        checks.one_of(f"{where}: interpolation", card.interpolation, ("bicubic", "bilinear"))
    if card.resize_mode is not None:
        checks.one_of(f"{where}: resize_mode", card.resize_mode, ("shortest", "squash"))
    if card.kind == "fake" and (given := [k for k in (*INPUT_KEYS, "quick_gelu") if getattr(card, k) is not None]):
        raise ConfigError(f"{where}: {given[0]}: a fake model has no such setting: leave it out")
    for name in ("mean", "std"):
        if (value := getattr(card, name)) is not None:
            object.__setattr__(card, name, _channels(f"{where}: {name}", value, above_zero=name == "std"))
    return card


def _channels(key: str, value: Any, above_zero: bool) -> tuple[float, ...]:
    """Three numbers in [0, 1], one for each colour channel."""
    numbers = tuple(value) if isinstance(value, (list, tuple)) else ()
    valid = len(numbers) == 3 and all(
        isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n) and 0 <= n <= 1 for n in numbers
    )
    if not valid or (above_zero and 0 in numbers):
        least = "above 0 and at most 1" if above_zero else "from 0 to 1"
        raise ConfigError(
            f"{key}: {value}: expected three numbers {least} (pixels are divided by 255), as in [0.5, 0.5, 0.5]"
        )
    return tuple(float(n) for n in numbers)


@dataclass(frozen=True, kw_only=True)
class DatasetCard:
    """A data set. See conf/dataset/*.yaml and docs/data.md."""

    name: str
    layout: str = "parquet"
    """How its files lie: see pipeline/data/layouts.py."""
    path: str
    """File or folder; a folder's may be relative to `data.root`, and is absolute once composed if that is known."""
    sha256: str = ""
    """Digest of a Parquet file; other layouts are named by the digest of what is listed."""
    classes: int
    train: int
    val: int
    test: int
    template: str
    templates: tuple[str, ...] = ()
    classnames: tuple[str, ...] = ()
    """In label order, in place of those that the layout gives."""
    classes_digest: str = ""
    """Of the classes' ids in label order: `classnames` is refused for other classes."""
    split_seed: int = 1
    """Of a split that is made here, where none is published."""
    augment: str = "crop_flip"
    test_split: str = ""
    """val: the split val is scored, where there is no test split with labels; nothing is left for validation then."""
    duplicates: str = ""
    """allow: classes may have the same prompt."""
    bits: int | None = None
    """Bits that 16-bit grey images use, 8 to 16. None: all 16; a set that uses fewer is refused."""
    shift_of: str | None = None
    """Set on test-only sets: the data set that methods are fitted on."""
    licence: str = ""
    source: str = ""
    url: str = ""
    """Where its authors publish it."""
    citation: str = ""
    note: str = ""
    card_file: str = field(default="", compare=False)
    """Path of the card itself; set when it is read, not a key of it."""

    @property
    def file(self) -> Path:
        """The Parquet file: as given, or in the embedded package data."""
        path = Path(self.path)
        return path if path.is_absolute() or path.exists() else EMBEDDED / path
