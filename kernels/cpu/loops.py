"""Loops compiled by Numba for the processor at hand: the CPU forms of the kernels that every layer runs.

In plain torch each of them is five to ten operations. Between products that stream the weights through the caches an
operation costs 3 to 6 us, most of it in fetching its own code anew, so a decode of a small model waits for these.
PERF: SmolLM2-135M, a token of one sequence, in place, torch / here: add_rms_norm 28 / 13 us, rope 29 / 10, kv_write
17 / 9, silu_mul 17 / 10, paged_attention 86 / 33. The loops are 1 to 3 us of it (attention 17), the rest is launchers.
"""

import numpy as np
from numba import float32, intp, njit, uint32

from cableway.kernels.cpu.compiled import (
    KINDS,
    f32_at,
    f32_of_bits,
    floats,
    i32_at,
    i64_at,
    integers,
    read,
    u16_at,
    write,
)
from cableway.kernels.cpu.team import loop, run

__all__ = ["KINDS", "run"]


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
    return p * f32_of_bits(uint32(max(np.int32(n) + np.int32(127), np.int32(0))) << uint32(23))


@njit(inline="always")
def _softmax(scores, size, soft_cap):
    """In place, over the first `size`."""
    if soft_cap > 0:
        for i in range(size):
            scores[i] = soft_cap * np.tanh(scores[i] / soft_cap)
    highest = scores[0]
    for i in range(size):
        highest = max(highest, scores[i])
    total = float32(0)
    for i in range(size):
        scores[i] = _exp(scores[i] - highest)
        total += scores[i]
    for i in range(size):
        scores[i] /= total


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
            read(sums, row * sums_stride, size, sums_kind, total)
            for i in range(size):
                total[i] += h[i]
            write(sums, row * sums_stride, size, sums_kind, total)
            read(sums, row * sums_stride, size, sums_kind, h)
        squares = float32(0)
        for i in range(size):
            squares += h[i] * h[i]
        scale = float32(1) / np.sqrt(squares / float32(size) + eps)
        for i in range(size):
            h[i] = h[i] * scale * (weight[i] + offset)
        write(y, row * size, size, x_kind, h)


@loop(8)
def rotate(begin, end, arguments):
    """Rotate the first `rotary` numbers of the heads of x in place; see rope.py."""
    x, x_token, x_head, kind, cos_sin, positions, num_heads, rotary = integers(arguments, 8)
    angle, position, half = f32_at(cos_sin), i32_at(positions), rotary // 2
    h, turned = np.empty(rotary, np.float32), np.empty(rotary, np.float32)
    for token in range(begin, end):
        cos = intp(position[token]) * rotary
        sin = cos + half
        for head in range(num_heads):
            start = token * x_token + head * x_head
            read(x, start, rotary, kind, h)
            for i in range(half):
                turned[i] = h[i] * angle[cos + i] - h[half + i] * angle[sin + i]
                turned[half + i] = h[half + i] * angle[cos + i] + h[i] * angle[sin + i]
            write(x, start, rotary, kind, turned)


@loop(8)
def write_kv(begin, end, arguments):
    """Copy rows of k and v, `width` elements of 2 bytes, to their slots in the cache; strides in such elements."""
    k, k_token, v, v_token, cache, value_offset, slots, width = integers(arguments, 8)
    keys, values, into, slot = u16_at(k), u16_at(v), u16_at(cache), i64_at(slots)
    for token in range(begin, end):
        start = slot[token] * width
        for i in range(width):
            into[start + i] = keys[token * k_token + i]
        for i in range(width):
            into[value_offset + start + i] = values[token * v_token + i]


@loop(5)
def silu_mul(begin, end, arguments):
    """y [.., size] = silu(gate) * up of x [.., 2 * size]"""
    x, x_stride, y, kind, size = integers(arguments, 5)
    gate, up = np.empty(size, np.float32), np.empty(size, np.float32)
    for row in range(begin, end):
        read(x, row * x_stride, size, kind, gate)
        read(x, row * x_stride + size, size, kind, up)
        for i in range(size):
            gate[i] = gate[i] / (float32(1) + _exp(-gate[i])) * up[i]
        write(y, row * size, size, kind, gate)


@loop(16, 2)
def attend(begin, end, arguments):
    """Attention of sequences that bring one token each; see paged_attention.py.

    `singles` [n, 3] i64 are (row of the block table, token, length), `max_keys` the most keys that one of them sees. A
    row is a sequence and a KV head, counted sequence by sequence.
    """
    (
        q, q_token, y, kind, cache, cache_kind, value_offset, table, table_stride, singles, max_keys,
        num_kv_heads, group, head_dim, block_size, window,
    ) = integers(arguments, 16)  # fmt: skip
    scale, soft_cap = floats(arguments + 128, 2)
    single, block = i64_at(singles), i32_at(table)
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
            read(q, token * q_token + (kv_head * group + g) * head_dim, head_dim, kind, query[g])
            for i in range(head_dim):
                query[g, i] *= scale
                mixed[g, i] = 0
        for key in range(first, length):
            slot = intp(block[blocks + key // block_size]) * block_size + key % block_size
            read(cache, slot * width + kv_head * head_dim, head_dim, cache_kind, row)
            for g in range(group):
                score = float32(0)
                for i in range(head_dim):
                    score += query[g, i] * row[i]
                weights[g, key - first] = score
        for g in range(group):
            _softmax(weights[g], length - first, soft_cap)
        for key in range(first, length):
            slot = intp(block[blocks + key // block_size]) * block_size + key % block_size
            read(cache, value_offset + slot * width + kv_head * head_dim, head_dim, cache_kind, row)
            for g in range(group):
                weight = weights[g, key - first]
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
