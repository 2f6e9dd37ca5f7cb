"""Causal attention of new tokens over a paged KV cache: prefill, chunked prefill and decode.

Formula and arguments: attention_plan.py. Steps of one token a sequence have a kernel of their own in paged_decode.py,
unless results must be invariant: then one kernel does all.

Bound: bytes for decode (keys and values of every sequence), FLOPs for prefill (4 * head_dim a head and visible key).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cableway.kernels import paged_decode
from cableway.kernels.attention_plan import AttentionPlan, check_fits, make, num_bytes, ref
from cableway.kernels.cpu import attention as cpu_attention
from cableway.kernels.lang import jit, tl, triton
from cableway.kernels.registry import FLOATS, Call, are_contiguous, check, grid, kernel


@jit
def _paged_attention(
    q_ptr, cache_ptr, out_ptr, query_start_ptr, seq_lens_ptr, table_ptr, scale, soft_cap, window,
    q_stride, value_offset, table_stride, block_size, num_kv_heads,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
    TILE: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """One tile of TILE query tokens of one sequence, for the query heads of one KV head."""
    sequence, kv_head = tl.program_id(0), tl.program_id(2)
    start = tl.load(query_start_ptr + sequence)
    num_queries = tl.load(query_start_ptr + sequence + 1) - start
    first_query = tl.program_id(1) * TILE
    if first_query < num_queries:
        length = tl.load(seq_lens_ptr + sequence)
        row = tl.arange(0, TILE * BLOCK_GROUP)
        query, head = first_query + row // BLOCK_GROUP, row % BLOCK_GROUP
        position = length - num_queries + query
        dim = tl.arange(0, BLOCK_DIM)
        row_inside = (query < num_queries) & (head < GROUP)
        inside = row_inside[:, None] & (dim[None, :] < HEAD_DIM)
        element = (kv_head * GROUP + head)[:, None] * HEAD_DIM + dim[None, :]
        token = (start + query).to(tl.int64)[:, None]
        q = tl.load(q_ptr + token * q_stride + element, mask=inside, other=0.0)

        top = tl.full((TILE * BLOCK_GROUP,), float("-inf"), tl.float32)
        mass = tl.zeros((TILE * BLOCK_GROUP,), tl.float32)
        sums = tl.zeros((TILE * BLOCK_GROUP, BLOCK_DIM), tl.float32)
        last_key = tl.minimum(length, length - num_queries + first_query + TILE)
        first_key = 0
        if HAS_WINDOW:
            first_key = tl.maximum(length - num_queries + first_query - window + 1, 0) // BLOCK_KEYS * BLOCK_KEYS
        for keys_from in range(first_key, last_key, BLOCK_KEYS):
            key = keys_from + tl.arange(0, BLOCK_KEYS)
            key_inside = key < last_key
            block = tl.load(table_ptr + sequence * table_stride + key // block_size, mask=key_inside, other=0)
            slot = block.to(tl.int64) * block_size + key % block_size
            place = (slot * num_kv_heads + kv_head)[:, None] * HEAD_DIM + dim[None, :]
            kv_inside = key_inside[:, None] & (dim[None, :] < HEAD_DIM)
            k = tl.load(cache_ptr + place, mask=kv_inside, other=0.0)
            v = tl.load(cache_ptr + value_offset + place, mask=kv_inside, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            if HAS_CAP:
                scores = soft_cap * (2 * tl.sigmoid(2 * scores / soft_cap) - 1)
            seen = key_inside[None, :] & (key[None, :] <= position[:, None])
            if HAS_WINDOW:
                seen = seen & (key[None, :] > position[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            # A row that has seen nothing yet has no maximum: keep its differences finite.
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights = tl.exp(scores - shift[:, None])
            decay = tl.exp(top - shift)
            mass = mass * decay + tl.sum(weights, 1)
            sums = sums * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            top = new_top
        y = sums / tl.where(mass == 0, 1.0, mass)[:, None]  # nobody's rows see nothing
        tl.store(out_ptr + token * num_kv_heads * GROUP * HEAD_DIM + element, y.to(q.dtype), mask=inside)


def launch(
    q: Tensor, cache: Tensor, plan: AttentionPlan, *, scale: float, window: int = 0, soft_cap: float = 0.0,
    slopes: Tensor | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    check(slopes is None and sinks is None, "slopes and sinks are not in this kernel yet")
    if plan.max_query_len == 1 and not plan.invariant and len(q) == len(plan.seq_lens):
        return paged_decode.launch(q, cache, plan, scale=scale, window=window, soft_cap=soft_cap)
    (_, num_heads, head_dim), (_, _, block_size, num_kv_heads, _) = q.shape, cache.shape
    check(are_contiguous(plan.query_start, plan.seq_lens) and plan.block_table.stride(1) == 1, "the plan is strided")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    group = num_heads // num_kv_heads
    block_group = triton.next_power_of_2(group)
    # A tile has at least 16 rows, which tl.dot wants. An invariant one has the same rows for a chunk of any length.
    most_rows = 16 if plan.invariant else 64
    tile = max(most_rows // block_group, 1)
    block_group = max(block_group, 16 // tile)
    block_dim = max(triton.next_power_of_2(head_dim), 16)
    # Two stages of keys and values fit the 99 KiB of a block on smaller GPUs: heads of 128 in float32, of 256 else.
    block_keys = min(max((1 << 14) // (block_dim * q.element_size()), 16), 64)
    _paged_attention[(plan.seq_lens.shape[0], triton.cdiv(plan.max_query_len, tile), num_kv_heads)](
        q, cache, out, plan.query_start, plan.seq_lens, plan.block_table, scale, soft_cap, window,
        q.stride(0), cache.stride(0), plan.block_table.stride(0), block_size, num_kv_heads,
        GROUP=group, HEAD_DIM=head_dim, HAS_CAP=soft_cap > 0, HAS_WINDOW=window > 0,
        TILE=tile, BLOCK_GROUP=block_group, BLOCK_DIM=block_dim, BLOCK_KEYS=block_keys,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


def _visible_keys(made: Call) -> int:
    """Pairs of a query token and a key it sees."""
    window = made.kwargs["window"]
    lengths = (p + 1 for start, end, length in made.args[2].spans for p in range(length - end + start, length))
    return sum(min(length, window or length) for length in lengths)


DECODE = ((1, 5), (1, 33), (1, 70), (1, 1))
MIXED = ((1, 40), (20, 20), (7, 30), (1, 9), (70, 75))
BENCH_DECODE, BENCH_PREFILL = ((1, 512),) * 16, ((512, 512),)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=[
        *grid(spans=(DECODE, MIXED), heads=((9, 3, 64), (4, 4, 32)), dtype=FLOATS, invariant=(False, True)),
        *grid(spans=(MIXED, DECODE), heads=((6, 2, 80),), dtype=FLOATS, window=(16,), soft_cap=(0.0, 2.0)),
        *grid(spans=(MIXED,), heads=((4, 1, 16),), dtype=FLOATS, block_size=(8, 24), window=(0, 9), invariant=(True,)),
    ],
    bench_cases=grid(
        spans=(((1, 128),), ((1, 1024),), BENCH_DECODE, BENCH_PREFILL),
        heads=((9, 3, 64), (32, 8, 128)),
        dtype=(torch.bfloat16,),
    ),
    num_bytes=num_bytes,
    num_flops=lambda c: 4 * c.args[0].shape[1] * c.args[0].shape[2] * _visible_keys(c),
    tolerances={torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 4e-2},
)
def paged_attention(
    q: Tensor, cache: Tensor, plan: AttentionPlan, *, scale: float, window: int = 0, soft_cap: float = 0.0,
    slopes: Tensor | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attend q [T, H, D] to the cached keys of its sequences -> [T, H, D]; ValueError when shapes do not fit."""
    check_fits(q, cache)
    form = cpu_attention.attend if q.device.type == "cpu" else launch
    return form(q, cache, plan, scale=scale, window=window, soft_cap=soft_cap, slopes=slopes, sinks=sinks)
