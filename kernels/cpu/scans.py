"""Loops of the kernels that go through a sequence token by token, with a state: see loops.py and recurrence.py.

The first arguments of each are where a plan and its states lie, as `places` gives them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numba import float32, intp, njit
from torch import Tensor

from cableway.kernels.cpu.compiled import KINDS, exp, f32_at, i32_at, integers, read, write
from cableway.kernels.cpu.team import loop, run

if TYPE_CHECKING:
    from cableway.kernels.recurrence import RecurrentPlan

__all__ = ["KINDS", "places", "run"]


def places(states: Tensor, plan: RecurrentPlan) -> tuple[int, ...]:
    """Which tokens each sequence has, and where its states are."""
    starts, lengths, table = plan.query_start, plan.seq_lens, plan.block_table
    return (
        states.data_ptr(), states.stride(0), starts.data_ptr(), lengths.data_ptr(), table.data_ptr(), table.stride(0),
        plan.block_size, KINDS[states.dtype],
    )  # fmt: skip


@njit(inline="always")
def _span(plan, sequence):
    """First token of a sequence, how many were computed before it, and the sequence's length."""
    starts, length = i32_at(plan[2]), intp(i32_at(plan[3])[sequence])
    start = intp(starts[sequence])
    return start, length - (intp(starts[sequence + 1]) - start), length


@njit(inline="always")
def _row(plan, sequence, position):
    """Where the state after the token at `position` begins."""
    return intp(i32_at(plan[4])[sequence * plan[5] + position // plan[6]]) * plan[1]


@njit(inline="always")
def _is_kept(plan, position, length):
    """Whether the state after the token at `position` is kept."""
    return (position + 1) % plan[6] == 0 or position + 1 == length


@njit(inline="always")
def _resume(plan, sequence, before, offset, h):
    """h [p, n] = the numbers from `offset` on of the state that a sequence goes on from."""
    h[:, :] = 0
    if before > 0:
        row = _row(plan, sequence, before - 1) + offset
        for p in range(h.shape[0]):
            read(plan[0], row + p * h.shape[1], h.shape[1], plan[7], h[p])


@njit(inline="always")
def _keep(plan, sequence, position, offset, h):
    """Those numbers of the state after the token at `position` = h [p, n]."""
    row = _row(plan, sequence, position) + offset
    for p in range(h.shape[0]):
        write(plan[0], row + p * h.shape[1], h.shape[1], plan[7], h[p])


@loop(18)
def convolve(begin, end, arguments):
    """Causal convolution of some channels of a sequence, a row of so many; see causal_conv.py."""
    plan = integers(arguments, 8)
    x, x_stride, kind, w, b, y, channels, width, silu, part_len = integers(arguments + 64, 10)
    weight, bias = f32_at(w), f32_at(b)
    last = np.empty((width, part_len), np.float32)  # the inputs that a token sees, its own last
    out = np.empty(part_len, np.float32)
    num_parts = (channels + part_len - 1) // part_len
    for item in range(begin, end):
        sequence, first = item // num_parts, item % num_parts * part_len
        size = min(part_len, channels - first)
        start, before, length = _span(plan, sequence)
        for j in range(1, width):
            _resume(plan, sequence, before, (j - 1) * channels + first, last[j : j + 1, :size])
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
                    out[i] += weight[j * channels + first + i] * last[j, i]
            if silu:
                for i in range(size):
                    out[i] = out[i] / (float32(1) + exp(-out[i]))
            write(y, token * channels + first, size, kind, out)
            if _is_kept(plan, position, length):
                for j in range(1, width):
                    _keep(plan, sequence, position, (j - 1) * channels + first, last[j : j + 1, :size])


@loop(20)
def scan(begin, end, arguments):
    """Selective state space of a head of a sequence, which is a row; see state_scan.py."""
    plan = integers(arguments, 8)
    x, dt, a, num_decays, b, c, d, y, num_heads, num_groups, head_dim, size = integers(arguments + 64, 12)
    x_at, dt_at, a_at, b_at, c_at, d_at = f32_at(x), f32_at(dt), f32_at(a), f32_at(b), f32_at(c), f32_at(d)
    into, h = f32_at(y), np.empty((head_dim, size), np.float32)
    decay, taken, seen = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
    for item in range(begin, end):
        sequence, head = item // num_heads, item % num_heads
        group, offset = head // (num_heads // num_groups), head * head_dim * size
        start, before, length = _span(plan, sequence)
        _resume(plan, sequence, before, offset, h)
        for position in range(before, length):
            token = start + position - before
            step, first = dt_at[token * num_heads + head], (token * num_groups + group) * size
            for n in range(num_decays):
                decay[n] = exp(step * a_at[head * num_decays + n])
            for n in range(num_decays, size):
                decay[n] = decay[0]
            for n in range(size):
                taken[n], seen[n] = step * b_at[first + n], c_at[first + n]
            for p in range(head_dim):
                place = (token * num_heads + head) * head_dim + p
                value, total = x_at[place], float32(0)
                for n in range(size):
                    h[p, n] = decay[n] * h[p, n] + taken[n] * value
                    total += h[p, n] * seen[n]
                into[place] = total + d_at[head] * value
            if _is_kept(plan, position, length):
                _keep(plan, sequence, position, offset, h)


@loop(19)
def correct(begin, end, arguments):
    """Gated delta rule of a head of a sequence, which is a row; see delta_scan.py."""
    plan = integers(arguments, 8)
    q, k, v, g, beta, y, num_heads, num_k_heads, head_dim, size, by_key = integers(arguments + 64, 11)
    q_at, k_at, v_at, g_at, beta_at = f32_at(q), f32_at(k), f32_at(v), f32_at(g), f32_at(beta)
    into, h, decay = f32_at(y), np.empty((head_dim, size), np.float32), np.empty(size, np.float32)
    for item in range(begin, end):
        sequence, head = item // num_heads, item % num_heads
        k_head, offset = head // (num_heads // num_k_heads), head * head_dim * size
        start, before, length = _span(plan, sequence)
        _resume(plan, sequence, before, offset, h)
        for position in range(before, length):
            token = start + position - before
            first = (token * num_k_heads + k_head) * size
            of_head = token * num_heads + head
            part = beta_at[of_head]
            for n in range(size):
                decay[n] = exp(g_at[of_head * size + n if by_key else of_head])
            for p in range(head_dim):
                place = of_head * head_dim + p
                found, total = float32(0), float32(0)
                for n in range(size):
                    h[p, n] *= decay[n]
                    found += h[p, n] * k_at[first + n]
                error = part * (v_at[place] - found)
                for n in range(size):
                    h[p, n] += error * k_at[first + n]
                    total += h[p, n] * q_at[first + n]
                into[place] = total
            if _is_kept(plan, position, length):
                _keep(plan, sequence, position, offset, h)


@loop(13)
def decay(begin, end, arguments):
    """Real-gated recurrence of some channels of a sequence, a row of so many; see lru_scan.py."""
    plan, (g, x, y, channels, part_len) = integers(arguments, 8), integers(arguments + 64, 5)
    g_at, x_at, into = f32_at(g), f32_at(x), f32_at(y)
    states = np.empty((1, part_len), np.float32)
    num_parts = (channels + part_len - 1) // part_len
    for item in range(begin, end):
        sequence, first = item // num_parts, item % num_parts * part_len
        h = states[:, : min(part_len, channels - first)]
        start, before, length = _span(plan, sequence)
        _resume(plan, sequence, before, first, h)
        for position in range(before, length):
            place = (start + position - before) * channels + first
            for i in range(h.shape[1]):
                a = exp(g_at[place + i])
                taken = np.sqrt(float32(1) - a * a) if position else float32(1)
                h[0, i] = a * h[0, i] + taken * x_at[place + i]
                into[place + i] = h[0, i]
            if _is_kept(plan, position, length):
                _keep(plan, sequence, position, first, h)


@loop(15)
def fade(begin, end, arguments):
    """Fading means of some channels of a sequence, a row of so many; see wkv_scan.py."""
    plan, (k, v, w, u, y, channels, part_len) = integers(arguments, 8), integers(arguments + 64, 7)
    k_at, v_at, w_at, u_at, into = f32_at(k), f32_at(v), f32_at(w), f32_at(u), f32_at(y)
    states = np.empty((3, 1, part_len), np.float32)
    num_parts = (channels + part_len - 1) // part_len
    for item in range(begin, end):
        sequence, first = item // num_parts, item % num_parts * part_len
        h = states[:, :, : min(part_len, channels - first)]
        start, before, length = _span(plan, sequence)
        for plane in range(3):
            _resume(plan, sequence, before, plane * channels + first, h[plane])
        if before <= 0:
            h[2] = -1e38
        for position in range(before, length):
            place = (start + position - before) * channels + first
            for i in range(h.shape[2]):
                n, m, p, key, value = h[0, 0, i], h[1, 0, i], h[2, 0, i], k_at[place + i], v_at[place + i]
                now, later = u_at[first + i] + key, p + w_at[first + i]
                top = max(p, now)
                kept, taken = exp(p - top), exp(now - top)
                into[place + i] = (kept * n + taken * value) / (kept * m + taken)
                top = max(later, key)
                kept, taken = exp(later - top), exp(key - top)
                h[0, 0, i], h[1, 0, i], h[2, 0, i] = kept * n + taken * value, kept * m + taken, top
            if _is_kept(plan, position, length):
                for plane in range(3):
                    _keep(plan, sequence, position, plane * channels + first, h[plane])
