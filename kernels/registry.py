"""Every kernel, with all that a test or a benchmark needs to know of it.

A kernel file holds: docstring (formula, arguments as `name [dims] dtype`, bound), `ref` in plain float32 torch, the
Triton kernel, `launch` that starts it, the public launcher, and its cases. The public launcher checks shapes and
dtypes, runs the CPU form (plain torch, or a loop of cpu/loops.py) on a CPU tensor and `launch` on any other; there is
no third way. Strides that only the Triton kernel takes for granted are checked by `launch`.
"""

import importlib
import itertools
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

Case = dict[str, Any]
"""Named dimensions and options of one call, as `make` takes them."""


@dataclass(frozen=True)
class Call:
    """Arguments of one call: what `ref`, `launch` and the public launcher all take."""

    args: tuple
    kwargs: dict[str, Any]

    def clone(self) -> "Call":
        """The same call on tensors of its own, as kernels may write into their arguments.

        Strides are kept, what lies between rows too, and views of one tensor are views of one tensor again.
        """
        storages: dict[int, torch.UntypedStorage] = {}
        return Call(
            tuple(_clone(a, storages) for a in self.args),
            {name: _clone(a, storages) for name, a in self.kwargs.items()},
        )


def call(*args, **kwargs) -> Call:
    return Call(args, kwargs)


@dataclass(frozen=True)
class Kernel:
    """One entry of the registry. `ref`, `launch` and `function` take the same arguments and return the same values.

    `updates` names the tensors (positions in `args`) that are written in place; they are compared like returned ones.
    `spoils` names those that hold nothing of use afterwards.
    `tolerances` are by the dtype of a result; where products are in another, `rounds_to` says in which.
    `bench_cases` are large cases to be timed; `num_bytes` and `num_flops` of a call give the bound.
    """

    name: str
    function: Callable
    ref: Callable
    launch: Callable
    make: Callable[..., Call]
    cases: list[Case]
    bench_cases: list[Case]
    num_bytes: Callable[[Call], int]
    num_flops: Callable[[Call], int] | None
    updates: tuple[int, ...]
    spoils: tuple[int, ...]
    tolerances: dict[torch.dtype, float]
    rounds_to: Callable[[Call], torch.dtype] | None

    def run(self, form: Callable, made: Call) -> tuple[Tensor, ...]:
        """All that `form` computes: what it returns, then what it wrote in place."""
        returned = form(*made.args, **made.kwargs)
        outputs = () if returned is None else returned if isinstance(returned, tuple) else (returned,)
        return (*outputs, *(made.args[i] for i in self.updates))


_kernels: dict[str, Kernel] = {}

TOLERANCES = {
    torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2,
    # A step of what a cache of 8 bits keeps, which may be rounded the other way.
    torch.float8_e4m3fn: 0.13, torch.float8_e5m2: 0.26, torch.int8: 0.07,
}  # fmt: skip


def kernel(
    *, ref, launch, make, cases, bench_cases, num_bytes, num_flops=None, updates=(), spoils=(), tolerances=TOLERANCES,
    rounds_to=None,
):  # fmt: skip
    """Register the decorated public launcher; it is returned as it is, so a call costs nothing more."""

    def register(function: Callable) -> Callable:
        _kernels[function.__name__] = Kernel(
            name=function.__name__,
            function=function,
            ref=ref,
            launch=launch,
            make=make,
            cases=list(cases),
            bench_cases=list(bench_cases),
            num_bytes=num_bytes,
            num_flops=num_flops,
            updates=tuple(updates),
            spoils=tuple(spoils),
            tolerances=tolerances,
            rounds_to=rounds_to,
        )
        return function

    return register


def kernels() -> list[Kernel]:
    """Every kernel of this folder."""
    package = importlib.import_module("cableway.kernels")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"cableway.kernels.{module.name}")
    return list(_kernels.values())


def grid(**axes) -> Iterator[Case]:
    """Every combination of the named values: `grid(num_tokens=(1, 7), dtype=FLOATS)`."""
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def check(condition: bool, message: str) -> None:
    """Raise ValueError: a launcher was called with what its contract does not allow."""
    if not condition:
        raise ValueError(message)


def are_contiguous(*tensors: Tensor) -> bool:
    return all(t.is_contiguous() for t in tensors)


def are_dense_in_tokens(x: Tensor) -> bool:
    """Whether the numbers of each token of x [T, H, D] lie side by side, in order."""
    return x[:1].is_contiguous()


def _clone(value, storages: dict[int, torch.UntypedStorage]):
    if not isinstance(value, Tensor):
        return value
    storage = value.untyped_storage()
    if storage.data_ptr() not in storages:
        storages[storage.data_ptr()] = storage.clone()
    return torch.empty(0, dtype=value.dtype, device=value.device).set_(
        storages[storage.data_ptr()], value.storage_offset(), value.shape, value.stride()
    )
