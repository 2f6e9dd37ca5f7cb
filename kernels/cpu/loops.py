"""Loops compiled by Numba for the processor at hand: the CPU forms of the kernels that every layer runs.

In plain torch each of them is five to ten operations. Between products that stream the weights through the caches an
operation costs 3 to 6 us, most of it in fetching its own code anew, so a decode of a small model waits for these.
PERF: SmolLM2-135M, a token of one sequence, in place, torch / here: add_rms_norm 28 / 13 us, rope 29 / 10, kv_write
17 / 9, silu_mul 17 / 10, paged_attention 86 / 33. The loops are 1 to 3 us of it (attention 17), the rest is launchers.

A loop computes rows `begin` to `end` of its result. Its arguments are addresses, sizes, strides (in elements) and
dtypes as `KINDS` numbers them, then float32 numbers. It computes in float32, each row alone: a row's result is the same
to the bit in any batch. Compiled code is kept on disk beside this file, or where Numba keeps what it cannot keep there.
"""

import ctypes
import struct
import time
from collections.abc import Callable

import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, float32, intp, njit, types, uint16, uint32
from numba.core.typing.templates import Signature
from numba.extending import intrinsic

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_F32, _BF16 = 0, 1
_OPERATIONS_A_THREAD = 1 << 17
"""To wake a thread takes a good part of the time of this many multiplications."""
_TURNS_A_THREAD = 2
_OPERATIONS_A_NS = 20
"""What two threads do at the least, where they get their cores."""
_LATE_NS, _MOST_LATE_NS, _CALLS_ALONE = 60_000, 2_000_000, 400
"""How late a call may be, how much that may add up to, and how many calls then do with one thread."""
_INT, _FLOAT, _NOTHING = ir.IntType(64), ir.FloatType(), ir.VoidType()


class Loop:
    """A compiled loop. `num_integers` and `num_floats` say how its arguments are packed."""

    def __init__(self, function: Callable, num_integers: int, num_floats: int):
        compiled = _compiled(types.void(intp, intp, intp), function)
        self.address = compiled.address
        self.call = ctypes.PYFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)(compiled.address)
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


_team = _Team()


def _compiled(signature: Signature, function: Callable):
    options = {"fastmath": {"reassoc", "contract", "arcp", "nsz"}, "error_model": "numpy"}
    try:
        return cfunc(signature, cache=True, **options)(function)
    except RuntimeError:  # no folder can be written to: compile at every start
        return cfunc(signature, **options)(function)


def _loop(num_integers: int, num_floats: int = 0) -> Callable[[Callable], Loop]:
    """Compile a function of (begin, end, the address of so many i64 and then f64 arguments)."""
    return lambda function: Loop(function, num_integers, num_floats)


def _pointer(numba_type, llvm_type):
    @intrinsic
    def at(context, address):
        def generate(_, builder, signature, arguments):
            return builder.inttoptr(arguments[0], llvm_type.as_pointer())

        return types.CPointer(numba_type)(intp), generate

    return at


_f32_at = _pointer(float32, ir.FloatType())
_u16_at = _pointer(uint16, ir.IntType(16))
_i32_at = _pointer(types.int32, ir.IntType(32))
_i64_at = _pointer(types.int64, ir.IntType(64))


@intrinsic(prefer_literal=True)
def _integers(context, address, number):
    """That many i64 from an address on, as a tuple."""
    kind = types.UniTuple(intp, number.literal_value)

    def generate(context, builder, signature, arguments):
        first = builder.inttoptr(arguments[0], _INT.as_pointer())
        loaded = [builder.load(builder.gep(first, [_INT(i)])) for i in range(kind.count)]
        return context.make_tuple(builder, kind, loaded)

    return kind(intp, number), generate


@intrinsic(prefer_literal=True)
def _floats(context, address, number):
    """That many f64 from an address on, as a tuple of f32."""
    kind = types.UniTuple(float32, number.literal_value)

    def generate(context, builder, signature, arguments):
        first = builder.inttoptr(arguments[0], ir.DoubleType().as_pointer())
        loaded = [builder.load(builder.gep(first, [_INT(i)])) for i in range(kind.count)]
        return context.make_tuple(builder, kind, [builder.fptrunc(value, _FLOAT) for value in loaded])

    return kind(intp, number), generate


@intrinsic
def _next_turn(context, address, turn):
    """Add `turn` to the i64 at an address, for one thread at a time; what was there before."""

    def generate(_, builder, signature, arguments):
        return builder.atomic_rmw("add", builder.inttoptr(arguments[0], _INT.as_pointer()), arguments[1], "monotonic")

    return intp(intp, intp), generate


@intrinsic
def _call(context, function, begin, end, arguments):
    """Call a loop by its address."""

    def generate(context, builder, signature, arguments):
        kind = ir.FunctionType(_NOTHING, [_INT] * 3)
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.void(intp, intp, intp, intp), generate


def _turns(work):
    """What each thread does. `work` is the address of: rows given out, rows, rows a turn, the loop, its arguments."""
    _, num_rows, turn, function = _integers(work, 4)
    begin = _next_turn(work, turn)
    while begin < num_rows:
        _call(function, begin, min(begin + turn, num_rows), work + 32)
        begin = _next_turn(work, turn)


_take_turns = _compiled(types.void(intp), _turns).address


@intrinsic
def _f32_of_bits(context, bits):
    return float32(uint32), lambda _, builder, signature, arguments: builder.bitcast(arguments[0], ir.FloatType())


@intrinsic
def _bits_of_f32(context, value):
    return uint32(float32), lambda _, builder, signature, arguments: builder.bitcast(arguments[0], ir.IntType(32))


@intrinsic
def _f32_of_half(context, bits):
    def generate(_, builder, signature, arguments):
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return float32(uint16), generate


@intrinsic
def _half_of_f32(context, value):
    def generate(_, builder, signature, arguments):
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return uint16(float32), generate


@njit(inline="always")
def _read(address, start, size, kind, into):
    """into[i] = element start + i of the tensor of dtype `kind` at `address`"""
    if kind == _F32:
        wide = _f32_at(address)
        for i in range(size):
            into[i] = wide[start + i]
    elif kind == _BF16:
        narrow = _u16_at(address)
        for i in range(size):
            into[i] = _f32_of_bits(uint32(narrow[start + i]) << uint32(16))
    else:
        narrow = _u16_at(address)
        for i in range(size):
            into[i] = _f32_of_half(narrow[start + i])


@njit(inline="always")
def _write(address, start, size, kind, values):
    """Element start + i = values[i], rounded to nearest even; NaN stays NaN."""
    if kind == _F32:
        wide = _f32_at(address)
        for i in range(size):
            wide[start + i] = values[i]
    elif kind == _BF16:
        narrow = _u16_at(address)
        for i in range(size):
            bits = _bits_of_f32(values[i])
            rounded = (bits + uint32(0x7FFF) + ((bits >> uint32(16)) & uint32(1))) >> uint32(16)
            is_nan = (bits & uint32(0x7FFFFFFF)) > uint32(0x7F800000)
            narrow[start + i] = uint16(0x7FC0) if is_nan else uint16(rounded)
    else:
        narrow = _u16_at(address)
        for i in range(size):
            narrow[start + i] = _half_of_f32(values[i])


@njit(inline="always")
def _exp(x):
    """e**x to 2 units in the last place, without a branch; x counts as at least -104, which gives 0, and at most 88."""
    x = min(max(x, float32(-104.0)), float32(88.0))
    n = np.floor(x * float32(1.4426950408889634) + float32(0.5))
    r = x - n * float32(0.693145751953125) - n * float32(1.428606765330187e-06)
    p = float32(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + float32(c)
    p = p * r * r + r + float32(1)
    return p * _f32_of_bits(uint32(max(np.int32(n) + np.int32(127), np.int32(0))) << uint32(23))


@njit(inline="always")
def _softmax(scores, size, sink):
    """In place, over the first `size` and a score `sink` that nothing is read for."""
    highest = max(scores[0], float32(sink))
    for i in range(size):
        highest = max(highest, scores[i])
    total = _exp(float32(sink) - highest) if sink > -np.inf else float32(0)
    for i in range(size):
        scores[i] = _exp(scores[i] - highest)
        total += scores[i]
    for i in range(size):
        scores[i] /= total


@_loop(11, 2)
def normalise(begin, end, arguments):
    """y = RMS norm of the rows of x [.., num_inner, size]; of x + sums, which is kept, where `sums` is not 0."""
    x, x_outer, x_inner, num_inner, x_kind, sums, sums_stride, sums_kind, w, y, size = _integers(arguments, 11)
    eps, offset = _floats(arguments + 88, 2)
    weight = _f32_at(w)
    h, total = np.empty(size, np.float32), np.empty(size, np.float32)
    for row in range(begin, end):
        _read(x, row // num_inner * x_outer + row % num_inner * x_inner, size, x_kind, h)
        if sums:
            _read(sums, row * sums_stride, size, sums_kind, total)
            for i in range(size):
                total[i] += h[i]
            _write(sums, row * sums_stride, size, sums_kind, total)
            _read(sums, row * sums_stride, size, sums_kind, h)
        squares = float32(0)
        for i in range(size):
            squares += h[i] * h[i]
        scale = float32(1) / np.sqrt(squares / float32(size) + eps)
        for i in range(size):
            h[i] = h[i] * scale * (weight[i] + offset)
        _write(y, row * size, size, x_kind, h)


@_loop(13, 1)
def centre(begin, end, arguments):
    """y = layer norm of the rows of x [.., num_inner, size]; of x + sums, which is kept, where `sums` is not 0."""
    x, x_outer, x_inner, num_inner, x_kind, sums, sums_stride, sums_kind, w, w_inner, b, y, size = _integers(
        arguments, 13
    )
    (eps,) = _floats(arguments + 104, 1)
    weight, bias = _f32_at(w), _f32_at(b)
    h, total = np.empty(size, np.float32), np.empty(size, np.float32)
    for row in range(begin, end):
        _read(x, row // num_inner * x_outer + row % num_inner * x_inner, size, x_kind, h)
        if sums:
            _read(sums, row * sums_stride, size, sums_kind, total)
            for i in range(size):
                total[i] += h[i]
            _write(sums, row * sums_stride, size, sums_kind, total)
            _read(sums, row * sums_stride, size, sums_kind, h)
        mean = float32(0)
        for i in range(size):
            mean += h[i]
        mean /= float32(size)
        squares = float32(0)
        for i in range(size):
            h[i] -= mean
            squares += h[i] * h[i]
        scale = float32(1) / np.sqrt(squares / float32(size) + eps)
        first = row % num_inner * w_inner
        for i in range(size):
            h[i] = h[i] * scale * weight[first + i]
        if b:
            for i in range(size):
                h[i] += bias[i]
        _write(y, row * size, size, x_kind, h)


@_loop(8)
def rotate(begin, end, arguments):
    """Rotate the first `rotary` numbers of the heads of x in place; see rope.py."""
    x, x_token, x_head, kind, cos_sin, positions, num_heads, rotary = _integers(arguments, 8)
    angle, position, half = _f32_at(cos_sin), _i32_at(positions), rotary // 2
    h, turned = np.empty(rotary, np.float32), np.empty(rotary, np.float32)
    for token in range(begin, end):
        cos = intp(position[token]) * rotary
        sin = cos + half
        for head in range(num_heads):
            start = token * x_token + head * x_head
            _read(x, start, rotary, kind, h)
            for i in range(half):
                turned[i] = h[i] * angle[cos + i] - h[half + i] * angle[sin + i]
                turned[half + i] = h[half + i] * angle[cos + i] + h[i] * angle[sin + i]
            _write(x, start, rotary, kind, turned)


@_loop(8)
def write_kv(begin, end, arguments):
    """Copy rows of k and v, `width` elements of 2 bytes, to their slots in the cache; strides in such elements."""
    k, k_token, v, v_token, cache, value_offset, slots, width = _integers(arguments, 8)
    keys, values, into, slot = _u16_at(k), _u16_at(v), _u16_at(cache), _i64_at(slots)
    for token in range(begin, end):
        start = slot[token] * width
        for i in range(width):
            into[start + i] = keys[token * k_token + i]
        for i in range(width):
            into[value_offset + start + i] = values[token * v_token + i]


@_loop(5)
def silu_mul(begin, end, arguments):
    """y [.., size] = silu(gate) * up of x [.., 2 * size]"""
    x, x_stride, y, kind, size = _integers(arguments, 5)
    gate, up = np.empty(size, np.float32), np.empty(size, np.float32)
    for row in range(begin, end):
        _read(x, row * x_stride, size, kind, gate)
        _read(x, row * x_stride + size, size, kind, up)
        for i in range(size):
            gate[i] = gate[i] / (float32(1) + _exp(-gate[i])) * up[i]
        _write(y, row * size, size, kind, gate)


@njit(inline="always")
def _erf(x):
    """To 4e-7, by a quotient of polynomials; beyond 4 it is 1."""
    x = min(max(x, float32(-4)), float32(4))
    z = x * x
    p, q = float32(-2.72614225801306e-10), float32(-1.45660718464996e-05)
    for k in (2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05, -7.34990630326855e-04,
              -2.95459980854025e-03, -1.60960333262415e-02):  # fmt: skip
        p = p * z + float32(k)
    for k in (-2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03, -1.42647390514189e-02):
        q = q * z + float32(k)
    return x * p / q


@_loop(7, 2)
def activate(begin, end, arguments):
    """y [.., size] = activation of x, times the `size` numbers that follow where gated; see activation.py."""
    x, x_stride, y, dtype, size, kind, gated = _integers(arguments, 7)
    a, c = _floats(arguments + 56, 2)
    h, up = np.empty(size, np.float32), np.empty(size, np.float32)
    one, half = float32(1), float32(0.5)
    for row in range(begin, end):
        _read(x, row * x_stride, size, dtype, h)
        if gated:
            _read(x, row * x_stride + size, size, dtype, up)
        if kind == 0:
            for i in range(size):
                h[i] = h[i] / (one + _exp(-h[i]))
        elif kind == 1:
            for i in range(size):
                h[i] = half * h[i] * (one + _erf(h[i] * float32(0.7071067811865476)))
        elif kind == 2:
            for i in range(size):
                z = float32(1.5957691216057308) * (h[i] + float32(0.044715) * h[i] * h[i] * h[i])
                h[i] = h[i] / (one + _exp(-z))
        elif kind == 3:
            for i in range(size):
                h[i] = max(h[i], float32(0))
        elif kind == 4:
            for i in range(size):
                h[i] = max(h[i], float32(0)) * max(h[i], float32(0))
        elif kind == 5:
            for i in range(size):
                negative = c * (_exp(min(h[i], float32(-1e-6))) - one - h[i])
                h[i] = (a * h[i] * h[i] if h[i] > 0 else negative) + half * h[i]
        else:
            for i in range(size):
                gate = min(h[i], c)
                h[i] = gate / (one + _exp(-a * gate))
                up[i] = min(max(up[i], -c), c) + one
        if gated:
            for i in range(size):
                h[i] *= up[i]
        _write(y, row * size, size, dtype, h)


@_loop(17)
def convolve(begin, end, arguments):
    """Causal convolution of some channels of a sequence, a row of so many; see causal_conv.py."""
    (
        x, x_stride, kind, w, b, states, state_stride, y, query_start, seq_lens, table, table_stride, block_size,
        channels, width, silu, part_len,
    ) = _integers(arguments, 17)  # fmt: skip
    weight, bias, state = _f32_at(w), _f32_at(b), _f32_at(states)
    starts, lengths, block = _i32_at(query_start), _i32_at(seq_lens), _i32_at(table)
    last = np.empty((width, part_len), np.float32)  # the inputs that a token sees, its own last
    out = np.empty(part_len, np.float32)
    num_parts = (channels + part_len - 1) // part_len
    for item in range(begin, end):
        sequence, first = item // num_parts, item % num_parts * part_len
        size = min(part_len, channels - first)
        start, length = intp(starts[sequence]), intp(lengths[sequence])
        before = length - (intp(starts[sequence + 1]) - start)
        last[:, :] = 0
        if before > 0:
            row = intp(block[sequence * table_stride + (before - 1) // block_size]) * state_stride
            for j in range(width - 1):
                for i in range(size):
                    last[j + 1, i] = state[row + (first + i) * (width - 1) + j]
        for position in range(before, length):
            token = start + position - before
            for j in range(width - 1):
                for i in range(size):
                    last[j, i] = last[j + 1, i]
            _read(x, token * x_stride + first, size, kind, last[width - 1])
            for i in range(size):
                out[i] = bias[first + i] if b else float32(0)
            for j in range(width):
                for i in range(size):
                    out[i] += weight[(first + i) * width + j] * last[j, i]
            if silu:
                for i in range(size):
                    out[i] = out[i] / (float32(1) + _exp(-out[i]))
            _write(y, token * channels + first, size, kind, out)
            if (position + 1) % block_size == 0 or position + 1 == length:
                row = intp(block[sequence * table_stride + position // block_size]) * state_stride
                for j in range(width - 1):
                    for i in range(size):
                        state[row + (first + i) * (width - 1) + j] = last[j + 1, i]


@_loop(18)
def scan(begin, end, arguments):
    """Selective state space of a head of a sequence, which is a row; see state_scan.py."""
    (
        x, dt, a, b, c, d, states, state_stride, y, query_start, seq_lens, table, table_stride, block_size, num_heads,
        num_groups, head_dim, size,
    ) = _integers(arguments, 18)  # fmt: skip
    x_at, dt_at, a_at, b_at, c_at, d_at = _f32_at(x), _f32_at(dt), _f32_at(a), _f32_at(b), _f32_at(c), _f32_at(d)
    state, into = _f32_at(states), _f32_at(y)
    starts, lengths, block = _i32_at(query_start), _i32_at(seq_lens), _i32_at(table)
    h, decay = np.empty((head_dim, size), np.float32), np.empty(size, np.float32)
    taken, read = np.empty(size, np.float32), np.empty(size, np.float32)
    for item in range(begin, end):
        sequence, head = item // num_heads, item % num_heads
        start, length = intp(starts[sequence]), intp(lengths[sequence])
        before = length - (intp(starts[sequence + 1]) - start)
        group, offset = head // (num_heads // num_groups), head * head_dim * size
        h[:, :] = 0
        if before > 0:
            row = intp(block[sequence * table_stride + (before - 1) // block_size]) * state_stride + offset
            for p in range(head_dim):
                for n in range(size):
                    h[p, n] = state[row + p * size + n]
        for position in range(before, length):
            token = start + position - before
            step, first = dt_at[token * num_heads + head], (token * num_groups + group) * size
            for n in range(size):
                decay[n] = _exp(step * a_at[head * size + n])
                taken[n], read[n] = step * b_at[first + n], c_at[first + n]
            for p in range(head_dim):
                place = (token * num_heads + head) * head_dim + p
                value, total = x_at[place], float32(0)
                for n in range(size):
                    h[p, n] = decay[n] * h[p, n] + taken[n] * value
                    total += h[p, n] * read[n]
                into[place] = total + d_at[head] * value
            if (position + 1) % block_size == 0 or position + 1 == length:
                row = intp(block[sequence * table_stride + position // block_size]) * state_stride + offset
                for p in range(head_dim):
                    for n in range(size):
                        state[row + p * size + n] = h[p, n]


@_loop(17)
def correct(begin, end, arguments):
    """Gated delta rule of a head of a sequence, which is a row; see delta_scan.py."""
    (
        q, k, v, g, beta, states, state_stride, y, query_start, seq_lens, table, table_stride, block_size, num_heads,
        num_k_heads, head_dim, size,
    ) = _integers(arguments, 17)  # fmt: skip
    q_at, k_at, v_at, g_at, beta_at = _f32_at(q), _f32_at(k), _f32_at(v), _f32_at(g), _f32_at(beta)
    state, into = _f32_at(states), _f32_at(y)
    starts, lengths, block = _i32_at(query_start), _i32_at(seq_lens), _i32_at(table)
    h = np.empty((head_dim, size), np.float32)
    for item in range(begin, end):
        sequence, head = item // num_heads, item % num_heads
        start, length = intp(starts[sequence]), intp(lengths[sequence])
        before = length - (intp(starts[sequence + 1]) - start)
        k_head, offset = head // (num_heads // num_k_heads), head * head_dim * size
        h[:, :] = 0
        if before > 0:
            row = intp(block[sequence * table_stride + (before - 1) // block_size]) * state_stride + offset
            for p in range(head_dim):
                for n in range(size):
                    h[p, n] = state[row + p * size + n]
        for position in range(before, length):
            token = start + position - before
            first = (token * num_k_heads + k_head) * size
            decay, part = _exp(g_at[token * num_heads + head]), beta_at[token * num_heads + head]
            for p in range(head_dim):
                place = (token * num_heads + head) * head_dim + p
                found, total = float32(0), float32(0)
                for n in range(size):
                    h[p, n] *= decay
                    found += h[p, n] * k_at[first + n]
                error = part * (v_at[place] - found)
                for n in range(size):
                    h[p, n] += error * k_at[first + n]
                    total += h[p, n] * q_at[first + n]
                into[place] = total
            if (position + 1) % block_size == 0 or position + 1 == length:
                row = intp(block[sequence * table_stride + position // block_size]) * state_stride + offset
                for p in range(head_dim):
                    for n in range(size):
                        state[row + p * size + n] = h[p, n]


@_loop(18, 2)
def attend(begin, end, arguments):
    """Attention of sequences that bring one token each; see paged_attention.py.

    `slopes` and `sinks` are 0 or addresses of a number a head. `singles` [n, 3] i64 are (row of the block table, token,
    length), `max_keys` the most keys that one of them sees. A row is a sequence and a KV head, counted sequence by
    sequence.
    """
    (
        q, q_token, y, kind, cache, cache_kind, value_offset, table, table_stride, singles, max_keys,
        num_kv_heads, group, head_dim, block_size, window, slopes, sinks,
    ) = _integers(arguments, 18)  # fmt: skip
    scale, soft_cap = _floats(arguments + 144, 2)
    single, block, slope, sink = _i64_at(singles), _i32_at(table), _f32_at(slopes), _f32_at(sinks)
    query, mixed = np.empty((group, head_dim), np.float32), np.empty((group, head_dim), np.float32)
    row = np.empty(head_dim, np.float32)
    weights = np.empty((group, max_keys), np.float32)
    width = num_kv_heads * head_dim
    for item in range(begin, end):
        sequence, kv_head = item // num_kv_heads * 3, item % num_kv_heads
        blocks, token, length = single[sequence] * table_stride, single[sequence + 1], single[sequence + 2]
        first = max(length - window, 0) if window else 0
        out = (token * num_kv_heads + kv_head) * group * head_dim
        for g in range(group):
            _read(q, token * q_token + (kv_head * group + g) * head_dim, head_dim, kind, query[g])
            for i in range(head_dim):
                query[g, i] *= scale
                mixed[g, i] = 0
        for key in range(first, length):
            slot = intp(block[blocks + key // block_size]) * block_size + key % block_size
            _read(cache, slot * width + kv_head * head_dim, head_dim, cache_kind, row)
            for g in range(group):
                score = float32(0)
                for i in range(head_dim):
                    score += query[g, i] * row[i]
                weights[g, key - first] = score
        for g in range(group):
            head = kv_head * group + g
            if soft_cap > 0:
                for i in range(length - first):
                    weights[g, i] = soft_cap * np.tanh(weights[g, i] / soft_cap)
            if slopes:
                for i in range(length - first):
                    weights[g, i] += slope[head] * float32(first + i - length + 1)
            _softmax(weights[g], length - first, sink[head] if sinks else -np.inf)
        for key in range(first, length):
            slot = intp(block[blocks + key // block_size]) * block_size + key % block_size
            _read(cache, value_offset + slot * width + kv_head * head_dim, head_dim, cache_kind, row)
            for g in range(group):
                weight = weights[g, key - first]
                for i in range(head_dim):
                    mixed[g, i] += weight * row[i]
        for g in range(group):
            _write(y, out + g * head_dim, head_dim, kind, mixed[g])


@_loop(4)
def likeliest(begin, end, arguments):
    """Where each row of logits [.., vocab] f32 is largest, first among equals; -1 if any is NaN or that one is inf."""
    logits, stride, vocab, token_ids = _integers(arguments, 4)
    value, chosen = _f32_at(logits), _i32_at(token_ids)
    highest = np.empty(64, np.float32)  # of every 64th: the compiler does not change the order of one maximum
    for row in range(begin, end):
        start = row * stride
        for lane in range(64):
            highest[lane] = -np.inf
        num_nan = 0
        for first in range(start, start + vocab // 64 * 64, 64):
            for lane in range(64):
                x = value[first + lane]
                highest[lane] = x if x > highest[lane] else highest[lane]
                num_nan += x != x
        for i in range(start + vocab // 64 * 64, start + vocab):
            highest[0] = max(value[i], highest[0])
            num_nan += value[i] != value[i]
        top = highest.max()
        index = -1
        if num_nan == 0 and np.isfinite(top):
            index = 0
            while value[start + index] != top:
                index += 1
        chosen[row] = index


# ---------------------------------------------------------------------------------------------------------------------
# Products with matrices of small integers, as files hold them. torch has none of 8 bits with a scale every 32 numbers,
# and rounds the scales of its own of 4 bits.
#
# Activations become 16-bit integers with one scale a row, which is finer than bfloat16; integers are multiplied and
# added exactly within a group, in float32 between groups.

GROUP_LEN = 32
"""Numbers of a row of weights that share a scale."""
_LANES = GROUP_LEN // 2
_FINEST = 32767
_NO_FRACTION = 1.5 * 2**23
_SUMS = ir.VectorType(_FLOAT, _LANES)
_NARROW, _WIDE = ir.VectorType(ir.IntType(16), GROUP_LEN), ir.VectorType(ir.IntType(32), GROUP_LEN)
_INDEX = ir.IntType(32)


def _dot_of(bits: int, num_tokens: int):
    """Make dot(codes, scales, x, num_groups): sums over groups g of scale[g] * (code[g] · x[g]) for each token.

    Codes are a row of i8, or of 4 bits each two rows in one of bytes (the first in the low bits); scales f32, of one
    row after the other; x i16, one token after the other. All are given by address. The result is a tuple: for each
    row, each token.

    Written for LLVM, as Numba turns loops over bytes into code that goes one by one: a group becomes four instructions
    where there are vectors of 512 bits, and what fits elsewhere.
    """
    num_rows = 8 // bits
    kind = types.UniTuple(float32, num_rows * num_tokens)

    def generate(context, builder, signature, arguments):
        codes, scales, x, num_groups = arguments
        before = builder.block
        group_block, after = builder.append_basic_block("group"), builder.append_basic_block("after")
        builder.branch(group_block)
        builder.position_at_end(group_block)
        group = builder.phi(_INT)
        group.add_incoming(_INT(0), before)
        sums = [builder.phi(_SUMS) for _ in range(kind.count)]
        for total in sums:
            total.add_incoming(ir.Constant(_SUMS, [0.0] * _LANES), before)

        def load(base, element, number, row):
            """Group number `group` of a row of groups of `number` elements."""
            loaded_type = element if number == 1 else ir.VectorType(element, number)
            num_bytes = 4 if element is _FLOAT else element.width // 8
            index = builder.add(group, builder.mul(num_groups, _INT(row)))
            address = builder.add(base, builder.mul(index, _INT(number * num_bytes)))
            loaded = builder.load(builder.inttoptr(address, loaded_type.as_pointer()))
            loaded.align = num_bytes
            return loaded

        def pairs_added(products):
            """Products [32] of i32, neighbours added: an instruction of its own on most processors."""
            first, second = (
                ir.Constant(ir.VectorType(_INDEX, _LANES), [_INDEX(2 * lane + odd) for lane in range(_LANES)])
                for odd in (0, 1)
            )
            shuffle = builder.shuffle_vector
            return builder.add(shuffle(products, products, first), shuffle(products, products, second))

        def everywhere(number):
            one = builder.insert_element(ir.Constant(_SUMS, ir.Undefined), number, _INDEX(0))
            return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_INDEX, _LANES), [0] * _LANES))

        stored = load(codes, ir.IntType(8), GROUP_LEN, 0)
        if bits == 8:
            rows = [builder.sext(stored, _WIDE)]
        else:
            both = builder.zext(stored, _NARROW)
            low = builder.and_(both, ir.Constant(_NARROW, [15] * GROUP_LEN))
            high = builder.lshr(both, ir.Constant(_NARROW, [4] * GROUP_LEN))
            rows = [builder.zext(low, _WIDE), builder.zext(high, _WIDE)]
        tokens = [builder.sext(load(x, ir.IntType(16), GROUP_LEN, token), _WIDE) for token in range(num_tokens)]
        next_group = builder.add(group, _INT(1))
        new_sums = []
        for number, row in enumerate(rows):
            scale = everywhere(load(scales, _FLOAT, 1, number))
            for token in tokens:
                exact = builder.sitofp(pairs_added(builder.mul(row, token)), _SUMS)
                scaled = builder.fmul(exact, scale, flags=("contract",))
                new_sums.append(builder.fadd(scaled, sums[len(new_sums)], flags=("contract",)))
        for total, new in zip(sums, new_sums, strict=True):
            total.add_incoming(new, group_block)
        group.add_incoming(next_group, group_block)
        builder.cbranch(builder.icmp_signed("<", next_group, num_groups), group_block, after)
        builder.position_at_end(after)
        name = f"llvm.vector.reduce.fadd.v{_LANES}f32"
        module = builder.module
        add_up = module.globals.get(name) or ir.Function(module, ir.FunctionType(_FLOAT, [_FLOAT, _SUMS]), name)
        totals = [builder.call(add_up, [_FLOAT(0.0), new], fastmath=("reassoc",)) for new in new_sums]
        return context.make_tuple(builder, kind, totals)

    return intrinsic(lambda context, codes, scales, x, num_groups: (kind(intp, intp, intp, intp), generate))


_dot_8_1, _dot_4_1, _dot_4_4 = _dot_of(8, 1), _dot_of(4, 1), _dot_of(4, 4)


@njit(inline="always")
def _integers_of(x, x_stride, kind, num_rows, num_in):
    """Rows of x as integers [num_rows, num_in] times units, and per row that unit and then the sums of the groups.

    Rows that hold a number that is not finite get a unit that is NaN.
    """
    num_groups = num_in // GROUP_LEN
    fine = np.empty((num_rows, num_in), np.int16)
    numbers = np.empty(num_in + num_rows * (1 + num_groups), np.float32)
    row, sums = numbers[:num_in], numbers[num_in:].reshape(num_rows, 1 + num_groups)
    for token in range(num_rows):
        _read(x, token * x_stride, num_in, kind, row)
        largest_bits = uint32(0)  # of a number without its sign; the order of bits is that of numbers
        for i in range(num_in):
            largest_bits = max(largest_bits, _bits_of_f32(row[i]) & uint32(0x7FFFFFFF))
        largest = _f32_of_bits(largest_bits)
        is_finite = largest_bits < uint32(0x7F800000)
        sums[token, 0] = largest / float32(_FINEST) if is_finite else np.nan
        per_unit = float32(_FINEST) / largest if is_finite and largest > 0 else float32(0)
        for i in range(num_in):
            # The sum has no room for a fraction: its low bits are the nearest integer.
            fine[token, i] = np.int16(_bits_of_f32(row[i] * per_unit + float32(_NO_FRACTION)) & uint32(0xFFFF))
        for group in range(num_groups):
            total = np.int32(0)
            for i in range(group * GROUP_LEN, (group + 1) * GROUP_LEN):
                total += np.int32(fine[token, i])
            sums[token, 1 + group] = total
    return fine, sums


@_loop(10)
def multiply_int8(begin, end, arguments):
    """y [num_rows, num_out] = x [num_rows, num_in] Wᵀ for rows `begin` … `end` of W: i8 codes, and their scales.

    A row's result does not depend on the others. Numbers that are not finite give results that are not.
    """
    x, x_stride, num_rows, y, kind, codes, scales, scale_kind, num_in, num_out = _integers(arguments, 10)
    num_groups = num_in // GROUP_LEN
    fine, sums = _integers_of(x, x_stride, kind, num_rows, num_in)
    scale, result = np.empty(num_groups, np.float32), np.empty(1, np.float32)
    for row in range(begin, end):
        _read(scales, row * num_groups, num_groups, scale_kind, scale)
        for token in range(num_rows):
            integers = fine.ctypes.data + token * num_in * 2
            result[0] = sums[token, 0] * _dot_8_1(codes + row * num_in, scale.ctypes.data, integers, num_groups)[0]
            _write(y, token * num_out + row, 1, kind, result)


@_loop(10)
def multiply_int4(begin, end, arguments):
    """The same where W is `codes * scale + offset`; rows are pairs of rows of W, one in the low bits, one in the high.

    `scales` are [pairs, 2, 2, groups]: of each row of a pair its scales, then of each its offsets.
    """
    x, x_stride, num_rows, y, kind, codes, scales, scale_kind, num_in, num_out = _integers(arguments, 10)
    num_groups = num_in // GROUP_LEN
    fine, sums = _integers_of(x, x_stride, kind, num_rows, num_in)
    scale, results = np.empty(4 * num_groups, np.float32), np.empty((4, 2), np.float32)
    for pair in range(begin, end):
        _read(scales, pair * 4 * num_groups, 4 * num_groups, scale_kind, scale)
        token = 0
        while token < num_rows:
            integers = fine.ctypes.data + token * num_in * 2
            if token + 4 <= num_rows:
                together = 4
                dots = _dot_4_4(codes + pair * num_in, scale.ctypes.data, integers, num_groups)
                for i in range(4):
                    results[i, 0], results[i, 1] = dots[i], dots[4 + i]
            else:
                together = 1
                results[0, 0], results[0, 1] = _dot_4_1(codes + pair * num_in, scale.ctypes.data, integers, num_groups)
            for i in range(together):
                for row in range(2):
                    first, offset = (2 + row) * num_groups, float32(0)
                    for group in range(num_groups):
                        offset += scale[first + group] * sums[token + i, 1 + group]
                    results[i, row] = (results[i, row] + offset) * sums[token + i, 0]
                _write(y, (token + i) * num_out + 2 * pair, 2, kind, results[i])
            token += together
