"""Real-gated linear recurrent unit: each channel decays, and takes in its token so far as it has decayed.

    a = exp(g);   h = a h + sqrt(1 - a²) x;   y = h;   of a sequence's first token h = x

g, x    [num_tokens, channels]      f32, contiguous; g <= 0
states  [num_rows, channels]        bf16|f16|f32  rows may be strided
plan    a RecurrentPlan: see recurrence.py
y       [num_tokens, channels]      f32, contiguous

Bound: bytes; reads g and x, writes y.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cableway.kernels.lang import jit, scans, tl, triton
from cableway.kernels.recurrence import LONG, MIXED, RecurrentPlan, check_states, keep, make_plan, resumed, span
from cableway.kernels.registry import Call, are_contiguous, call, check, grid, kernel, nbytes

_CHANNELS = 64
_TOKENS = 16


def ref(g: Tensor, x: Tensor, states: Tensor, plan: RecurrentPlan) -> Tensor:
    y = torch.zeros_like(x)
    for sequence, (start, end, length) in enumerate(plan.spans()):
        before = length - (end - start)
        h = states[plan.row(sequence, before - 1)].float() if before > 0 else torch.zeros_like(x[0])
        for position in range(before, length):
            t = start + position - before
            h = g[t].exp() * h + (1 - (2 * g[t]).exp()).sqrt() * x[t] if position else x[t]
            y[t] = h
            if plan.keeps(position, length):
                states[plan.row(sequence, position)] = h
    return y


@jit(do_not_specialize=("query_start_ptr", "seq_lens_ptr", "table_stride"))  # which vary between steps
def _lru_scan(
    g_ptr, x_ptr, states_ptr, y_ptr, query_start_ptr, seq_lens_ptr, table_ptr, state_stride, table_stride, channels,
    block_size, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Some channels of one sequence; TOKENS are loaded before the first of them is taken in."""
    sequence = tl.program_id(0).to(tl.int64)
    start, before, length = span(query_start_ptr, seq_lens_ptr, sequence)
    table_ptr += sequence * table_stride
    channel, row = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, TOKENS)
    inside = channel < channels
    h = resumed(states_ptr, table_ptr, channel, inside, before, state_stride, block_size)
    for chunk in range(before // TOKENS, tl.cdiv(length, TOKENS)):
        first = start + chunk * TOKENS - before
        y = tl.zeros((TOKENS, CHANNELS), tl.float32)
        for i in tl.static_range(TOKENS):
            position = chunk * TOKENS + i
            is_new = (position >= before) & (position < length)
            place, here = (first + i) * channels + channel, channel < tl.where(is_new, channels, 0)
            a = tl.exp(tl.load(g_ptr + place, mask=here, other=0.0))
            x = tl.load(x_ptr + place, mask=here, other=0.0)
            h = a * h + tl.where(position > 0, tl.sqrt(1 - a * a), 1.0) * x
            y = tl.where((row == i)[:, None], h[None, :], y)
        position = chunk * TOKENS + row
        is_new = (position >= before) & (position < length)
        out_place = (first + row)[:, None] * channels + channel[None, :]
        tl.store(y_ptr + out_place, y, mask=is_new[:, None] & inside[None, :])
        num_done = tl.minimum((chunk + 1) * TOKENS, length)
        keep(states_ptr, table_ptr, channel, inside, h, num_done, length, state_stride, block_size)


def launch(g: Tensor, x: Tensor, states: Tensor, plan: RecurrentPlan) -> Tensor:
    y = torch.empty_like(x)
    _lru_scan[(plan.num_seqs, triton.cdiv(x.shape[1], _CHANNELS))](
        g, x, states, y, plan.query_start, plan.seq_lens, plan.block_table, states.stride(0),
        plan.block_table.stride(0), x.shape[1], plan.block_size,
        TOKENS=plan.chunk_len(_TOKENS) if plan.max_query_len > 1 else 1, CHANNELS=_CHANNELS, num_warps=2,
    )  # fmt: skip
    return y


def make(spans, channels: int, block_size: int = 8, kept_as=torch.float32, device: str = "cpu") -> Call:
    """`spans`: (new tokens, length) of each sequence."""
    plan, num_rows = make_plan(spans, block_size, device)
    num_tokens = sum(new for new, _ in spans)
    g = -torch.rand(num_tokens, channels, device=device)
    states = torch.randn(num_rows, channels + 3, device=device).to(kept_as)[:, :channels]
    return call(g, torch.randn(num_tokens, channels, device=device), states, plan)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=[
        *grid(spans=(MIXED, LONG), channels=(100, 24), block_size=(8, 64)),
        *grid(spans=(MIXED,), channels=(24,), kept_as=(torch.bfloat16,)),
    ],
    bench_cases=grid(spans=(((1, 100),) * 64, ((512, 512),)), channels=(2560,)),
    num_bytes=lambda c: 3 * nbytes(c.args[0]),
    updates=(2,),
)
def lru_scan(g: Tensor, x: Tensor, states: Tensor, plan: RecurrentPlan) -> Tensor:
    """y [T, C], and the states that follow are left; ValueError when shapes or dtypes do not fit."""
    check(x.dim() == 2 and g.shape == x.shape, "g and x do not fit")
    check(g.dtype == x.dtype == torch.float32 and are_contiguous(g, x), "g or x is strided, or not float32")
    check_states(states, x.shape[1], plan)
    if not x.is_cpu:
        return launch(g, x, states, plan)
    (num_tokens, channels), y = x.shape, torch.empty_like(x)
    scans.run(
        scans.decay, plan.num_seqs * -(-channels // _CHANNELS), 2 * _CHANNELS * (num_tokens // plan.num_seqs + 1),
        *scans.places(states, plan), g.data_ptr(), x.data_ptr(), y.data_ptr(), channels, _CHANNELS,
    )  # fmt: skip
    return y
