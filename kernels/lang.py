"""The one place that imports Triton, so that kernel files load where it is not installed (with CPU builds of torch).

Kernel files say `from cableway.kernels.lang import jit, tl, triton`, with annotations left as strings. Without Triton a
kernel can be defined but not launched. Kernels that overlap with the one before them (`overlapping`) also import
`gdc_wait` and `gdc_launch_dependents`. CPU forms say `loops.name(…)`, which imports and compiles them at the first use:
workers on a GPU do without.
"""

import importlib
from functools import cache
from typing import Any

import torch


class _AtFirstUse:
    """Stands for a module, which is imported when something of it is first asked for, by whichever thread."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module(self._name), name)
        setattr(self, name, value)  # not asked for again
        return value


loops = _AtFirstUse("cableway.kernels.cpu.loops")
scans = _AtFirstUse("cableway.kernels.cpu.scans")
products = _AtFirstUse("cableway.kernels.cpu.products")

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
    from triton.runtime.errors import OutOfResources
    from triton.tools.tensor_descriptor import TensorDescriptor

    jit = triton.jit
except ModuleNotFoundError as missing:
    if missing.name != "triton":
        raise
    triton = tl = gdc_launch_dependents = gdc_wait = OutOfResources = TensorDescriptor = None

    class Absent:
        """A kernel that cannot be launched."""

        def __init__(self, function):
            self.name = function.__name__

        def __getitem__(self, grid):
            raise RuntimeError(f"kernel {self.name} needs Triton, which is not installed")

    def jit(function=None, **options):
        """Stands for triton.jit."""
        return Absent(function) if function else Absent


def overlapping() -> dict[str, Any]:
    """Launch options of a kernel with a constexpr PDL, whose programs may start while the kernel before still runs.

    Where PDL is set each program says `gdc_launch_dependents()`, and `gdc_wait()` before it reads what the step
    computes or writes anything: until then it sees only weights, and what an ordinary kernel made before the last one.
    At least one program waits in any case, so that a kernel that is complete leaves none before it incomplete.
    """
    if triton.knobs.runtime.interpret:
        return {"PDL": False}
    driver = triton.runtime.driver.active
    is_hopper = _generation(driver, driver.get_current_device()) >= 90
    return {"PDL": True, "launch_pdl": True} if is_hopper else {"PDL": False}


@cache
def _generation(driver: Any, device: int) -> int:
    return driver.get_current_target().arch


def gpu_capability() -> int:
    """Of the GPU that kernels are compiled for: 90 for Hopper; 0 in Triton's interpreter."""
    if triton.knobs.runtime.interpret:
        return 0
    driver = triton.runtime.driver.active
    return _generation(driver, driver.get_current_device())


@cache
def num_processors() -> int:
    """Of the GPU that kernels are launched on. Without one a few make the interpreter cut sequences as a GPU does."""
    return torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else 8
