"""Selective state space: a state a head that decays and takes in each token, and is read by it.

    h[p, n] = exp(dt a[n]) h[p, n] + dt b[n] x[p];   y[p] = sum over n of c[n] h[p, n] + d x[p]

x       [num_tokens, num_heads, head_dim]           bf16|f16|f32   tokens may be strided
dt      [num_tokens, num_heads]                     f32, contiguous, not negative
a       [num_heads, state], or [num_heads, 1]       f32, contiguous, negative; one number of a head that decays as one
b, c    [num_tokens, num_groups, state]             dtype of x     tokens may be strided
d       [num_heads]                                 f32, contiguous
states  [num_rows, num_heads * head_dim * state]    bf16|f16|f32   rows may be strided
plan    a RecurrentPlan: see recurrence.py
y       [num_tokens, num_heads, head_dim]           dtype of x, contiguous

Head i reads b and c of group i // (num_heads / num_groups). Mamba has heads of one channel (channel_scan.py); in Mamba
2 a head decays as one, and sequences that bring many tokens are computed chunk by chunk (state_chunks.py).
Bound: bytes for few tokens (the states); for many see there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cableway.kernels import channel_scan, state_chunks
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


def ref(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, states: Tensor, plan: RecurrentPlan
) -> Tensor:
    (_, num_heads, head_dim), (_, num_groups, state), dtype = x.shape, b.shape, x.dtype
    group = num_heads // num_groups
    x, b, c = x.float(), b.float(), c.float()
    y = torch.zeros(x.shape, device=x.device)
    for sequence, (start, end, length) in enumerate(plan.spans()):
        before = length - (end - start)
        h = torch.zeros(num_heads, head_dim, state, device=x.device)
        if before > 0:
            h = states[plan.row(sequence, before - 1)].float().view(h.shape)
        for position in range(before, length):
            t = start + position - before
            b_t, c_t = (z[t].repeat_interleave(group, 0)[:, None] for z in (b, c))
            h = (dt[t][:, None] * a).exp()[:, None] * h + (dt[t][:, None] * x[t])[..., None] * b_t
            y[t] = (h * c_t).sum(-1) + d[:, None] * x[t]
            if plan.keeps(position, length):
                states[plan.row(sequence, position)] = h.flatten()
    return y.to(dtype)


@jit(do_not_specialize=("query_start_ptr", "seq_lens_ptr", "table_stride", "most", "num_pieces"))  # which vary
def _state_scan(
    x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, d_ptr, states_ptr, y_ptr, query_start_ptr, seq_lens_ptr, table_ptr,
    x_stride, b_stride, c_stride, state_stride, table_stride, block_size, most, num_pieces,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, NUM_DECAYS: tl.constexpr, HEAD_DIM: tl.constexpr,
    STATE: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_STATE: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some pieces of heads, BLOCK_DIM channels each, of one sequence that brings no more than `most` tokens.

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
        kept = piece_of(row_ptr, first, first + 1, before, PIECES, HEAD_DIM, STATE, BLOCK_DIM, BLOCK_STATE)
        end = tl.minimum(first + num_pieces, NUM_HEADS * PIECES)
        if AHEAD:
            for piece in range(first, end):
                h = kept.to(tl.float32)
                kept = piece_of(row_ptr, piece + 1, end, before, PIECES, HEAD_DIM, STATE, BLOCK_DIM, BLOCK_STATE)
                _take(
                    h, piece, x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, d_ptr, states_ptr, y_ptr, table_ptr, start, before,
                    length, x_stride, b_stride, c_stride, state_stride, block_size,
                    NUM_HEADS, GROUP, NUM_DECAYS, PIECES, HEAD_DIM, STATE, BLOCK_DIM, BLOCK_STATE,
                )  # fmt: skip
        else:
            _take(
                kept.to(tl.float32), first, x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, d_ptr, states_ptr, y_ptr, table_ptr,
                start, before, length, x_stride, b_stride, c_stride, state_stride, block_size,
                NUM_HEADS, GROUP, NUM_DECAYS, PIECES, HEAD_DIM, STATE, BLOCK_DIM, BLOCK_STATE,
            )  # fmt: skip


@jit
def _take(
    h, piece, x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, d_ptr, states_ptr, y_ptr, table_ptr, start, before, length,
    x_stride, b_stride, c_stride, state_stride, block_size,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, NUM_DECAYS: tl.constexpr, PIECES: tl.constexpr,
    HEAD_DIM: tl.constexpr, STATE: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_STATE: tl.constexpr,
):  # fmt: skip
    """What the tokens of a sequence make of the state h of a piece, one after another."""
    head, dim, n = piece // PIECES, piece % PIECES * BLOCK_DIM + tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_STATE)
    dim_inside, n_inside = dim < HEAD_DIM, n < STATE
    inside = dim_inside[:, None] & n_inside[None, :]
    place = (head * HEAD_DIM + dim)[:, None] * STATE + n[None, :]
    a = tl.load(a_ptr + head * NUM_DECAYS + n % NUM_DECAYS, mask=n_inside, other=0.0)
    d = tl.load(d_ptr + head)
    for position in range(before, length):
        token = start + position - before
        dt = tl.load(dt_ptr + token * NUM_HEADS + head)
        group = head // GROUP * STATE + n
        b = tl.load(b_ptr + token * b_stride + group, mask=n_inside, other=0.0).to(tl.float32)
        c = tl.load(c_ptr + token * c_stride + group, mask=n_inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + token * x_stride + head * HEAD_DIM + dim, mask=dim_inside, other=0.0).to(tl.float32)
        h = tl.exp(dt * a)[None, :] * h + (dt * x)[:, None] * b[None, :]
        y = (tl.sum(h * c[None, :], 1) + d * x).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + (token * NUM_HEADS + head) * HEAD_DIM + dim, y, mask=dim_inside)
        keep(states_ptr, table_ptr, place, inside, h, position + 1, length, state_stride, block_size)


def launch(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, states: Tensor, plan: RecurrentPlan
) -> Tensor:
    (_, num_heads, head_dim), (_, num_groups, state), num_decays = x.shape, b.shape, a.shape[1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if head_dim == 1:
        channel_scan.launch(x, dt, a, b, c, d, states, plan, y)
        return y
    in_chunks = plan.has_chunks and num_decays == 1
    if in_chunks:
        state_chunks.launch(x, dt, a, b, c, d, states, plan, y)
    block_dim = min(triton.next_power_of_2(head_dim), 32)
    pieces = num_heads * triton.cdiv(head_dim, block_dim)
    num_pieces = pieces_at_once(pieces, plan.num_seqs)
    _state_scan[(plan.num_seqs, triton.cdiv(pieces, num_pieces))](
        x, dt, a, b, c, d, states, y, plan.query_start, plan.seq_lens, plan.block_table,
        x.stride(0), b.stride(0), c.stride(0), states.stride(0), plan.block_table.stride(0), plan.block_size,
        plan.most_singly if in_chunks else plan.max_query_len, num_pieces,
        NUM_HEADS=num_heads, GROUP=num_heads // num_groups, NUM_DECAYS=num_decays, HEAD_DIM=head_dim, STATE=state,
        BLOCK_DIM=block_dim, BLOCK_STATE=triton.next_power_of_2(state), num_warps=4 if block_dim * state > 1024 else 1,
        AHEAD=num_pieces > 1, **overlapping(),
    )  # fmt: skip
    return y


def make(
    spans, heads: tuple[int, int, int], state: int, decays: int, dtype: torch.dtype = torch.float32,
    block_size: int = 8, kept_as: torch.dtype = torch.float32, padding: int = 3, device: str = "cpu",
) -> Call:  # fmt: skip
    """`spans`: (new tokens, length) of each sequence. `heads`: num_heads, num_groups, head_dim. x, b and c are views of
    one convolution; `padding` numbers are between rows of states.
    """
    num_heads, num_groups, head_dim = heads
    plan, num_rows = make_plan(spans, block_size, device)
    num_tokens, inner, state_len = sum(new for new, _ in spans), num_heads * head_dim, num_heads * head_dim * state
    sizes = (inner, num_groups * state, num_groups * state)
    x, b, c = torch.randn(num_tokens, sum(sizes), device=device).to(dtype).split(sizes, 1)
    return call(
        x.unflatten(1, (num_heads, head_dim)),
        torch.rand(num_tokens, num_heads, device=device),
        -torch.rand(num_heads, decays, device=device) * 2,
        b.unflatten(1, (num_groups, state)),
        c.unflatten(1, (num_groups, state)) * state**-0.5,
        torch.randn(num_heads, device=device),
        torch.randn(num_rows, state_len + padding, device=device).to(kept_as)[:, :state_len],
        plan,
    )


BENCH = ((1, 100),) * 64, ((2048, 2048),)
MAMBA2, MAMBA = {"heads": ((80, 1, 64),), "state": (128,)}, {"heads": ((5120, 1, 1),), "state": (16,)}


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=[
        *grid(spans=(MIXED,), heads=((6, 2, 20),), state=(16,), decays=(1,), dtype=FLOATS),
        *grid(spans=(MIXED,), heads=((3, 3, 40),), state=(10,), decays=(1,)),
        *grid(spans=(MANY,), heads=((11, 1, 40),), state=(10,), decays=(1,)),
        *grid(spans=(LONG,), heads=((4, 2, 16),), state=(24,), decays=(1,), dtype=FLOATS, block_size=(64,)),
        *grid(spans=(LONG,), heads=((4, 2, 16),), state=(24,), decays=(1,), block_size=(16, 24)),
        *grid(spans=(LONG,), heads=((2, 1, 96),), state=(80,), decays=(1,), block_size=(32,)),
        *grid(spans=(MIXED,), heads=((24, 1, 1),), state=(16,), decays=(16,), dtype=FLOATS),
        *grid(spans=(MIXED, LONG), heads=((40, 4, 1),), state=(16,), decays=(16,)),
        *grid(spans=(MIXED,), heads=((6, 2, 20),), state=(10,), decays=(10,)),
        *grid(spans=(MIXED,), heads=((24, 1, 1),), state=(16,), decays=(16,), **NARROW),
        *grid(spans=(LONG,), heads=((4, 2, 16),), state=(24,), decays=(1,), block_size=(64,), padding=(0,), **NARROW),
    ],
    bench_cases=[
        *grid(
            spans=BENCH,
            **MAMBA2,
            decays=(1,),
            dtype=(torch.bfloat16,),
            block_size=(256,),
            kept_as=(torch.float32, torch.bfloat16),
            padding=(0,),
        ),
        *grid(spans=BENCH, **MAMBA, decays=(16,), dtype=(torch.bfloat16,), block_size=(256,), padding=(0,)),
    ],
    num_bytes=lambda c: 2 * nbytes(c.args[6][0]) * c.args[7].num_seqs + 2 * nbytes(c.args[0]),
    updates=(6,),
    rounds_to=lambda c: c.args[0].dtype,
    tolerances={torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2},
)
def state_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, states: Tensor, plan: RecurrentPlan
) -> Tensor:
    """y [T, H, P], and the states that follow are left; ValueError when shapes or dtypes do not fit."""
    check(x.dim() == b.dim() == 3 and dt.shape == x.shape[:2] and a.dim() == 2 and len(a) == x.shape[1], "x, dt or a")
    check(b.shape == c.shape and b.shape[0] == x.shape[0] and a.shape[1] in (1, b.shape[2]), "a, b or c")
    check(x.shape[1] % b.shape[1] == 0 and d.shape == x.shape[1:2], "heads and groups, or d")
    check(x.dtype == b.dtype == c.dtype and x.dtype in FLOATS, "x, b and c are not of one dtype")
    check(dt.dtype == a.dtype == d.dtype == torch.float32 and are_contiguous(dt, a, d), "dt, a or d")
    check(all(are_dense_in_tokens(z) for z in (x, b, c)), "x, b or c is strided within its tokens")
    check_states(states, x.shape[1] * x.shape[2] * b.shape[2], plan)
    if not x.is_cpu:
        return launch(x, dt, a, b, c, d, states, plan)
    (num_tokens, num_heads, head_dim), (_, num_groups, state), dtype = x.shape, b.shape, x.dtype
    x, b, c = (z.float().contiguous() for z in (x, b, c))
    y = torch.empty_like(x)
    scans.run(
        scans.scan, plan.num_seqs * num_heads, 4 * head_dim * state * (num_tokens // plan.num_seqs + 1),
        *scans.places(states, plan), x.data_ptr(), dt.data_ptr(), a.data_ptr(), a.shape[1], b.data_ptr(), c.data_ptr(),
        d.data_ptr(), y.data_ptr(), num_heads, num_groups, head_dim, state,
    )  # fmt: skip
    return y.to(dtype)
