"""Cards: what is known of a model or of a data set before either is opened. Read by config.py from conf/."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from methods.base import Access
from pipeline import checks

EMBEDDED = Path(__file__).resolve().parent / "embedded"


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
    licence: str = ""
    source: str = ""
    note: str = ""

    @property
    def access(self) -> Access:
        """The grant as flags."""
        return checks.access("grant", self.grant)


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
