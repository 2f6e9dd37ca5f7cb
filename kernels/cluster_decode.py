"""Attention of one new token a sequence, for few sequences, on Hopper GPUs, in CUDA C++ (cluster_decode.cu).

Formula and arguments: attention_plan.py; the plan has one token a sequence, in order, as paged_decode.py has it. Few
sequences leave most of a GPU idle, and what counts is how long the last program takes: here eight share the keys of one
head, and put their parts together without a way through memory.

Bound: latency.

PERF (H200, a step of one token of a model of 28 layers with 8 KV heads of 128, ms at 128, 300 and 3,500 keys): 0.533,
0.549, 0.755; with paged_decode.py 0.550, 0.648, 0.855. Two sequences and 3,500 keys 1.37, there 1.27: enough programs
are at work then. With 128 threads 0.552, 0.594, 1.128; with tiles on their way in shared memory 0.573, 0.606, 0.955.
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
_PARTS = 8
_MOST_ELEMENTS = 512  # of a KV head's query heads: they are held in registers
_MOST_CLUSTERS = 8


def fits(q: Tensor, cache: Tensor, plan: AttentionPlan) -> bool:
    """Whether this kernel computes what is asked for, on the GPU at hand, and has enough programs to be the faster."""
    (_, num_heads, head_dim), num_kv_heads = q.shape, cache.shape[3]
    are_few = (
        num_heads // num_kv_heads * head_dim <= _MOST_ELEMENTS and len(plan.seq_lens) * num_kv_heads <= _MOST_CLUSTERS
    )
    is_half = q.dtype == cache.dtype != torch.float32
    return gpu_capability() == 90 and is_half and are_few and head_dim % 8 == 0 and not plan.invariant


def launch(q: Tensor, cache: Tensor, plan: AttentionPlan, scores: Scores) -> Tensor:
    (num_seqs, num_heads, head_dim), num_kv_heads = q.shape, cache.shape[3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    num_threads = 512 if num_heads // num_kv_heads * head_dim <= _MOST_ELEMENTS // 2 else 256
    constants = (*macros(q, cache, scores), ("PARTS", _PARTS), ("NUM_THREADS", num_threads))
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
        num_programs=num_seqs * num_kv_heads * _PARTS,
        num_threads=num_threads,
        cluster=_PARTS,
        overlaps=True,
    )
    return out
