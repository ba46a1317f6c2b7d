"""Read the tensors of a TorchScript archive, such as OpenAI's ViT-B-32.pt, without running its code.

An archive contains a pickle of nested modules and one file per storage. `torch.jit.load` would also compile and may run
the archive's code. Here modules are read as plain objects, and only their tensors are used.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
LISTS = {"build_intlist", "build_floatlist", "build_doublelist", "build_boollist", "build_tensorlist"}
"""Functions of torch.jit._pickle that return their argument."""


class _Module:
    """Attributes of a module of the archive, without its code."""


class _Storage(NamedTuple):
    dtype: torch.dtype
    file: str


def read_torchscript(path: Path, values: bool = True) -> dict[str, Tensor]:
    """Return the archive's tensors by key, as in the state dict of its module; without `values`, on the meta device.

    Raises:
        ValueError: the archive holds more than modules, tensors and plain values. The message states how to convert it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (pickled,) = (name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl")
            folder = pickled.removesuffix("data.pkl") + "data/"
            with archive.open(pickled) as file:
                module = _Unpickler(file, lambda name: archive.read(folder + name) if values else None).load()
            if not isinstance(module, _Module):
                raise pickle.UnpicklingError(f"it holds {type(module).__name__}, not a module")
            return dict(_tensors(module))
    except Exception as error:
        raise ValueError(
            f"it is a TorchScript archive that cannot be read without running its code ({str(error)[:60]}); if you "
            f"trust it, convert it in Python: torch.save(torch.jit.load('{path.name}').state_dict(), 'weights.pt')"
        ) from error


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, read: Callable[[str], bytes | None]) -> None:
        super().__init__(file)
        self.read = read

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the few functions and classes that archives of modules and tensors need."""
        if module.split(".")[0] == "__torch__":
            return _Module
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor")):
            return self._rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name in LISTS:
            return list
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        """Return the type and the file of a storage."""
        _, dtype, file, *_ = pid
        return _Storage(dtype, str(file))

    def _rebuild(self, storage: _Storage, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
        content = self.read(storage.file)
        if content is None:
            return torch.empty(tuple(size), dtype=storage.dtype, device="meta")
        if not content:
            return torch.empty(tuple(size), dtype=storage.dtype)
        flat = torch.frombuffer(bytearray(content), dtype=storage.dtype)
        return flat.as_strided(tuple(size), tuple(stride), offset).clone()


def _tensors(module: _Module, prefix: str = "") -> Any:
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _tensors(value, f"{prefix}{name}.")
