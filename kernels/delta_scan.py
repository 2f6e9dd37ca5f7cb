"""Gated delta rule: a state a head that decays, and is corrected towards each token's value at its key.

    h = exp(g) h;   h[p, n] += beta (v[p] - sum over m of h[p, m] k[m]) k[n];   y[p] = sum over n of h[p, n] q[n]

q, k    [num_tokens, num_k_heads, key_dim]           f32, contiguous; head i reads i // (num_heads / num_k_heads)
v       [num_tokens, num_heads, head_dim]                       f32, contiguous
g, beta [num_tokens, num_heads]                                 f32, contiguous; g <= 0
states  [num_rows, num_heads * head_dim * key_dim]              f32  rows may be strided
plan    a RecurrentPlan: see recurrence.py
y       [num_tokens, num_heads, head_dim]                       f32, contiguous

Bound: bytes for few tokens (the states), the chain of tokens for many: each is taken in after the one before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cableway.kernels.lang import jit, scans, tl, triton
from cableway.kernels.recurrence import MIXED, RecurrentPlan, check_states, make_plan
from cableway.kernels.registry import Call, are_contiguous, call, check, grid, kernel, nbytes


def ref(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, states: Tensor, plan: RecurrentPlan) -> Tensor:
    (_, num_heads, head_dim), key_dim = v.shape, k.shape[2]
    group = num_heads // k.shape[1]
    y = torch.zeros_like(v)
    for sequence, (start, end, length) in enumerate(plan.spans()):
        before = length - (end - start)
        h = torch.zeros(num_heads, head_dim, key_dim, device=v.device)
        if before > 0:
            h = states[plan.row(sequence, before - 1)].view(h.shape).clone()
        for position in range(before, length):
            t = start + position - before
            q_t, k_t = (x[t].repeat_interleave(group, 0)[:, None] for x in (q, k))
            h = g[t].exp()[:, None, None] * h
            error = beta[t][:, None] * (v[t] - (h * k_t).sum(-1))
            h = h + error[..., None] * k_t
            y[t] = (h * q_t).sum(-1)
            if plan.keeps(position, length):
                states[plan.row(sequence, position)] = h.flatten()
    return y


@jit(do_not_specialize=("query_start_ptr", "seq_lens_ptr", "table_stride"))  # which vary between steps
def _delta_scan(
    q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, states_ptr, y_ptr, query_start_ptr, seq_lens_ptr, table_ptr,
    state_stride, table_stride, num_heads, num_k_heads, block_size,
    HEAD_DIM: tl.constexpr, KEY_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_KEY: tl.constexpr,
):  # fmt: skip
    """Some numbers of one head's values, of one sequence, token after token."""
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = tl.load(query_start_ptr + sequence).to(tl.int64)
    num_new = tl.load(query_start_ptr + sequence + 1).to(tl.int32) - start.to(tl.int32)
    length = tl.load(seq_lens_ptr + sequence)
    table_ptr += sequence * table_stride
    dim, n = tl.program_id(2) * BLOCK_DIM + tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_KEY)
    dim_inside, n_inside = dim < HEAD_DIM, n < KEY_DIM
    inside = dim_inside[:, None] & n_inside[None, :]
    place = (head * HEAD_DIM + dim)[:, None] * KEY_DIM + n[None, :]
    k_head = head // (num_heads // num_k_heads)
    before = length - num_new
    row = tl.load(table_ptr + tl.maximum(before - 1, 0) // block_size).to(tl.int64)
    h = tl.where(before > 0, tl.load(states_ptr + row * state_stride + place, mask=inside, other=0.0), 0.0)
    if length > 0:
        for token in range(num_new):
            t = start + token
            q = tl.load(q_ptr + (t * num_k_heads + k_head) * KEY_DIM + n, mask=n_inside, other=0.0)
            k = tl.load(k_ptr + (t * num_k_heads + k_head) * KEY_DIM + n, mask=n_inside, other=0.0)
            v = tl.load(v_ptr + (t * num_heads + head) * HEAD_DIM + dim, mask=dim_inside, other=0.0)
            h *= tl.exp(tl.load(g_ptr + t * num_heads + head))
            error = tl.load(beta_ptr + t * num_heads + head) * (v - tl.sum(h * k[None, :], 1))
            h += error[:, None] * k[None, :]
            y = tl.sum(h * q[None, :], 1)
            tl.store(y_ptr + (t * num_heads + head) * HEAD_DIM + dim, y, mask=dim_inside)
            position = before + token
            if ((position + 1) % block_size == 0) | (position + 1 == length):
                row = tl.load(table_ptr + position // block_size).to(tl.int64)
                tl.store(states_ptr + row * state_stride + place, h, mask=inside)


def launch(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, states: Tensor, plan: RecurrentPlan) -> Tensor:
    (_, num_heads, head_dim), key_dim = v.shape, k.shape[2]
    block_dim = min(triton.next_power_of_2(head_dim), 32)
    y = torch.empty_like(v)
    _delta_scan[(plan.num_seqs, num_heads, triton.cdiv(head_dim, block_dim))](
        q, k, v, g, beta, states, y, plan.query_start, plan.seq_lens, plan.block_table, states.stride(0),
        plan.block_table.stride(0), num_heads, k.shape[1], plan.block_size, HEAD_DIM=head_dim, KEY_DIM=key_dim,
        BLOCK_DIM=block_dim, BLOCK_KEY=triton.next_power_of_2(key_dim), num_warps=4,
    )  # fmt: skip
    return y


def make(spans, heads: tuple[int, int, int], key_dim: int, block_size: int = 8, device: str = "cpu") -> Call:
    """`spans`: (new tokens, length) of each sequence. `heads`: num_heads, num_k_heads, head_dim."""
    num_heads, num_k_heads, head_dim = heads
    plan, num_rows = make_plan(spans, block_size, device)
    num_tokens, state_len = sum(new for new, _ in spans), num_heads * head_dim * key_dim
    q, k = torch.randn(2, num_tokens, num_k_heads, key_dim, device=device).div(key_dim**0.5)
    return call(
        q,
        k,
        torch.randn(num_tokens, num_heads, head_dim, device=device),
        -torch.rand(num_tokens, num_heads, device=device),
        torch.rand(num_tokens, num_heads, device=device),
        torch.randn(num_rows, state_len + 3, device=device)[:, :state_len],
        plan,
    )


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=grid(spans=(MIXED,), heads=((6, 2, 20), (3, 3, 40)), key_dim=(16, 10)),
    bench_cases=grid(spans=(((1, 100),) * 64, ((512, 512),)), heads=((32, 16, 128),), key_dim=(128,)),
    num_bytes=lambda c: 2 * nbytes(c.args[5][0]) * c.args[6].num_seqs + 2 * nbytes(c.args[2]),
    updates=(5,),
    tolerances={torch.float32: 1e-4},
)
def delta_scan(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, states: Tensor, plan: RecurrentPlan) -> Tensor:
    """y [T, H, P], and the states that follow are left; ValueError when shapes or dtypes do not fit."""
    check(v.dim() == 3 and q.dim() == 3 and q.shape == k.shape and q.shape[0] == v.shape[0], "q, k or v")
    check(v.shape[1] % k.shape[1] == 0 and g.shape == beta.shape == v.shape[:2], "heads, or g or beta")
    check(all(x.dtype == torch.float32 for x in (q, k, v, g, beta)), "an argument is not float32")
    check(are_contiguous(q, k, v, g, beta), "an argument is strided")
    check_states(states, v.shape[1] * v.shape[2] * k.shape[2], plan)
    if not v.is_cpu:
        return launch(q, k, v, g, beta, states, plan)
    (num_tokens, num_heads, head_dim), key_dim = v.shape, k.shape[2]
    y = torch.empty_like(v)
    scans.run(
        scans.correct, plan.num_seqs * num_heads, 6 * head_dim * key_dim * (num_tokens // plan.num_seqs + 1),
        *scans.places(states, plan), q.data_ptr(), k.data_ptr(), v.data_ptr(), g.data_ptr(), beta.data_ptr(),
        y.data_ptr(), num_heads, k.shape[1], head_dim, key_dim,
    )  # fmt: skip
    return y
