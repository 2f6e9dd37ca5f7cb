"""Attention of one new token a sequence, for few sequences, on Hopper GPUs, in CUDA C++ (cluster_decode.cu).

Formula and arguments: attention_plan.py; the plan has one token a sequence, in order, as paged_decode.py has it. Few
sequences leave most of a GPU idle, and what counts is how long the last program takes: here up to eight share the keys
of one head, and put their parts together without a way through memory.

Bound: latency.

PERF (H200, 8 KV heads of 128, bf16, behind rope_and_write in a graph, us; in brackets hopper_decode.py): with 16 query
heads 2 x 130, 600, 2,000 keys 3.4, 5.7, 10.4 (6.9, 8.8, 12.5), 4 x 200, 600, 2,000 4.1, 7.8, 18.9 (8.1, 9.0, 16.5), 8 x
200, 600 4.5, 8.7 (8.3, 10.9), 16 x 200, 600, 2,000 6.2, 13.6, 35.3 (8.9, 15.0, 36.0); with 32 2 x 130, 600, 2,000 3.3,
7.3, 16.3 (7.3, 8.9, 13.0), 4 x 200, 600 5.2, 10.9 (8.4, 9.1), 8 x 200, 600 5.7, 11.2 (8.7, 11.5). More parts than here
wait until as many neighbouring processors are free: 4 x 200 in four 7.1. One sequence, a step of 28 layers, ms at 128,
300 and 3,500 keys: 0.533, 0.549, 0.755 (paged_decode.py 0.550, 0.648, 0.855); with 128 threads 0.552, 0.594, 1.128.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from cableway.kernels import compilation
from cableway.kernels.attention_plan import AttentionPlan, Scores, macros
from cableway.kernels.cuda import CudaKernel, address
from cableway.kernels.lang import gpu_capability

_KERNEL = CudaKernel("cluster_decode")
_PARTS = {8: 8, 16: 4, 64: 2, 128: 1}  # up to how many clusters: programs of each
_MOST_ELEMENTS = 512  # of a KV head's query heads: they are held in registers
_MOST_CLUSTERS_OF_WIDE = 64  # with more than half as many, whose programs have half as many threads
_MOST_SEQS, _MOST_KEYS, _MOST_KEYS_EACH = 16, 4096, 512


def longest(num_seqs: int) -> int:
    """Tokens of the longest of so many sequences for which this may be the faster; 0: it is not."""
    return max(_MOST_KEYS // num_seqs, _MOST_KEYS_EACH) if num_seqs <= _MOST_SEQS else 0


def fits(q: Tensor, cache: Tensor, plan: AttentionPlan) -> bool:
    """Whether this kernel computes what is asked for, on the GPU at hand, and is the faster."""
    (_, num_heads, head_dim), num_kv_heads = q.shape, cache.shape[3]
    num_seqs, num_elements = len(plan.seq_lens), num_heads // num_kv_heads * head_dim
    most_clusters = _MOST_CLUSTERS_OF_WIDE if _is_wide(num_elements) else max(_PARTS)
    are_few = plan.max_seq_len <= longest(num_seqs) and num_seqs * num_kv_heads <= most_clusters
    is_half = q.dtype == cache.dtype != torch.float32
    is_small = num_elements <= _MOST_ELEMENTS and head_dim % 8 == 0
    return gpu_capability() == 90 and is_half and are_few and is_small and not plan.invariant


def _is_wide(num_elements: int) -> bool:
    return num_elements > _MOST_ELEMENTS // 2


def launch(q: Tensor, cache: Tensor, plan: AttentionPlan, scores: Scores) -> Tensor:
    (num_seqs, num_heads, head_dim), num_kv_heads = q.shape, cache.shape[3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    num_clusters = num_seqs * num_kv_heads
    parts = next(parts for most, parts in _PARTS.items() if num_clusters <= most)
    num_threads = 256 if _is_wide(num_heads // num_kv_heads * head_dim) else 512
    constants = (*macros(q, cache, scores), ("PARTS", parts), ("NUM_THREADS", num_threads))
    if q.is_meta:
        compilation.in_background(_KERNEL.load, constants)
        return out
    tensors = q, cache, out, plan.seq_lens, plan.block_table, scores.slopes, scores.sinks
    arguments = struct.pack(
        "7P3q2fi4x",
        *map(address, tensors),
        q.stride(0), cache.stride(0), plan.block_table.stride(0), *scores.in_powers_of_two(), scores.window,
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
