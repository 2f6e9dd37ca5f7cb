"""Attention of one new token a sequence, for few sequences, on Hopper GPUs, in CUDA C++ (cluster_decode.cu).

Formula and arguments: attention_plan.py; the plan has one token a sequence, in order, as paged_decode.py has it. Few
sequences leave most of a GPU idle, and what counts is how long the last program takes: here up to eight share the keys
of one head, and put their parts together without a way through memory. Numbers of 8 bits are converted in registers.

Bound: latency.

PERF: H200, 8 KV heads of 128, behind rope_and_write in a graph, us; in brackets hopper_decode.py, paged_decode.py:

    sequences x keys    with 16 query heads    with 32
    1 x 130              3.5 ( 4.8,  5.8)       3.4 ( 5.0,  6.0)
    1 x 600              4.0 ( 5.8, 12.3)       5.8 ( 6.2, 14.9)
    1 x 4,000           10.6 (15.3, 15.3)      17.1 (16.2, 18.0)
    1 x 8,000           19.2 (27.9, 15.8)      31.4 (30.0, 23.7)
    2 x 130              3.4 ( 6.9,  5.9)       3.3 ( 7.3,  5.9)
    2 x 2,000           10.4 (12.5, 15.3)      16.3 (13.0, 17.6)
    4 x 200              4.1 ( 8.1,  6.2)       5.2 ( 8.4,  6.4)
    4 x 1,000           10.7 ( 9.4, 15.1)      16.8 (10.6, 17.8)
    8 x 200              4.5 ( 8.3,  6.8)       5.7 ( 8.7,  6.7)
    8 x 500              7.2 ( 8.0, 11.6)       9.8 ( 8.9, 11.8)
    16 x 200             6.2 ( 8.9,  8.5)       8.4 ( 9.1,  8.2)
    16 x 500            11.6 (11.6, 13.0)      15.5 (12.3, 13.2)

More parts than here wait until as many neighbouring processors are free: 4 x 200 in four 7.1.
"""

from __future__ import annotations

import struct
from dataclasses import replace

import torch
from torch import Tensor

from cableway.kernels import compilation
from cableway.kernels.attention_plan import AttentionPlan, Scores, macros
from cableway.kernels.cuda import CudaKernel, address
from cableway.kernels.kv_cache import NO_SCALES, KVScales
from cableway.kernels.lang import gpu_capability

_KERNEL = CudaKernel("cluster_decode")
_PARTS = {8: 8, 16: 4, 64: 2, 128: 1}  # up to how many clusters: programs of each
_MOST_ELEMENTS = 512  # of a KV head's query heads: they are held in registers
_MOST_CLUSTERS_OF_WIDE = 64  # with more than half as many, whose programs have half as many threads
_KEPT_IN_8_BITS = {torch.float8_e4m3fn: 1, torch.float8_e5m2: 2, torch.int8: 3}
_LONGEST = {1: 4096, 2: 2048, 16: 512}  # up to how many sequences: tokens


def longest(num_seqs: int) -> int:
    """Tokens of the longest of so many sequences for which this may be the faster; 0: it is not, or not on this GPU."""
    if gpu_capability() != 90:
        return 0
    return next((tokens for most, tokens in _LONGEST.items() if num_seqs <= most), 0)


def fits(q: Tensor, cache: Tensor, plan: AttentionPlan) -> bool:
    """Whether this kernel computes what is asked for, on the GPU at hand, and is the faster."""
    (_, num_heads, head_dim), num_kv_heads = q.shape, cache.shape[3]
    num_seqs, num_elements = len(plan.seq_lens), num_heads // num_kv_heads * head_dim
    most_clusters = _MOST_CLUSTERS_OF_WIDE if _is_wide(num_elements) else max(_PARTS)
    are_few = 0 < plan.max_seq_len <= longest(num_seqs) and num_seqs * num_kv_heads <= most_clusters
    is_half = q.dtype != torch.float32 and cache.dtype in (q.dtype, *_KEPT_IN_8_BITS)
    is_small = num_elements <= _MOST_ELEMENTS and head_dim % 8 == 0
    return is_half and are_few and is_small and not plan.invariant


def _is_wide(num_elements: int) -> bool:
    return num_elements > _MOST_ELEMENTS // 2


def launch(
    q: Tensor, cache: Tensor, plan: AttentionPlan, scores: Scores, scales: KVScales = NO_SCALES
) -> Tensor:  # fmt: skip
    (num_seqs, num_heads, head_dim), num_kv_heads = q.shape, cache.shape[3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    num_clusters = num_seqs * num_kv_heads
    parts = next(parts for most, parts in _PARTS.items() if num_clusters <= most)
    num_threads = 256 if _is_wide(num_heads // num_kv_heads * head_dim) else 512
    constants = (
        *macros(q, cache, scores),
        ("KEPT_AS", _KEPT_IN_8_BITS.get(cache.dtype, 0)), ("BLOCK_ROWS", cache.shape[2]),
        ("PARTS", parts), ("NUM_THREADS", num_threads),
    )  # fmt: skip
    if q.is_meta:
        compilation.in_background(_KERNEL.load, constants)
        return out
    tensors = q, cache, out, plan.seq_lens, plan.block_table, scores.slopes, scores.sinks
    with_keys = replace(scores, scale=scores.scale * scales.key).in_powers_of_two()
    arguments = struct.pack(
        "7P3q3fi",
        *map(address, tensors),
        q.stride(0), cache.stride(0), plan.block_table.stride(0), *with_keys, scales.value, scores.window,
    )  # fmt: skip
    _KERNEL(
        constants,
        arguments,
        num_programs=num_clusters * parts,
        num_threads=num_threads,
        cluster=parts,
        overlaps=True,
    )
    return out
