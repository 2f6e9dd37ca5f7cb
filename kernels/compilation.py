"""How many kernels were compiled, and compiling many side by side before there is anything to launch them on.

Triton compiles a kernel for the types of its arguments, for constants, and for what is known of integers (whether one
is 1, or a multiple of 16), when it is first launched that way; for seconds nothing else happens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from cableway.kernels.lang import TensorDescriptor, triton

_NUM_THREADS = 16
"""Python's lock is held for about a third of a compilation: more threads than cores that they keep busy do no harm."""

_ALIGNMENT = 16
"""Of a pointer, in bytes, which Triton makes use of."""

_others: tuple[Executor, dict[Any, Future[Any]]] | None = None
"""While compiling ahead: who compiles, and what they were given that Triton knows nothing of."""


class Kernel(NamedTuple):
    """What is compiled once, or found compiled on disk."""

    name: str  # of one in Triton, with its module's
    made_for: str | tuple[tuple[str, int | str], ...]  # as Triton puts it, or constants of one in CUDA C++


class Counter:
    """Kernels that this process began to compile, or to load as compiled before, since `watch` was called."""

    def __init__(self) -> None:
        self.kernels: list[Kernel] = []

    def __call__(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> None:
        """What Triton calls; it goes on where nothing is returned."""
        self.kernels.append(Kernel(f"{fn.module}.{fn.name}", compile["specialization_data"]))


def watch() -> Counter:
    """Count from now on. Where there is no Triton, nothing is ever compiled."""
    counter = Counter()
    if triton is not None:
        # Once it is compiled, Triton tells only one of launches that need the same kernel and are not looked up alike.
        triton.knobs.runtime.jit_cache_hook = counter
    return counter


def count(kernel: Kernel) -> None:
    """One more, that Triton knows nothing of."""
    if isinstance(counter := triton.knobs.runtime.jit_cache_hook, Counter):
        counter.kernels.append(kernel)


def kept(*made_of: Any) -> Any:
    """Where Triton keeps what depends on nothing but `made_of`, as it is printed: its `CacheManager`."""
    return triton.runtime.cache.get_cache_manager(hashlib.sha256(repr(made_of).encode()).hexdigest())


@contextmanager
def ahead() -> Iterator[None]:
    """Compile what is launched on tensors of the meta device, side by side, and launch nothing on them.

    To be entered by one thread at a time; at its end everything is compiled, and loaded on the GPU.

    Raises:
        Exception: what the compiler raised.
    """
    global _others
    jit_function = triton.runtime.JITFunction
    run, asked = jit_function.run, set()

    def compile_or_run(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if not any(isinstance(argument, Tensor) and argument.is_meta for argument in args):
            return run(function, *args, grid=grid, warmup=warmup, **options)
        # PERF: Triton looks into each launch anew until what it asked for is compiled: 1.2 s for 28 layers alike.
        launch = (function, *map(_seen_by_triton, (*args, *options.items())))
        if launch not in asked:
            asked.add(launch)
            run(function, *args, grid=grid, warmup=True, **options)
        return None

    jit_function.run = compile_or_run
    try:
        with ThreadPoolExecutor(_NUM_THREADS) as pool, triton.AsyncCompileMode(_Loading(pool)):
            tasks: dict[Any, Future[Any]] = {}
            _others = pool, tasks
            yield
        for task in tasks.values():
            task.result()
    finally:
        jit_function.run = run
        _others = None


def _seen_by_triton(argument: Any) -> Any:
    """All that a kernel can be compiled for, and more."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % _ALIGNMENT
    if isinstance(argument, TensorDescriptor):
        return argument.base.dtype, *argument.shape, *argument.strides, *argument.block_shape
    return type(argument), argument


class _Loading:
    """Compiles for Triton by way of `pool`, and has each kernel made ready for its launch there as well.

    PERF: Triton 3.6 has gcc make a program that launches a kernel, 0.2 s each, one after another, at the first launch.
    """

    def __init__(self, pool: Executor) -> None:
        self._pool = pool

    def submit(self, compile_it: Callable[[], Any]) -> Future[Any]:
        def compile_and_load() -> Any:
            kernel = compile_it()
            kernel.run  # noqa: B018 - a property, which makes what it returns
            return kernel

        return self._pool.submit(compile_and_load)


def in_background(compile_it: Callable[..., Any], *args: Any) -> None:
    """Have something done once beside Triton's compilations, by the end of `ahead`, within which this is called."""
    assert _others is not None
    pool, tasks = _others
    if (compile_it, args) not in tasks:
        tasks[compile_it, args] = pool.submit(compile_it, *args)
