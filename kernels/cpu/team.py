"""Running compiled loops on several threads.

A loop computes rows `begin` to `end` of its result, each row alone: a row's result is the same to the bit in any batch
and on any number of threads. Its arguments are addresses, sizes, strides (in elements) and dtypes as `KINDS` numbers
them, then float32 numbers.
"""

import ctypes
import struct
import time
from collections.abc import Callable

import torch
from llvmlite import ir
from numba import intp, types
from numba.extending import intrinsic

from cableway.kernels.cpu.compiled import INT, compiled, integers

_OPERATIONS_A_THREAD = 1 << 17
"""To wake a thread takes a good part of the time of this many multiplications."""
_TURNS_A_THREAD = 2
_OPERATIONS_A_NS = 20
"""What two threads do at the least, where they get their cores."""
_LATE_NS, _MOST_LATE_NS, _CALLS_ALONE = 60_000, 2_000_000, 400
"""How late a call may be, how much that may add up to, and how many calls then do with one thread."""


class Loop:
    """A compiled function of (begin, end, the address of `num_integers` i64 and then `num_floats` f64 arguments)."""

    def __init__(self, function: Callable, num_integers: int, num_floats: int):
        made = compiled(types.void(intp, intp, intp), function)
        self.address = made.address
        self.call = ctypes.PYFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)(made.address)
        self.pack = struct.Struct(f"={num_integers}q{num_floats}d").pack


class _Team:
    """The threads of OpenMP that torch computes with, which are awake between its products.

    They take turns: one that the system takes away holds up the others for one turn only. Beside somebody else who
    computes that is a third of a millisecond for each call, so calls that are late again and again are followed by many
    on one thread.
    PERF: SmolLM2-135M, a token of one sequence beside a busy process on 2 cores: 37 to 41 ms, with this 12.
    """

    def __init__(self) -> None:
        self._parallel = _openmp()
        self._num_alone = 0
        self._late_ns = 0

    def size(self, most: int) -> int:
        """How many threads to compute with, up to `most`."""
        if most <= 1 or self._parallel is None:
            return 1
        if self._num_alone:
            self._num_alone -= 1
            return 1
        return most

    def compute(self, work: ctypes.Array, num_threads: int, operations: int) -> None:
        """Go through `work`, as `_turns` takes it."""
        began_ns = time.perf_counter_ns()
        self._parallel(_take_turns, work, num_threads, 0)
        elapsed_ns = time.perf_counter_ns() - began_ns
        self._late_ns = max(self._late_ns + elapsed_ns - operations // _OPERATIONS_A_NS - _LATE_NS, 0)
        if self._late_ns > _MOST_LATE_NS:
            self._late_ns, self._num_alone = 0, _CALLS_ALONE


def loop(num_integers: int, num_floats: int = 0) -> Callable[[Callable], Loop]:
    """Compile a function of (begin, end, the address of so many i64 and then f64 arguments)."""
    return lambda function: Loop(function, num_integers, num_floats)


def run(loop: Loop, num_rows: int, operations: int, *arguments: float) -> None:
    """Compute `num_rows` rows, on several threads where `operations` a row make that pay."""
    packed = loop.pack(*arguments)
    operations *= num_rows
    num_threads = _team.size(min(torch.get_num_threads(), num_rows, operations // _OPERATIONS_A_THREAD))
    if num_threads == 1:
        loop.call(0, num_rows, packed)
        return
    work = struct.pack("=4q", 0, num_rows, _turn_len(num_rows, num_threads), loop.address) + packed
    _team.compute(ctypes.create_string_buffer(work, len(work)), num_threads, operations)


class Prepared:
    """A large loop whose last arguments, all integers, are always the same ones; one call at a time.

    PERF: packing and deciding anew is 4 us of a product that takes 30.
    """

    def __init__(self, loop: Loop, num_rows: int, operations: int, num_changing: int, *fixed: int):
        self._loop, self._num_rows, self._end = loop, num_rows, 4 + num_changing
        self._operations = num_rows * operations
        self._work = (ctypes.c_int64 * (self._end + len(fixed)))(0, num_rows, 0, loop.address)
        self._work[self._end :] = fixed
        self._arguments = ctypes.addressof(self._work) + 4 * ctypes.sizeof(ctypes.c_int64)

    def __call__(self, *changing: int) -> None:
        work, num_threads = self._work, _team.size(torch.get_num_threads())
        work[4 : self._end] = changing
        if num_threads == 1:
            self._loop.call(0, self._num_rows, self._arguments)
            return
        work[0], work[2] = 0, _turn_len(self._num_rows, num_threads)
        _team.compute(work, num_threads, self._operations)


def _turn_len(num_rows: int, num_threads: int) -> int:
    return max(num_rows // (num_threads * _TURNS_A_THREAD), 1)


def _openmp() -> Callable | None:
    """`GOMP_parallel(function, data, num_threads, flags)` of the OpenMP library that torch has loaded, if it has it."""
    try:
        parallel = ctypes.PyDLL(None).GOMP_parallel
    except AttributeError:
        return None
    parallel.restype, parallel.argtypes = None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    return parallel


@intrinsic
def _next_turn(context, address, turn):
    """Add `turn` to the i64 at an address, for one thread at a time; what was there before."""

    def generate(_, builder, signature, arguments):
        return builder.atomic_rmw("add", builder.inttoptr(arguments[0], INT.as_pointer()), arguments[1], "monotonic")

    return intp(intp, intp), generate


@intrinsic
def _call(context, function, begin, end, arguments):
    """Call a loop by its address."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.VoidType(), [INT] * 3)
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.void(intp, intp, intp, intp), generate


def _turns(work):
    """What each thread does. `work` is the address of: rows given out, rows, rows a turn, the loop, its arguments."""
    _, num_rows, turn, function = integers(work, 4)
    begin = _next_turn(work, turn)
    while begin < num_rows:
        _call(function, begin, min(begin + turn, num_rows), work + 32)
        begin = _next_turn(work, turn)


_take_turns = compiled(types.void(intp), _turns).address
_team = _Team()
