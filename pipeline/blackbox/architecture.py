"""Facts of open_clip about a model: architecture, pretrained tags, input rule, tokenizer.

Only this module and weights.py import open_clip.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.util
import logging
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from pipeline.cards import EMBEDDED, INPUT_KEYS, ModelCard
from pipeline.data.images import Preprocess
from pipeline.errors import ConfigError, DataError, did_you_mean
from pipeline.files import verified

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Types of weights and activations; norms stay in fp32, as in open_clip."""
QUICK = "-quickgelu"
"""Suffix of open_clip's architectures with QuickGELU."""


def configuration(card: ModelCard) -> dict[str, Any]:
    """Return open_clip's configuration of the architecture. Raises ConfigError if it is unknown or cannot run."""
    import open_clip

    if card.kind not in ("embedded", "open_clip"):
        raise ConfigError(f"model {card.name!r}: kind {card.kind!r} is none of fake, embedded, open_clip")
    if card.precision not in PRECISIONS:
        raise ConfigError(f"model {card.name!r}: " + did_you_mean("precision", card.precision, PRECISIONS))
    if card.kind == "embedded" and card.arch not in open_clip.list_models():
        open_clip.add_model_config(verified(EMBEDDED / f"{card.arch}.json"))
    if ":" in card.arch:  # open_clip would take the weights from there too, and ignore the card's
        raise ConfigError(f"model {card.name!r}: arch {card.arch!r} is a place: write open_clip's name and set weights")
    config = open_clip.get_model_config(card.arch)
    if config is None:
        near = ", ".join(difflib.get_close_matches(card.arch, open_clip.list_models(), n=4, cutoff=0.4))
        raise ConfigError(f"model {card.name!r}: open_clip has no architecture {card.arch!r} (near: {near or 'none'})")
    text = config["text_cfg"]
    needed = [name for name in ("hf_model_name", "hf_tokenizer_name") if text.get(name)]
    if needed and importlib.util.find_spec("transformers") is None:
        part = "text tower" if "hf_model_name" in needed else "tokenizer"
        raise ConfigError(
            f"model {card.name!r}: the {part} of {card.arch} ({text[needed[0]]}) needs transformers, which is not "
            "installed: type pip install transformers sentencepiece protobuf"
        )
    return cast(dict[str, Any], config)


def has_tag(card: ModelCard) -> bool:
    """Return whether the card's weights are a pretrained tag of open_clip."""
    import open_clip

    return card.kind == "open_clip" and card.weights in open_clip.list_pretrained_tags_by_model(card.arch)


def tag_settings(arch: str, tag: str) -> dict[str, Any]:
    """Return open_clip's configuration of a pretrained tag: address, input rule, activation."""
    import open_clip

    return cast(dict[str, Any], open_clip.get_pretrained_cfg(arch, tag))


class KnownFile(NamedTuple):
    """A local file that holds the weights of a pretrained tag."""

    arch: str
    tag: str

    @property
    def settings(self) -> dict[str, Any]:
        """open_clip's configuration of the tag."""
        return tag_settings(self.arch, self.tag)


def known_file(path: Path, sha256: str) -> KnownFile | None:
    """Return the tag whose weights a file holds, by the digest in its address or its folder in a hub's cache."""
    import open_clip

    for arch, tag in open_clip.list_pretrained():
        settings = tag_settings(arch, tag)
        digest = re.search(r"/([0-9a-f]{64})/|-([0-9a-f]{8})\.pth?$", settings.get("url") or "")
        repository = (settings.get("hf_hub") or "").rpartition("/")[0].replace("/", "--")
        by_digest = digest is not None and sha256.startswith(digest[1] or digest[2])
        if by_digest or (repository and f"models--{repository}" in path.absolute().parts):
            return KnownFile(arch, tag)
    return None


def local_file(card: ModelCard) -> Path | None:
    """Return the local weights file of a card, or None for a tag. Raises DataError when there is no such file."""
    if has_tag(card):
        return None
    path = _path(card)
    if path.parent == EMBEDDED:
        return verified(path)
    if not path.is_file():
        raise DataError(f"model {card.name!r}: {card.weights!r} {_not_a_file(card, path)}")
    return path


def _path(card: ModelCard) -> Path:
    return EMBEDDED / card.weights if card.kind == "embedded" else Path(card.weights)


def _not_a_file(card: ModelCard, path: Path) -> str:
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(card.arch)
    if card.weights and path.is_dir():
        return "is a folder: name the weights file in it"
    plain = card.arch.removesuffix(QUICK)
    if plain != card.arch and card.weights in open_clip.list_pretrained_tags_by_model(plain):
        return f"was not trained with QuickGELU: write arch: {plain}"
    return f"is neither a file nor an open_clip tag of {card.arch} (tags: {', '.join(tags[:4]) or 'none'})"


def missing(card: ModelCard) -> tuple[str, str] | None:
    """Return what is missing on this machine and where it is published, or None. Downloads nothing."""
    if card.kind == "fake":
        return None
    configuration(card)
    if not has_tag(card):
        path = _path(card)
        return None if path.is_file() else (f"no weights at {path}", card.source)
    settings = tag_settings(card.arch, card.weights)
    if cached_file(settings):
        return None
    return "not in open_clip's cache; a run fetches them", settings.get("url") or settings["hf_hub"]


def cached_file(settings: dict[str, Any]) -> Path | None:
    """Return the file of a tag's weights in open_clip's cache, or in its hub client's; None when it is in neither."""
    from huggingface_hub import try_to_load_from_cache
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    if not settings.get("hf_hub"):
        own = Path.home() / ".cache" / "clip" / Path(settings["url"]).name
        return own if own.is_file() else None
    repository, _, name = settings["hf_hub"].rpartition("/")
    safe = re.sub(r"\.(bin|pth)$", ".safetensors", name) if name else HF_SAFE_WEIGHTS_NAME
    found = (try_to_load_from_cache(repository, file) for file in (safe, name or HF_WEIGHTS_NAME))
    return next((Path(file) for file in found if isinstance(file, str)), None)


def fetched_file(card: ModelCard) -> Path:
    """Return the file of a tag's weights; open_clip downloads it if it is not in its cache."""
    import open_clip

    settings = tag_settings(card.arch, card.weights)
    return cached_file(settings) or Path(open_clip.download_pretrained(settings))


def quick_gelu(card: ModelCard, known: KnownFile | None = None, openai: bool = False) -> bool:
    """Return whether the network computes QuickGELU, by the card or else by its architecture.

    Raises:
        ConfigError: the card does not say, and the weights were trained with the other activation: those of a tag (or
            of a file that is a tag's), or of a file in the layout of OpenAI's code (`openai`).
    """
    if card.quick_gelu is not None:
        return card.quick_gelu
    computed = bool(configuration(card).get("quick_gelu", False))
    if has_tag(card):
        known = KnownFile(card.arch, card.weights)
    if known is None and not (openai and not computed):
        return computed
    trained = known is None or bool(known.settings.get("quick_gelu", False))
    if trained == computed:
        return computed
    other = other_activation(card.arch)
    whose = f"the weights of {known.tag!r}" if known else "weights in the layout of OpenAI's code"
    named = {True: "QuickGELU", False: "GELU"}
    write = f"arch: {other}" if other else f"quick_gelu: {str(trained).lower()}"
    raise ConfigError(
        f"model {card.name!r}: {whose} were trained with {named[trained]}, and {card.arch} computes {named[computed]}: "
        f"write {write} in the card (or quick_gelu: {str(computed).lower()} to compute {named[computed]} all the same)"
    )


def other_activation(arch: str) -> str | None:
    """Return the architecture that differs only in its activation, or None."""
    import open_clip

    other = arch.removesuffix(QUICK) if arch.endswith(QUICK) else arch + QUICK
    return other if other in open_clip.list_models() else None


def input_rule(card: ModelCard, size: Any, known: KnownFile | None = None) -> tuple[Preprocess, str]:
    """Return how images become pixels, and the origin of that rule. `size` is the network's image size.

    The card's keys take precedence over the tag's rule, and that over the rule that all tags of the architecture share.

    Raises:
        ConfigError: the tags differ. The message names the keys that the card must state.
    """
    import open_clip

    stated = {key: value for key in INPUT_KEYS if (value := getattr(card, key)) is not None}
    if has_tag(card):
        known = KnownFile(card.arch, card.weights)
    names = open_clip.list_pretrained_tags_by_model(card.arch)
    tags = [known] if known else [KnownFile(card.arch, tag) for tag in names]
    rules = [{key: _plain(tag.settings[key]) for key in INPUT_KEYS} for tag in tags]
    whose = f"the rule of {known.tag!r}" if known else f"the rule of {card.arch}'s pretrained tags"
    if not rules:
        default = dataclasses.asdict(open_clip.transform.PreprocessCfg())
        rules, whose = [{key: _plain(default[key]) for key in INPUT_KEYS}], "open_clip's default, as no tag has a rule"
    differ = [key for key in INPUT_KEYS if key not in stated and len({rule[key] for rule in rules}) > 1]
    if differ:
        values = "; ".join(f"{tag.tag}: {rule[differ[0]]}" for tag, rule in _first_of_each(tags, rules, differ[0]))
        raise ConfigError(
            f"model {card.name!r}: the pretrained tags of {card.arch} differ in {', '.join(differ)} "
            f"({values[:120]}): state {' and '.join(differ)} in the card"
        )
    rule = rules[0] | stated
    if stated:
        whose = f"{', '.join(stated)} from the card" + ("" if len(stated) == len(INPUT_KEYS) else f", else {whose}")
    sides = list(size) if isinstance(size, (list, tuple)) else [size]
    mode, kind = rule["resize_mode"], rule["interpolation"]
    if len(set(sides)) != 1 or mode not in ("shortest", "squash") or kind not in ("bicubic", "bilinear"):
        raise ConfigError(f"model {card.name!r}: images of size {sides}, {mode}, {kind} are not supported")
    return Preprocess(int(sides[0]), rule["mean"], rule["std"], mode, kind), whose


def _first_of_each(tags: Sequence[KnownFile], rules: Sequence[dict[str, Any]], key: str) -> list[Any]:
    """Return one (tag, rule) for each value of the key."""
    return list({rule[key]: (tag, rule) for tag, rule in reversed(list(zip(tags, rules, strict=True)))}.values())


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def build(card: ModelCard, quick: bool, device: torch.device) -> Any:
    """Build the card's network without trained weights. On the meta device this takes almost no time and memory."""
    import open_clip

    config = configuration(card)
    options = {} if quick == bool(config.get("quick_gelu", False)) else {"quick_gelu": quick}
    with _silent(), device if device.type == "meta" else contextlib.nullcontext():
        return open_clip.create_model(
            card.arch, precision=card.precision, device=device, pretrained_hf=False, **options
        )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Suppress open_clip's warning that a network has no trained weights, which are loaded later."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def tokenizer(card: ModelCard, fetch: bool = True) -> Any:
    """Return the card's tokenizer. Without `fetch`, raises OSError when its files are not on this machine."""
    config = configuration(card)
    from_hub = bool(config["text_cfg"].get("hf_tokenizer_name"))
    return _tokenizer(card.kind, card.arch, config["text_cfg"].get("context_length", 77), from_hub and not fetch)


@lru_cache(maxsize=8)
def _tokenizer(kind: str, arch: str, context_length: int, local_only: bool) -> Any:
    import open_clip

    if kind == "embedded":
        return open_clip.SimpleTokenizer(
            bpe_path=str(verified(EMBEDDED / f"{arch}_bpe.txt.gz")), context_length=context_length
        )
    return open_clip.get_tokenizer(arch, **({"local_files_only": True} if local_only else {}))


def prompt_lengths(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Count the tokens of each text, start and end included, untruncated: open_clip's tokenizers truncate silently."""
    if hasattr(tokenizer, "encode"):
        return [len(tokenizer.encode(text)) + 2 for text in texts]
    own_tokens = getattr(tokenizer, "tokenizer_mode", "") == "clips"  # open_clip adds start, end and class token
    cleaned = [tokenizer.clean_fn(text) for text in texts]
    ids = tokenizer.tokenizer(cleaned, add_special_tokens=not own_tokens)["input_ids"]
    return [len(row) + 3 * own_tokens for row in ids]
