"""The interface of a method: its task, the black box that it queries, and the bill of its queries.

Shape suffixes used in every method: B images in a call, C classes, D feature width, N training images (C * shots),
M validation images, L context tokens, E token-embedding width, K intrinsic dimension, P prompt sets (a population),
V views, T templates.

A trial calls `plan` for the schedule that fits the allotment, `start` once, `step` until it returns False, and then
`predict` on a copy. Between two steps the method may be pickled and continued in another process, so its attributes
hold all of its state, random generators included. They never hold the box.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeVar, final

if TYPE_CHECKING:  # commands that read results import this module, but need neither
    import numpy as np
    import torch
    from torch import Tensor

TOP_K = 5
"""Number of classes that an endpoint tells under access TOPK, unless its answers have another k (docs/answers.md); all
of them if there are fewer."""


class Access(enum.Flag):
    """What a method may send and receive.

    Inputs: TEXT < SOFT, and PIXELS beside them. Outputs: LABELS < TOPK < SCORES < FEATURES. GRADIENTS and LORA: white
    box.
    """

    TEXT = enum.auto()
    SOFT = enum.auto()
    PIXELS = enum.auto()
    """Images that the method made itself, and the pixels of the task's images to make them from."""
    LABELS = enum.auto()
    """The best class of an image."""
    TOPK = enum.auto()
    """The k best classes of an image, with their probabilities; see `BlackBox.top_k`."""
    SCORES = enum.auto()
    FEATURES = enum.auto()
    GRADIENTS = enum.auto()
    """Gradients in soft prompts; see `BlackBox.text_gradients`."""
    LORA = enum.auto()
    """Low-rank changes of the weights, and gradients in them; see `Lora`."""

    @classmethod
    def parse(cls, text: str) -> Access:
        """Parse names joined by plus signs, as in 'SOFT+FEATURES'.

        Raises:
            ValueError: a name is not one of the flags.
        """
        access = cls(0)
        for name in str(text).replace("|", "+").split("+"):
            if name.strip().upper() not in cls.__members__:
                raise ValueError(f"unknown access {name!r}; expected {', '.join(cls.__members__)}, joined by +")
            access |= cls[name.strip().upper()]
        return access

    def closure(self) -> Access:
        """Return this access with everything that it implies (SOFT allows TEXT, FEATURES allow SCORES, ...)."""
        full = self
        if Access.SOFT in full:
            full |= Access.TEXT
        if Access.FEATURES in full:
            full |= Access.SCORES
        if Access.SCORES in full:
            full |= Access.TOPK
        if Access.TOPK in full:
            full |= Access.LABELS
        return full

    def covers(self, needed: Access) -> bool:
        """Return whether a grant of `self` allows everything in `needed`."""
        return needed.closure() in self.closure()

    def minimal(self) -> Access:
        """Return this access without the flags that others of it imply."""
        least = self
        for flag in Access:
            if flag in least and flag in (least & ~flag).closure():
                least &= ~flag
        return least

    @property
    def label(self) -> str:
        """Names joined by +, for example 'SOFT+SCORES'."""
        return "+".join(str(flag.name) for flag in Access if flag in self)


@dataclass(frozen=True)
class Bill:
    """Cost of one or more calls. Requests: prompt sets (or one per feature call); the other units are rows."""

    requests: int = 0
    images: int = 0
    prompts: int = 0
    outputs: int = 0

    @classmethod
    def scores(cls, p: int, b: int, c: int) -> Bill:
        """Cost of scoring P prompt sets on B images and C classes, in one call."""
        return cls(requests=p, images=p * b, prompts=p * c, outputs=p * b * c)

    @classmethod
    def top_k(cls, p: int, b: int, c: int, k: int = TOP_K) -> Bill:
        """Cost of the same call under access TOPK: k classes and k probabilities for each row."""
        return cls(requests=p, images=p * b, prompts=p * c, outputs=p * b * 2 * min(k, c))

    @classmethod
    def labels(cls, p: int, b: int, c: int) -> Bill:
        """Cost of the same call under access LABELS: one class for each row."""
        return cls(requests=p, images=p * b, prompts=p * c, outputs=p * b)

    @classmethod
    def image_features(cls, b: int, d: int) -> Bill:
        """Cost of the features [B, D] of B image rows (each view is a row), in one call."""
        return cls(requests=1, images=b, outputs=b * d)

    @classmethod
    def text_features(cls, p: int, c: int, d: int) -> Bill:
        """Cost of encoding P prompt sets. `text_gradients`, a backward pass through the text tower, costs the same."""
        return cls(requests=p, prompts=p * c, outputs=p * c * d)

    @classmethod
    def lora_gradients(cls, b: int, c: int) -> Bill:
        """Cost of a forward and a backward pass through both towers: one request, and all rows of `scores` twice."""
        return cls(requests=1, images=2 * b, prompts=2 * c, outputs=2 * b * c)

    def __add__(self, other: Bill) -> Bill:
        return Bill(  # written out: this runs several times for each request
            self.requests + other.requests,
            self.images + other.images,
            self.prompts + other.prompts,
            self.outputs + other.outputs,
        )

    def __mul__(self, times: int) -> Bill:
        return Bill(self.requests * times, self.images * times, self.prompts * times, self.outputs * times)


class Remaining(NamedTuple):
    """What is left of a trial's allotment; `math.inf` where there is no limit."""

    requests: float = math.inf
    images: float = math.inf

    def affords(self, bill: Bill) -> int | None:
        """Return how many times `bill` can be paid; None if there is no limit."""
        times = min(
            self.requests / bill.requests if bill.requests else math.inf,
            self.images / bill.images if bill.images else math.inf,
        )
        return None if math.isinf(times) else max(0, math.floor(times))

    def minus(self, bill: Bill) -> Remaining:
        """Return what is left after `bill`."""
        return Remaining(self.requests - bill.requests, self.images - bill.images)


@dataclass(frozen=True)
class TextPrompts:
    """P sets of C class prompts as text: texts[p][c]."""

    texts: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, eq=False)
class SoftPrompts:
    """P sets of context vectors that the endpoint places before each class name.

    The text tower reads [start] ctx[p] classname suffix [end]; the suffix is the template's words after the class name.
    """

    ctx_PLE: Tensor
    classnames: tuple[str, ...]
    suffix: str = "."


Prompts = TextPrompts | SoftPrompts


@dataclass(frozen=True)
class Classes:
    """Class names in label order, with the data set's frozen zero-shot template and its ensemble."""

    names: tuple[str, ...]
    template: str
    templates: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def context(self) -> str:
        """The template's words before the class name, e.g. 'a photo of a'."""
        return self.template.split("{}")[0].strip()

    def prompts(self, template: str | None = None) -> TextPrompts:
        """Return one prompt set (P = 1) of this template; by default the data set's."""
        return TextPrompts((tuple((template or self.template).format(n) for n in self.names),))

    def ensemble(self) -> TextPrompts:
        """Return one prompt set per ensemble template (P = T)."""
        return TextPrompts(tuple(self.prompts(t).texts[0] for t in self.templates or (self.template,)))

    def soft(self, ctx_PLE: Tensor) -> SoftPrompts:
        """Return soft prompts with the contexts [P, L, E] in place of the template's."""
        return SoftPrompts(ctx_PLE, self.names, self.template.split("{}")[1])


class ImageSet(Protocol):
    """An ordered set of image references. A method handles pixels only if it declares PIXELS (see `PixelImages`)."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> ImageSet:
        """Return the images at these rows, in that order."""
        ...

    def views(self, n: int, seed: int = 0) -> ImageSet:
        """Return n augmented copies of each image, view-major: row v * len(self) + i is view v of image i."""
        ...

    def pixels(self, size: int) -> Tensor:
        """Return gray thumbnails [B, size * size] in [0, 1], read on the client without a request."""
        ...

    def array(self, size: int) -> Tensor:
        """Return the images or their views as [B, 3, size, size] in [0, 1], without a request; access PIXELS.

        The rule is the same for every model: resize the short side to `size` (bicubic), then crop the center.
        """
        ...


def eight_bits(images: Tensor) -> Tensor:
    """Return images with values in [0, 1] as the endpoint receives them: round(255 x), uint8.

    Raises:
        ValueError: a value is outside [0, 1], or NaN.
    """
    import torch

    if not ((images >= 0) & (images <= 1)).all():
        raise ValueError("an image has a value outside [0, 1]: clamp it before it is sent")
    return (255 * images).round().to(torch.uint8)


@dataclass(frozen=True, eq=False)
class PixelImages:
    """P sets of B images that the client made, each from an image of `base`. `box.scores` takes them; access PIXELS.

    What a call is charged to, and whether `predict` may make it, is that of the base images.

    Raises:
        ValueError: the pixels are not uint8 of one of the two shapes, with as many images as `base` has.
    """

    base: ImageSet
    pixels: Tensor
    """uint8 [B, 3, S, S], or [P, B, 3, S, S] for P sets; S is `box.image_size`. `eight_bits` makes them."""

    def __post_init__(self) -> None:
        import torch

        shape, dtype = tuple(self.pixels.shape), self.pixels.dtype
        square = len(shape) in (4, 5) and shape[-3] == 3 and shape[-1] == shape[-2]
        if dtype != torch.uint8 or not square or shape[-4] != len(self.base):
            raise ValueError(
                f"pixels of shape {shape} and type {dtype} for {len(self.base)} images, expected uint8 [B, 3, S, S] or "
                "[P, B, 3, S, S]: see eight_bits"
            )

    @property
    def pixels_PB3SS(self) -> Tensor:
        """The pixels with the axis P, which has length 1 for one set."""
        return self.pixels if self.pixels.dim() == 5 else self.pixels.unsqueeze(0)


class LowRank(NamedTuple):
    """Factors A and B of the changes B A of one tower: n attention layers, each with 3 maps [W, W], rank r.

    The maps of a layer are those of the queries, the keys and the values, in this order.
    """

    a_n3rW: Tensor
    b_n3Wr: Tensor


@dataclass(frozen=True, eq=False)
class Lora:
    """A low-rank change of all attention layers of both towers: a weight becomes the weight + scale * B A; access LORA.

    `box.lora_shapes` tells n and W of the towers.
    """

    image: LowRank
    text: LowRank
    scale: float

    @property
    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A and B of the image tower, then those of the text tower."""
        return *self.image, *self.text


class LocalModel(Protocol):
    """A frozen pretrained encoder that runs on the client, for methods that declare `uses_local`. It sends no request.

    Tensors are float32 on the CPU. An attribute of the method may hold it: a pickle contains a reference only.
    """

    @property
    def size(self) -> int:
        """Side S of its square input in pixels."""
        ...

    @property
    def feature_dim(self) -> int:
        """Width F of its features."""
        ...

    def features(self, images: ImageSet) -> Tensor:
        """Return the features [B, F] of images or views, not normalised and without a gradient."""
        ...

    def pixels(self, images: ImageSet, size: int) -> Tensor:
        """Return images or views as RGB pixels [B, 3, size, size] in [0, 1]."""
        ...

    def encode(self, pixels_B3SS: Tensor) -> Tensor:
        """Return the features [B, F] of pixels in [0, 1]; differentiable."""
        ...


class LabelledImages(NamedTuple):
    """Images with their labels [N] (int64)."""

    images: ImageSet
    labels: Tensor


@dataclass(frozen=True)
class FewShotTask:
    """The training and validation data of one data set, number of shots and seed. It has no test split."""

    dataset: str
    classes: Classes
    shots: int
    train: LabelledImages
    val: LabelledImages
    """min(shots, 4) images per class, or none. Calls on them are billed to the phase `validate`."""
    views: int = 10
    """Number of fixed augmented views of the training images that a method may query; 0 = the plain images only."""
    fresh_views: bool = False
    """Use new views in every epoch, as the papers' loaders do; each is billed."""
    local: LocalModel | None = None
    """The run's local model; None for methods that do not declare `uses_local`."""


@dataclass(frozen=True)
class TaskShape:
    """The sizes that a bill depends on, known before any image is read."""

    n_classes: int
    n_train: int
    n_val: int
    shots: int
    views: int
    fresh_views: bool
    n_templates: int
    feature_dim: int
    top_k: int = TOP_K
    """Number of classes that the endpoint tells under access TOPK."""

    @classmethod
    def of(cls, task: FewShotTask, feature_dim: int, top_k: int = TOP_K) -> TaskShape:
        return cls(
            n_classes=len(task.classes),
            n_train=len(task.train.labels),
            n_val=len(task.val.labels),
            shots=task.shots,
            views=task.views,
            fresh_views=task.fresh_views,
            n_templates=max(1, len(task.classes.templates)),
            feature_dim=feature_dim,
            top_k=top_k,
        )


class BlackBox(Protocol):
    """The metered endpoint that a method queries. Tensors are float32 on the CPU; features have unit length."""

    logit_scale: float
    token_dim: int
    feature_dim: int
    image_size: int
    """Side of the model's input in pixels."""
    top_k: int
    """Number of classes that it tells under access TOPK."""
    lora_shapes: tuple[tuple[int, int], ...]
    """Number of attention layers and their width, of the image tower and of the text tower; () without access LORA."""

    @property
    def remaining(self) -> Remaining: ...

    @property
    def text_norm(self) -> float:
        """Mean length of the text tower's output before normalisation, for methods that declare `uses_text_norm`."""
        ...

    def scores(self, images: ImageSet | PixelImages, prompts: Prompts, lora: Lora | None = None) -> Tensor:
        """Return logit_scale * cosine, [P, B, C]; with `lora`, of the changed model.

        P sets of `PixelImages` are scored under P prompt sets, each under its own, or under one; one set of images
        under P prompt sets.
        A method that declares less than SCORES is told less: under TOPK the log probabilities of the `top_k` best
        classes, under LABELS zero for the best class, and -inf for all others. An endpoint that answers probabilities
        returns their logarithms: logits up to a constant for each image.
        """
        ...

    def score_blocks(
        self, images: ImageSet | PixelImages, prompts: Prompts, lora: Lora | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield the scores, for the same charge, as (rows, [P, rows, C]) blocks of at most 64 MiB each way."""
        ...

    def image_features(self, images: ImageSet) -> Tensor:
        """Return image features [B, D]; access FEATURES."""
        ...

    def text_features(self, prompts: Prompts) -> Tensor:
        """Return text features [P, C, D]; access FEATURES."""
        ...

    def embed_text(self, text: str) -> Tensor:
        """Return token embeddings [L, E] without start and end tokens; access SOFT; free of charge."""
        ...

    def text_gradients(self, prompts: SoftPrompts, upstream_PCD: Tensor) -> Tensor:
        """Return the gradient [P, L, E] of sum(upstream_PCD * text_features(prompts)) with respect to the contexts.

        White box: access SOFT and GRADIENTS. For a loss of the text features, `upstream_PCD` is its gradient with
        respect to them, computed on the client.
        """
        ...

    def lora_gradients(
        self, images: ImageSet, labels_B: Tensor, prompts: TextPrompts, lora: Lora, dropout: float, seed: int
    ) -> tuple[Tensor, ...]:
        """Return the mean cross-entropy of the changed model's scores, and its gradients in `lora.factors`.

        White box: access LORA. `prompts` is one set. `dropout` is the share of the input of each A that is set to zero,
        drawn with `seed` for this call; the rest is divided by 1 - dropout.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The schedule that a method follows within an allotment. Subclasses add the numbers that `start` needs."""

    bill: Bill
    """Exact cost of `start` and all steps, calls on validation images included."""


class Method:
    """Base of every method. Subclasses define `Config`, `plan`, `start` and `predict`; iterative ones also `step`."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings. The docstring below each field describes it."""

    info: ClassVar[MethodInfo]

    def __init_subclass__(cls) -> None:
        """Raise TypeError if a subclass overrides a final method."""
        for name in ("bill", "begin"):
            if name in vars(cls):
                raise TypeError(f"{cls.__name__} defines {name}, which is final: define plan and start")

    def __init__(self, config: Any = None) -> None:
        self.config: Any = config if config is not None else self.Config()
        self.notes: dict[str, float | int | str] = {}
        """What `start` decided (a scaled schedule, a chosen setting); recorded with the result."""
        self.trainable_params = 0
        self.paper_queries: float | None = None
        """Number of queries as the paper counts them, if it does; shown beside the bill."""

    def plan(self, shape: TaskShape, remaining: Remaining) -> Plan:
        """Return the schedule that fits `remaining`, with its exact bill. It sees sizes only and sends no request."""
        raise TypeError(f"{type(self).__name__} does not define plan")

    @final
    def bill(self, shape: TaskShape, remaining: Remaining) -> Bill:
        """Return what `start` and all steps will be charged on a task of this shape with this allotment."""
        return self.plan(shape, remaining).bill

    @final
    def begin(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator) -> None:
        """Plan within `box.remaining` and start."""
        self.start(task, box, rng, self.plan(TaskShape.of(task, box.feature_dim, box.top_k), box.remaining))

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator, plan: Any) -> None:
        """Set up the state and send the requests that are sent once. `plan` is what `plan()` returned."""
        raise TypeError(f"{type(self).__name__} does not define start")

    def step(self, box: BlackBox) -> bool:
        """Run one iteration. Return False when finished. Training-free methods do not override it."""
        return False

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        """Return the logits [B, C]; each row depends on its own image alone.

        `classes` is given only to methods that declare `new_classes`: the classes to predict in place of the fitted.
        """
        raise TypeError(f"{type(self).__name__} does not define predict")

    def deployed(self) -> dict[str, Tensor]:
        """Return the tensors that `predict` needs on the client; their size is reported."""
        from torch import Tensor

        return {k: v for k, v in vars(self).items() if isinstance(v, Tensor)}


@dataclass(frozen=True)
class MethodInfo:
    """Registry entry of a method."""

    name: str
    cls: type[Method]
    access: Access
    paper: str
    version: int
    new_classes: bool
    summary: str
    uses_views: bool = True
    """False: results do not depend on the `views` setting, and the task offers the method no views."""
    uses_text_norm: bool = False
    """True: the method reads `box.text_norm`, and the value that a model's card states is part of its trial ids."""
    uses_local: bool = False
    """True: the method needs `task.local`; its rows name the local model, and it is ranked apart."""


M = TypeVar("M", bound=type[Method])
REGISTRY: dict[str, MethodInfo] = {}


def method(
    *,
    name: str,
    access: Access,
    paper: str,
    version: int = 1,
    new_classes: bool = False,
    uses_views: bool = True,
    uses_text_norm: bool = False,
    uses_local: bool = False,
) -> Callable[[M], M]:
    """Register a method. `access` is all that it may ask; `new_classes`: predict accepts classes it was not fitted on.

    `uses_views=False` declares that the method reads no augmented views. Its task then has `views=0`, and its results
    are shared by runs with different `views` settings. `uses_text_norm=True` lets the method read `box.text_norm`, and
    `uses_local=True` gives it `task.local`.

    Raises ValueError when two classes claim one name.
    """

    def register(cls: M) -> M:
        known = REGISTRY.get(name)
        if known is not None and (known.cls.__module__, known.cls.__qualname__) != (cls.__module__, cls.__qualname__):
            others = " and ".join(f"{c.__module__}.{c.__qualname__}" for c in (known.cls, cls))
            raise ValueError(f"two methods are named {name!r}: {others}")
        summary = (cls.__doc__ or "").strip().split("\n")[0]
        cls.info = MethodInfo(
            name, cls, access, paper, version, new_classes, summary, uses_views, uses_text_norm, uses_local
        )
        REGISTRY[name] = cls.info
        return cls

    return register


def torch_generator(rng: np.random.Generator) -> torch.Generator:
    """Return a torch generator seeded from numpy's. It pickles with the method."""
    import torch

    return torch.Generator().manual_seed(int(rng.integers(2**63 - 1)))


def with_templates(classes: Classes, template: str) -> Classes:
    """Return the same classes with another template."""
    return replace(classes, template=template)
