"""What must hold of every kernel of the registry, whatever it computes.

The same tests run three times: on what public launchers run on a CPU; on Triton forms in Triton's interpreter, in a
process that test_triton.py starts; and on a GPU where there is one.
"""

import dataclasses
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cableway.kernels import kv_cache
from cableway.kernels.philox import gumbel_triton
from cableway.kernels.registry import Call, Case, Kernel, kernels

UNSETTLED = {
    "paged_attention: argument 0 longer in dimension 0",  # tokens that belong to no sequence have no result
    "latent_attention: argument 0 longer in dimension 0",
    "causal_conv: argument 0 longer in dimension 0",
    "prefill_work: argument 0 longer in dimension 0",  # a sequence cannot end before it begins
    "step_inputs: argument 3 longer in dimension 0",  # the same
}
"""Distorted arguments of which the contract says nothing."""


INTERPRETED = type(gumbel_triton).__name__ == "InterpretedFunction"
DEVICES = ["cuda"] if torch.cuda.is_available() and not INTERPRETED else ["cpu"]
RUNS_TRITON = INTERPRETED or DEVICES == ["cuda"]

IS_ON_HOPPER = DEVICES == ["cuda"] and torch.cuda.get_device_capability() == (9, 0)
needs_hopper = pytest.mark.skipif(not IS_ON_HOPPER, reason="needs a Hopper GPU")

slow_where_interpreted = [pytest.mark.slow] if INTERPRETED else []
"""Marks of a case that adds little in the interpreter to those beside it."""


def form(kernel: Kernel) -> Callable:
    """What is tested here: the public launcher, or the Triton form where the interpreter runs it on CPU tensors."""
    return kernel.launch if INTERPRETED else kernel.function


def named(name: str) -> Kernel:
    return next(kernel for kernel in kernels() if kernel.name == name)


def make(kernel: Kernel, case: Case, device: str) -> Call:
    """The case's arguments: the same in every run and every process."""
    torch.manual_seed(zlib.crc32(f"{kernel.name} {case}".encode()))
    return kernel.make(**case, device=device)


def label(value: Any) -> str:
    """Names kernels and cases in test ids."""
    if isinstance(value, Kernel):
        return value.name
    return "-".join(f"{name}={str(x).removeprefix('torch.')}" for name, x in value.items()).replace(" ", "")


def contract(kernel: Kernel) -> str:
    """The kernel file's docstring, on one line."""
    return " ".join((sys.modules[kernel.ref.__module__].__doc__ or "").split())


def assert_close(actual: Tensor, expected: Tensor, kernel: Kernel, dtype: torch.dtype | None = None) -> None:
    """Floats within the kernel's tolerance, of their own dtype or that one, all else equal; shapes and dtypes too, and
    NaN is NaN. KV caches of 8 bits count as the numbers that they say."""
    of_float32, dtype = kernel.tolerances.get(torch.float32, 0.0), dtype or expected.dtype
    is_cache = expected.dtype in (*kv_cache.F8, torch.int8)
    tolerance = kernel.tolerances.get(dtype, of_float32) if expected.is_floating_point() or is_cache else 0.0
    if is_cache:
        assert actual.dtype == expected.dtype
        actual, expected = kv_cache.numbers(actual), kv_cache.numbers(expected)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def assert_equals_ref(kernel: Kernel, made: Call) -> None:
    """What the form returns and updates is what `ref` does, and it writes nowhere else."""
    expected_call = made.clone()
    arguments = list(_tensors((made.args, made.kwargs)))
    before = [_whole(argument).clone() for argument in arguments]
    dtype = kernel.rounds_to(made) if kernel.rounds_to else None
    updated = {made.args[i].untyped_storage().data_ptr(): expected_call.args[i] for i in kernel.updates}

    expected = kernel.run(kernel.ref, expected_call)
    actual = kernel.run(form(kernel), made)
    # What a kernel returns it may have written where it was told to.
    written = {tensor.untyped_storage().data_ptr() for tensor in (*actual, *(made.args[i] for i in kernel.spoils))}
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, kernel, dtype)
    for argument, was in zip(arguments, before, strict=True):
        address = argument.untyped_storage().data_ptr()
        reference = updated.get(address)
        if reference is None and address in written:
            continue
        if reference is None:
            torch.testing.assert_close(_whole(argument), was, rtol=0, atol=0, equal_nan=True)
        else:
            assert_close(_whole(argument), _whole(reference), kernel, dtype)


def assert_rows_are_independent(kernel: Kernel, made: Call, num_rows: int) -> None:
    """A row is the same, to the bit, alone, in any part of the batch and in all of it."""
    together = kernel.run(form(kernel), made.clone())
    for start, stop in ((0, 1), (num_rows - 1, num_rows), (3, 5), (0, 4), (2, 18), (5, num_rows)):
        rows = slice(start, stop)
        part = mapped(lambda x, rows=rows: x[rows] if x.shape[:1] == (num_rows,) else x, made.clone())
        for some, all_rows in zip(kernel.run(form(kernel), part), together, strict=True):
            assert torch.equal(some, all_rows[start:stop]), f"rows {start}:{stop}"


def assert_refuses_or_computes(kernel: Kernel, made: Call) -> None:
    """Arguments that do not fit are a ValueError, never another error nor a wrong result."""
    refused, wrong = 0, []
    distorted = [(what, call) for what, call in _distorted(made) if f"{kernel.name}: {what}" not in UNSETTLED]
    for what, call in distorted:
        try:
            kernel.run(kernel.function, call.clone())
            assert_equals_ref(kernel, call)
        except ValueError:
            refused += 1
        except Exception as error:
            wrong.append(f"{what}: {error!r:.120}")
    assert not wrong, "\n".join(wrong)
    assert refused > 0


def _distorted(made: Call) -> Iterator[tuple[str, Call]]:
    """The call with one of its tensors larger by one in one dimension, or of other strides, or of float64."""
    for i, argument in enumerate(made.args):
        if not isinstance(argument, Tensor):
            continue
        for dim, size in enumerate(argument.shape):
            longer = argument.index_select(dim, torch.tensor([*range(size), 0], device=argument.device))
            yield f"argument {i} longer in dimension {dim}", _replaced(made, i, longer)
            spread = torch.stack((argument, argument), dim + 1).flatten(dim, dim + 1)
            every_other = spread[(slice(None),) * dim + (slice(None, None, 2),)]
            yield f"argument {i} strided in dimension {dim}", _replaced(made, i, every_other)
        yield f"argument {i} with a dimension more", _replaced(made, i, argument[None])
        yield f"argument {i} as float64", _replaced(made, i, argument.double())


def _replaced(made: Call, index: int, argument: Tensor) -> Call:
    return Call((*made.args[:index], argument, *made.args[index + 1 :]), made.kwargs).clone()


def mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with every tensor in it changed."""
    match value:
        case Tensor():
            return change(value)
        case tuple():
            items = [mapped(change, item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        case dict():
            return {name: mapped(change, item) for name, item in value.items()}
        case _ if dataclasses.is_dataclass(value):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return dataclasses.replace(value, **mapped(change, fields))
        case _:
            return value


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor among the arguments of a call, those of its dataclasses too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value):
        yield from _tensors(tuple(getattr(value, field.name) for field in dataclasses.fields(value)))


def _whole(tensor: Tensor) -> Tensor:
    """All of the memory that the tensor is a view of."""
    if tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes():
        return tensor
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
