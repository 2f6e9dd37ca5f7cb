"""Latent attention on GPUs of the Hopper generation, in CUDA C++ (hopper_latent.cuh): bf16 and f16.

Formula and arguments: latent_attention.py.

Decode: shares of all latents, see level_work.py. Where a sequence has several stretches each leaves its part in
float32, and a second kernel puts them together. Bound: bytes (the latents of every sequence) for up to 64 heads, beyond
that FLOPs.

Prefill: items of prefill_work.py, those that see most keys first. Bound: FLOPs, 2 * (width + rank) a head and visible
key.

PERF (H200, bf16, latents of 512 + 64; in brackets the Triton kernels' in the same run), us a launch in a graph whose
caches do not fit the L2 cache, with 16 | 64 | 128 heads: 16 x 2,048 24 (26) | 36 (48) | 32 (75), 64 x 1,024 41 (38) |
40 (81) | 59 (132), 200 x 1,024 73 (106) | 96 (251) | 141 (484), 64 x 4,096 92 (107) | 93 (247) | 159 (456), 256 x 1,024
83 (109) | 106 (257) | 171 (493), where latents alone take 71 at 4.27 TB/s; some 15 of each are beginning and end.
Prompts, TFLOP/s with 16 | 128 heads: 1 x 4,096 548 (191) | 531 (195), 2,048 of 32,768 591 | 559. Tiles of 32 keys, four
at a time, take 1.1 to 1.35 times as long; scores that begin when a third of a tile is there, as long.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from cableway.kernels import compilation
from cableway.kernels.attention_plan import LOG2_E, AttentionPlan
from cableway.kernels.cuda import Constants, CudaKernel, address
from cableway.kernels.lang import (
    gdc_launch_dependents,
    gdc_wait,
    gpu_capability,
    jit,
    num_processors,
    overlapping,
    tl,
    triton,
)
from cableway.kernels.level_work import LevelWork

_DECODE, _PREFILL = CudaKernel("hopper_latent_decode"), CudaKernel("hopper_latent_prefill")
_NUM_THREADS = 512
_ROWS, _KEYS, _STAGES = 64, 64, 2
_PANEL_BYTES = 128  # of a row in shared memory
_RANKS = 256, 512
_LEAST_TILES = 2  # of a share
_FEW_HEADS = 256  # of all sequences


def fits(q: Tensor, plan: AttentionPlan, rank: int) -> bool:
    """Whether this kernel computes what is asked for, on the GPU at hand."""
    width, is_half = q.shape[2], q.dtype != torch.float32
    fits_tiles = rank in _RANKS and rank <= width <= rank + 64 and width % 16 == 0
    return gpu_capability() == 90 and is_half and fits_tiles and not plan.invariant


class _Sizes(NamedTuple):
    """Of one call."""

    num_heads: int
    width: int
    rank: int
    block_heads: int  # of a program's rows, of one token

    @property
    def head_tiles(self) -> int:
        return triton.cdiv(self.num_heads, _ROWS)

    @property
    def shared_bytes(self) -> int:
        num_rows = (_ROWS + _STAGES * _KEYS) * triton.cdiv(self.width, 64) + _ROWS
        return num_rows * _PANEL_BYTES + 1024

    def constants(self, q: Tensor, cache: Tensor) -> Constants:
        return (
            ("T_NAME", '"bf16"' if q.dtype == torch.bfloat16 else '"f16"'),
            ("NUM_HEADS", self.num_heads), ("WIDTH", self.width), ("RANK", self.rank),
            ("BLOCK_HEADS", self.block_heads), ("BLOCK_SIZE", cache.shape[2]), ("KEYS", _KEYS), ("STAGES", _STAGES),
        )  # fmt: skip


def decode(q: Tensor, cache: Tensor, plan: AttentionPlan, *, scale: float, rank: int) -> Tensor:
    """out [T, H, rank], written for the sequences that come first and bring one token each."""
    sizes = _Sizes(q.shape[1], q.shape[2], rank, _ROWS)
    num_shares = max(num_processors() // sizes.head_tiles, 1)
    work = plan.level_work(num_shares=num_shares, tile=_KEYS, least_tiles=_LEAST_TILES)
    out = torch.empty(len(q), sizes.num_heads, rank, dtype=q.dtype, device=q.device)
    num_parts = len(work.items) * sizes.num_heads
    parts = torch.empty(num_parts * (rank + 2), dtype=torch.float32, device=q.device)
    sums, tops, masses = parts.split((num_parts * rank, num_parts, num_parts))
    constants = sizes.constants(q, cache)
    if q.is_meta:
        compilation.in_background(_DECODE.load, constants)
    else:
        lists = struct.pack("2P", address(work.items), address(work.shares))
        _DECODE(
            constants,
            _tensors(q, cache, out, plan, (sums, tops, masses), scale) + lists,
            num_programs=num_shares * sizes.head_tiles,
            num_threads=_NUM_THREADS,
            shared_bytes=sizes.shared_bytes,
            overlaps=True,
        )
    _put_together(out, work, sums, tops, masses)
    return out


@jit
def _latent_cuts(
    out_ptr, items_ptr, cuts_ptr, tops_ptr, masses_ptr, sums_ptr,
    NUM_HEADS: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The softmax over all keys of a sequence, of one head and some columns, from its parts."""
    head, cut = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    first_item, num_parts = tl.load(cuts_ptr + cut * 2).to(tl.int64), tl.load(cuts_ptr + cut * 2 + 1)
    if num_parts > 0:
        column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
        top, mass = float("-inf"), 0.0
        sums = tl.zeros((COLUMNS,), tl.float32)
        for first in range(0, num_parts, BLOCK_PARTS):
            part = first + tl.arange(0, BLOCK_PARTS)
            inside = part < num_parts
            place = (first_item + part) * NUM_HEADS + head
            tops = tl.load(tops_ptr + place, mask=inside, other=float("-inf"))
            masses = tl.load(masses_ptr + place, mask=inside, other=0.0)
            parts = tl.load(sums_ptr + place[:, None] * RANK + column[None, :], mask=inside[:, None], other=0.0)
            new_top = tl.maximum(top, tl.max(tops, 0))
            weights, decay = tl.exp2(tops - new_top), tl.exp2(top - new_top)
            mass = mass * decay + tl.sum(weights * masses, 0)
            sums = sums * decay + tl.sum(weights[:, None] * parts, 0)
            top = new_top
        sequence = tl.load(items_ptr + first_item * 5).to(tl.int64)
        place = (sequence * NUM_HEADS + head) * RANK + column
        tl.store(out_ptr + place, (sums / mass).to(out_ptr.dtype.element_ty))


def _put_together(out: Tensor, work: LevelWork, sums: Tensor, tops: Tensor, masses: Tensor) -> None:
    _, num_heads, rank = out.shape
    num_cuts = len(work.cuts)
    # Few programs take more parts at once, of fewer columns.
    columns = 128 if num_cuts * num_heads <= _FEW_HEADS else rank
    _latent_cuts[(num_heads, num_cuts, rank // columns)](
        out, work.items, work.cuts, tops, masses, sums,
        NUM_HEADS=num_heads, RANK=rank, COLUMNS=columns, BLOCK_PARTS=4096 // columns, num_warps=4, **overlapping(),
    )  # fmt: skip


def prefill(q: Tensor, cache: Tensor, plan: AttentionPlan, out: Tensor, *, scale: float, skips_singles: bool) -> None:
    """Write `out` [T, H, rank] for the sequences that `decode` leaves, or for all."""
    num_tokens, num_heads, width = q.shape
    sizes = _Sizes(num_heads, width, out.shape[2], min(triton.next_power_of_2(num_heads), _ROWS))
    constants = sizes.constants(q, cache)
    work = plan.heavy_prefill_work(num_tokens=num_tokens, tile=_ROWS // sizes.block_heads, skips_singles=skips_singles)
    if q.is_meta:
        compilation.in_background(_PREFILL.load, constants)
        return
    num_items, num_shares = len(work), max(num_processors() // sizes.head_tiles, 1)
    lists = struct.pack("3Pi4x", *map(address, (plan.query_start, plan.seq_lens, work)), num_items)
    _PREFILL(
        constants,
        _tensors(q, cache, out, plan, (None, None, None), scale) + lists,
        num_programs=min(num_items, num_shares) * sizes.head_tiles,
        num_threads=_NUM_THREADS,
        shared_bytes=sizes.shared_bytes,
    )


def _tensors(
    q: Tensor, cache: Tensor, out: Tensor, plan: AttentionPlan, parts: tuple[Tensor | None, ...], scale: float
) -> bytes:
    """The struct of that name."""
    table = plan.block_table
    return struct.pack(
        "4Pq3Pf4x", *map(address, (q, cache, out, table)), table.stride(0), *map(address, parts), scale * LOG2_E
    )
