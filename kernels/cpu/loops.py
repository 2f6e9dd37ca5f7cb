"""Loops compiled by Numba for the processor at hand: the CPU forms of the kernels that every layer runs.

In plain torch each of them is five to ten operations. Between products that stream the weights through the caches an
operation costs 3 to 6 us, most of it in fetching its own code anew, so a decode of a small model waits for these.
PERF: SmolLM2-135M, a token of one sequence, in place, torch / here: add_rms_norm 28 / 13 us, rope 29 / 10, kv_write
17 / 9, silu_mul 17 / 10, paged_attention 86 / 33. The loops are 1 to 3 us of it (attention 17), the rest is launchers.
"""

import numpy as np
from numba import float32, intp, njit

from cableway.kernels.cpu.compiled import (
    KINDS,
    exp,
    f32_at,
    floats,
    i32_at,
    i64_at,
    integers,
    read,
    write,
)
from cableway.kernels.cpu.kept import NUM_INTEGERS, integers_of, read_head, write_token
from cableway.kernels.cpu.team import loop, run

__all__ = ["KINDS", "integers_of", "run"]


@njit(inline="always")
def _softmax(scores, size, sink):
    """In place, over the first `size` and a score `sink` that nothing is read for."""
    highest = max(scores[0], float32(sink))
    for i in range(size):
        highest = max(highest, scores[i])
    total = exp(float32(sink) - highest) if sink > -np.inf else float32(0)
    for i in range(size):
        scores[i] = exp(scores[i] - highest)
        total += scores[i]
    for i in range(size):
        scores[i] /= total


@njit(inline="always")
def _add(sums, start, size, kind, h, total):
    """sums += h, in place; h becomes what is kept of it. `total` is room for as much."""
    read(sums, start, size, kind, total)
    for i in range(size):
        total[i] += h[i]
    write(sums, start, size, kind, total)
    read(sums, start, size, kind, h)


@loop(11, 2)
def normalise(begin, end, arguments):
    """y = RMS norm of the rows of x [.., num_inner, size]; of x + sums, which is kept, where `sums` is not 0."""
    x, x_outer, x_inner, num_inner, x_kind, sums, sums_stride, sums_kind, w, y, size = integers(arguments, 11)
    eps, offset = floats(arguments + 88, 2)
    weight = f32_at(w)
    h, total = np.empty(size, np.float32), np.empty(size, np.float32)
    for row in range(begin, end):
        read(x, row // num_inner * x_outer + row % num_inner * x_inner, size, x_kind, h)
        if sums:
            _add(sums, row * sums_stride, size, sums_kind, h, total)
        squares = float32(0)
        for i in range(size):
            squares += h[i] * h[i]
        scale = float32(1) / np.sqrt(squares / float32(size) + eps)
        for i in range(size):
            h[i] = h[i] * scale * (weight[i] + offset)
        write(y, row * size, size, x_kind, h)


@loop(13, 1)
def centre(begin, end, arguments):
    """y = layer norm of the rows of x [.., num_inner, size]; of x + sums, which is kept, where `sums` is not 0."""
    x, x_outer, x_inner, num_inner, x_kind, sums, sums_stride, sums_kind, w, w_inner, b, y, size = integers(
        arguments, 13
    )
    (eps,) = floats(arguments + 104, 1)
    weight, bias = f32_at(w), f32_at(b)
    h, total = np.empty(size, np.float32), np.empty(size, np.float32)
    for row in range(begin, end):
        read(x, row // num_inner * x_outer + row % num_inner * x_inner, size, x_kind, h)
        if sums:
            _add(sums, row * sums_stride, size, sums_kind, h, total)
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
        write(y, row * size, size, x_kind, h)


@njit(inline="always")
def _rotate_heads(x, start, head_stride, num_heads, kind, cos_sin, position, rotary):
    """Rotate the first `rotary` numbers of a token's heads in place; see rope.py."""
    angle, half = f32_at(cos_sin), rotary // 2
    cos = position * rotary
    sin = cos + half
    h, turned = np.empty(rotary, np.float32), np.empty(rotary, np.float32)
    for head in range(num_heads):
        read(x, start + head * head_stride, rotary, kind, h)
        for i in range(half):
            turned[i] = h[i] * angle[cos + i] - h[half + i] * angle[sin + i]
            turned[half + i] = h[half + i] * angle[cos + i] + h[i] * angle[sin + i]
        write(x, start + head * head_stride, rotary, kind, turned)


@loop(8)
def rotate(begin, end, arguments):
    """Rotate the heads of x in place."""
    x, x_token, x_head, kind, cos_sin, positions, num_heads, rotary = integers(arguments, 8)
    position = i32_at(positions)
    for token in range(begin, end):
        _rotate_heads(x, token * x_token, x_head, num_heads, kind, cos_sin, intp(position[token]), rotary)


@loop(13, 2)
def write_kv(begin, end, arguments):
    """Keep rows of k and v in their slots of the cache."""
    k, k_token, v, v_token, kind, slots = integers(arguments, 6)
    cache = integers(arguments + 48, NUM_INTEGERS)
    key_factor, value_factor = floats(arguments + 104, 2)
    slot = i64_at(slots)
    for token in range(begin, end):
        write_token(k, token * k_token, kind, cache, 0, slot[token], key_factor)
        write_token(v, token * v_token, kind, cache, 1, slot[token], value_factor)


@loop(19, 2)
def rotate_and_write(begin, end, arguments):
    """Both, of q, k and v whose heads lie together."""
    q, q_token, k, k_token, v, v_token, kind, cos_sin, positions, slots, num_heads, rotary = integers(arguments, 12)
    cache = integers(arguments + 96, NUM_INTEGERS)
    key_factor, value_factor = floats(arguments + 152, 2)
    position, slot, num_kv_heads, head_dim = i32_at(positions), i64_at(slots), cache[3], cache[4]
    for token in range(begin, end):
        at = intp(position[token])
        _rotate_heads(q, token * q_token, head_dim, num_heads, kind, cos_sin, at, rotary)
        _rotate_heads(k, token * k_token, head_dim, num_kv_heads, kind, cos_sin, at, rotary)
        write_token(k, token * k_token, kind, cache, 0, slot[token], key_factor)
        write_token(v, token * v_token, kind, cache, 1, slot[token], value_factor)


@loop(5)
def silu_mul(begin, end, arguments):
    """y [.., size] = silu(gate) * up of x [.., 2 * size]"""
    x, x_stride, y, kind, size = integers(arguments, 5)
    gate, up = np.empty(size, np.float32), np.empty(size, np.float32)
    for row in range(begin, end):
        read(x, row * x_stride, size, kind, gate)
        read(x, row * x_stride + size, size, kind, up)
        for i in range(size):
            gate[i] = gate[i] / (float32(1) + exp(-gate[i])) * up[i]
        write(y, row * size, size, kind, gate)


@loop(10, 1)
def gate(begin, end, arguments):
    """y = x silu(z) of the rows of x [.., num_groups, size], with a norm after or before; see gated_norm.py."""
    x, z, z_stride, y, kind, w, num_weights, num_groups, size, gates_first = integers(arguments, 10)
    (eps,) = floats(arguments + 80, 1)
    weight, h, factor = f32_at(w), np.empty(size, np.float32), np.empty(size, np.float32)
    for row in range(begin, end):
        read(x, row * size, size, kind, h)
        read(z, row // num_groups * z_stride + row % num_groups * size, size, kind, factor)
        for i in range(size):
            factor[i] = factor[i] / (float32(1) + exp(-factor[i]))
        if gates_first or not num_weights:
            for i in range(size):
                h[i] *= factor[i]
        if num_weights:
            squares = float32(0)
            for i in range(size):
                squares += h[i] * h[i]
            scale, first = float32(1) / np.sqrt(squares / float32(size) + eps), row % num_weights * size
            for i in range(size):
                h[i] = h[i] * scale * weight[first + i]
            if not gates_first:
                for i in range(size):
                    h[i] *= factor[i]
        write(y, row * size, size, kind, h)


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


@loop(7, 2)
def activate(begin, end, arguments):
    """y [.., size] = activation of x, times the `size` numbers that follow where gated; see activation.py."""
    x, x_stride, y, dtype, size, kind, gated = integers(arguments, 7)
    a, c = floats(arguments + 56, 2)
    h, up = np.empty(size, np.float32), np.empty(size, np.float32)
    one, half = float32(1), float32(0.5)
    for row in range(begin, end):
        read(x, row * x_stride, size, dtype, h)
        if gated:
            read(x, row * x_stride + size, size, dtype, up)
        if kind == 0:
            for i in range(size):
                h[i] = h[i] / (one + exp(-h[i]))
        elif kind == 1:
            for i in range(size):
                h[i] = half * h[i] * (one + _erf(h[i] * float32(0.7071067811865476)))
        elif kind == 2:
            for i in range(size):
                z = float32(1.5957691216057308) * (h[i] + float32(0.044715) * h[i] * h[i] * h[i])
                h[i] = h[i] / (one + exp(-z))
        elif kind == 3:
            for i in range(size):
                h[i] = max(h[i], float32(0))
        elif kind == 4:
            for i in range(size):
                h[i] = max(h[i], float32(0)) * max(h[i], float32(0))
        elif kind == 5:
            for i in range(size):
                negative = c * (exp(min(h[i], float32(-1e-6))) - one - h[i])
                h[i] = (a * h[i] * h[i] if h[i] > 0 else negative) + half * h[i]
        else:
            for i in range(size):
                gate = min(h[i], c)
                h[i] = gate / (one + exp(-a * gate))
                up[i] = min(max(up[i], -c), c) + one
        if gated:
            for i in range(size):
                h[i] *= up[i]
        write(y, row * size, size, dtype, h)


@loop(20, 2)
def attend(begin, end, arguments):
    """Attention of sequences that bring one token each; see paged_attention.py.

    `slopes` and `sinks` are 0 or addresses of a number a head; with `reach` slopes are `reach` + 1 numbers a head, for
    the distances of keys. `singles` [n, 3] i64 are (row of the block table, token,
    length), `max_keys` the most keys that one of them sees. A row is a sequence and a KV head, counted sequence by
    sequence.
    """
    (
        q, q_token, y, kind, table, table_stride, singles, max_keys, group, window, slopes, reach, sinks,
    ) = integers(arguments, 13)  # fmt: skip
    cache = integers(arguments + 104, NUM_INTEGERS)
    scale, soft_cap = floats(arguments + 160, 2)
    num_kv_heads, head_dim, block_size = cache[3], cache[4], cache[5]
    single, block, slope, sink = i64_at(singles), i32_at(table), f32_at(slopes), f32_at(sinks)
    query, mixed = np.empty((group, head_dim), np.float32), np.empty((group, head_dim), np.float32)
    row = np.empty(head_dim, np.float32)
    weights = np.empty((group, max_keys), np.float32)
    for item in range(begin, end):
        sequence, kv_head = item // num_kv_heads * 3, item % num_kv_heads
        blocks, token, length = single[sequence] * table_stride, single[sequence + 1], single[sequence + 2]
        first = max(length - window, 0) if window else 0
        out = (token * num_kv_heads + kv_head) * group * head_dim
        for g in range(group):
            read(q, token * q_token + (kv_head * group + g) * head_dim, head_dim, kind, query[g])
            for i in range(head_dim):
                query[g, i] *= scale
                mixed[g, i] = 0
        for key in range(first, length):
            of_key = intp(block[blocks + key // block_size])
            key_scale = read_head(cache, 0, of_key, key % block_size, kv_head, row)
            for g in range(group):
                score = float32(0)
                for i in range(head_dim):
                    score += query[g, i] * row[i]
                weights[g, key - first] = score * key_scale
        for g in range(group):
            head = kv_head * group + g
            if soft_cap > 0:
                for i in range(length - first):
                    weights[g, i] = soft_cap * np.tanh(weights[g, i] / soft_cap)
            if reach:
                for i in range(length - first):
                    weights[g, i] += slope[head * (reach + 1) + min(length - 1 - first - i, reach)]
            elif slopes:
                for i in range(length - first):
                    weights[g, i] += slope[head] * float32(first + i - length + 1)
            _softmax(weights[g], length - first, sink[head] if sinks else -np.inf)
        for key in range(first, length):
            of_key = intp(block[blocks + key // block_size])
            value_scale = read_head(cache, 1, of_key, key % block_size, kv_head, row)
            for g in range(group):
                weight = weights[g, key - first] * value_scale
                for i in range(head_dim):
                    mixed[g, i] += weight * row[i]
        for g in range(group):
            write(y, out + g * head_dim, head_dim, kind, mixed[g])


@loop(4)
def likeliest(begin, end, arguments):
    """Where each row of logits [.., vocab] f32 is largest, first among equals; -1 if any is NaN or that one is inf."""
    logits, stride, vocab, token_ids = integers(arguments, 4)
    value, chosen = f32_at(logits), i32_at(token_ids)
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
