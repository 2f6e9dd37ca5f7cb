"""Selective state spaces whose heads decay as one, chunk by chunk: for sequences that bring many tokens.

Formula and arguments: state_scan.py, with a [num_heads, 1]; chunks: chunk_work.py. With s_t the sum of dt a up to and
with token t of a chunk, and h the state before it,

    y_t = exp(s_t) h c_t + sum over u <= t of exp(s_t - s_u) dt_u (c_t · b_u) x_u + d x_t
    h'  = exp(s_last) h + sum over u of exp(s_last - s_u) dt_u x_u b_uᵀ

(Dao and Gu, "Transformers are SSMs", 2024: the state space dual.) A first kernel goes through the chunks of a sequence
with the state in registers, and leaves the one before each chunk, rounded to the dtype of x; a second computes all
chunks side by side. Products run on tensor cores, in the dtype of x.

Bound: bytes; x, b and c twice, y, and the states before chunks twice.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cableway.kernels.lang import jit, tl, triton
from cableway.kernels.recurrence import keep, resumed, rows_of, span, tile_width

if TYPE_CHECKING:
    from cableway.kernels.recurrence import RecurrentPlan

_CHUNK = 64
_BLOCK_DIM = _BLOCK_STATE = 64
_HEADS = 4
"""Of a group, at most, that share the products of its c and b in one program."""


@jit(do_not_specialize=("query_start_ptr", "seq_lens_ptr", "table_stride", "most_singly"))  # which vary between steps
def _chunk_states(
    x_ptr, dt_ptr, a_ptr, b_ptr, states_ptr, chunk_states_ptr, query_start_ptr, seq_lens_ptr, table_ptr,
    first_items_ptr, x_stride, b_stride, state_stride, table_stride, block_size, most_singly,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, STATE: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_STATE: tl.constexpr,
):  # fmt: skip
    """Part of the states of one head of one sequence, chunk after chunk."""
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, before, length = span(query_start_ptr, seq_lens_ptr, sequence)
    if length - before > most_singly:
        table_ptr += sequence * table_stride
        STATE_PARTS: tl.constexpr = (STATE + BLOCK_STATE - 1) // BLOCK_STATE
        dim = tl.program_id(2) // STATE_PARTS * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
        n = tl.program_id(2) % STATE_PARTS * BLOCK_STATE + tl.arange(0, BLOCK_STATE)
        dim_inside, n_inside = dim < HEAD_DIM, n < STATE
        inside = dim_inside[:, None] & n_inside[None, :]
        place = (head * HEAD_DIM + dim)[:, None] * STATE + n[None, :]
        row = tl.arange(0, ROWS)
        a = tl.load(a_ptr + head)
        h = resumed(states_ptr, table_ptr, place, inside, before, state_stride, block_size)
        item = tl.load(first_items_ptr + sequence).to(tl.int64)
        for chunk in range(before // CHUNK, tl.cdiv(length, CHUNK)):
            position = chunk * CHUNK + row
            is_new = (row < CHUNK) & (position >= before) & (position < length)
            token = start + position - before
            tl.store(
                chunk_states_ptr + item * (NUM_HEADS * HEAD_DIM * STATE) + place,
                h.to(x_ptr.dtype.element_ty),
                mask=inside,
            )
            dt = tl.load(dt_ptr + token * NUM_HEADS + head, mask=is_new, other=0.0)
            x = rows_of(x_ptr + head * HEAD_DIM, token, is_new, x_stride, dim, dim_inside)
            b = rows_of(b_ptr + head // GROUP * STATE, token, is_new, b_stride, n, n_inside)
            decay = dt * a
            total = tl.sum(decay, 0)
            weight = tl.exp(total - tl.cumsum(decay, 0)) * dt
            taken = (b * weight[:, None]).to(x.dtype)
            h = h * tl.exp(total) + tl.dot(tl.trans(x), taken, input_precision="ieee")
            num_done = tl.minimum((chunk + 1) * CHUNK, length)
            keep(states_ptr, table_ptr, place, inside, h, num_done, length, state_stride, block_size)
            item += 1


@jit(do_not_specialize=("query_start_ptr", "seq_lens_ptr", "work_ptr"))  # which vary between steps
def _chunk_outputs(
    x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, d_ptr, y_ptr, chunk_states_ptr, query_start_ptr, seq_lens_ptr, work_ptr,
    x_stride, b_stride, c_stride,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, STATE: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_STATE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """What part of HEADS heads of a group gives for the tokens of one chunk."""
    item, first_head = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS
    sequence, chunk = tl.load(work_ptr + item * 2), tl.load(work_ptr + item * 2 + 1)
    if sequence >= 0:
        start, before, length = span(query_start_ptr, seq_lens_ptr, sequence)
        row, n = tl.arange(0, ROWS), tl.arange(0, BLOCK_STATE)
        dim = tl.program_id(2) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
        dim_inside, n_inside = dim < HEAD_DIM, n < STATE
        position = chunk * CHUNK + row
        is_new = (row < CHUNK) & (position >= before) & (position < length)
        token = start + position - before
        b = rows_of(b_ptr + first_head // GROUP * STATE, token, is_new, b_stride, n, n_inside)
        c = rows_of(c_ptr + first_head // GROUP * STATE, token, is_new, c_stride, n, n_inside)
        products = tl.dot(c, tl.trans(b), input_precision="ieee")
        for head in range(first_head, first_head + HEADS):
            x = rows_of(x_ptr + head * HEAD_DIM, token, is_new, x_stride, dim, dim_inside)
            place = (head * HEAD_DIM + dim)[:, None] * STATE + n[None, :]
            h = tl.load(
                chunk_states_ptr + item * (NUM_HEADS * HEAD_DIM * STATE) + place,
                mask=dim_inside[:, None] & n_inside[None, :], other=0.0,
            )  # fmt: skip
            dt = tl.load(dt_ptr + token * NUM_HEADS + head, mask=is_new, other=0.0)
            decay = tl.cumsum(dt * tl.load(a_ptr + head), 0)
            # What comes later is left out before exp: it could overflow.
            late = decay - tl.log(dt)  # one vector for columns: of two, each thread would load its own copy of dt
            apart = tl.where(row[:, None] >= row[None, :], decay[:, None] - late[None, :], float("-inf"))
            weights = (products * tl.exp(apart)).to(x.dtype)
            y = tl.dot(c, tl.trans(h), input_precision="ieee") * tl.exp(decay)[:, None]
            y = tl.dot(weights, x, y, input_precision="ieee") + tl.load(d_ptr + head) * x
            out_place = (token[:, None] * NUM_HEADS + head) * HEAD_DIM + dim[None, :]
            tl.store(y_ptr + out_place, y.to(x.dtype), mask=is_new[:, None] & dim_inside[None, :])


def launch(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, states: Tensor, plan: RecurrentPlan, y: Tensor
) -> None:
    """Write `y` [T, H, P] and the states that follow, of the sequences that are not taken token by token."""
    (num_tokens, num_heads, head_dim), (_, num_groups, state) = x.shape, b.shape
    chunk = plan.chunk_len(_CHUNK)
    work, first_items = plan.chunk_work(num_tokens, chunk)
    block_dim = min(tile_width(head_dim, x.dtype), _BLOCK_DIM)
    block_state = tile_width(state, x.dtype)
    block_part = min(block_state, _BLOCK_STATE)
    num_parts = triton.cdiv(head_dim, block_dim)
    chunk_states = torch.empty(len(work), num_heads, head_dim, state, dtype=x.dtype, device=x.device)
    sizes = {
        "NUM_HEADS": num_heads, "GROUP": num_heads // num_groups, "HEAD_DIM": head_dim, "STATE": state, "CHUNK": chunk,
        "ROWS": max(chunk, 16), "BLOCK_DIM": block_dim,
    }  # fmt: skip
    _chunk_states[(plan.num_seqs, num_heads, num_parts * triton.cdiv(state, block_part))](
        x, dt, a, b, states, chunk_states, plan.query_start, plan.seq_lens, plan.block_table, first_items,
        x.stride(0), b.stride(0), states.stride(0), plan.block_table.stride(0), plan.block_size, plan.most_singly,
        **sizes, BLOCK_STATE=block_part, num_warps=4, num_stages=3,
    )  # fmt: skip
    heads = math.gcd(num_heads // num_groups, _HEADS)
    _chunk_outputs[(len(work), num_heads // heads, num_parts)](
        x, dt, a, b, c, d, y, chunk_states, plan.query_start, plan.seq_lens, work, x.stride(0), b.stride(0),
        c.stride(0), **sizes, BLOCK_STATE=block_state, HEADS=heads, num_warps=4, num_stages=2,
    )  # fmt: skip
