"""The one place that imports Triton, so that kernel files load where it is not installed (with CPU builds of torch).

Kernel files say `from cableway.kernels.lang import jit, tl, triton`, with annotations left as strings. Without Triton a
kernel can be defined but not launched. CPU forms say `loops.name(…)`, which imports and compiles them at the first use:
workers on a GPU do without.
"""

import importlib.util
import sys
from types import ModuleType


def _at_first_use(name: str) -> ModuleType:
    """The module, which is imported when something of it is first asked for."""
    spec = importlib.util.find_spec(name)
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


loops = _at_first_use("cableway.kernels.cpu.loops")

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ModuleNotFoundError as missing:
    if missing.name != "triton":
        raise
    triton = tl = None

    class Absent:
        """A kernel that cannot be launched."""

        def __init__(self, function):
            self.name = function.__name__

        def __getitem__(self, grid):
            raise RuntimeError(f"kernel {self.name} needs Triton, which is not installed")

    def jit(function=None, **options):
        """Stands for triton.jit."""
        return Absent(function) if function else Absent
