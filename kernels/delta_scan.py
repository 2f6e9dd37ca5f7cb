"""Gated delta rule: a state a head that decays, and is corrected towards each token's value at its key.

    h = exp(g) h;   h[p, n] += beta (v[p] - sum over m of h[p, m] k[m]) k[n];   y[p] = sum over n of h[p, n] q[n]

q, k    [num_tokens, num_k_heads, key_dim]                      bf16|f16|f32   tokens may be strided
v       [num_tokens, num_heads, head_dim]                       dtype of q     tokens may be strided
g       [num_tokens, num_heads]                                 f32, contiguous; g <= 0
        or [num_tokens, num_heads, key_dim]: each number of a key decays by itself
beta    [num_tokens, num_heads]                                 f32, contiguous
states  [num_rows, num_heads * head_dim * key_dim]              bf16|f16|f32   rows may be strided
plan    a RecurrentPlan: see recurrence.py
y       [num_tokens, num_heads, head_dim]                       dtype of q, contiguous

Head i reads q and k of head i // (num_heads / num_k_heads). Sequences that bring many tokens are computed chunk by
chunk (delta_chunks.py) where heads decay as one.
Bound: bytes for few tokens (the states); for many see there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cableway.kernels import delta_chunks
from cableway.kernels.lang import gdc_launch_dependents, gdc_wait, jit, overlapping, scans, tl, triton
from cableway.kernels.recurrence import (
    LONG,
    MANY,
    MIXED,
    NARROW,
    RecurrentPlan,
    check_states,
    keep,
    make_plan,
    piece_of,
    pieces_at_once,
    row_before,
    span,
)
from cableway.kernels.registry import (
    FLOATS,
    Call,
    are_contiguous,
    are_dense_in_tokens,
    call,
    check,
    grid,
    kernel,
    nbytes,
)


def ref(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, states: Tensor, plan: RecurrentPlan) -> Tensor:
    (_, num_heads, head_dim), key_dim, dtype = v.shape, k.shape[2], v.dtype
    group = num_heads // k.shape[1]
    q, k, v = q.float(), k.float(), v.float()
    y = torch.zeros(v.shape, device=v.device)
    for sequence, (start, end, length) in enumerate(plan.spans()):
        before = length - (end - start)
        h = torch.zeros(num_heads, head_dim, key_dim, device=v.device)
        if before > 0:
            h = states[plan.row(sequence, before - 1)].float().view(h.shape)
        for position in range(before, length):
            t = start + position - before
            q_t, k_t = (x[t].repeat_interleave(group, 0)[:, None] for x in (q, k))
            h = g[t].exp().view(num_heads, 1, -1) * h
            error = beta[t][:, None] * (v[t] - (h * k_t).sum(-1))
            h = h + error[..., None] * k_t
            y[t] = (h * q_t).sum(-1)
            if plan.keeps(position, length):
                states[plan.row(sequence, position)] = h.flatten()
    return y.to(dtype)


@jit(do_not_specialize=("query_start_ptr", "seq_lens_ptr", "table_stride", "most", "num_pieces"))  # which vary
def _delta_scan(
    q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, states_ptr, y_ptr, query_start_ptr, seq_lens_ptr, table_ptr,
    q_stride, k_stride, v_stride, state_stride, table_stride, block_size, most, num_pieces,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, KEY_DIM: tl.constexpr,
    DECAYS_BY_KEY: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_KEY: tl.constexpr, AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Some pieces of heads, BLOCK_DIM numbers of values each, of one sequence that brings no more than `most` tokens.

    AHEAD: there are several, and the next one's state is on its way while one is computed.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    PIECES: tl.constexpr = (HEAD_DIM + BLOCK_DIM - 1) // BLOCK_DIM
    sequence, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * num_pieces
    start, before, length = span(query_start_ptr, seq_lens_ptr, sequence)
    if (length > 0) & (length - before <= most):
        table_ptr += sequence * table_stride
        row_ptr = row_before(states_ptr, table_ptr, before, state_stride, block_size)
        kept = piece_of(row_ptr, first, first + 1, before, PIECES, HEAD_DIM, KEY_DIM, BLOCK_DIM, BLOCK_KEY)
        end = tl.minimum(first + num_pieces, NUM_HEADS * PIECES)
        if AHEAD:
            for piece in range(first, end):
                h = kept.to(tl.float32)
                kept = piece_of(row_ptr, piece + 1, end, before, PIECES, HEAD_DIM, KEY_DIM, BLOCK_DIM, BLOCK_KEY)
                _take(
                    h, piece, q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, states_ptr, y_ptr, table_ptr, start, before,
                    length, q_stride, k_stride, v_stride, state_stride, block_size,
                    NUM_HEADS, GROUP, PIECES, HEAD_DIM, KEY_DIM, DECAYS_BY_KEY, BLOCK_DIM, BLOCK_KEY,
                )  # fmt: skip
        else:
            _take(
                kept.to(tl.float32), first, q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, states_ptr, y_ptr, table_ptr, start,
                before, length, q_stride, k_stride, v_stride, state_stride, block_size,
                NUM_HEADS, GROUP, PIECES, HEAD_DIM, KEY_DIM, DECAYS_BY_KEY, BLOCK_DIM, BLOCK_KEY,
            )  # fmt: skip


@jit
def _take(
    h, piece, q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, states_ptr, y_ptr, table_ptr, start, before, length,
    q_stride, k_stride, v_stride, state_stride, block_size,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, PIECES: tl.constexpr, HEAD_DIM: tl.constexpr,
    KEY_DIM: tl.constexpr, DECAYS_BY_KEY: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_KEY: tl.constexpr,
):  # fmt: skip
    """What the tokens of a sequence make of the state h of a piece, one after another."""
    head, dim, n = piece // PIECES, piece % PIECES * BLOCK_DIM + tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_KEY)
    dim_inside, n_inside = dim < HEAD_DIM, n < KEY_DIM
    inside = dim_inside[:, None] & n_inside[None, :]
    place = (head * HEAD_DIM + dim)[:, None] * KEY_DIM + n[None, :]
    key = head // GROUP * KEY_DIM + n
    for position in range(before, length):
        token = start + position - before
        q = tl.load(q_ptr + token * q_stride + key, mask=n_inside, other=0.0).to(tl.float32)
        k = tl.load(k_ptr + token * k_stride + key, mask=n_inside, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + token * v_stride + head * HEAD_DIM + dim, mask=dim_inside, other=0.0).to(tl.float32)
        of_head = token * NUM_HEADS + head
        if DECAYS_BY_KEY:
            h *= tl.exp(tl.load(g_ptr + of_head * KEY_DIM + n, mask=n_inside, other=0.0))[None, :]
        else:
            h *= tl.exp(tl.load(g_ptr + of_head))
        error = tl.load(beta_ptr + of_head) * (v - tl.sum(h * k[None, :], 1))
        h += error[:, None] * k[None, :]
        y = tl.sum(h * q[None, :], 1).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + of_head * HEAD_DIM + dim, y, mask=dim_inside)
        keep(states_ptr, table_ptr, place, inside, h, position + 1, length, state_stride, block_size)


def launch(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, states: Tensor, plan: RecurrentPlan) -> Tensor:
    (_, num_heads, head_dim), (_, num_k_heads, key_dim) = v.shape, k.shape
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    in_chunks = g.dim() == 2 and delta_chunks.fits(k, plan)
    if in_chunks:
        delta_chunks.launch(q, k, v, g, beta, states, plan, y)
    block_dim = min(triton.next_power_of_2(head_dim), 32)
    pieces = num_heads * triton.cdiv(head_dim, block_dim)
    num_pieces = pieces_at_once(pieces, plan.num_seqs)
    _delta_scan[(plan.num_seqs, triton.cdiv(pieces, num_pieces))](
        q, k, v, g, beta, states, y, plan.query_start, plan.seq_lens, plan.block_table, q.stride(0), k.stride(0),
        v.stride(0), states.stride(0), plan.block_table.stride(0), plan.block_size,
        plan.most_singly if in_chunks else plan.max_query_len, num_pieces,
        NUM_HEADS=num_heads, GROUP=num_heads // num_k_heads, HEAD_DIM=head_dim, KEY_DIM=key_dim,
        DECAYS_BY_KEY=g.dim() == 3, BLOCK_DIM=block_dim, BLOCK_KEY=triton.next_power_of_2(key_dim), num_warps=4,
        AHEAD=num_pieces > 1, **overlapping(),
    )  # fmt: skip
    return y


def make(
    spans, heads: tuple[int, int, int], key_dim: int, dtype: torch.dtype = torch.float32, block_size: int = 8,
    by_key: bool = False, kept_as: torch.dtype = torch.float32, padding: int = 3, device: str = "cpu",
) -> Call:  # fmt: skip
    """`spans`: (new tokens, length) of each sequence. `heads`: num_heads, num_k_heads, head_dim. Keys are much alike,
    as those of real prompts are; v is a view of a convolution. `by_key`: each number of a key decays by itself.
    `padding` numbers are between rows of states.
    """
    num_heads, num_k_heads, head_dim = heads
    plan, num_rows = make_plan(spans, block_size, device)
    num_tokens, state_len = sum(new for new, _ in spans), num_heads * head_dim * key_dim
    q, k = torch.randn(2, num_tokens, num_k_heads, key_dim, device=device)
    k = torch.nn.functional.normalize(k + 2 * torch.randn(num_k_heads, key_dim, device=device), dim=-1)
    v = torch.randn(num_tokens, num_heads * head_dim + 5, device=device).to(dtype)[:, 5:]
    return call(
        q.div(key_dim**0.5).to(dtype),
        k.to(dtype),
        v.unflatten(1, (num_heads, head_dim)),
        -torch.rand(num_tokens, num_heads, *((key_dim,) if by_key else ()), device=device),
        torch.rand(num_tokens, num_heads, device=device),
        torch.randn(num_rows, state_len + padding, device=device).to(kept_as)[:, :state_len],
        plan,
    )


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=[
        *grid(spans=(MIXED,), heads=((6, 2, 20),), key_dim=(16,), dtype=FLOATS),
        *grid(spans=(MIXED,), heads=((3, 3, 40),), key_dim=(10,)),
        *grid(spans=(MIXED,), heads=((3, 3, 20),), key_dim=(24,), dtype=FLOATS, block_size=(16,), by_key=(True,)),
        *grid(spans=(MANY,), heads=((11, 1, 40),), key_dim=(10,)),
        *grid(spans=(LONG,), heads=((4, 2, 16),), key_dim=(24,), dtype=FLOATS, block_size=(64,)),
        *grid(spans=(LONG,), heads=((4, 2, 16),), key_dim=(24,), block_size=(16, 24)),
        *grid(spans=(LONG,), heads=((2, 1, 96),), key_dim=(80,), block_size=(32,)),
        *grid(spans=(LONG,), heads=((1, 1, 16),), key_dim=(136,), block_size=(32,)),
        *grid(spans=(LONG,), heads=((4, 2, 16),), key_dim=(24,), block_size=(64,), padding=(0,), **NARROW),
    ],
    bench_cases=grid(
        spans=(((1, 100),) * 64, ((2048, 2048),)),
        heads=((32, 16, 128),),
        key_dim=(128,),
        dtype=(torch.bfloat16,),
        block_size=(256,),
        kept_as=(torch.float32, torch.bfloat16),
        padding=(0,),
    ),
    num_bytes=lambda c: 2 * nbytes(c.args[5][0]) * c.args[6].num_seqs + 2 * nbytes(c.args[2]),
    updates=(5,),
    rounds_to=lambda c: c.args[1].dtype,
    tolerances={torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2},
)
def delta_scan(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, states: Tensor, plan: RecurrentPlan) -> Tensor:
    """y [T, H, P], and the states that follow are left; ValueError when shapes or dtypes do not fit."""
    check(v.dim() == 3 and q.dim() == 3 and q.shape == k.shape and q.shape[0] == v.shape[0], "q, k or v")
    check(v.shape[1] % k.shape[1] == 0 and beta.shape == v.shape[:2], "heads, or beta")
    check(g.shape in (beta.shape, (*beta.shape, k.shape[2])), "g is neither of heads nor of their keys")
    check(q.dtype == k.dtype == v.dtype and v.dtype in FLOATS, "q, k and v are not of one dtype")
    check(g.dtype == beta.dtype == torch.float32 and are_contiguous(g, beta), "g or beta")
    check(all(are_dense_in_tokens(x) for x in (q, k, v)), "q, k or v is strided within its tokens")
    check_states(states, v.shape[1] * v.shape[2] * k.shape[2], plan)
    if not v.is_cpu:
        return launch(q, k, v, g, beta, states, plan)
    (num_tokens, num_heads, head_dim), (_, num_k_heads, key_dim), dtype = v.shape, k.shape, v.dtype
    q, k, v = (x.float().contiguous() for x in (q, k, v))
    y = torch.empty_like(v)
    scans.run(
        scans.correct, plan.num_seqs * num_heads, 6 * head_dim * key_dim * (num_tokens // plan.num_seqs + 1),
        *scans.places(states, plan), q.data_ptr(), k.data_ptr(), v.data_ptr(), g.data_ptr(), beta.data_ptr(),
        y.data_ptr(), num_heads, num_k_heads, head_dim, key_dim, g.dim() == 3,
    )  # fmt: skip
    return y.to(dtype)
