"""Which kernels a rehearsal has found to be needed, kept on disk beside them, so that a start like it needs none."""

import contextlib
import importlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import torch

from cableway.ipc.config import WorkerConfig
from cableway.kernels import compilation
from cableway.kernels.compilation import Kernel
from cableway.kernels.cuda import CudaKernel
from cableway.kernels.lang import num_processors, triton
from cableway.kernels.tuning import device_name
from cableway.workers import memory

_FILE = "repertoire.json"
_CODE = [Path(__file__).parents[1] / folder for folder in ("ipc", "kernels", "workers")]
_SUFFIXES = ".py", ".cu", ".cuh", ".json"


def read(config: WorkerConfig) -> list[Kernel]:
    """What an earlier start like this one has written; nothing where there is none, or it is broken."""
    try:
        path = _kept(config).get_file(_FILE)
        return msgspec.json.decode(Path(path).read_bytes(), type=list[Kernel]) if path else []
    except (OSError, msgspec.DecodeError):
        return []


def write(config: WorkerConfig, kernels: Iterable[Kernel]) -> None:
    """Each once. Not where nothing can be written, such as in a folder that came with a container."""
    with contextlib.suppress(OSError):
        _kept(config).put(msgspec.json.encode(list(dict.fromkeys(kernels))), _FILE)


def load(kernels: Iterable[Kernel]) -> None:
    """Have kernels loaded, within `compilation.ahead`. What is no longer on disk is compiled."""
    for name, made_for in kernels:
        if isinstance(made_for, str):
            module, _, function = name.rpartition(".")
            getattr(importlib.import_module(module), function).preload(made_for)
        else:
            compilation.in_background(CudaKernel(name).load, made_for)


def _kept(config: WorkerConfig) -> Any:
    """Its place is named by all that decides what is launched, so that no list is ever out of date."""
    model = Path(config.model)
    files = [(path, path.stat()) for path in (sorted(model.iterdir()) if model.is_dir() else (model,))]
    code = [path for folder in _CODE for path in sorted(folder.rglob("*")) if path.suffix in _SUFFIXES]
    return compilation.kept(
        msgspec.structs.replace(config, runtime_dir="", engine=""),
        [(path, found.st_size, found.st_mtime_ns) for path, found in files],
        [path.read_bytes() for path in code],
        (torch.__version__, triton.__version__),
        sorted(item for item in os.environ.items() if item[0].startswith("TRITON_")),
        (device_name(), num_processors(), memory.most_bytes()),
    )
