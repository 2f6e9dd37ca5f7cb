"""RWKV 4: a mean of all values so far, each weighed by its key and fading with distance, the newest by one of its own.

    y[t] = (n + exp(u + k) v) / (m + exp(u + k));   n = exp(w) n + exp(k) v;   m = exp(w) m + exp(k)

k, v    [num_tokens, channels]      f32, contiguous
w, u    [channels]                  f32, contiguous; w <= 0
states  [num_rows, 3 * channels]    bf16|f16|f32  rows may be strided: all of n exp(-p), of m exp(-p), and of p
plan    a RecurrentPlan: see recurrence.py
y       [num_tokens, channels]      f32, contiguous

p is the largest exponent so far: sums are kept in units of exp(p).
Bound: bytes; reads k and v, writes y.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cableway.kernels.lang import jit, scans, tl, triton
from cableway.kernels.recurrence import MIXED, RecurrentPlan, check_states, keep, make_plan, resumed, span
from cableway.kernels.registry import Call, are_contiguous, call, check, grid, kernel, nbytes

_CHANNELS = 64
_LEAST = -1e38
"""The exponent of nothing."""


def ref(k: Tensor, v: Tensor, w: Tensor, u: Tensor, states: Tensor, plan: RecurrentPlan) -> Tensor:
    y = torch.zeros_like(v)
    for sequence, (start, end, length) in enumerate(plan.spans()):
        before = length - (end - start)
        n, m, p = torch.zeros_like(w), torch.zeros_like(w), torch.full_like(w, _LEAST)
        if before > 0:
            n, m, p = states[plan.row(sequence, before - 1)].float().view(3, -1)
        for position in range(before, length):
            t = start + position - before
            top = torch.maximum(p, u + k[t])
            kept, taken = (p - top).exp(), (u + k[t] - top).exp()
            y[t] = (kept * n + taken * v[t]) / (kept * m + taken)
            top = torch.maximum(p + w, k[t])
            kept, taken = (p + w - top).exp(), (k[t] - top).exp()
            n, m, p = kept * n + taken * v[t], kept * m + taken, top
            if plan.keeps(position, length):
                states[plan.row(sequence, position)] = torch.cat((n, m, p))
    return y


@jit(do_not_specialize=("query_start_ptr", "seq_lens_ptr", "table_stride"))  # which vary between steps
def _wkv_scan(
    k_ptr, v_ptr, w_ptr, u_ptr, states_ptr, y_ptr, query_start_ptr, seq_lens_ptr, table_ptr, state_stride,
    table_stride, channels, block_size, least, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Some channels of one sequence, token after token."""
    sequence = tl.program_id(0).to(tl.int64)
    start, before, length = span(query_start_ptr, seq_lens_ptr, sequence)
    table_ptr += sequence * table_stride
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    w = tl.load(w_ptr + channel, mask=inside, other=0.0)
    u = tl.load(u_ptr + channel, mask=inside, other=0.0)
    if length > 0:
        n = resumed(states_ptr, table_ptr, channel, inside, before, state_stride, block_size)
        m = resumed(states_ptr, table_ptr, channel + channels, inside, before, state_stride, block_size)
        p = resumed(states_ptr, table_ptr, channel + 2 * channels, inside, before, state_stride, block_size)
        p = tl.where(before > 0, p, least)
        for position in range(before, length):
            place = (start + position - before) * channels + channel
            k = tl.load(k_ptr + place, mask=inside, other=0.0)
            v = tl.load(v_ptr + place, mask=inside, other=0.0)
            top = tl.maximum(p, u + k)
            kept, taken = tl.exp(p - top), tl.exp(u + k - top)
            tl.store(y_ptr + place, (kept * n + taken * v) / (kept * m + taken), mask=inside)
            top = tl.maximum(p + w, k)
            kept, taken = tl.exp(p + w - top), tl.exp(k - top)
            n, m, p = kept * n + taken * v, kept * m + taken, top
            keep(states_ptr, table_ptr, channel, inside, n, position + 1, length, state_stride, block_size)
            keep(states_ptr, table_ptr, channel + channels, inside, m, position + 1, length, state_stride, block_size)
            keep(
                states_ptr, table_ptr, channel + 2 * channels, inside, p, position + 1, length, state_stride, block_size
            )


def launch(k: Tensor, v: Tensor, w: Tensor, u: Tensor, states: Tensor, plan: RecurrentPlan) -> Tensor:
    y = torch.empty_like(v)
    _wkv_scan[(plan.num_seqs, triton.cdiv(v.shape[1], _CHANNELS))](
        k, v, w, u, states, y, plan.query_start, plan.seq_lens, plan.block_table, states.stride(0),
        plan.block_table.stride(0), v.shape[1], plan.block_size, _LEAST, CHANNELS=_CHANNELS, num_warps=2,
    )  # fmt: skip
    return y


def make(spans, channels: int, block_size: int = 8, kept_as=torch.float32, device: str = "cpu") -> Call:
    """`spans`: (new tokens, length) of each sequence."""
    plan, num_rows = make_plan(spans, block_size, device)
    k, v = torch.randn(2, sum(new for new, _ in spans), channels, device=device) * 3
    w, u = -torch.rand(channels, device=device), torch.randn(channels, device=device)
    states = torch.rand(num_rows, 3 * channels + 3, device=device).to(kept_as)[:, : 3 * channels]
    return call(k, v, w, u, states, plan)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=grid(spans=(MIXED,), channels=(100, 24), kept_as=(torch.float32, torch.bfloat16)),
    bench_cases=grid(spans=(((1, 100),) * 64, ((512, 512),)), channels=(4096,)),
    num_bytes=lambda c: 3 * nbytes(c.args[0]),
    updates=(4,),
    tolerances={torch.float32: 1e-4, torch.bfloat16: 1e-2},
)
def wkv_scan(k: Tensor, v: Tensor, w: Tensor, u: Tensor, states: Tensor, plan: RecurrentPlan) -> Tensor:
    """y [T, C], and the states that follow are left; ValueError when shapes or dtypes do not fit."""
    check(v.dim() == 2 and k.shape == v.shape and w.shape == u.shape == v.shape[1:], "k, v, w and u do not fit")
    check(all(x.dtype == torch.float32 for x in (k, v, w, u)), "an argument is not float32")
    check(are_contiguous(k, v, w, u), "an argument is strided")
    check_states(states, 3 * v.shape[1], plan)
    if not v.is_cpu:
        return launch(k, v, w, u, states, plan)
    (num_tokens, channels), y = v.shape, torch.empty_like(v)
    scans.run(
        scans.fade, plan.num_seqs * -(-channels // _CHANNELS), 8 * _CHANNELS * (num_tokens // plan.num_seqs + 1),
        *scans.places(states, plan), k.data_ptr(), v.data_ptr(), w.data_ptr(), u.data_ptr(), y.data_ptr(), channels,
        _CHANNELS,
    )  # fmt: skip
    return y
