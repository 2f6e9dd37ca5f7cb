"""Gated delta rule, chunk by chunk: for sequences that bring many tokens.

Formula and arguments: delta_scan.py; chunks: chunk_work.py. With s_t the sum of g up to and with token t of a chunk, h
the state before it, and e_t = beta_t (v_t - what the state then holds at k_t) what token t corrects,

    e = u - w hᵀ,   (1 + A) [u, w] = beta [v, exp(s) k],   A_tu = beta_t (k_t · k_u) exp(s_t - s_u) for u < t
    y_t = exp(s_t) h q_t + sum over u <= t of exp(s_t - s_u) (q_t · k_u) e_u
    h'  = exp(s_last) h + sum over u of exp(s_last - s_u) e_u k_uᵀ

(Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", 2024, and "Gated Delta
Networks", 2024; the WY form is Bischof and Van Loan's, 1987, the triangular one Joffrain et al.'s, 2006.) One kernel
makes u and w of all chunks, the second goes through the chunks of a sequence with the state in registers, leaves the
one before each chunk and turns u into e, and the third makes y. Products run on tensor cores, in the dtype of k.

Bound: bytes; k and q twice, v, y, u and w, and the states before chunks twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cableway.kernels.lang import jit, tl, triton
from cableway.kernels.recurrence import keep, resumed, rows_of, span, tile_width

if TYPE_CHECKING:
    from cableway.kernels.recurrence import RecurrentPlan

_CHUNK = {torch.float32: 32, torch.float16: 64, torch.bfloat16: 64}
_MOST_KEY_DIM = 128
_STATE_DIM = 32
"""Of a head's values, that a program takes through a sequence."""


@jit
def _inverse(below, ROWS: tl.constexpr):
    """The inverse of 1 + below, a matrix [ROWS, ROWS] f32 that is zero on its diagonal and above it.

    Blocks on the diagonal are inverted row after row, side by side, and then joined: a series of powers of the whole
    would need a few products only, but where keys are alike its terms grow far beyond their sum.
    """
    BLOCK: tl.constexpr = 16
    PARTS: tl.constexpr = ROWS // BLOCK
    PRECISION: tl.constexpr = "tf32x3" if ROWS == 64 else "ieee"
    row, i = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    is_diagonal = row[:, None] // BLOCK == row[None, :] // BLOCK
    blocks = tl.sum(tl.reshape(tl.where(is_diagonal, below, 0.0), (PARTS, BLOCK, PARTS, BLOCK)), 2)
    inverse = tl.where((i[:, None] == i[None, :])[None, :, :], blocks * 0.0 + 1.0, 0.0)
    for r in range(1, BLOCK):
        is_row = (i == r)[None, :, None]
        of_row = tl.sum(tl.where(is_row, blocks, 0.0), 1)
        known = tl.sum(of_row[:, :, None] * inverse, 1)
        inverse = tl.where(is_row, inverse - known[:, None, :], inverse)
    across = tl.broadcast_to(inverse[:, :, None, :], (PARTS, BLOCK, PARTS, BLOCK))
    inverse = tl.where(is_diagonal, tl.reshape(across, (ROWS, ROWS)), 0.0)
    if PARTS > 1:
        # Now (1 + m)^-1 inverse, where m has no blocks on its diagonal: its PARTS-th power is zero.
        m = tl.dot(inverse, tl.where(is_diagonal, 0.0, below), input_precision=PRECISION)
        if PARTS > 2:
            inverse += tl.dot(tl.dot(m, m, input_precision=PRECISION), inverse, input_precision=PRECISION)
        inverse -= tl.dot(m, inverse, input_precision=PRECISION)
    return inverse


@jit(do_not_specialize=("query_start_ptr", "seq_lens_ptr", "work_ptr"))  # which vary between steps
def _delta_factors(
    k_ptr, v_ptr, g_ptr, beta_ptr, u_ptr, w_ptr, decay_ptr, query_start_ptr, seq_lens_ptr, work_ptr, k_stride,
    v_stride,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, KEY_DIM: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_KEY: tl.constexpr,
):  # fmt: skip
    """u, w and s of one head for the tokens of one chunk."""
    item, head = tl.program_id(0), tl.program_id(1)
    sequence, chunk = tl.load(work_ptr + item * 2), tl.load(work_ptr + item * 2 + 1)
    if sequence >= 0:
        start, before, length = span(query_start_ptr, seq_lens_ptr, sequence)
        row, n = tl.arange(0, ROWS), tl.arange(0, BLOCK_KEY)
        position = chunk * CHUNK + row
        is_new = (row < CHUNK) & (position >= before) & (position < length)
        token = start + position - before
        k = rows_of(k_ptr + head // GROUP * KEY_DIM, token, is_new, k_stride, n, n < KEY_DIM)
        beta = tl.load(beta_ptr + token * NUM_HEADS + head, mask=is_new, other=0.0)
        decay = tl.cumsum(tl.load(g_ptr + token * NUM_HEADS + head, mask=is_new, other=0.0), 0)
        tl.store(decay_ptr + token * NUM_HEADS + head, decay, mask=is_new)
        apart = tl.where(row[:, None] > row[None, :], decay[:, None] - decay[None, :], float("-inf"))
        below = tl.dot(k, tl.trans(k), input_precision="ieee") * tl.exp(apart) * beta[:, None]
        solved = _inverse(below, ROWS).to(k.dtype)
        scaled = (k * (beta * tl.exp(decay))[:, None]).to(k.dtype)
        w = tl.dot(solved, scaled, input_precision="ieee")
        out = (token * NUM_HEADS + head)[:, None]
        tl.store(w_ptr + out * KEY_DIM + n[None, :], w.to(k.dtype), mask=is_new[:, None] & (n < KEY_DIM)[None, :])
        for first_dim in range(0, HEAD_DIM, BLOCK_DIM):
            dim = first_dim + tl.arange(0, BLOCK_DIM)
            v = rows_of(v_ptr + head * HEAD_DIM, token, is_new, v_stride, dim, dim < HEAD_DIM)
            u = tl.dot(solved, (v * beta[:, None]).to(k.dtype), input_precision="ieee")
            inside = is_new[:, None] & (dim < HEAD_DIM)[None, :]
            tl.store(u_ptr + out * HEAD_DIM + dim[None, :], u.to(k.dtype), mask=inside)


@jit(do_not_specialize=("query_start_ptr", "seq_lens_ptr", "table_stride", "most_singly"))  # which vary between steps
def _delta_states(
    k_ptr, decay_ptr, u_ptr, w_ptr, states_ptr, chunk_states_ptr, query_start_ptr, seq_lens_ptr, table_ptr,
    first_items_ptr, k_stride, state_stride, table_stride, block_size, most_singly,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, KEY_DIM: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_KEY: tl.constexpr,
):  # fmt: skip
    """Part of the states of one head of one sequence, [keys, values], chunk after chunk; u becomes e."""
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, before, length = span(query_start_ptr, seq_lens_ptr, sequence)
    if length - before > most_singly:
        table_ptr += sequence * table_stride
        row, n = tl.arange(0, ROWS), tl.arange(0, BLOCK_KEY)
        dim = tl.program_id(2) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
        n_inside, dim_inside = n < KEY_DIM, dim < HEAD_DIM
        inside = n_inside[:, None] & dim_inside[None, :]
        place = (head * HEAD_DIM + dim)[None, :] * KEY_DIM + n[:, None]
        h = resumed(states_ptr, table_ptr, place, inside, before, state_stride, block_size)
        item = tl.load(first_items_ptr + sequence).to(tl.int64)
        for chunk in range(before // CHUNK, tl.cdiv(length, CHUNK)):
            position = chunk * CHUNK + row
            is_new = (row < CHUNK) & (position >= before) & (position < length)
            token = start + position - before
            of_head = token * NUM_HEADS + head
            k = rows_of(k_ptr + head // GROUP * KEY_DIM, token, is_new, k_stride, n, n_inside)
            w = rows_of(w_ptr, of_head, is_new, KEY_DIM, n, n_inside)
            u = rows_of(u_ptr, of_head, is_new, HEAD_DIM, dim, dim_inside)
            decay = tl.load(decay_ptr + of_head, mask=is_new, other=0.0)
            narrow = h.to(k.dtype)
            chunk_place = ((item * NUM_HEADS + head) * KEY_DIM + n)[:, None] * HEAD_DIM + dim[None, :]
            tl.store(chunk_states_ptr + chunk_place, narrow, mask=inside)
            e = u - tl.dot(w, narrow, input_precision="ieee")
            tl.store(
                u_ptr + of_head[:, None] * HEAD_DIM + dim[None, :], e.to(k.dtype),
                mask=is_new[:, None] & dim_inside[None, :],
            )  # fmt: skip
            total = tl.min(decay, 0)  # the last one: none adds to a state
            taken = (e * tl.exp(total - decay)[:, None]).to(k.dtype)
            h = h * tl.exp(total) + tl.dot(tl.trans(k), taken, input_precision="ieee")
            num_done = tl.minimum((chunk + 1) * CHUNK, length)
            keep(states_ptr, table_ptr, place, inside, h, num_done, length, state_stride, block_size)
            item += 1


@jit(do_not_specialize=("query_start_ptr", "seq_lens_ptr", "work_ptr"))  # which vary between steps
def _delta_outputs(
    q_ptr, k_ptr, g_ptr, e_ptr, y_ptr, chunk_states_ptr, query_start_ptr, seq_lens_ptr, work_ptr, q_stride,
    k_stride,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, KEY_DIM: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_KEY: tl.constexpr,
):  # fmt: skip
    """What the heads of one key head give for the tokens of one chunk."""
    item, k_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sequence, chunk = tl.load(work_ptr + item * 2), tl.load(work_ptr + item * 2 + 1)
    if sequence >= 0:
        start, before, length = span(query_start_ptr, seq_lens_ptr, sequence)
        row, n = tl.arange(0, ROWS), tl.arange(0, BLOCK_KEY)
        n_inside = n < KEY_DIM
        position = chunk * CHUNK + row
        is_new = (row < CHUNK) & (position >= before) & (position < length)
        token = start + position - before
        q = rows_of(q_ptr + k_head * KEY_DIM, token, is_new, q_stride, n, n_inside)
        k = rows_of(k_ptr + k_head * KEY_DIM, token, is_new, k_stride, n, n_inside)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        PARTS: tl.constexpr = (HEAD_DIM + BLOCK_DIM - 1) // BLOCK_DIM
        for part in range(GROUP * PARTS):
            head = k_head * GROUP + part // PARTS
            dim = part % PARTS * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
            dim_inside, of_head = dim < HEAD_DIM, token * NUM_HEADS + head
            e = rows_of(e_ptr, of_head, is_new, HEAD_DIM, dim, dim_inside)
            chunk_place = ((item * NUM_HEADS + head) * KEY_DIM + n)[:, None] * HEAD_DIM + dim[None, :]
            h = tl.load(chunk_states_ptr + chunk_place, mask=n_inside[:, None] & dim_inside[None, :], other=0.0)
            decay = tl.cumsum(tl.load(g_ptr + of_head, mask=is_new, other=0.0), 0)
            apart = tl.where(row[:, None] >= row[None, :], decay[:, None] - decay[None, :], float("-inf"))
            weights = (products * tl.exp(apart)).to(e.dtype)
            y = tl.dot(q, h, input_precision="ieee") * tl.exp(decay)[:, None]
            y = tl.dot(weights, e, y, input_precision="ieee")
            out_place = of_head[:, None] * HEAD_DIM + dim[None, :]
            tl.store(y_ptr + out_place, y.to(e.dtype), mask=is_new[:, None] & dim_inside[None, :])


def fits(k: Tensor, plan: RecurrentPlan) -> bool:
    """Whether there may be sequences for these kernels, whose states they can hold."""
    return plan.has_chunks and k.shape[2] <= _MOST_KEY_DIM


def launch(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, states: Tensor, plan: RecurrentPlan, y: Tensor
) -> None:
    """Write `y` [T, H, P] and the states that follow, of the sequences that are not taken token by token."""
    (num_tokens, num_heads, head_dim), (_, num_k_heads, key_dim) = v.shape, k.shape
    chunk = plan.chunk_len(_CHUNK[k.dtype])
    work, first_items = plan.chunk_work(num_tokens, chunk)
    u = torch.empty(v.shape, dtype=k.dtype, device=k.device)
    w = torch.empty(num_tokens, num_heads, key_dim, dtype=k.dtype, device=k.device)
    decay = torch.empty_like(g)
    chunk_states = torch.empty(len(work), num_heads, key_dim, head_dim, dtype=k.dtype, device=k.device)
    block_dim = tile_width(head_dim, k.dtype)
    sizes = {
        "NUM_HEADS": num_heads, "GROUP": num_heads // num_k_heads, "HEAD_DIM": head_dim, "KEY_DIM": key_dim,
        "CHUNK": chunk, "ROWS": max(chunk, 16), "BLOCK_KEY": tile_width(key_dim, k.dtype),
    }  # fmt: skip
    starts = (plan.query_start, plan.seq_lens)
    _delta_factors[(len(work), num_heads)](
        k, v, g, beta, u, w, decay, *starts, work, k.stride(0), v.stride(0), **sizes, BLOCK_DIM=min(block_dim, 64),
        num_warps=4,
    )  # fmt: skip
    state_dim = min(block_dim, _STATE_DIM)
    _delta_states[(plan.num_seqs, num_heads, triton.cdiv(head_dim, state_dim))](
        k, decay, u, w, states, chunk_states, *starts, plan.block_table, first_items, k.stride(0), states.stride(0),
        plan.block_table.stride(0), plan.block_size, plan.most_singly, **sizes, BLOCK_DIM=state_dim,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    _delta_outputs[(len(work), num_k_heads)](
        q, k, g, u, y, chunk_states, *starts, work, q.stride(0), k.stride(0), **sizes,
        BLOCK_DIM=min(block_dim, 64), num_warps=4, num_stages=2,
    )  # fmt: skip
