"""Selective state spaces of channels, each with a time step of its own, as Mamba has them: any number of tokens.

Formula and arguments: state_scan.py, with head_dim 1. A program takes some channels of one sequence through its tokens.
What several tokens need is loaded before the first of them is taken in, and what they give is stored together: between
them are only multiplications of numbers that are there.

Bound: bytes (x, dt and y), and an exp a number of the state and token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from cableway.kernels.lang import jit, tl, triton
from cableway.kernels.recurrence import keep, resumed, span

if TYPE_CHECKING:
    from cableway.kernels.recurrence import RecurrentPlan

_CHANNELS = 32
_TOKENS = 8


@jit(do_not_specialize=("query_start_ptr", "seq_lens_ptr", "table_stride"))  # which vary between steps
def _channel_scan(
    x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, d_ptr, states_ptr, y_ptr, query_start_ptr, seq_lens_ptr, table_ptr,
    x_stride, b_stride, c_stride, state_stride, table_stride, block_size,
    NUM_CHANNELS: tl.constexpr, GROUP: tl.constexpr, NUM_DECAYS: tl.constexpr, STATE: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_STATE: tl.constexpr,
):  # fmt: skip
    """Some channels of one group of one sequence."""
    sequence, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, before, length = span(query_start_ptr, seq_lens_ptr, sequence)
    table_ptr += sequence * table_stride
    nth, n = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, BLOCK_STATE)
    channel, nth_inside, n_inside = group * GROUP + nth, nth < GROUP, n < STATE
    inside = nth_inside[:, None] & n_inside[None, :]
    place = channel[:, None] * STATE + n[None, :]
    a = tl.load(a_ptr + channel[:, None] * NUM_DECAYS + n[None, :] % NUM_DECAYS, mask=inside, other=0.0)
    d = tl.load(d_ptr + channel, mask=nth_inside, other=0.0)
    h = resumed(states_ptr, table_ptr, place, inside, before, state_stride, block_size)
    row = tl.arange(0, TOKENS)
    for chunk in range(before // TOKENS, tl.cdiv(length, TOKENS)):
        first = start + chunk * TOKENS - before
        y = tl.zeros((TOKENS, CHANNELS), tl.float32)
        for i in tl.static_range(TOKENS):
            token = first + i
            is_new = (chunk * TOKENS + i >= before) & (chunk * TOKENS + i < length)
            here, n_here = nth < tl.where(is_new, GROUP, 0), n < tl.where(is_new, STATE, 0)
            dt = tl.load(dt_ptr + token * NUM_CHANNELS + channel, mask=here, other=0.0)
            x = tl.load(x_ptr + token * x_stride + channel, mask=here, other=0.0).to(tl.float32)
            b = tl.load(b_ptr + token * b_stride + group * STATE + n, mask=n_here, other=0.0).to(tl.float32)
            c = tl.load(c_ptr + token * c_stride + group * STATE + n, mask=n_here, other=0.0).to(tl.float32)
            h = tl.exp(dt[:, None] * a) * h + (dt * x)[:, None] * b[None, :]
            y = tl.where((row == i)[:, None], (tl.sum(h * c[None, :], 1) + d * x)[None, :], y)
        position = chunk * TOKENS + row
        is_new = (position >= before) & (position < length)
        out_place = (first + row)[:, None] * NUM_CHANNELS + channel[None, :]
        tl.store(y_ptr + out_place, y.to(y_ptr.dtype.element_ty), mask=is_new[:, None] & nth_inside[None, :])
        num_done = tl.minimum((chunk + 1) * TOKENS, length)
        keep(states_ptr, table_ptr, place, inside, h, num_done, length, state_stride, block_size)


def launch(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, states: Tensor, plan: RecurrentPlan, y: Tensor
) -> None:
    """Write `y` [T, H, 1] and the states that follow, of all sequences."""
    num_channels, (_, num_groups, state) = x.shape[1], b.shape
    group = num_channels // num_groups
    channels = min(triton.next_power_of_2(group), _CHANNELS)
    _channel_scan[(plan.num_seqs, num_groups, triton.cdiv(group, channels))](
        x, dt, a, b, c, d, states, y, plan.query_start, plan.seq_lens, plan.block_table,
        x.stride(0), b.stride(0), c.stride(0), states.stride(0), plan.block_table.stride(0), plan.block_size,
        NUM_CHANNELS=num_channels, GROUP=group, NUM_DECAYS=a.shape[1], STATE=state,
        TOKENS=plan.chunk_len(_TOKENS) if plan.max_query_len > 1 else 1, CHANNELS=channels,
        BLOCK_STATE=triton.next_power_of_2(state), num_warps=2,
    )  # fmt: skip
