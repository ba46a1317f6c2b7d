"""Cards describe a model or a data set. They are read from conf/ before the model or the data set is opened."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from methods.base import TOP_K, Access
from pipeline.errors import ConfigError, did_you_mean

EMBEDDED = Path(__file__).resolve().parent / "embedded"
INPUT_KEYS = ("mean", "std", "interpolation", "resize_mode")
"""Keys of a model card that override the model's input rule."""
AUGMENTATIONS = {
    "crop_flip": "random resized crop (area 0.5 to 1, bicubic) and horizontal flip, after CraFT and Tip-Adapter",
    "crop": "random resized crop (area 0.5 to 1, bicubic), no flip: for images whose mirror image means another thing",
}
"""Augmentations of training images, by the name that a data set's card has."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What an endpoint answers in place of full scores and features (docs/answers.md). The default is full answers."""

    scores: str = "logits"
    """logits, probabilities, topk (the best classes with their probabilities) or label (the best class)."""
    k: int = TOP_K
    """Number of classes that access TOPK is told."""
    digits: int | None = None
    """Decimals that scores or probabilities are rounded to. None: not rounded."""
    features: str = "float32"
    """float32, int8 or binary."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise on a score. On a component of a feature it is divided by the logit scale."""
    images: str = "float"
    """float: images are sent as they are; jpeg90: as JPEG files of quality 90 at the size of the model's input."""

    @property
    def text(self) -> str:
        """The settings as rows show them: 'logits', 'probabilities, 3 digits', 'top-5', 'label'."""
        parts = [f"top-{self.k}" if self.scores == "topk" else self.scores]
        parts += [f"{self.digits} digit{'s' * (self.digits != 1)}"] if self.digits is not None else []
        parts += [f"{self.features} features"] if self.features != "float32" else []
        parts += [f"noise {self.noise!r}"] if self.noise else []
        return ", ".join([*parts, *([f"{self.images} images"] if self.images != "float" else [])])

    def granted(self, grant: Access) -> Access:
        """Return what is left of a model's grant. Features come with logits only, gradients with full answers only."""
        if self == Answers():
            return grant
        untold = {
            "logits": Access(0),
            "probabilities": Access.FEATURES,
            "topk": Access.FEATURES | Access.SCORES,
            "label": Access.FEATURES | Access.SCORES | Access.TOPK,
        }
        return (grant.closure() & ~(untold[self.scores] | Access.GRADIENTS)).minimal()


FULL_ANSWERS = Answers()


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Card of a model behind the endpoint. See conf/model/*.yaml."""

    name: str
    kind: str
    """fake, embedded or open_clip."""
    arch: str = ""
    """open_clip model name; OpenAI weights need the -quickgelu variants."""
    weights: str = ""
    """open_clip pretrained tag, or a local checkpoint path."""
    weights_sha256: str = ""
    """Expected SHA-256 of a local checkpoint; empty: any. Every row records the actual one."""
    precision: str = "fp32"
    """fp32, bf16 or fp16; bf16 and fp16 need CUDA."""
    grant: str = "SOFT+FEATURES"
    """Access that the endpoint grants, e.g. TEXT+SCORES."""
    answers: Answers = FULL_ANSWERS
    """What it answers in place of full scores and features."""
    mean: tuple[float, float, float] | None = None
    """Mean by which the red, green and blue channels are normalised, in [0, 1]. None: see docs/models.md."""
    std: tuple[float, float, float] | None = None
    """Standard deviation by which they are normalised, in (0, 1]. None: see docs/models.md."""
    interpolation: str | None = None
    """bicubic or bilinear. None: see docs/models.md."""
    resize_mode: str | None = None
    """shortest (resize the short side, crop the centre) or squash (resize both sides). None: see docs/models.md."""
    quick_gelu: bool | None = None
    """Whether the network uses QuickGELU. None: as its architecture says."""
    text_norm: float | None = None
    """Mean length of the text tower's output before normalisation. None: measured when the model is loaded."""
    licence: str = ""
    source: str = ""
    note: str = ""

    @property
    def access(self) -> Access:
        """The granted access as flags. Raises ConfigError for an unknown one."""
        try:
            return Access.parse(self.grant)
        except ValueError as error:
            raise ConfigError(f"grant: {error}") from None


def check_model(card: ModelCard) -> None:
    """Check the values of a model's card, which have the types of their fields already.

    Raises:
        ConfigError: Naming the key whose value is wrong.
    """
    where = f"model {card.name!r}"
    for name, choices in (("interpolation", ("bicubic", "bilinear")), ("resize_mode", ("shortest", "squash"))):
        if (value := getattr(card, name)) not in (None, *choices):
            raise ConfigError(f"{where}: {name}: " + did_you_mean("choice", str(value), choices))
    if card.kind == "fake" and (given := [k for k in (*INPUT_KEYS, "quick_gelu") if getattr(card, k) is not None]):
        raise ConfigError(f"{where}: {given[0]}: a fake model has no such setting: leave it out")
    if card.text_norm is not None and not 0 < card.text_norm < math.inf:
        raise ConfigError(f"{where}: text_norm: {card.text_norm}: expected a number above 0 (docs/models.md)")
    for name in ("mean", "std"):
        if (value := getattr(card, name)) is not None:
            _check_channels(f"{where}: {name}", value, above_zero=name == "std")


def _check_channels(key: str, numbers: Sequence[float], above_zero: bool) -> None:
    """Raise ConfigError unless these are three numbers in [0, 1], one for each colour channel."""
    if len(numbers) != 3 or not all(0 <= n <= 1 for n in numbers) or (above_zero and 0 in numbers):
        allowed = "above 0 and at most 1" if above_zero else "from 0 to 1"
        raise ConfigError(
            f"{key}: {numbers}: expected three numbers {allowed} (pixels are divided by 255), as in [0.5, 0.5, 0.5]"
        )


@dataclass(frozen=True, kw_only=True)
class DatasetCard:
    """Card of a data set. See conf/dataset/*.yaml and docs/data.md."""

    name: str
    layout: str = "parquet"
    """Layout of its files: see pipeline/data/layouts/registry.py."""
    path: str
    """File or folder. A folder may be relative to `data.root`; the composed configuration has the absolute path."""
    sha256: str = ""
    """SHA-256 of a `layout: parquet` file. Other layouts are identified by the digest of their index."""
    classes: int
    train: int
    val: int
    test: int
    template: str
    templates: tuple[str, ...] = ()
    classnames: tuple[str, ...] = ()
    """Class names in label order, instead of those that the files contain."""
    classes_digest: str = ""
    """Digest of the class ids in label order. `classnames` is rejected for other classes."""
    split_seed: int = 1
    """Seed of a split that is generated because none is published."""
    augment: str = "crop_flip"
    test_split: str = ""
    """val: score the val split, for data sets whose test split has no labels. No validation images are left then."""
    duplicates: str = ""
    """allow: classes may have the same prompt."""
    bits: int | None = None
    """Number of bits that 16-bit grey images use, 8 to 16. None: all 16; a set that uses fewer is rejected."""
    shift_of: str | None = None
    """For test-only sets: the data set that methods are fitted on."""
    licence: str = ""
    source: str = ""
    url: str = ""
    """Where its authors publish it."""
    citation: str = ""
    note: str = ""
    card_file: str = field(default="", compare=False)
    """Path of the card itself; not a key of it."""

    @property
    def file(self) -> Path:
        """Path of the Parquet file: as given, or in the package's embedded data."""
        path = Path(self.path)
        return path if path.is_absolute() or path.exists() else EMBEDDED / path


@dataclass(frozen=True, kw_only=True)
class LocalCard:
    """Card of a pretrained model that methods run on the client. See conf/local/*.yaml and docs/models.md."""

    name: str
    arch: str
    """tiny_conv, or the name of a timm model without its tag."""
    weights: str
    """A safetensors file: its path, or a name in the package's embedded data."""
    sha256: str
    """SHA-256 of that file."""
    licence: str
    trained_on: str
    """What it was trained on: whether it has seen the test images of a data set is for the reader to judge."""
    source: str = ""
    note: str = ""

    @property
    def file(self) -> Path:
        """Path of the weights: as given, or in the package's embedded data."""
        path = Path(self.weights)
        return path if path.is_absolute() or path.exists() else EMBEDDED / path
