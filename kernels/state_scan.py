"""Selective state space: a state a head that decays and takes in each token, and is read by it.

    h[p, n] = exp(dt a[n]) h[p, n] + dt b[n] x[p];   y[p] = sum over n of c[n] h[p, n] + d x[p]

x       [num_tokens, num_heads, head_dim]           f32, contiguous
dt      [num_tokens, num_heads]                     f32, contiguous
a       [num_heads, state]                          f32, contiguous, negative
b, c    [num_tokens, num_groups, state]             f32, contiguous; head i reads group i // (num_heads / num_groups)
d       [num_heads]                                 f32, contiguous
states  [num_rows, num_heads * head_dim * state]    f32  rows may be strided
plan    a RecurrentPlan: see recurrence.py
y       [num_tokens, num_heads, head_dim]           f32, contiguous

Mamba has heads of one channel; in Mamba 2 all a of a head are the same.
Bound: bytes for few tokens (the states), the chain of tokens for many: each is taken in after the one before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cableway.kernels.lang import jit, scans, tl, triton
from cableway.kernels.recurrence import MIXED, RecurrentPlan, check_states, make_plan
from cableway.kernels.registry import Call, are_contiguous, call, check, grid, kernel, nbytes


def ref(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, states: Tensor, plan: RecurrentPlan
) -> Tensor:
    (_, num_heads, head_dim), state = x.shape, a.shape[1]
    group = num_heads // b.shape[1]
    y = torch.zeros_like(x)
    for sequence, (start, end, length) in enumerate(plan.spans()):
        before = length - (end - start)
        h = torch.zeros(num_heads, head_dim, state, device=x.device)
        if before > 0:
            h = states[plan.row(sequence, before - 1)].view(h.shape).clone()
        for position in range(before, length):
            t = start + position - before
            b_t, c_t = (z[t].repeat_interleave(group, 0)[:, None] for z in (b, c))
            h = (dt[t][:, None] * a).exp()[:, None] * h + (dt[t][:, None] * x[t])[..., None] * b_t
            y[t] = (h * c_t).sum(-1) + d[:, None] * x[t]
            if plan.keeps(position, length):
                states[plan.row(sequence, position)] = h.flatten()
    return y


@jit(do_not_specialize=("query_start_ptr", "seq_lens_ptr", "table_stride"))  # which vary between steps
def _state_scan(
    x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, d_ptr, states_ptr, y_ptr, query_start_ptr, seq_lens_ptr, table_ptr,
    state_stride, table_stride, num_heads, num_groups, block_size,
    HEAD_DIM: tl.constexpr, STATE: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_STATE: tl.constexpr,
):  # fmt: skip
    """Some channels of one head of one sequence, token after token."""
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = tl.load(query_start_ptr + sequence).to(tl.int64)
    num_new = tl.load(query_start_ptr + sequence + 1).to(tl.int32) - start.to(tl.int32)
    length = tl.load(seq_lens_ptr + sequence)
    table_ptr += sequence * table_stride
    dim, n = tl.program_id(2) * BLOCK_DIM + tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_STATE)
    dim_inside, n_inside = dim < HEAD_DIM, n < STATE
    inside = dim_inside[:, None] & n_inside[None, :]
    place = (head * HEAD_DIM + dim)[:, None] * STATE + n[None, :]
    group = head // (num_heads // num_groups)
    a = tl.load(a_ptr + head * STATE + n, mask=n_inside, other=0.0)
    d = tl.load(d_ptr + head)
    before = length - num_new
    row = tl.load(table_ptr + tl.maximum(before - 1, 0) // block_size).to(tl.int64)
    h = tl.where(before > 0, tl.load(states_ptr + row * state_stride + place, mask=inside, other=0.0), 0.0)
    if length > 0:
        for token in range(num_new):
            t = start + token
            dt = tl.load(dt_ptr + t * num_heads + head)
            b = tl.load(b_ptr + (t * num_groups + group) * STATE + n, mask=n_inside, other=0.0)
            c = tl.load(c_ptr + (t * num_groups + group) * STATE + n, mask=n_inside, other=0.0)
            x = tl.load(x_ptr + (t * num_heads + head) * HEAD_DIM + dim, mask=dim_inside, other=0.0)
            h = tl.exp(dt * a)[None, :] * h + (dt * x)[:, None] * b[None, :]
            y = tl.sum(h * c[None, :], 1) + d * x
            tl.store(y_ptr + (t * num_heads + head) * HEAD_DIM + dim, y, mask=dim_inside)
            position = before + token
            if ((position + 1) % block_size == 0) | (position + 1 == length):
                row = tl.load(table_ptr + position // block_size).to(tl.int64)
                tl.store(states_ptr + row * state_stride + place, h, mask=inside)


def launch(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, states: Tensor, plan: RecurrentPlan
) -> Tensor:
    (_, num_heads, head_dim), state = x.shape, a.shape[1]
    block_dim = min(triton.next_power_of_2(head_dim), 32)
    y = torch.empty_like(x)
    _state_scan[(plan.num_seqs, num_heads, triton.cdiv(head_dim, block_dim))](
        x, dt, a, b, c, d, states, y, plan.query_start, plan.seq_lens, plan.block_table, states.stride(0),
        plan.block_table.stride(0), num_heads, b.shape[1], plan.block_size, HEAD_DIM=head_dim, STATE=state,
        BLOCK_DIM=block_dim, BLOCK_STATE=triton.next_power_of_2(state), num_warps=4 if block_dim * state > 1024 else 1,
    )  # fmt: skip
    return y


def make(spans, heads: tuple[int, int, int], state: int, block_size: int = 8, device: str = "cpu") -> Call:
    """`spans`: (new tokens, length) of each sequence. `heads`: num_heads, num_groups, head_dim."""
    num_heads, num_groups, head_dim = heads
    plan, num_rows = make_plan(spans, block_size, device)
    num_tokens, state_len = sum(new for new, _ in spans), num_heads * head_dim * state
    b, c = torch.randn(2, num_tokens, num_groups, state, device=device)
    return call(
        torch.randn(num_tokens, num_heads, head_dim, device=device),
        torch.rand(num_tokens, num_heads, device=device),
        -torch.rand(num_heads, state, device=device) * 2,
        b,
        c,
        torch.randn(num_heads, device=device),
        torch.randn(num_rows, state_len + 3, device=device)[:, :state_len],
        plan,
    )


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=grid(spans=(MIXED,), heads=((6, 2, 20), (24, 1, 1), (3, 3, 40)), state=(16, 10)),
    bench_cases=grid(spans=(((1, 100),) * 64, ((512, 512),)), heads=((80, 1, 64),), state=(128,)),
    num_bytes=lambda c: 2 * nbytes(c.args[6][0]) * c.args[7].num_seqs + 2 * nbytes(c.args[0]),
    updates=(6,),
    tolerances={torch.float32: 1e-4},
)
def state_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, states: Tensor, plan: RecurrentPlan
) -> Tensor:
    """y [T, H, P], and the states that follow are left; ValueError when shapes or dtypes do not fit."""
    check(x.dim() == 3 and dt.shape == x.shape[:2] and a.dim() == 2 and a.shape[0] == x.shape[1], "x, dt or a")
    check(b.shape == c.shape and b.dim() == 3 and b.shape[0] == x.shape[0] and b.shape[2] == a.shape[1], "b or c")
    check(x.shape[1] % b.shape[1] == 0 and d.shape == x.shape[1:2], "heads and groups, or d")
    check(all(z.dtype == torch.float32 for z in (x, dt, a, b, c, d)), "an argument is not float32")
    check(are_contiguous(x, dt, a, b, c, d), "an argument is strided")
    check_states(states, x.shape[1] * x.shape[2] * a.shape[1], plan)
    if not x.is_cpu:
        return launch(x, dt, a, b, c, d, states, plan)
    (num_tokens, num_heads, head_dim), state = x.shape, a.shape[1]
    y = torch.empty_like(x)
    scans.run(
        scans.scan, plan.num_seqs * num_heads, 4 * head_dim * state * (num_tokens // plan.num_seqs + 1),
        *scans.places(states, plan), x.data_ptr(), dt.data_ptr(), a.data_ptr(), b.data_ptr(), c.data_ptr(),
        d.data_ptr(), y.data_ptr(), num_heads, b.shape[1], head_dim, state,
    )  # fmt: skip
    return y
