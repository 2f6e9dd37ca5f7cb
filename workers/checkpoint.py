"""Open a model's weight files: name -> `Stored`, nothing read yet. Foreign files: any fault in them is a ModelError."""

import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from cableway.ipc.gguf import read_header
from cableway.ipc.modelfiles import ModelError, ModelFiles
from cableway.workers.formats import gguf
from cableway.workers.formats.stored import PLAIN, Stored

_SAFETENSORS_DTYPES = ("F32", "F16", "BF16")
_TORCH_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def open_files(files: ModelFiles) -> dict[str, Stored]:
    """Every tensor of a model's files by name; ModelError with one line for files that are broken or not served."""
    tensors: dict[str, Stored] = {}
    for path in files.weights:
        for stored in _OPENERS[Path(path).suffix](path):
            if stored.name in tensors:
                raise ModelError(f"{path}: tensor {stored.name!r} is in another file too")
            tensors[stored.name] = stored
    return tensors


def _open_gguf(path: str) -> Iterator[Stored]:
    header = read_header(path)
    data = np.memmap(path, np.uint8, "c")  # copy on write: torch wants writable memory
    for name, info in header.tensors.items():

        def read(info=info) -> Tensor:
            return gguf.view(data[info.offset : info.offset + info.num_bytes], info.shape, info.ggml_type)

        yield Stored(name, info.shape, gguf.encoding(info.ggml_type, len(info.shape), name), read)


def _open_safetensors(path: str) -> Iterator[Stored]:
    with _foreign(path):
        file = safe_open(path, framework="pt")
        names = sorted(file.keys())
    for name in names:
        with _foreign(path):
            part = file.get_slice(name)
            shape, dtype = tuple(part.get_shape()), part.get_dtype()
        if dtype not in _SAFETENSORS_DTYPES:
            raise ModelError(f"{path}: tensor {name!r} is {dtype}, not one of {', '.join(_SAFETENSORS_DTYPES)}")
        yield Stored(name, shape, PLAIN, lambda name=name: file.get_tensor(name))


def _open_torch(path: str) -> Iterator[Stored]:
    with _foreign(path):
        # Only files in the zip format (of torch 1.6 and later) can be mapped.
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(tensors, dict):
        raise ModelError(f"{path}: holds a {type(tensors).__name__}, not tensors by name")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ModelError(f"{path}: entry {name!r} is no tensor with a name")
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise ModelError(f"{path}: tensor {name!r} is {tensor.layout} on {tensor.device}, not plain numbers")
        if tensor.dtype not in _TORCH_DTYPES:
            raise ModelError(f"{path}: tensor {name!r} is {tensor.dtype}, not float32, float16 or bfloat16")
        yield Stored(name, tuple(tensor.shape), PLAIN, lambda tensor=tensor: tensor.detach())


_OPENERS: dict[str, Callable[[str], Iterator[Stored]]] = {
    ".gguf": _open_gguf,
    ".safetensors": _open_safetensors,
    ".bin": _open_torch,
    ".pt": _open_torch,
}


@contextmanager
def _foreign(path: str) -> Iterator[None]:
    """Whatever a parser raises over a foreign file is the file's fault, and said in one line."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{path}: broken or not a weight file: {reason[0][:200]}") from None
