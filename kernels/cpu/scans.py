"""Loops of the kernels that go through a sequence token by token, with a state: see loops.py and recurrence.py."""

import numpy as np
from numba import float32, intp

from cableway.kernels.cpu.compiled import KINDS, exp, f32_at, i32_at, integers, read, write
from cableway.kernels.cpu.team import loop, run

__all__ = ["KINDS", "run"]


@loop(17)
def convolve(begin, end, arguments):
    """Causal convolution of some channels of a sequence, a row of so many; see causal_conv.py."""
    (
        x, x_stride, kind, w, b, states, state_stride, y, query_start, seq_lens, table, table_stride, block_size,
        channels, width, silu, part_len,
    ) = integers(arguments, 17)  # fmt: skip
    weight, bias, state = f32_at(w), f32_at(b), f32_at(states)
    starts, lengths, block = i32_at(query_start), i32_at(seq_lens), i32_at(table)
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
            read(x, token * x_stride + first, size, kind, last[width - 1])
            for i in range(size):
                out[i] = bias[first + i] if b else float32(0)
            for j in range(width):
                for i in range(size):
                    out[i] += weight[(first + i) * width + j] * last[j, i]
            if silu:
                for i in range(size):
                    out[i] = out[i] / (float32(1) + exp(-out[i]))
            write(y, token * channels + first, size, kind, out)
            if (position + 1) % block_size == 0 or position + 1 == length:
                row = intp(block[sequence * table_stride + position // block_size]) * state_stride
                for j in range(width - 1):
                    for i in range(size):
                        state[row + (first + i) * (width - 1) + j] = last[j + 1, i]


@loop(18)
def scan(begin, end, arguments):
    """Selective state space of a head of a sequence, which is a row; see state_scan.py."""
    (
        x, dt, a, b, c, d, states, state_stride, y, query_start, seq_lens, table, table_stride, block_size, num_heads,
        num_groups, head_dim, size,
    ) = integers(arguments, 18)  # fmt: skip
    x_at, dt_at, a_at, b_at, c_at, d_at = f32_at(x), f32_at(dt), f32_at(a), f32_at(b), f32_at(c), f32_at(d)
    state, into = f32_at(states), f32_at(y)
    starts, lengths, block = i32_at(query_start), i32_at(seq_lens), i32_at(table)
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
                decay[n] = exp(step * a_at[head * size + n])
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


@loop(17)
def correct(begin, end, arguments):
    """Gated delta rule of a head of a sequence, which is a row; see delta_scan.py."""
    (
        q, k, v, g, beta, states, state_stride, y, query_start, seq_lens, table, table_stride, block_size, num_heads,
        num_k_heads, head_dim, size,
    ) = integers(arguments, 17)  # fmt: skip
    q_at, k_at, v_at, g_at, beta_at = f32_at(q), f32_at(k), f32_at(v), f32_at(g), f32_at(beta)
    state, into = f32_at(states), f32_at(y)
    starts, lengths, block = i32_at(query_start), i32_at(seq_lens), i32_at(table)
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
            decay, part = exp(g_at[token * num_heads + head]), beta_at[token * num_heads + head]
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


@loop(12)
def decay(begin, end, arguments):
    """Real-gated recurrence of some channels of a sequence, a row of so many; see lru_scan.py."""
    (
        g, x, states, state_stride, y, query_start, seq_lens, table, table_stride, block_size, channels, part_len,
    ) = integers(arguments, 12)  # fmt: skip
    g_at, x_at, state, into = f32_at(g), f32_at(x), f32_at(states), f32_at(y)
    starts, lengths, block = i32_at(query_start), i32_at(seq_lens), i32_at(table)
    h = np.empty(part_len, np.float32)
    num_parts = (channels + part_len - 1) // part_len
    for item in range(begin, end):
        sequence, first = item // num_parts, item % num_parts * part_len
        size = min(part_len, channels - first)
        start, length = intp(starts[sequence]), intp(lengths[sequence])
        before = length - (intp(starts[sequence + 1]) - start)
        h[:] = 0
        if before > 0:
            row = intp(block[sequence * table_stride + (before - 1) // block_size]) * state_stride
            for i in range(size):
                h[i] = state[row + first + i]
        for position in range(before, length):
            place = (start + position - before) * channels + first
            for i in range(size):
                a = exp(g_at[place + i])
                taken = np.sqrt(float32(1) - a * a) if position else float32(1)
                h[i] = a * h[i] + taken * x_at[place + i]
                into[place + i] = h[i]
            if (position + 1) % block_size == 0 or position + 1 == length:
                row = intp(block[sequence * table_stride + position // block_size]) * state_stride
                for i in range(size):
                    state[row + first + i] = h[i]
