"""What the kernels of a step have to move: calls and bytes of each, booked while a step runs without graphs.

A kernel's own contract says how many bytes a call takes (`num_bytes`); one that launches others is booked as a whole.
Products that a library makes are booked by what goes into them and comes out.
"""

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cableway.kernels.cuda import CudaKernel
from cableway.kernels.lang import triton
from cableway.kernels.registry import Call, Kernel, kernels

PRODUCTS = "library products"
_PRODUCTS = (torch.nn.functional.linear, torch.mm, Tensor.matmul, Tensor.__matmul__)


@dataclass
class Entry:
    """Of one step."""

    calls: int = 0
    num_bytes: int = 0


class Ledger(TorchFunctionMode):
    """Books what runs inside it: `entries` by name, and for each function on the GPU the `owners` that launched it."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: dict[str, Entry] = {}
        self.owners: dict[str, str] = {}
        self._current = ""
        self._patches = ExitStack()

    def __enter__(self) -> "Ledger":
        for kernel in kernels():
            module = sys.modules[kernel.launch.__module__]
            self._patches.enter_context(patch.object(module, "launch", self._booked(kernel)))
        run = triton.runtime.JITFunction.run

        def noted(function: Any, *args: Any, **options: Any) -> Any:
            self.owners[function.__name__] = self._current
            return run(function, *args, **options)

        call = CudaKernel.__call__

        def noted_cuda(function: CudaKernel, *args: Any, **options: Any) -> None:
            self.owners[function.name] = self._current
            call(function, *args, **options)

        self._patches.enter_context(patch.object(triton.runtime.JITFunction, "run", noted))
        self._patches.enter_context(patch.object(CudaKernel, "__call__", noted_cuda))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._patches.close()
        super().__exit__(*error)

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in _PRODUCTS and not self._current:
            factors = [arg for arg in args if isinstance(arg, Tensor)]
            self._book(PRODUCTS, sum(tensor.nbytes for tensor in (*factors, result)))
        return result

    def _booked(self, kernel: Kernel) -> Callable:
        def launch(*args: Any, **kwargs: Any) -> Any:
            if self._current:
                return kernel.launch(*args, **kwargs)
            self._book(kernel.name, kernel.num_bytes(Call(args, kwargs)))
            self._current = kernel.name
            try:
                return kernel.launch(*args, **kwargs)
            finally:
                self._current = ""

        return launch

    def _book(self, name: str, num_bytes: int) -> None:
        entry = self.entries.setdefault(name, Entry())
        entry.calls += 1
        entry.num_bytes += num_bytes
