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
    u16_at,
    write,
)
from cableway.kernels.cpu.team import loop, run

__all__ = ["KINDS", "run"]


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
        scores[i] = exp(scores[i] - highest)
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


@njit(inline="always")
def _copy(source, start, target, to, size):
    """So many elements of 2 bytes from one address to another; places in such elements."""
    elements, into = u16_at(source), u16_at(target)
    for i in range(size):
        into[to + i] = elements[start + i]


@loop(8)
def rotate(begin, end, arguments):
    """Rotate the heads of x in place."""
    x, x_token, x_head, kind, cos_sin, positions, num_heads, rotary = integers(arguments, 8)
    position = i32_at(positions)
    for token in range(begin, end):
        _rotate_heads(x, token * x_token, x_head, num_heads, kind, cos_sin, intp(position[token]), rotary)


@loop(8)
def write_kv(begin, end, arguments):
    """Copy rows of k and v, `width` elements of 2 bytes, to their slots in the cache; strides in such elements."""
    k, k_token, v, v_token, cache, value_offset, slots, width = integers(arguments, 8)
    slot = i64_at(slots)
    for token in range(begin, end):
        to = slot[token] * width
        _copy(k, token * k_token, cache, to, width)
        _copy(v, token * v_token, cache, value_offset + to, width)


@loop(17)
def rotate_and_write(begin, end, arguments):
    """Both, of q, k and v whose heads lie together. `halves`: elements of 2 bytes in one of theirs."""
    (
        q, q_token, k, k_token, v, v_token, kind, halves, cos_sin, positions, cache, value_offset, slots, num_heads,
        num_kv_heads, head_dim, rotary,
    ) = integers(arguments, 17)  # fmt: skip
    position, slot, width = i32_at(positions), i64_at(slots), num_kv_heads * head_dim * halves
    for token in range(begin, end):
        at, to = intp(position[token]), slot[token] * width
        _rotate_heads(q, token * q_token, head_dim, num_heads, kind, cos_sin, at, rotary)
        _rotate_heads(k, token * k_token, head_dim, num_kv_heads, kind, cos_sin, at, rotary)
        _copy(k, token * k_token * halves, cache, to, width)
        _copy(v, token * v_token * halves, cache, value_offset * halves + to, width)


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
