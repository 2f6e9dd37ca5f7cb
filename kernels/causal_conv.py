"""Causal convolution over the tokens of each sequence, channel by channel, with the inputs before them as state.

    y[t, c] = act(b[c] + sum over j of w[c, j] x[t - width + 1 + j, c]),   act = identity or silu

x       [num_tokens, channels]                   bf16|f16|f32  rows may be strided
w       [channels, width]                        f32, contiguous
b       [channels] f32 or None
states  [num_rows, channels * (width - 1)]       f32  rows may be strided; a channel's last inputs, oldest first
plan    a RecurrentPlan: see recurrence.py
y       [num_tokens, channels]                   dtype of x, contiguous

Bound: bytes; reads x, writes y.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cableway.kernels.lang import jit, scans, tl, triton
from cableway.kernels.recurrence import MIXED, RecurrentPlan, check_states, make_plan
from cableway.kernels.registry import FLOATS, Call, call, check, grid, kernel, nbytes

_CHANNELS = 64


def ref(x: Tensor, w: Tensor, b: Tensor | None, states: Tensor, plan: RecurrentPlan, *, silu: bool) -> Tensor:
    channels, width = w.shape
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for sequence, (start, end, length) in enumerate(plan.spans()):
        before = length - (end - start)
        last = torch.zeros(channels, width - 1, device=x.device)
        if before > 0:
            last = states[plan.row(sequence, before - 1)].view(channels, width - 1).clone()
        for position in range(before, length):
            seen = torch.cat((last, x[start + position - before].float()[:, None]), 1)
            y[start + position - before] = (seen * w).sum(1) + (0 if b is None else b)
            last = seen[:, 1:]
            if plan.keeps(position, length):
                states[plan.row(sequence, position)] = last.flatten()
    return (y * torch.sigmoid(y) if silu else y).to(x.dtype)


@jit(do_not_specialize=("query_start_ptr", "seq_lens_ptr", "table_stride"))  # which vary between steps
def _causal_conv(
    x_ptr, w_ptr, b_ptr, states_ptr, y_ptr, query_start_ptr, seq_lens_ptr, table_ptr, x_stride, state_stride,
    table_stride, channels, block_size,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, BLOCK_WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Some channels of one sequence, token after token."""
    sequence = tl.program_id(0).to(tl.int64)
    start = tl.load(query_start_ptr + sequence).to(tl.int64)
    num_new = tl.load(query_start_ptr + sequence + 1).to(tl.int32) - start.to(tl.int32)
    length = tl.load(seq_lens_ptr + sequence)
    table_ptr += sequence * table_stride
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    tap = tl.arange(0, BLOCK_WIDTH)  # of the inputs before a token; the last is the one right before it
    kept = inside[:, None] & (tap < WIDTH - 1)[None, :]
    place = channel[:, None] * (WIDTH - 1) + tap[None, :]
    before = length - num_new
    row = tl.load(table_ptr + tl.maximum(before - 1, 0) // block_size).to(tl.int64)
    last = tl.where(before > 0, tl.load(states_ptr + row * state_stride + place, mask=kept, other=0.0), 0.0)
    taps = tl.load(w_ptr + channel[:, None] * WIDTH + tap[None, :], mask=kept, other=0.0)
    newest = tl.load(w_ptr + channel * WIDTH + WIDTH - 1, mask=inside, other=0.0)
    bias = tl.zeros((CHANNELS,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(b_ptr + channel, mask=inside, other=0.0)
    if length > 0:
        for token in range(num_new):
            x = tl.load(x_ptr + (start + token) * x_stride + channel, mask=inside, other=0.0).to(tl.float32)
            y = bias + tl.sum(last * taps, 1) + newest * x
            if SILU:
                y = y * tl.sigmoid(y)
            tl.store(y_ptr + (start + token) * channels + channel, y.to(y_ptr.dtype.element_ty), mask=inside)
            # Inputs move by one, and x is the newest: a column is the sum over those that are its right neighbour.
            moves = (tap[None, :] == tap[:, None] + 1)[None, :, :]
            moved = tl.sum(tl.where(moves, last[:, None, :], 0.0), 2)
            last = tl.where((tap == WIDTH - 2)[None, :], x[:, None], moved)
            position = before + token
            if ((position + 1) % block_size == 0) | (position + 1 == length):
                row = tl.load(table_ptr + position // block_size).to(tl.int64)
                tl.store(states_ptr + row * state_stride + place, last, mask=kept)


def launch(x: Tensor, w: Tensor, b: Tensor | None, states: Tensor, plan: RecurrentPlan, *, silu: bool) -> Tensor:
    (num_tokens, channels), width = x.shape, w.shape[1]
    y = torch.empty(num_tokens, channels, dtype=x.dtype, device=x.device)
    _causal_conv[(plan.num_seqs, triton.cdiv(channels, _CHANNELS))](
        x, w, w if b is None else b, states, y, plan.query_start, plan.seq_lens, plan.block_table, x.stride(0),
        states.stride(0), plan.block_table.stride(0), channels, plan.block_size,
        WIDTH=width, HAS_BIAS=b is not None, SILU=silu, BLOCK_WIDTH=triton.next_power_of_2(max(width - 1, 1)),
        CHANNELS=_CHANNELS, num_warps=2,
    )  # fmt: skip
    return y


def make(
    spans, channels: int, width: int, dtype: torch.dtype, silu: bool, bias: bool, block_size: int = 8, device="cpu"
) -> Call:
    """`spans`: (new tokens, length) of each sequence."""
    plan, num_rows = make_plan(spans, block_size, device)
    x = torch.randn(sum(new for new, _ in spans), channels + 5, device=device).to(dtype)[:, :channels]
    w, b = torch.randn(channels, width, device=device), torch.randn(channels, device=device)
    states = torch.randn(num_rows, channels * (width - 1) + 3, device=device)[:, : channels * (width - 1)]
    return call(x, w, b if bias else None, states, plan, silu=silu)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=[
        *grid(spans=(MIXED,), channels=(100,), width=(3, 4), dtype=FLOATS, silu=(True,), bias=(True,)),
        *grid(spans=(MIXED,), channels=(24,), width=(4,), dtype=FLOATS, silu=(False,), bias=(False,)),
    ],
    bench_cases=grid(
        spans=(((1, 100),) * 64, ((512, 512),)),
        channels=(5120,),
        width=(4,),
        dtype=(torch.bfloat16,),
        silu=(True,),
        bias=(True,),
    ),
    num_bytes=lambda c: 2 * nbytes(c.args[0]),
    updates=(3,),
)
def causal_conv(x: Tensor, w: Tensor, b: Tensor | None, states: Tensor, plan: RecurrentPlan, *, silu: bool) -> Tensor:
    """Convolve x [T, C], and leave the states that follow; ValueError when shapes or dtypes do not fit."""
    check(x.dim() == 2 and w.dim() == 2 and w.shape[0] == x.shape[1] and w.shape[1] > 1, "x and w do not fit")
    check(x.dtype in FLOATS and x.stride(1) == 1 and w.dtype == torch.float32 and w.is_contiguous(), "x or w")
    fits = b is None or (b.shape == w.shape[:1] and b.dtype == torch.float32 and b.is_contiguous())
    check(fits, "b does not fit w")
    check_states(states, w.shape[0] * (w.shape[1] - 1), plan)
    if not x.is_cpu:
        return launch(x, w, b, states, plan, silu=silu)
    (num_tokens, channels), width = x.shape, w.shape[1]
    y = torch.empty(num_tokens, channels, dtype=x.dtype)
    parts = -(-channels // _CHANNELS)
    scans.run(
        scans.convolve, plan.num_seqs * parts, _CHANNELS * width * (num_tokens // plan.num_seqs + 1),
        *scans.places(states, plan), x.data_ptr(), x.stride(0), scans.KINDS[x.dtype], w.data_ptr(),
        0 if b is None else b.data_ptr(), y.data_ptr(), channels, width, silu, _CHANNELS,
    )  # fmt: skip
    return y
