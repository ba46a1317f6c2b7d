"""What a method sees: the task that it is given, the black box that it may ask, and the bill for asking.

Shape suffixes used in every method: B images in a call, C classes, D feature width, N training images (C * shots),
M validation images, L context tokens, E token-embedding width, K intrinsic dimension, P prompt sets (a population),
V views, T templates.

The life of a trial: `start` once (plan within `box.remaining`, ask what is asked once), then `step` until it returns
False, then `predict` on a copy. Between two steps the whole object can be pickled and continued elsewhere, so it keeps
its state in its own attributes, its random generators included, and never keeps the box.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor


class Access(enum.Flag):
    """What may cross the boundary. Inputs: TEXT < SOFT; outputs: SCORES < FEATURES; GRADIENTS is the white box."""

    TEXT = enum.auto()
    SOFT = enum.auto()
    SCORES = enum.auto()
    FEATURES = enum.auto()
    GRADIENTS = enum.auto()

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
        """This access with everything that it implies (SOFT allows TEXT, FEATURES allow SCORES)."""
        full = self
        if Access.SOFT in full:
            full |= Access.TEXT
        if Access.FEATURES in full:
            full |= Access.SCORES
        return full

    def covers(self, needed: Access) -> bool:
        """True when a grant of `self` allows everything in `needed`."""
        return needed.closure() in self.closure()

    @property
    def label(self) -> str:
        """Names joined by +, e.g. 'SOFT+SCORES'."""
        return "+".join(str(flag.name) for flag in Access if flag in self)


@dataclass(frozen=True)
class Bill:
    """What a call, or many, cost. Requests: prompt sets asked about (or one per feature call); the rest are rows."""

    requests: int = 0
    images: int = 0
    prompts: int = 0
    outputs: int = 0

    @classmethod
    def scores(cls, p: int, b: int, c: int) -> Bill:
        """P prompt sets scored on B images and C classes, in one call."""
        return cls(requests=p, images=p * b, prompts=p * c, outputs=p * b * c)

    @classmethod
    def image_features(cls, b: int, d: int) -> Bill:
        """Features [B, D] of B image rows (each view is a row), in one call."""
        return cls(requests=1, images=b, outputs=b * d)

    @classmethod
    def text_features(cls, p: int, c: int, d: int) -> Bill:
        """Features [P, C, D] of P prompt sets, in one call; so is the way back through them, `text_gradients`."""
        return cls(requests=p, prompts=p * c, outputs=p * c * d)

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
        """How many times `bill` can still be paid; None when nothing limits it."""
        times = min(
            self.requests / bill.requests if bill.requests else math.inf,
            self.images / bill.images if bill.images else math.inf,
        )
        return None if math.isinf(times) else max(0, math.floor(times))

    def minus(self, bill: Bill) -> Remaining:
        return Remaining(self.requests - bill.requests, self.images - bill.images)


@dataclass(frozen=True)
class TextPrompts:
    """P sets of C class prompts in words: texts[p][c]."""

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
        """One prompt set (P = 1) from the template, or from another."""
        return TextPrompts((tuple((template or self.template).format(n) for n in self.names),))

    def ensemble(self) -> TextPrompts:
        """One prompt set for each ensemble template (P = T)."""
        return TextPrompts(tuple(self.prompts(t).texts[0] for t in self.templates or (self.template,)))

    def soft(self, ctx_PLE: Tensor) -> SoftPrompts:
        """Soft prompts [P, L, E] in the place of the template's context."""
        return SoftPrompts(ctx_PLE, self.names, self.template.split("{}")[1])


class ImageSet(Protocol):
    """An ordered set of images, held by reference: pixels go to the endpoint, never through a method."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> ImageSet:
        """The images at these rows, in that order."""
        ...

    def views(self, n: int, seed: int = 0) -> ImageSet:
        """n augmented copies of each image, view-major: row v * len(self) + i is view v of image i."""
        ...

    def pixels(self, size: int) -> Tensor:
        """Grey thumbnails [B, size * size] in [0, 1], read on the client: no request is made."""
        ...


class LabelledImages(NamedTuple):
    """Images with their labels [N] (int64)."""

    images: ImageSet
    labels: Tensor


@dataclass(frozen=True)
class FewShotTask:
    """One data set x shots x seed. There is no test split in it."""

    dataset: str
    classes: Classes
    shots: int
    train: LabelledImages
    val: LabelledImages
    """min(shots, 4) images a class, or none: calls on it are billed to the phase `validate`."""
    views: int = 10
    """How many fixed augmented views of the training images a method may ask for; 0 means none, the plain image."""
    fresh_views: bool = False
    """True: new views in every epoch, as in the papers' loaders (each is billed)."""


@dataclass(frozen=True)
class TaskShape:
    """The sizes that a bill depends on; `farebox plan` needs no image to fill it."""

    n_classes: int
    n_train: int
    n_val: int
    shots: int
    views: int
    fresh_views: bool
    n_templates: int
    feature_dim: int

    @classmethod
    def of(cls, task: FewShotTask, feature_dim: int) -> TaskShape:
        return cls(
            n_classes=len(task.classes),
            n_train=len(task.train.labels),
            n_val=len(task.val.labels),
            shots=task.shots,
            views=task.views,
            fresh_views=task.fresh_views,
            n_templates=max(1, len(task.classes.templates)),
            feature_dim=feature_dim,
        )


class BlackBox(Protocol):
    """The metered endpoint as one method may use it. Tensors are float32 on the CPU; features have unit length."""

    logit_scale: float
    token_dim: int
    feature_dim: int

    @property
    def remaining(self) -> Remaining: ...

    def scores(self, images: ImageSet, prompts: Prompts) -> Tensor:
        """logit_scale * cosine, [P, B, C]."""
        ...

    def score_blocks(self, images: ImageSet, prompts: Prompts) -> Iterator[tuple[slice, Tensor]]:
        """The same answer, for the same one charge, as (rows, [P, rows, C]) blocks of at most 64 MiB."""
        ...

    def image_features(self, images: ImageSet) -> Tensor:
        """[B, D]; access FEATURES."""
        ...

    def text_features(self, prompts: Prompts) -> Tensor:
        """[P, C, D]; access FEATURES."""
        ...

    def embed_text(self, text: str) -> Tensor:
        """Token embeddings [L, E] of the words, without start and end; access SOFT; free of charge."""
        ...

    def text_gradients(self, prompts: SoftPrompts, upstream_PCD: Tensor) -> Tensor:
        """[P, L, E]: the gradient, in the contexts, of sum(upstream_PCD * text_features(prompts)).

        White box: access SOFT and GRADIENTS. Any loss of the text features is differentiated so: its own gradient in
        them, taken on the client, is `upstream_PCD`.
        """
        ...


class Method:
    """Base of every method. Subclasses define `Config`, `start`, `predict` and `bill`; iterative ones also `step`."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings; each field's docstring line says what it does."""

    info: ClassVar[MethodInfo]

    def __init__(self, config: Any = None) -> None:
        self.config: Any = config if config is not None else self.Config()
        self.notes: dict[str, float | int | str] = {}
        """What `start` decided (a scaled schedule, a chosen setting); recorded beside the result."""
        self.trainable_params = 0
        self.paper_queries: float | None = None
        """What the paper would call the number of its queries, where it counts any: it stands beside the bill."""

    def start(self, task: FewShotTask, box: BlackBox, rng: np.random.Generator) -> None:
        raise TypeError(f"{type(self).__name__} does not define start")

    def step(self, box: BlackBox) -> bool:
        """One iteration; False when finished. Training-free methods leave it as it is."""
        return False

    def predict(self, images: ImageSet, box: BlackBox, classes: Classes | None = None) -> Tensor:
        """Logits [B, C]; each row depends on its own image alone. A method that declares `new_classes` may be given
        others than the fitted ones: C is then their number. No other method is given `classes`.
        """
        raise TypeError(f"{type(self).__name__} does not define predict")

    def bill(self, shape: TaskShape, remaining: Remaining) -> Bill:
        """Exactly what `start` and all steps will be charged on a task of this shape with this allotment."""
        raise TypeError(f"{type(self).__name__} does not define bill")

    def deployed(self) -> dict[str, Tensor]:
        """Tensors that `predict` needs on the client: their bytes are reported."""
        return {k: v for k, v in vars(self).items() if isinstance(v, Tensor)}


@dataclass(frozen=True)
class MethodInfo:
    """What the registry knows of a method."""

    name: str
    cls: type[Method]
    access: Access
    paper: str
    version: int
    new_classes: bool
    summary: str
    uses_views: bool = True
    """False: results do not depend on the `views` setting, and the task offers the method no views."""


M = TypeVar("M", bound=type[Method])
REGISTRY: dict[str, MethodInfo] = {}


def method(
    *, name: str, access: Access, paper: str, version: int = 1, new_classes: bool = False, uses_views: bool = True
) -> Callable[[M], M]:
    """Register a method. `access` is all that it may ask; `new_classes`: predict accepts classes it was not fitted on.

    `uses_views=False` declares that the method reads no augmented views. Its task then has `views=0`, and its results
    are shared by runs with different `views` settings.

    Raises ValueError when two classes claim one name.
    """

    def register(cls: M) -> M:
        known = REGISTRY.get(name)
        if known is not None and known.cls.__qualname__ != cls.__qualname__:
            raise ValueError(f"two methods are named {name!r}: {known.cls.__qualname__} and {cls.__qualname__}")
        summary = (cls.__doc__ or "").strip().split("\n")[0]
        cls.info = MethodInfo(name, cls, access, paper, version, new_classes, summary, uses_views)
        REGISTRY[name] = cls.info
        return cls

    return register


def torch_generator(rng: np.random.Generator) -> torch.Generator:
    """A torch generator seeded from numpy's, so that a trial has one source of randomness. Pickles with the method."""
    return torch.Generator().manual_seed(int(rng.integers(2**63 - 1)))


def with_templates(classes: Classes, template: str) -> Classes:
    """The same classes under another template (a paper's own start, as a flagged variant)."""
    return replace(classes, template=template)
