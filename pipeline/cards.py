"""Cards describe a model or a data set. They are read from conf/ before the model or the data set is opened."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

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
BITS = range(8, 17)
"""Valid values of the key `bits` of a data set's card."""
HTTP_GRANTS = {
    "farebox": "TEXT+PIXELS+FEATURES",
    "openai_embeddings": "TEXT+FEATURES",
    "oip_v2": "TEXT+FEATURES",
    "hf_zero_shot": "TEXT+SCORES",
    "jina_classify": "TEXT+SCORES",
}
"""The adapters of `kind: http`, and the greatest access that each can give."""
MICRO = 1_000_000
"""Micro-dollars in a dollar. Amounts of money are whole numbers of micro-dollars."""


@dataclass(frozen=True, kw_only=True)
class Auth:
    """How a request proves who sends it. The secret itself is read from the environment when a run starts."""

    env: str
    """Environment variable that holds the key."""
    header: str = "Authorization"
    prefix: str = "Bearer "


@dataclass(frozen=True, kw_only=True)
class Served:
    """Which model is expected to answer."""

    model: str = ""
    """Name that requests send and that responses must state, where they state one."""
    probe: str = ""
    """Fingerprint of its answers to fixed probes. Empty: recorded by the first run, compared by later ones."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Most items and bytes of one HTTP call."""

    images: int = 32
    texts: int = 128
    bytes: int = 20 * 2**20
    """Most bytes of a call's body."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Limits of the rate at which a run sends, over all its trials. None: no limit."""

    requests_per_minute: int | None = None
    """HTTP calls."""
    images_per_minute: int | None = None
    tokens_per_minute: int | None = None
    at_once: int = 4
    """Connections that are used at the same time."""


@dataclass(frozen=True, kw_only=True)
class Retry:
    """Which responses are asked for again, and when."""

    on: tuple[int, ...] = (408, 425, 429, 500, 502, 503, 504)
    """HTTP statuses."""
    first_s: float = 1.0
    """Seconds before the second try; they double with each further one."""
    most_s: float = 60.0
    """Most seconds between two tries, and the longest `Retry-After` that is waited for."""
    tries: int = 8


@dataclass(frozen=True, kw_only=True)
class SentImage:
    """How an image is sent: made at the size of the model's input on this side, then encoded."""

    size: int
    """Width and height in pixels."""
    format: str = "png"
    """png (lossless), or jpeg of quality 95."""
    resize_mode: str = "shortest"
    interpolation: str = "bicubic"


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """Names that a server of the Open Inference Protocol gave to its models and tensors. For `oip_v2` only."""

    image_model: str
    text_model: str
    image_input: str = "image"
    """BYTES tensor [B] of base64-encoded images."""
    text_input: str = "text"
    """BYTES tensor [B] of prompts."""
    output: str = "embedding"
    """FP32 tensor [B, D]."""


@dataclass(frozen=True, kw_only=True)
class Price:
    """What the owner of the endpoint charges, in US dollars."""

    as_of: str
    """Date at which these prices were read, as 2026-11-01."""
    usd_per_request: float = 0.0
    """Per HTTP call."""
    usd_per_image: float = 0.0
    usd_per_1k_tokens: float = 0.0
    tokens_per_image: int = 0
    """Most tokens that an image is billed as."""

    def micro_usd(self, requests: int, images: int, tokens: int) -> int:
        """Return the price of HTTP calls with these images and tokens, in micro-dollars, rounded up."""
        usd = requests * self.usd_per_request + images * self.usd_per_image + tokens / 1000 * self.usd_per_1k_tokens
        return math.ceil(round(usd * MICRO, 6))  # rounded first: 3 * 0.1 is above 0.3


@dataclass(frozen=True, kw_only=True)
class HttpCard:
    """The keys of a model card that only `kind: http` has. See docs/remote.md."""

    url: str
    adapter: str
    """A key of `HTTP_GRANTS`."""
    image: SentImage
    logit_scale: float
    """Factor of the cosines in scores, which few servers tell: 100 for CLIP."""
    auth: Auth | None = None
    identity: Served = Served()
    feature_dim: int = 0
    """Width of the features; required if the grant has FEATURES."""
    max_text: int | None = None
    """Most characters of a prompt, so that the server does not cut it. Required except for farebox, which refuses."""
    batch: Batch = Batch()
    rate: Rate = Rate()
    timeout_s: float = 60.0
    retry: Retry = Retry()
    price: Price | None = None
    tensors: Tensors | None = None

    @property
    def source(self) -> str:
        """What determines its answers: adapter, model and form of the images. Records are stored under this text.

        A model whose `identity.probe` is stated is known by its answers; any other by its address.
        """
        where = f"probe {self.identity.probe}" if self.identity.probe else self.url
        model = self.identity.model or "model"
        parts = [f"{self.adapter} {model} at {where}", f"images {self.transform}", f"{self.feature_dim} features"]
        if self.tensors is not None:
            parts.append(f"{self.tensors.image_model}.{self.tensors.image_input}")
            parts.append(f"{self.tensors.text_model}.{self.tensors.text_input}.{self.tensors.output}")
        return "; ".join(parts)

    @property
    def transform(self) -> str:
        """Name of the form in which images are sent, as in result rows."""
        return f"{self.image.format}{self.image.size}-{self.image.interpolation}-{self.image.resize_mode}"

    @property
    def model_identity(self) -> str:
        """Identity of the model in trial ids and rows: its source, and the scale of its scores."""
        return f"{self.source}; logit_scale {self.logit_scale!r}"

    @property
    def host(self) -> str:
        """Host of the URL, with its port if that is stated."""
        return urlsplit(self.url).netloc

    @property
    def loopback(self) -> bool:
        """Whether the host is this machine."""
        return is_loopback(urlsplit(self.url).hostname or "")


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


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
        """Return what is left of a model's grant. Features need logits; white boxes need full answers."""
        if self == Answers():
            return grant
        untold = {
            "logits": Access(0),
            "probabilities": Access.FEATURES,
            "topk": Access.FEATURES | Access.SCORES,
            "label": Access.FEATURES | Access.SCORES | Access.TOPK,
        }
        return (grant.closure() & ~(untold[self.scores] | Access.GRADIENTS | Access.LORA)).minimal()


FULL_ANSWERS = Answers()


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Card of a model behind the endpoint. See conf/model/*.yaml."""

    name: str
    kind: str
    """fake, embedded, open_clip, or http: a model that answers over HTTP."""
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
    http: HttpCard | None = None
    """The keys of `kind: http`, which its file has beside the others; None for every other kind."""

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
