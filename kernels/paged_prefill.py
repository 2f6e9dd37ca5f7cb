"""Attention of tiles of query tokens over a paged KV cache: on any GPU, in any dtype, invariant where that is asked.

Formula and arguments: attention_plan.py; items: prefill_work.py. A program takes the query heads of one KV head for one
tile. A tile of an invariant plan has the same rows for a chunk of any length.

Bound: FLOPs, 4 * head_dim a head and visible key.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from cableway.kernels.attention_plan import AttentionPlan, Scores, make
from cableway.kernels.kv_cache import NO_SCALES, KVScales, as_factor, beside, block_size_of, scales_at
from cableway.kernels.lang import jit, tl, triton
from cableway.kernels.online_softmax import add_scores
from cableway.kernels.registry import Call, call
from cableway.kernels.tuning import OF_BYTES, Tunable


@jit(do_not_specialize=("query_start_ptr", "seq_lens_ptr", "table_stride"))  # which vary between steps
def _paged_prefill(
    q_ptr, cache_ptr, out_ptr, query_start_ptr, seq_lens_ptr, table_ptr, work_ptr, slopes_ptr, sinks_ptr, scale,
    soft_cap, window, value_scale, q_stride, value_offset, table_stride, block_size, rows_a_block, num_kv_heads,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_CAP: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SLOPES: tl.constexpr, REACH: tl.constexpr, HAS_SINKS: tl.constexpr,
    TILE: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """One item of the work, TILE query tokens of one sequence, for the query heads of one KV head."""
    HAS_SCALES: tl.constexpr = cache_ptr.dtype.element_ty == tl.int8
    kv_head, item = tl.program_id(0), tl.program_id(1)
    sequence, first_query = tl.load(work_ptr + item * 2).to(tl.int64), tl.load(work_ptr + item * 2 + 1)
    if sequence >= 0:
        start = tl.load(query_start_ptr + sequence)
        num_queries = tl.load(query_start_ptr + sequence + 1) - start
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
        q = beside(q, cache_ptr.dtype.element_ty)

        top = tl.full((TILE * BLOCK_GROUP,), float("-inf"), tl.float32)
        mass = tl.zeros((TILE * BLOCK_GROUP,), tl.float32)
        slope = 0.0
        if HAS_SINKS:  # a score that was seen first
            top = tl.load(sinks_ptr + kv_head * GROUP + head, mask=head < GROUP, other=0.0)
            mass += 1.0
        if HAS_SLOPES:
            slope = tl.load(slopes_ptr + kv_head * GROUP + head, mask=head < GROUP, other=0.0)[:, None]
        sums = tl.zeros((TILE * BLOCK_GROUP, BLOCK_DIM), tl.float32)
        last_key = tl.minimum(length, length - num_queries + first_query + TILE)
        first_key = 0
        if HAS_WINDOW:
            first_key = tl.maximum(length - num_queries + first_query - window + 1, 0) // BLOCK_KEYS * BLOCK_KEYS
        for keys_from in range(first_key, last_key, BLOCK_KEYS):
            key = keys_from + tl.arange(0, BLOCK_KEYS)
            key_inside = key < last_key
            block = tl.load(table_ptr + sequence * table_stride + key // block_size, mask=key_inside, other=0)
            slot = block.to(tl.int64) * rows_a_block + key % block_size
            place = (slot * num_kv_heads + kv_head)[:, None] * HEAD_DIM + dim[None, :]
            kv_inside = key_inside[:, None] & (dim[None, :] < HEAD_DIM)
            k = as_factor(tl.load(cache_ptr + place, mask=kv_inside, other=0.0), q.dtype)
            v = as_factor(tl.load(cache_ptr + value_offset + place, mask=kv_inside, other=0.0), q.dtype)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            if HAS_SCALES:
                sizes = num_kv_heads, HEAD_DIM, block_size, rows_a_block
                scores *= scales_at(cache_ptr, block, key, key_inside, kv_head, *sizes)[None, :]
                v_scales = scales_at(cache_ptr + value_offset, block, key, key_inside, kv_head, *sizes)
            if HAS_CAP:
                scores = soft_cap * (2 * tl.sigmoid(2 * scores / soft_cap) - 1)
            if HAS_SLOPES:
                scores += slope * (key[None, :] - position[:, None]).to(tl.float32)
            if REACH:
                back = tl.minimum(tl.maximum(position[:, None] - key[None, :], 0), REACH)
                head_biases = ((kv_head * GROUP + tl.minimum(head, GROUP - 1)) * (REACH + 1))[:, None]
                scores += tl.load(slopes_ptr + head_biases + back)
            seen = key_inside[None, :] & (key[None, :] <= position[:, None])
            if HAS_WINDOW:
                seen = seen & (key[None, :] > position[:, None] - window)
            weights, decay, top, mass = add_scores(tl.where(seen, scores, float("-inf")), top, mass)
            if HAS_SCALES:
                weights *= v_scales[None, :]
            sums = sums * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        y = sums * value_scale / tl.where(mass == 0, 1.0, mass)[:, None]  # nobody's rows see nothing
        place = token * num_kv_heads * GROUP * HEAD_DIM + element
        tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=inside)


class Tuning(NamedTuple):
    """Shape of a program's tile."""

    rows: int  # query heads of one KV head, of some tokens
    keys: int
    num_warps: int
    num_stages: int


class Key(NamedTuple):
    """What the best tuning depends on."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    item_bytes: int
    kv_item_bytes: int


def _rule(key: Key) -> Tuning:
    """Two stages of keys and values fit the 99 KiB of a block on smaller GPUs: heads of 128 in float32, of 256 else."""
    block_dim = max(triton.next_power_of_2(key.head_dim), 16)
    return Tuning(64, min(max((1 << 14) // (block_dim * key.item_bytes), 16), 64), 4, 2)


def _candidates(key: Key) -> Iterator[Tuning]:
    for rows, keys, num_warps, num_stages in product((64, 128), (32, 64, 128), (4, 8), (2, 3)):
        if 512 * num_warps <= rows * keys <= 1024 * num_warps:
            yield Tuning(rows, keys, num_warps, num_stages)


def launch(
    q: Tensor, cache: Tensor, plan: AttentionPlan, out: Tensor, scores: Scores, scales: KVScales = NO_SCALES, *,
    tuned: Tuning | None = None,
) -> None:  # fmt: skip
    """Write `out` [T, H, D] for all sequences of an invariant plan, else for those that paged_decode leaves."""
    (num_tokens, num_heads, head_dim), (_, _, rows_a_block, num_kv_heads, _) = q.shape, cache.shape
    key = Key(num_heads, num_kv_heads, head_dim, q.element_size(), cache.element_size())
    t = _rule(key)._replace(rows=16) if plan.invariant else tuned or tuning(key)
    group = num_heads // num_kv_heads
    block_group = triton.next_power_of_2(group)
    tile = max(t.rows // block_group, 1)
    block_group = max(block_group, 16 // tile)  # tl.dot wants 16 rows
    work = plan.prefill_work(num_tokens=num_tokens, tile=tile, skips_singles=not plan.invariant)
    slopes, sinks = scores.slopes if scores.biases is None else scores.biases, scores.sinks
    _paged_prefill[(num_kv_heads, len(work))](
        q, cache, out, plan.query_start, plan.seq_lens, plan.block_table, work,
        q if slopes is None else slopes, q if sinks is None else sinks,
        scores.scale * scales.key, scores.soft_cap, scores.window, scales.value,
        q.stride(0), cache.stride(0), plan.block_table.stride(0), block_size_of(cache), rows_a_block, num_kv_heads,
        GROUP=group, HEAD_DIM=head_dim, HAS_CAP=scores.soft_cap > 0, HAS_WINDOW=scores.window > 0,
        HAS_SLOPES=scores.slopes is not None, REACH=0 if scores.biases is None else scores.biases.shape[1] - 1,
        HAS_SINKS=sinks is not None,
        TILE=tile, BLOCK_GROUP=block_group, BLOCK_DIM=max(triton.next_power_of_2(head_dim), 16), BLOCK_KEYS=t.keys,
        num_warps=t.num_warps, num_stages=t.num_stages,
    )  # fmt: skip


def _make(key: Key, device: str) -> Call:
    """Two prompts of a thousand tokens."""
    kept_as = torch.int8 if key.kv_item_bytes == 1 else None
    made = make(((1024, 1024),) * 2, key[:3], OF_BYTES[key.item_bytes], kept_as=kept_as, device=device)
    return call(*made.args, torch.empty_like(made.args[0]), **made.kwargs)


tuning = Tunable("paged_prefill", Key, Tuning, rule=_rule, candidates=_candidates, make=_make, launch=launch)
