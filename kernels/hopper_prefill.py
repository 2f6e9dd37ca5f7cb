"""Prefill attention on GPUs of the Hopper generation, in CUDA C++ (hopper_prefill.cu): bf16 and f16.

Formula and arguments: attention_plan.py; items: prefill_work.py.

Bound: FLOPs, 4 * head_dim a head and visible key.

PERF (H200, 8 KV heads of 128, bf16; TFLOP/s at 8 x 1,024, 2 x 4,096, 1 x 8,192 tokens and 8,192 of 32,000): 356, 551,
612, 655. In Gluon, 64 rows a program, two programs a processor and no warps set apart, 288, 417, 456, 480: there a tile
took 448 instructions for 64 keys, here 477 for 128, and both halves of a processor's shared memory were written for as
many products. Program by program in place of item by item: 296, 512, 586, 652.
"""

from __future__ import annotations

import struct
from functools import cache

import torch
from torch import Tensor

from cableway.kernels import compilation
from cableway.kernels.attention_plan import AttentionPlan, Scores, macros
from cableway.kernels.cuda import CudaKernel, address
from cableway.kernels.lang import gpu_capability, num_processors, triton

_KERNEL = CudaKernel("hopper_prefill")
_NUM_THREADS = 384
_ROWS, _STAGES = 128, 2
_PANEL_BYTES = 128  # of a row in shared memory


def fits(q: Tensor, cache: Tensor, plan: AttentionPlan) -> bool:
    """Whether this kernel computes what is asked for, on the GPU at hand.

    Not from caches of 8 bits: tiles go from memory to the tensor cores as they are, by way of shared memory alone.
    """
    (_, num_heads, head_dim), is_half = q.shape, q.dtype == cache.dtype != torch.float32
    is_small = head_dim <= 256 and num_heads <= _ROWS // 2
    return gpu_capability() == 90 and is_half and is_small and head_dim % 8 == 0 and not plan.invariant


def launch(q: Tensor, cache: Tensor, plan: AttentionPlan, out: Tensor, scores: Scores) -> None:
    """Write `out` [T, H, D] for the sequences that paged_decode leaves."""
    (num_tokens, num_heads, head_dim), num_kv_heads = q.shape, cache.shape[3]
    tile = _ROWS // triton.next_power_of_2(num_heads // num_kv_heads)
    work = plan.prefill_work(num_tokens=num_tokens, tile=tile, skips_singles=True)
    num_panels = -(-head_dim // 64)
    keys, query_slots = 128 if num_panels <= 2 else 64, 2 if num_panels <= 3 else 1
    constants = (*macros(q, cache, scores), ("KEYS", keys), ("STAGES", _STAGES), ("Q_SLOTS", query_slots))
    if q.is_meta:
        compilation.in_background(_KERNEL.load, constants)
        return
    num_items, counters = num_kv_heads * len(work), _counters(q.device)
    tensors = (
        q, cache, out, plan.query_start, plan.seq_lens, plan.block_table, work, scores.slopes, scores.sinks, counters
    )  # fmt: skip
    arguments = struct.pack(
        "10P3q2f2i",
        *map(address, tensors),
        q.stride(0), cache.stride(0), plan.block_table.stride(0), *scores.in_powers_of_two(), scores.window, num_items,
    )  # fmt: skip
    _KERNEL(
        constants,
        arguments,
        num_programs=min(num_items, num_processors()),
        num_threads=_NUM_THREADS,
        shared_bytes=(query_slots * _ROWS + 2 * _STAGES * keys) * num_panels * _PANEL_BYTES + 1024,
    )


@cache
def _counters(device: torch.device) -> Tensor:
    """Of items taken and programs ended: zeros, which each launch leaves as zeros."""
    return torch.zeros(2, dtype=torch.int32, device=device)
