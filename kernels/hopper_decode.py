"""Attention of one new token a sequence, for many sequences, on Hopper GPUs, in CUDA C++ (hopper_decode.cu): bf16, f16.

Formula and arguments: attention_plan.py; the sequences that come first and bring one token each, as paged_decode.py has
them. Programs take equal shares of all keys (level_work.py), each of them for some KV heads, which lie side by side in
a block: tensor maps bring 16 tokens of them at once. Tiles are on their way before the kernel that makes the newest
keys is done, and go on being so from one sequence to the next. Where a sequence has several stretches each leaves its
part in float32, and the one that arrives last puts them together.

Bound: bytes (keys and values of every sequence).

PERF (H200, 32 query heads and 8 KV heads of 128, bf16; in brackets paged_decode.py in the same run), us a launch in a
graph whose caches do not fit the L2 cache: 2 x 600 8.8 (15.1), 8 x 600 11.5 (15.7), 16 x 600 16.2 (14.6), 24 x 600
18.1 (25.2), 64 x 600 39.4 (49.3), 128 x 600 79.8 (86.0), 256 x 600 156.4 (158.1), 256 x 1,100 281 (275), 4 x 32,000
135 (156); lengths as in mixed256 at step 50 168 (170), 400 169 (170), 600 132 (136), 800 73.8 (79.0), 950 37.3 (49.1).
Behind rope_and_write, as in a step: 2 x 600 10.1 (16.4), 16 x 600 17.9 (16.1), 24 x 600 22.0 (24.1), 64 x 600 41.8
(50.1), 256 x 600 158.5 (159.6); with 16 query heads 158.5 (155.6). Another day, 16 x 200, 400, 600, 1,100, 2,000 9.1,
11.3, 15.2, 23.1, 36.6 (8.2, 12.5, 15.0, 24.2, 39.9), 1 x 8,000, 32,000 30.0, 53.8 (23.7, 51.2), 2 x 4,000 22.4 (18.5),
8 x 2,000 23.7 (28.0). All eight heads in one program, or two, or one, and tiles of 16 keys: 1 to 10 % slower.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from cableway.kernels import compilation
from cableway.kernels.attention_plan import AttentionPlan, Scores, macros
from cableway.kernels.cuda import CudaKernel, address, tensor_map
from cableway.kernels.lang import gpu_capability, num_processors

_KERNEL = CudaKernel("hopper_decode")
_BOX_KEYS, _PANEL = 16, 64  # of a copy; numbers of a row in shared memory
_RING_BYTES = 216 << 10  # of a processor
_MOST_STAGES = 12
_WARPS = 4  # of a processor's programs, that multiply
_LEAST_TILES = 4  # of a share
_MOST_GROUP, _MOST_DIMS = 16, 192  # for which there are registers
_LEAST_SEQS = 3  # of fewer, long ones, paged_decode.py is done sooner


class Tuning(NamedTuple):
    """How the work is shared out."""

    heads: int  # KV heads of a program
    keys: int  # of a tile
    programs: int  # of a processor


def _rule(num_kv_heads: int, head_dim: int, window: int) -> Tuning:
    heads = max(n for n in range(1, _WARPS + 1) if num_kv_heads % n == 0)
    # Beside larger heads there are no registers for more; and no tile begins in a block before the first that is seen.
    return Tuning(heads, _BOX_KEYS if window or head_dim > 128 else 2 * _BOX_KEYS, _WARPS // heads)


def fits(q: Tensor, cache: Tensor, plan: AttentionPlan) -> bool:
    """Whether this kernel computes what is asked for, on the GPU at hand, and is the faster."""
    (_, num_heads, head_dim), (_, _, block_size, num_kv_heads, _) = q.shape, cache.shape
    is_half = q.dtype == cache.dtype != torch.float32
    are_panels = head_dim % _PANEL == 0 and head_dim <= _MOST_DIMS and block_size % _BOX_KEYS == 0
    is_small = num_heads // num_kv_heads <= _MOST_GROUP
    are_several = len(plan.seq_lens) >= _LEAST_SEQS
    return gpu_capability() == 90 and is_half and are_panels and is_small and are_several and not plan.invariant


def launch(q: Tensor, cache: Tensor, plan: AttentionPlan, scores: Scores, *, tuned: Tuning | None = None) -> Tensor:
    """[T, H, D], written for the sequences that come first and bring one token each."""
    (_, num_heads, head_dim), num_kv_heads = q.shape, cache.shape[3]
    heads, keys, programs = tuned or _rule(num_kv_heads, head_dim, scores.window)
    stage_bytes = 4 * keys * heads * head_dim
    stages = min(_RING_BYTES // programs // stage_bytes, _MOST_STAGES)
    num_bundles = num_kv_heads // heads
    num_shares = max(programs * num_processors() // num_bundles, 1)
    options = {"num_shares": num_shares, "tile": keys, "least_tiles": _LEAST_TILES, "window": scores.window}
    is_first = not plan.has_level_work(**options)
    work = plan.level_work(**options)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    num_parts = len(work.items) * num_heads
    parts = torch.empty(num_parts * (head_dim + 2), dtype=torch.float32, device=q.device)
    constants = (
        *macros(q, cache, scores),
        ("HEADS", heads), ("KEYS", keys), ("STAGES", stages), ("PROGRAMS", programs),
    )  # fmt: skip
    if q.is_meta:
        compilation.in_background(_KERNEL.load, constants)
        return out
    tensors = (
        q, cache, out, plan.seq_lens, plan.block_table, work.items, work.shares,
        _arrivals(num_shares, num_kv_heads, q.device),
        scores.slopes, scores.sinks, *parts.split((num_parts * head_dim, num_parts, num_parts)),
    )  # fmt: skip
    arguments = struct.pack(
        "13P3q2f2i",
        *map(address, tensors),
        q.stride(0), cache.stride(0), plan.block_table.stride(0), *scores.in_powers_of_two(), scores.window, is_first,
    )  # fmt: skip
    _KERNEL(
        constants,
        _boxes(cache, heads) + arguments + bytes(-len(arguments) % 64),
        num_programs=num_shares * num_bundles,
        num_threads=32 * (heads + 1),
        shared_bytes=stages * stage_bytes + 1024,
        overlaps=True,
    )
    return out


def _boxes(cache: Tensor, heads: int) -> bytes:
    """How copies of 16 tokens of some heads see a cache: planes, pieces of 64 numbers, slots."""
    pieces = cache.view(2, -1, cache.shape[3] * cache.shape[4] // _PANEL, _PANEL).transpose(1, 2)
    return tensor_map(pieces, (1, heads * cache.shape[4] // _PANEL, _BOX_KEYS, _PANEL))


@cache
def _arrivals(num_shares: int, num_kv_heads: int, device: torch.device) -> Tensor:
    """Of parts: zeros, which each launch leaves as zeros."""
    return torch.zeros(num_shares, num_kv_heads, dtype=torch.int32, device=device)
