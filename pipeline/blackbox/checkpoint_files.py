"""Read files of model weights without running code: PyTorch checkpoints, TorchScript archives and safetensors.

Every function raises ValueError with what is wrong and what to do; the caller adds the model and the file.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from pipeline.blackbox.torchscript import read_torchscript
from pipeline.files import file_sha256, file_stamp

SAFETENSORS_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NOT_WEIGHTS = (
    (rb"version https://git-lfs", "it is a Git LFS pointer, not the weights: type git lfs pull in its folder"),
    (rb"\s*<(!doctype|html|\?xml|head)", "it is a web page, not weights: download the file again"),
    (rb"\s*[{\[]", "it is JSON text, not weights: name the .safetensors, .pt or .bin file"),
    (rb"\x1f\x8b", "it is compressed by gzip: unpack it first"),
    (rb"\x93NUMPY", "it is a NumPy array, not a state dict"),
    (rb"\x89HDF", "it is an HDF5 file: only PyTorch and safetensors files are read"),
    (rb"GGUF", "it is a GGUF file: only PyTorch and safetensors files are read"),
)
"""First bytes of files that are often mistaken for weights, and what to do."""
PREFIXES = ("module.", "_orig_mod.")
"""Prefixes of all keys that DistributedDataParallel and torch.compile add."""
OPENAI_BUFFERS = ("input_resolution", "context_length", "vocab_size")
"""Numbers among the weights in OpenAI's archives."""
SAVE_AGAIN = "save the weights alone: torch.save(model.state_dict(), 'weights.pt')"


@dataclass(frozen=True)
class StoredWeights:
    """Tensors of a weights file by key, with notes on how they were read."""

    tensors: dict[str, Tensor]
    notes: tuple[str, ...]
    """Lines for the user on what was skipped or renamed."""
    openai: bool
    """Whether the file has the layout of OpenAI's code, whose models were trained with QuickGELU."""


def read_weights(path: Path, values: bool = True) -> StoredWeights:
    """Read the state dict of a file.

    Without `values` its tensors are on the meta device (keys, shapes and types alone), and a zip archive's checksums
    are compared with its content.
    """
    if _is_safetensors(path):
        tensors, notes = _safetensors(path, values), list[str]()
    elif _is_torchscript(path, check=not values):
        tensors, notes = read_torchscript(path, values), ["read from a TorchScript archive, whose code was not run"]
    else:
        tensors, notes = _state_dict(_torch_load(path))
    tensors = _without_prefixes(tensors, notes)
    numbers = [key for key in OPENAI_BUFFERS if key in tensors]
    tensors = {key: tensor for key, tensor in tensors.items() if key not in numbers}
    if numbers:
        notes.append(f"skipped {', '.join(numbers)}: no weights")
    _check_dense(tensors)
    if not values:
        tensors = {key: torch.empty_like(tensor, device="meta") for key, tensor in tensors.items()}
    return StoredWeights(tensors, tuple(notes), len(numbers) == len(OPENAI_BUFFERS) or _mixed_precision(tensors))


def _is_safetensors(path: Path) -> bool:
    """Return whether a file is in the safetensors format, by its content: the header's length, then a JSON header."""
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise ValueError("it is empty: copy or download it again")
    length = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and length <= path.stat().st_size:
        return True
    for pattern, advice in NOT_WEIGHTS:
        if re.match(pattern, start, re.IGNORECASE):
            raise ValueError(advice)
    if path.suffix == ".safetensors" and start[:2] != b"PK":
        raise ValueError("its safetensors header is damaged: copy or download it again")
    return False


def _safetensors(path: Path, values: bool) -> dict[str, Tensor]:
    try:
        if values:
            return load_file(path)
        tensors = {}
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  # not a mapping
                entry = file.get_slice(key)
                if entry.get_dtype() not in SAFETENSORS_TYPES:
                    raise ValueError(f"{key} is stored as {entry.get_dtype()}, which is not supported")
                shape, dtype = entry.get_shape(), SAFETENSORS_TYPES[entry.get_dtype()]
                tensors[key] = torch.empty(shape, dtype=dtype, device="meta")
        return tensors
    except ValueError:
        raise
    except Exception as error:  # SafetensorError is not always an exception class of its own
        raise ValueError(f"it is not a whole safetensors file ({error}): copy or download it again") from error


def _is_torchscript(path: Path, check: bool) -> bool:
    """Return whether a file is a TorchScript archive, and not written by torch.save. `check` verifies checksums."""
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return False
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] or name for name in archive.namelist()}
            unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > 10 * path.stat().st_size:
                raise ValueError(f"it would unpack to {unpacked:,} bytes, as no weights file does: download it again")
            if check and (damaged := archive.testzip()):
                raise ValueError(f"{damaged} in it does not match its checksum: copy or download it again")
    except zipfile.BadZipFile as error:
        raise ValueError("it is cut off or damaged: copy or download it again") from error
    if any(name.endswith(".npy") for name in names):
        raise ValueError(
            "it is a NumPy archive (of Google's big_vision?), which has no keys to check: load it with open_clip and "
            + SAVE_AGAIN
        )
    if "data.pkl" not in names:
        raise ValueError("it is a zip archive of other files: unpack it and name the weights file")
    return "constants.pkl" in names


def _torch_load(path: Path) -> Any:
    """Load a file that torch.save wrote, with its tensors memory-mapped. No code in it is run."""
    try:
        with _plain_values():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"it holds objects of {refused[1][:60]}, which may run code when they are read: {SAVE_AGAIN}"
            ) from error
        raise ValueError("it is damaged or no PyTorch file: copy or download it again") from error


def _plain_values() -> contextlib.AbstractContextManager[Any]:
    """Allow NumPy numbers and argparse namespaces, which training checkpoints contain and which run no code."""
    scalar = np.float64(0).__reduce__()[0]
    kinds = {type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "?")}
    named: list[Any] = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return torch.serialization.safe_globals([argparse.Namespace, np.dtype, *kinds, *named])


def _state_dict(loaded: Any) -> tuple[dict[str, Tensor], list[str]]:
    """Find the state dict in a loaded object: the object, its entry `state_dict`, or its only entry with tensors."""
    if not isinstance(loaded, Mapping):
        raise ValueError(f"it holds {type(loaded).__name__}, not a state dict: {SAVE_AGAIN}")
    inner = {key: value for key, value in loaded.items() if isinstance(value, Mapping) and _holds_tensors(value)}
    notes = []
    if inner and "state_dict" not in inner and len(inner) > 1:
        raise ValueError(f"it holds several state dicts ({_listed(inner)}): save the one that is meant")
    if inner:
        name = "state_dict" if "state_dict" in inner else next(iter(inner))
        others = [key for key in loaded if key != name]
        notes.append(f"read from its entry {name!r}" + (f", without {_listed(others)}" if others else ""))
        loaded = inner[name]
    others = [key for key, value in loaded.items() if not isinstance(value, Tensor)]
    if others:
        notes.append(f"skipped {len(others)} entries that are no tensors: {_listed(others)}")
    tensors = {key: value.detach() for key, value in loaded.items() if isinstance(value, Tensor)}
    if any(tensor.is_meta for tensor in tensors.values()):
        raise ValueError(f"its tensors are without values (on the meta device): {SAVE_AGAIN}")
    if not tensors:
        raise ValueError(f"it holds no tensors ({_listed(others) or 'an empty state dict'}): {SAVE_AGAIN}")
    return tensors, notes


def _holds_tensors(value: Mapping[Any, Any]) -> bool:
    return any(isinstance(item, Tensor) for item in value.values()) and all(isinstance(key, str) for key in value)


def _without_prefixes(tensors: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    if wrong := [key for key in tensors if not isinstance(key, str)]:
        raise ValueError(f"its keys are no names ({_listed(wrong)}): {SAVE_AGAIN}")
    again = True
    while again:
        again = False
        for prefix in PREFIXES:
            if all(key.startswith(prefix) for key in tensors):
                tensors = {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}
                notes.append(f"removed {prefix!r} from the start of all {len(tensors)} keys")
                again = True
    return tensors


def _check_dense(tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
            raise ValueError(f"{key} is sparse, quantized or complex: save dense floating-point weights")


def _mixed_precision(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether layers are float16 and norms float32, as in models that OpenAI's code saves."""
    types = {key: tensors[key].dtype for key in ("visual.conv1.weight", "ln_final.weight") if key in tensors}
    return types == {"visual.conv1.weight": torch.float16, "ln_final.weight": torch.float32}


def _listed(names: Any, most: int = 4) -> str:
    names = [str(name)[:40] for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def weights_digest(path: Path) -> str:
    """Return the SHA-256 of a weights file, cached until the file changes."""
    return _digest(path, *file_stamp(path))


@lru_cache(maxsize=16)
def _digest(path: Path, *_stat: int) -> str:
    return file_sha256(path)
