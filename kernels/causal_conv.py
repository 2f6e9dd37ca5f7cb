"""Causal convolution over the tokens of each sequence, channel by channel, with the inputs before them as state.

    y[t, c] = act(b[c] + sum over j of w[j, c] x[t - width + 1 + j, c]),   act = identity or silu

x       [num_tokens, channels]                   bf16|f16|f32  rows may be strided
w       [width, channels]                        f32, contiguous
b       [channels] f32 or None
states  [num_rows, (width - 1) * channels]       bf16|f16|f32  rows may be strided; the last inputs, oldest first
plan    a RecurrentPlan: see recurrence.py
y       [num_tokens, channels]                   dtype of x, contiguous

Of a sequence that brings many tokens, those after the first few see none of earlier steps, and are computed in chunks
(chunk_work.py), side by side.
Bound: bytes; reads x, writes y.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cableway.kernels.lang import gdc_launch_dependents, gdc_wait, jit, overlapping, scans, tl, triton
from cableway.kernels.recurrence import (
    LONG,
    MIXED,
    NARROW,
    RecurrentPlan,
    check_states,
    keep,
    make_plan,
    resumed,
    rows_of,
    span,
)
from cableway.kernels.registry import FLOATS, Call, call, check, grid, kernel, nbytes

# PERF, H200, us for 8,192 tokens of 8,192 channels (their bytes take 64): 86; 16 x 512 113, 8 x 512 122, 16 x 1024 103.
_CHUNK, _CHANNELS, _WARPS = 16, 256, 2
_FEW_ROWS, _FEW_CHANNELS, _FEW_WARPS = 16, 256, 2
_CPU_CHANNELS = 128


def ref(x: Tensor, w: Tensor, b: Tensor | None, states: Tensor, plan: RecurrentPlan, *, silu: bool) -> Tensor:
    width, channels = w.shape
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for sequence, (start, end, length) in enumerate(plan.spans()):
        before = length - (end - start)
        last = torch.zeros(width - 1, channels, device=x.device)
        if before > 0:
            last = states[plan.row(sequence, before - 1)].float().view(width - 1, channels)
        for position in range(before, length):
            seen = torch.cat((last, x[start + position - before].float()[None]))
            y[start + position - before] = (seen * w).sum(0) + (0 if b is None else b)
            last = seen[1:]
            if plan.keeps(position, length):
                states[plan.row(sequence, position)] = last.flatten()
    return (y * torch.sigmoid(y) if silu else y).to(x.dtype)


@jit
def _inputs(
    x_ptr, states_ptr, table_ptr, start, before, position, position_inside, channel, channel_inside, x_stride,
    state_stride, channels, block_size, WIDTH: tl.constexpr, IS_FIRST: tl.constexpr,
):  # fmt: skip
    """Inputs [positions, channels] f32, zeros before the first. IS_FIRST: some may be of earlier steps."""
    is_new = position_inside & (position >= before) if IS_FIRST else position_inside
    x = rows_of(x_ptr, start + position - before, is_new, x_stride, channel, channel_inside).to(tl.float32)
    if IS_FIRST:
        nth = position - before + WIDTH - 1  # of those that are kept
        is_old = position_inside & (nth >= 0) & (position < before)
        place = nth[:, None] * channels + channel[None, :]
        inside = is_old[:, None] & channel_inside[None, :]
        x += resumed(states_ptr, table_ptr, place, inside, before, state_stride, block_size)
    return x


@jit
def _convolve(
    x_ptr, w_ptr, b_ptr, states_ptr, y_ptr, table_ptr, start, before, first, end, length, channel, channel_inside,
    x_stride, state_stride, channels, block_size,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    IS_FIRST: tl.constexpr,
):  # fmt: skip
    """Positions first … end - 1 of a sequence, and what is kept after them. IS_FIRST: first is `before`.

    `_keep_last` must come last: it may write over the state that inputs are read from.
    """
    position = first + tl.arange(0, ROWS)
    is_own = position < end
    y = tl.zeros((ROWS, channel.shape[0]), tl.float32)
    if HAS_BIAS:
        y += tl.load(b_ptr + channel, mask=channel_inside, other=0.0)[None, :]
    for tap in tl.static_range(WIDTH):
        x = _inputs(
            x_ptr, states_ptr, table_ptr, start, before, position - (WIDTH - 1 - tap), is_own, channel, channel_inside,
            x_stride, state_stride, channels, block_size, WIDTH, IS_FIRST and tap < WIDTH - 1,
        )  # fmt: skip
        y += x * tl.load(w_ptr + tap * channels + channel, mask=channel_inside, other=0.0)[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    place = (start + position - before)[:, None] * channels + channel[None, :]
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=is_own[:, None] & channel_inside[None, :])
    _keep_last(
        x_ptr, states_ptr, table_ptr, start, before, first, end, length, channel, channel_inside, x_stride,
        state_stride, channels, block_size, WIDTH, BLOCK_WIDTH, IS_FIRST,
    )  # fmt: skip


@jit
def _keep_last(
    x_ptr, states_ptr, table_ptr, start, before, first, end, length, channel, channel_inside, x_stride, state_stride,
    channels, block_size, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, IS_FIRST: tl.constexpr,
):  # fmt: skip
    """What is kept after positions first … end - 1."""
    nth = tl.arange(0, BLOCK_WIDTH)
    kept, is_kept = nth[:, None] * channels + channel[None, :], (nth < WIDTH - 1)[:, None] & channel_inside[None, :]
    last_block = (end - 1) // block_size
    for back in range(last_block - first // block_size + 1):
        # The last block goes first: the sequence may have gone on from the state of the very block it now begins with.
        num_done = tl.minimum((last_block - back + 1) * block_size, length)
        if num_done <= end:
            last = _inputs(
                x_ptr, states_ptr, table_ptr, start, before, num_done - (WIDTH - 1) + nth, nth < WIDTH - 1, channel,
                channel_inside, x_stride, state_stride, channels, block_size, WIDTH, IS_FIRST,
            )  # fmt: skip
            if IS_FIRST:
                tl.debug_barrier()  # every thread has read what is written over
            keep(states_ptr, table_ptr, kept, is_kept, last, num_done, num_done, state_stride, block_size)


@jit(do_not_specialize=("query_start_ptr", "seq_lens_ptr", "table_stride", "most"))  # which vary between steps
def _causal_conv(
    x_ptr, w_ptr, b_ptr, states_ptr, y_ptr, query_start_ptr, seq_lens_ptr, table_ptr, x_stride, state_stride,
    table_stride, channels, block_size, most,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some channels of one sequence: of its first WIDTH - 1 tokens, or of all where it brings no more than `most`."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    sequence = tl.program_id(0).to(tl.int64)
    start, before, length = span(query_start_ptr, seq_lens_ptr, sequence)
    if length > 0:
        table_ptr += sequence * table_stride
        channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        end = tl.where(length - before <= most, length, before + WIDTH - 1)
        _convolve(
            x_ptr, w_ptr, b_ptr, states_ptr, y_ptr, table_ptr, start, before, before, tl.minimum(before + ROWS, end),
            length, channel, channel < channels, x_stride, state_stride, channels, block_size,
            WIDTH, HAS_BIAS, SILU, ROWS, BLOCK_WIDTH, True,
        )  # fmt: skip
        for first in range(before + ROWS, end, ROWS):
            _convolve(
                x_ptr, w_ptr, b_ptr, states_ptr, y_ptr, table_ptr, start, before, first, tl.minimum(first + ROWS, end),
                length, channel, channel < channels, x_stride, state_stride, channels, block_size,
                WIDTH, HAS_BIAS, SILU, ROWS, BLOCK_WIDTH, False,
            )  # fmt: skip


@jit(do_not_specialize=("query_start_ptr", "seq_lens_ptr", "table_stride", "work_ptr"))  # which vary between steps
def _chunk_conv(
    x_ptr, w_ptr, b_ptr, states_ptr, y_ptr, query_start_ptr, seq_lens_ptr, table_ptr, work_ptr, first_items_ptr,
    x_stride, state_stride, table_stride, channels, block_size,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Some channels of ROWS tokens of a sequence that brings many, counted from the first that sees new ones alone.

    A thread has the same channels of all tokens, whose inputs are loaded once, all before the first is stored.
    """
    item = tl.program_id(0)
    sequence = tl.load(work_ptr + item * 2).to(tl.int64)
    if sequence >= 0:
        start, before, length = span(query_start_ptr, seq_lens_ptr, sequence)
        first = before + WIDTH - 1 + (item - tl.load(first_items_ptr + sequence)) * ROWS
        if first < length:
            channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
            inside, end = channel < channels, tl.minimum(first + ROWS, length)
            token = start + first - before
            x_ptr += token * x_stride
            inputs = ()
            for row in tl.static_range(1 - WIDTH, ROWS):
                here = channel < tl.where(first + row < length, channels, 0)
                inputs += (tl.load(x_ptr + row * x_stride + channel, mask=here, other=0.0),)
            bias = tl.zeros((CHANNELS,), tl.float32)
            if HAS_BIAS:
                bias = tl.load(b_ptr + channel, mask=inside, other=0.0)
            taps = ()
            for tap in tl.static_range(WIDTH):
                taps += (tl.load(w_ptr + tap * channels + channel, mask=inside, other=0.0),)
            for row in tl.static_range(ROWS):
                y = bias
                for tap in tl.static_range(WIDTH):
                    y += inputs[row + tap].to(tl.float32) * taps[tap]
                if SILU:
                    y = y * tl.sigmoid(y)
                here = channel < tl.where(first + row < length, channels, 0)
                tl.store(y_ptr + (token + row) * channels + channel, y.to(y_ptr.dtype.element_ty), mask=here)
            if (first // block_size != end // block_size) | (end == length):
                _keep_last(
                    x_ptr - token * x_stride, states_ptr, table_ptr + sequence * table_stride, start, before, first,
                    end, length, channel, inside, x_stride, state_stride, channels, block_size, WIDTH, BLOCK_WIDTH,
                    False,
                )  # fmt: skip


def launch(x: Tensor, w: Tensor, b: Tensor | None, states: Tensor, plan: RecurrentPlan, *, silu: bool) -> Tensor:
    (num_tokens, channels), width = x.shape, len(w)
    y = torch.empty(num_tokens, channels, dtype=x.dtype, device=x.device)
    tensors = (x, w, w if b is None else b, states, y, plan.query_start, plan.seq_lens, plan.block_table)
    sizes = (x.stride(0), states.stride(0), plan.block_table.stride(0), channels, plan.block_size)
    constants = {
        "WIDTH": width, "HAS_BIAS": b is not None, "SILU": silu, "BLOCK_WIDTH": triton.next_power_of_2(width - 1),
    }  # fmt: skip
    in_chunks = plan.has_chunks and width - 1 <= plan.most_singly
    most = plan.most_singly if in_chunks else plan.max_query_len
    # One compilation for one token, and hardly more than another for all other numbers of them.
    rows = 1 if most == 1 else triton.next_power_of_2(min(max(most, _FEW_ROWS // 2), max(_FEW_ROWS, width - 1)))
    _causal_conv[(plan.num_seqs, triton.cdiv(channels, _FEW_CHANNELS))](
        *tensors, *sizes, most, **constants, ROWS=rows, CHANNELS=_FEW_CHANNELS, num_warps=_FEW_WARPS, **overlapping(),
    )  # fmt: skip
    if in_chunks:
        chunk = plan.chunk_len(_CHUNK)
        work, first_items = plan.chunk_work(num_tokens, chunk)
        _chunk_conv[(len(work), triton.cdiv(channels, _CHANNELS))](
            *tensors, work, first_items, *sizes, **constants, ROWS=chunk, CHANNELS=_CHANNELS, num_warps=_WARPS
        )
    return y


def make(
    spans, channels: int, width: int, dtype: torch.dtype, silu: bool, bias: bool, block_size: int = 8,
    kept_as: torch.dtype = torch.float32, device="cpu",
) -> Call:  # fmt: skip
    """`spans`: (new tokens, length) of each sequence."""
    plan, num_rows = make_plan(spans, block_size, device)
    x = torch.randn(sum(new for new, _ in spans), channels + 5, device=device).to(dtype)[:, :channels]
    w, b = torch.randn(width, channels, device=device), torch.randn(channels, device=device)
    states = torch.randn(num_rows, channels * (width - 1) + 3, device=device).to(kept_as)[:, : channels * (width - 1)]
    return call(x, w, b if bias else None, states, plan, silu=silu)


EDGES = ((70, 133), (10, 74), (65, 130), (64, 128), (130, 194), (62, 64))
"""Sequences that go on, or end, within a few tokens of the end of a block or a chunk."""


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=[
        *grid(spans=(MIXED,), channels=(100,), width=(3, 4), dtype=FLOATS, silu=(True,), bias=(True,)),
        *grid(spans=(MIXED,), channels=(24,), width=(4,), dtype=FLOATS, silu=(False,), bias=(False,)),
        *grid(
            spans=(LONG,),
            channels=(70,),
            width=(4,),
            dtype=FLOATS,
            silu=(True,),
            bias=(False, True),
            block_size=(16, 64, 24, 256),
        ),
        *grid(
            spans=(LONG,), channels=(20,), width=(2, 6), dtype=FLOATS, silu=(True,), bias=(True,), block_size=(4, 64)
        ),
        *grid(spans=(MIXED, LONG), channels=(70,), width=(4,), silu=(True,), bias=(True,), block_size=(64,), **NARROW),
        *grid(
            spans=(EDGES,), channels=(20,), width=(4,), dtype=FLOATS[:1], silu=(True,), bias=(True,), block_size=(64,)
        ),
    ],
    bench_cases=grid(
        spans=(((1, 100),) * 64, ((2048, 2048),)),
        block_size=(256,),
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
    check(x.dim() == 2 and w.dim() == 2 and w.shape[1] == x.shape[1] and len(w) > 1, "x and w do not fit")
    check(x.dtype in FLOATS and x.stride(1) == 1 and w.dtype == torch.float32 and w.is_contiguous(), "x or w")
    fits = b is None or (b.shape == w.shape[1:] and b.dtype == torch.float32 and b.is_contiguous())
    check(fits, "b does not fit w")
    check_states(states, w.shape[1] * (len(w) - 1), plan)
    if not x.is_cpu:
        return launch(x, w, b, states, plan, silu=silu)
    (num_tokens, channels), width = x.shape, len(w)
    y = torch.empty(num_tokens, channels, dtype=x.dtype)
    parts = -(-channels // _CPU_CHANNELS)
    scans.run(
        scans.convolve, plan.num_seqs * parts, _CPU_CHANNELS * width * (num_tokens // plan.num_seqs + 1),
        *scans.places(states, plan), x.data_ptr(), x.stride(0), scans.KINDS[x.dtype], w.data_ptr(),
        0 if b is None else b.data_ptr(), y.data_ptr(), channels, width, silu, _CPU_CHANNELS,
    )  # fmt: skip
    return y
