"""Loops compiled by Numba for the processor at hand: the CPU forms of the kernels that every layer runs.

In plain torch each of them is five to ten operations. Between products that stream the weights through the caches an
operation costs 3 to 6 us, most of it in fetching its own code anew, so a decode of a small model waits for these.
PERF: SmolLM2-135M, a token of one sequence, in place, torch / here: add_rms_norm 28 / 13 us, rope 29 / 10, kv_write
17 / 9, silu_mul 17 / 10, paged_attention 86 / 33. The loops are 1 to 3 us of it (attention 17), the rest is launchers.

A loop takes the rows to compute, `begin` to `end`, then addresses, sizes and strides (in elements), and dtypes as
`KINDS` numbers them; its signature is declared, so a call looks at nothing. It computes in float32, each row alone: a
row's result is the same to the bit in any batch. Compiled code is kept on disk beside this file, or where Numba keeps
what it cannot keep there.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from llvmlite import ir
from numba import float32, intp, njit, types, uint16, uint32
from numba.extending import intrinsic

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_F32, _BF16 = 0, 1
_OPERATIONS_A_THREAD = 1 << 20
"""To wake a thread takes a good part of the time of this many multiplications."""


def run(loop, num_rows: int, operations: int, *arguments) -> None:
    """Call loop(begin, end, *arguments) for all rows, on several threads where `operations` a row make that pay."""
    num_parts = min(torch.get_num_threads(), num_rows, num_rows * operations // _OPERATIONS_A_THREAD)
    if num_parts <= 1:
        loop(0, num_rows, *arguments)
        return
    borders = [num_rows * part // num_parts for part in range(num_parts + 1)]
    others = [_threads().submit(loop, *part, *arguments) for part in pairwise(borders[1:])]
    loop(0, borders[1], *arguments)
    for other in others:
        other.result()


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(torch.get_num_threads() - 1, 1), thread_name_prefix="loops")


def _loop(num_integers: int, num_floats: int = 0):
    """Compile for that many integers (addresses, sizes, strides) and then float32 numbers."""
    signature = types.void(*[intp] * num_integers, *[float32] * num_floats)
    options = {"fastmath": {"reassoc", "contract", "arcp", "nsz"}, "error_model": "numpy", "nogil": True}

    def compiled(function):
        try:
            return njit(signature, cache=True, **options)(function)
        except RuntimeError:  # no folder can be written to: compile at every start
            return njit(signature, **options)(function)

    return compiled


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


@_loop(13, 2)
def normalise(
    begin, end, x, x_outer, x_inner, num_inner, x_kind, sums, sums_stride, sums_kind, w, y, size, eps, offset
):
    """y = RMS norm of the rows of x [.., num_inner, size]; of x + sums, which is kept, where `sums` is not 0."""
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


@_loop(15, 1)
def centre(
    begin, end, x, x_outer, x_inner, num_inner, x_kind, sums, sums_stride, sums_kind, w, w_inner, b, y, size, eps
):
    """y = layer norm of the rows of x [.., num_inner, size]; of x + sums, which is kept, where `sums` is not 0."""
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


@_loop(10)
def rotate(begin, end, x, x_token, x_head, kind, cos_sin, positions, num_heads, rotary):
    """Rotate the first `rotary` numbers of the heads of x in place; see rope.py."""
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


@_loop(10)
def write_kv(begin, end, k, k_token, v, v_token, cache, value_offset, slots, width):
    """Copy rows of k and v, `width` elements of 2 bytes, to their slots in the cache; strides in such elements."""
    keys, values, into, slot = _u16_at(k), _u16_at(v), _u16_at(cache), _i64_at(slots)
    for token in range(begin, end):
        start = slot[token] * width
        for i in range(width):
            into[start + i] = keys[token * k_token + i]
        for i in range(width):
            into[value_offset + start + i] = values[token * v_token + i]


@_loop(7)
def silu_mul(begin, end, x, x_stride, y, kind, size):
    """y [.., size] = silu(gate) * up of x [.., 2 * size]"""
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


@_loop(9, 2)
def activate(begin, end, x, x_stride, y, dtype, size, kind, gated, a, c):
    """y [.., size] = activation of x, times the `size` numbers that follow where gated; see activation.py."""
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


@_loop(20, 2)
def attend(
    begin, end, q, q_token, y, kind, cache, cache_kind, value_offset, table, table_stride, singles, max_keys,
    num_kv_heads, group, head_dim, block_size, window, slopes, sinks, scale, soft_cap,
):  # fmt: skip
    """Attention of sequences that bring one token each; see paged_attention.py.

    `slopes` and `sinks` are 0 or addresses of a number a head. `singles` [n, 3] i64 are (row of the block table, token, length), `max_keys` the most keys that one of them sees. A
    row is a sequence and a KV head, counted sequence by sequence.
    """
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


@_loop(6)
def likeliest(begin, end, logits, stride, vocab, token_ids):
    """Where each row of logits [.., vocab] f32 is largest, first among equals; -1 if any is NaN or that one is inf."""
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


GROUP_LEN = 32
"""Numbers of a row of weights that share a scale in `multiply_int8`."""
_LANES = GROUP_LEN // 2
_ROWS_TOGETHER = 64
_FINEST = 32767
_INT, _FLOAT = ir.IntType(64), ir.FloatType()
_SUMS = ir.VectorType(_FLOAT, _LANES)
_WIDE = ir.VectorType(ir.IntType(32), GROUP_LEN)


@intrinsic
def _dot(context, codes, scales, x, num_groups):
    """sum over groups g of scales[g] * (codes[g] · x[g]); codes i8, scales f32, x i16, given by address.

    Written for LLVM, as Numba turns loops over bytes into code that goes one by one: what stands here becomes four
    instructions a group where there are vectors of 512 bits, and what fits elsewhere.
    """

    def generate(_, builder, signature, arguments):
        codes, scales, x, num_groups = arguments
        before = builder.block
        group_block, after = builder.append_basic_block("group"), builder.append_basic_block("after")
        builder.branch(group_block)
        builder.position_at_end(group_block)
        group, sums = builder.phi(_INT), builder.phi(_SUMS)
        group.add_incoming(_INT(0), before)
        sums.add_incoming(ir.Constant(_SUMS, [0.0] * _LANES), before)

        def load(base, kind, num_bytes, align):
            address = builder.add(base, builder.mul(group, _INT(num_bytes)))
            loaded = builder.load(builder.inttoptr(address, kind.as_pointer()))
            loaded.align = align
            return loaded

        def every_second(vector, first):
            mask = [ir.IntType(32)(2 * lane + first) for lane in range(_LANES)]
            return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(ir.IntType(32), _LANES), mask))

        def widened(base, bits):
            narrow = load(base, ir.VectorType(ir.IntType(bits), GROUP_LEN), GROUP_LEN * bits // 8, bits // 8)
            return builder.sext(narrow, _WIDE)

        products = builder.mul(widened(codes, 8), widened(x, 16))
        exact = builder.add(every_second(products, 0), every_second(products, 1))
        scale = builder.insert_element(ir.Constant(_SUMS, ir.Undefined), load(scales, _FLOAT, 4, 4), ir.IntType(32)(0))
        scale = builder.shuffle_vector(scale, scale, ir.Constant(ir.VectorType(ir.IntType(32), _LANES), [0] * _LANES))
        scaled = builder.fmul(builder.sitofp(exact, _SUMS), scale, flags=("contract",))
        new_sums, next_group = builder.fadd(scaled, sums, flags=("contract",)), builder.add(group, _INT(1))
        group.add_incoming(next_group, group_block)
        sums.add_incoming(new_sums, group_block)
        builder.cbranch(builder.icmp_signed("<", next_group, num_groups), group_block, after)
        builder.position_at_end(after)
        name = f"llvm.vector.reduce.fadd.v{_LANES}f32"
        add_up = builder.module.globals.get(name) or ir.Function(
            builder.module, ir.FunctionType(_FLOAT, [_FLOAT, _SUMS]), name
        )
        return builder.call(add_up, [_FLOAT(0.0), new_sums], fastmath=("reassoc",))

    return float32(intp, intp, intp, intp), generate


@_loop(11)
def multiply_int8(begin, end, x, x_stride, kind, num_rows, codes, scales, y, num_in, num_out):
    """y [num_rows, num_out] = x [num_rows, num_in] Wᵀ for rows `begin` … `end` of W, whose codes are [num_out, num_in].

    A row's result does not depend on the others. Numbers that are not finite give results that are not.
    """
    num_groups = num_in // GROUP_LEN
    row, fine, units = np.empty(num_in, np.float32), np.empty((num_rows, num_in), np.int16), np.empty(num_rows)
    for token in range(num_rows):
        _read(x, token * x_stride, num_in, kind, row)
        largest, nothing = float32(0), float32(0)
        for i in range(num_in):
            largest = max(largest, abs(row[i]))
            nothing += row[i] * float32(0)  # NaN if a number is not finite
        units[token] = largest / float32(_FINEST) + nothing
        per_unit = float32(_FINEST) / largest if largest > 0 and nothing == 0 else float32(0)
        for i in range(num_in):
            fine[token, i] = np.int16(np.rint(row[i] * per_unit))
    results = np.empty(_ROWS_TOGETHER, np.float32)
    for first in range(begin, end, _ROWS_TOGETHER):
        together = min(end - first, _ROWS_TOGETHER)
        for token in range(num_rows):
            integers = fine.ctypes.data + token * num_in * 2
            for i in range(together):
                place = (first + i) * num_groups
                results[i] = units[token] * _dot(codes + place * GROUP_LEN, scales + place * 4, integers, num_groups)
            _write(y, token * num_out + first, together, kind, results)
