"""Fit stored weights to a network. Conversions that open_clip's loader makes silently are made here and reported.

Weights are never loaded in part: a missing or unknown key, or another shape, is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from methods._finite import first_non_finite
from pipeline.blackbox.architecture import QUICK, KnownFile
from pipeline.blackbox.checkpoint_files import StoredWeights
from pipeline.cards import ModelCard
from pipeline.errors import DataError, one_line

TEXT_PARTS = ("transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection")
POSITION_IDS = "text.transformer.embeddings.position_ids"
TRANSFORMERS = "its keys look like transformers' CLIPModel: name a file in open_clip's layout"
FOREIGN = (
    ("text_model.", TRANSFORMERS),
    ("vision_model.", TRANSFORMERS),
    ("lora_", "it holds LoRA adapters: merge them into the model and save all of its weights"),
    ("prompt_learner.", "it holds a learned prompt (CoOp), not the model: name the model's weights"),
    ("image_encoder.", "its keys look like those of Apple's MobileCLIP, of a model that open_clip cannot convert"),
    ("blocks.0.attn.qkv", "its keys look like those of a timm image model, which has no text tower"),
)
"""Parts of keys that identify the origin of weights, with the message about them."""


def fit_weights(
    net: Any, stored: StoredWeights, arch: str, known: KnownFile | None = None
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the stored tensors under the network's keys and in its shapes, and notes on all changes.

    The notes are the same for tensors with values and on the meta device.

    Raises:
        ValueError: the weights are those of another model.
    """
    notes, tensors = list(stored.notes), dict(stored.tensors)
    wanted = net.state_dict()
    try:
        tensors = _converted(net, tensors, notes)
    except Exception as error:  # open_clip's conversions assert, or fail inside torch
        reason = one_line(error)[:80]
        differences = _differences(tensors, wanted, arch) or f"open_clip cannot convert them for {arch} ({reason})"
        raise ValueError(f"{differences}: {_guess(tensors, wanted, arch, known)}") from error
    counters = [key for key in wanted if key.endswith("num_batches_tracked") and key not in tensors]
    tensors |= {key: torch.zeros_like(wanted[key]) for key in counters}
    if differences := _differences(tensors, wanted, arch):
        raise ValueError(f"{differences}: {_guess(tensors, wanted, arch, known)}")
    for key, tensor in tensors.items():
        if wanted[key].is_floating_point() and not tensor.is_floating_point():
            raise ValueError(f"{key} is stored as {_name(tensor.dtype)}: dequantize the weights, save them as float32")
    types = Counter((_name(tensor.dtype), _name(wanted[key].dtype)) for key, tensor in tensors.items())
    for (found, computed), count in sorted(types.items()):
        if found not in (computed, "float32"):  # from float32, the conversion is the card's `precision`
            notes.append(f"{count} of {len(tensors)} tensors converted from {found} to {computed}")
    return tensors, tuple(notes)


def _converted(net: Any, tensors: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Convert a state dict as open_clip's `load_checkpoint` does; append a note for each change."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import resize_pos_embed, resize_text_pos_embed

    before = tensors.keys()
    tensors = dict(convert_state_dict(net, tensors))
    if tensors.keys() != before:
        notes.append("keys converted from the layout of Apple's MobileCLIP")
    if "positional_embedding" in tensors and "text_projection" in tensors and not hasattr(net, "positional_embedding"):
        tensors = {f"text.{key}" if key.startswith(TEXT_PARTS) else key: value for key, value in tensors.items()}
        notes.append("keys of the text tower moved under 'text.'")
    for key in ("logit_scale", "logit_bias"):
        parameter = getattr(net, key, None)
        if key in tensors and parameter is not None and tensors[key].shape != parameter.shape:
            notes.append(f"{key} reshaped from {list(tensors[key].shape)} to {list(parameter.shape)}")
            tensors[key] = tensors[key].reshape(parameter.shape)
    if getattr(net, "logit_bias", None) is not None and "logit_bias" not in tensors:
        tensors["logit_bias"] = torch.zeros_like(tensors["logit_scale"])
        notes.append("logit_bias, which the file lacks, set to 0")
    buffers = {name for name, _ in net.named_buffers()} - net.state_dict().keys()  # computed, not trained
    unused = [key for key in tensors if key in buffers or key == POSITION_IDS or key.rpartition(".")[2] == "attn_mask"]
    if unused:
        notes.append(f"skipped {', '.join(unused[:3])}: computed, not trained")
    if "logit_bias" in tensors and getattr(net, "logit_bias", None) is None:
        unused.append("logit_bias")
        notes.append("skipped logit_bias: one number added to every score, which changes no prediction")
    tensors = {key: value for key, value in tensors.items() if key not in unused}
    shapes = {key: list(value.shape) for key, value in tensors.items()}
    if "visual.positional_embedding" in tensors:
        resize_pos_embed(tensors, net)
    if "positional_embedding" in tensors or "text.positional_embedding" in tensors:
        resize_text_pos_embed(tensors, net)
    for key, shape in shapes.items():
        if list(tensors[key].shape) != shape:
            notes.append(f"{key} resized from {shape[0]} to {tensors[key].shape[0]} positions")
    return tensors


def _differences(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], arch: str) -> str:
    """Describe how the file differs from the architecture: counts with the first keys; empty if it does not."""
    missing = [key for key in wanted if key not in tensors]
    unknown = [key for key in tensors if key not in wanted]
    shapes = [key for key in wanted if key in tensors and tensors[key].shape != wanted[key].shape]
    if len(unknown) == len(tensors):
        return f"none of its {len(tensors)} keys ({_first(unknown)}) is one of {arch}'s {len(wanted)}"
    parts = []
    if missing:
        named = f" ({_first(missing)})" if not unknown else ""
        parts.append(f"{len(missing)} of {arch}'s {len(wanted)} keys are missing{named}")
    if unknown:
        parts.append(f"{len(unknown)} of its {len(tensors)} keys are unknown ({_first(unknown)})")
    if shapes and not unknown:
        found, expected = list(tensors[shapes[0]].shape), list(wanted[shapes[0]].shape)
        parts.append(f"{len(shapes)} have another shape ({shapes[0]}: {found}, {arch} has {expected})")
    return ", ".join(parts)


def _guess(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], arch: str, known: KnownFile | None) -> str:
    """Guess where weights of other keys or shapes come from; return that and what to do."""
    unknown = [key for key in tensors if key not in wanted]
    if known and known.arch.removesuffix(QUICK) != arch.removesuffix(QUICK):
        return f"it is open_clip's {known.tag!r} of {known.arch}: write arch: {known.arch}"
    for part, guess in FOREIGN:
        if any(part in key for key in unknown):
            return guess
    first = next(iter(tensors)).partition(".")[0] + "."
    if unknown and first not in ("visual.", "text.", "transformer.") and all(key.startswith(first) for key in tensors):
        return f"all keys begin with {first!r}: remove it, as in {{k[{len(first)}:]: v for k, v in weights.items()}}"
    if unknown and all(key.startswith("visual.") for key in tensors):
        return "it holds an image tower alone"
    if not unknown and any(key not in tensors for key in wanted):
        return "the file is not whole: save the state dict of the whole model"
    return "the weights are of another architecture: correct arch in the card"


def _first(keys: list[str]) -> str:
    return ", ".join(key if len(key) <= 30 else f"{key[:27]}..." for key in keys[:2])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write_random_weights(arch: str, path: Path, seed: int = 0) -> None:
    """Write a checkpoint of random weights, for benchmarks."""
    import open_clip

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.save(open_clip.CLIP(**open_clip.get_model_config(arch)).state_dict(), path)


def imagenet_names() -> tuple[str, ...]:
    """Return ImageNet's 1,000 class names as open_clip ships them."""
    import open_clip

    return tuple(open_clip.IMAGENET_CLASSNAMES)


def check_finite(card: ModelCard, net: torch.nn.Module) -> None:
    """Check that all weights and the logit scale are finite.

    Raises:
        DataError: names the first weight that is NaN or infinite, or a logit scale that overflows.
    """
    for name, weights in net.state_dict().items():
        if not name.endswith("attn_mask") and (bad := first_non_finite(weights.float())) is not None:
            raise DataError(
                f"model {card.name!r}: weight {name}{list(bad)} of {card.weights!r} is {float(weights[bad])}, wanted a "
                "finite number: restore the checkpoint file"
            )
    scale = cast(Tensor, net.logit_scale).detach().float()
    if not torch.isfinite(scale.exp()).all():
        raise DataError(f"model {card.name!r}: logit_scale of {card.weights!r} is {float(scale)}: its exp overflows")
