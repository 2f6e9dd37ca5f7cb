"""Causal attention of new tokens over a paged KV cache: prefill, chunked prefill and decode.

Formula and arguments: attention_plan.py. The sequences that come first and bring one token each are computed by
cluster_decode.py where it fits and there are no others, else by hopper_decode.py where it fits, else by
paged_decode.py; the others by hopper_prefill.py where it fits, else by paged_prefill.py, which computes all of them
where results must be invariant. What is launched depends on shapes alone, and on how long a sequence may be: a captured
graph may replay it.

Bound: bytes for decode (keys and values of every sequence), FLOPs for prefill (4 * head_dim a head and visible key).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cableway.kernels import cluster_decode, hopper_decode, hopper_prefill, paged_decode, paged_prefill
from cableway.kernels.attention_plan import AttentionPlan, Scores, check_fits, make, num_bytes, ref
from cableway.kernels.cpu import attention as cpu_attention
from cableway.kernels.kv_cache import F8, NO_SCALES, KVScales, block_size_of
from cableway.kernels.registry import FLOATS, Call, are_contiguous, check, grid, kernel


def _as_it_is_seen(q: Tensor, cache: Tensor, plan: AttentionPlan, scores: Scores) -> AttentionPlan:
    return plan.in_chunks(scores.chunk, block_size_of(cache), len(q)) if scores.chunk else plan


def launch(q: Tensor, cache: Tensor, plan: AttentionPlan, scores: Scores, scales: KVScales = NO_SCALES) -> Tensor:
    plan = _as_it_is_seen(q, cache, plan, scores)
    check(are_contiguous(plan.query_start, plan.seq_lens) and plan.block_table.stride(1) == 1, "the plan is strided")
    are_singles = plan.max_query_len == 1 and len(q) == len(plan.seq_lens)
    is_common = scores.biases is None  # which kernels in CUDA C++ do not know
    if are_singles and is_common and cluster_decode.fits(q, cache, plan):
        return cluster_decode.launch(q, cache, plan, scores, scales)
    if plan.invariant or not plan.may_have_singles:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    else:
        if is_common and hopper_decode.fits(q, cache, plan):
            out = hopper_decode.launch(q, cache, plan, scores)
        else:
            out = paged_decode.launch(q, cache, plan, scores, scales)
        if are_singles:
            return out
    if is_common and hopper_prefill.fits(q, cache, plan):
        hopper_prefill.launch(q, cache, plan, out, scores)
    else:
        paged_prefill.launch(q, cache, plan, out, scores, scales)
    return out


def _visible_keys(made: Call) -> int:
    """Pairs of a query token and a key it sees."""
    window, chunk = made.kwargs["scores"].window, made.kwargs["scores"].chunk
    positions = (
        p % (chunk or length) for start, end, length in made.args[2].spans for p in range(length - end + start, length)
    )
    return sum(min(p + 1, window or p + 1) for p in positions)


DECODE = ((1, 5), (1, 33), (1, 70), (1, 1))
MIXED = ((1, 40), (1, 90), (20, 20), (7, 30), (1, 9), (70, 75), (13, 0))
MANY = tuple((1, length) for length in (255, 3, 130, 64, 1, 17, 16, 90, 33, 48, 5, 128, 31, 63, 8, 2, 40, 100))
BENCH_DECODE, BENCH_PREFILL = ((1, 512),) * 16, ((512, 512),)
BENCH_MIXED = ((1, 512),) * 16 + ((1024, 1024),) * 4


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=[
        *grid(spans=(DECODE, MIXED), heads=((9, 3, 64), (4, 4, 32)), dtype=FLOATS, invariant=(False, True)),
        *grid(spans=(MIXED, DECODE), heads=((6, 2, 80),), dtype=FLOATS, window=(16,), soft_cap=(0.0, 2.0)),
        *grid(spans=(MIXED,), heads=((4, 1, 16),), dtype=FLOATS, block_size=(8, 24), window=(0, 9), invariant=(True,)),
        *grid(spans=(MIXED,), heads=((6, 2, 32),), dtype=FLOATS, window=(9,), slopes=(False, True), sinks=(True,)),
        *grid(spans=(MIXED, DECODE), heads=((6, 2, 32),), dtype=FLOATS, chunk=(32,), invariant=(False, True)),
        *grid(spans=(MANY, MANY + MIXED[2:4]), heads=((6, 2, 64),), dtype=FLOATS, sinks=(False, True)),
        *grid(spans=(MANY,), heads=((16, 1, 128),), dtype=FLOATS, window=(50,), soft_cap=(2.0,), block_size=(32,)),
        *grid(spans=(MIXED,), heads=((4, 4, 16),), dtype=FLOATS, slopes=(True,), soft_cap=(2.0,), invariant=(True,)),
        *grid(spans=(MIXED,), heads=((6, 2, 32),), dtype=FLOATS, reach=(10, 60), invariant=(False, True)),
        *grid(
            spans=(MIXED,),
            heads=((6, 2, 48),),
            dtype=FLOATS,
            block_size=(24,),
            window=(9, 0),
            invariant=(True, False),
            kept_as=(torch.int8, *F8),
            scales=(KVScales(0.5, 3.0),),
        ),
    ],
    bench_cases=[
        *grid(
            spans=(((1, 128),), ((1, 1024),), BENCH_DECODE, BENCH_PREFILL, BENCH_MIXED),
            heads=((9, 3, 64), (32, 8, 128)),
            dtype=(torch.bfloat16,),
        ),
        *grid(
            spans=(BENCH_PREFILL, BENCH_MIXED),
            heads=((32, 8, 128),),
            dtype=(torch.bfloat16,),
            kept_as=(torch.int8, torch.float8_e4m3fn),
        ),
    ],
    num_bytes=num_bytes,
    num_flops=lambda c: 4 * c.args[0].shape[1] * c.args[0].shape[2] * _visible_keys(c),
    tolerances={torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 4e-2},
)
def paged_attention(
    q: Tensor, cache: Tensor, plan: AttentionPlan, scores: Scores, scales: KVScales = NO_SCALES
) -> Tensor:
    """Attend q [T, H, D] to the cached keys of its sequences -> [T, H, D]; ValueError when shapes do not fit."""
    check_fits(q, cache, scores)
    if q.device.type == "cpu":
        return cpu_attention.attend(q, cache, _as_it_is_seen(q, cache, plan, scores), scores, scales)
    return launch(q, cache, plan, scores, scales)
