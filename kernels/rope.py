"""Rotary position embedding of q and k, in place, by halves (NeoX style), on the first `rotary` of head_dim elements.

    x1, x2 = halves of x[:rotary];   x1' = x1 * cos - x2 * sin;   x2' = x2 * cos + x1 * sin

q       [num_tokens, num_heads, head_dim]     bf16|f16|f32   last dimension contiguous, the others may be strided
k       [num_tokens, num_kv_heads, head_dim]  dtype of q     the same
angles  a table of cosines and sines [max_positions, rotary] f32, and the tokens' positions [num_tokens] i32

q and k may be views of one fused [num_tokens, (num_heads + 2 num_kv_heads) * head_dim] projection.
Bound: bytes; reads and writes the rotated part of q and k. A token's result does not depend on the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cableway.kernels.lang import jit, loops, tl, triton
from cableway.kernels.registry import FLOATS, call, check, grid, kernel, nbytes


@dataclass(frozen=True)
class Angles:
    """By how much one step's tokens are rotated: made once a step, used by each layer."""

    cos_sin: Tensor  # [max_positions, rotary] f32; a row holds rotary / 2 cosines, then rotary / 2 sines
    positions: Tensor  # [num_tokens] i32


def ref(q: Tensor, k: Tensor, angles: Angles) -> None:
    half = angles.cos_sin.shape[1] // 2
    cos, sin = angles.cos_sin[angles.positions.long(), None].split(half, -1)
    for x in (q, k):
        x1, x2 = x[..., :half].float(), x[..., half : 2 * half].float()
        x[..., :half], x[..., half : 2 * half] = (x1 * cos - x2 * sin).to(x.dtype), (x2 * cos + x1 * sin).to(x.dtype)


@jit
def _rope(
    q_ptr, k_ptr, cos_sin_ptr, positions_ptr, q_token, q_head, k_token, k_head, num_heads, num_kv_heads, half,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token).to(tl.int64)
    column = tl.arange(0, BLOCK_HALF)
    row = cos_sin_ptr + position * 2 * half + column
    cos = tl.load(row, mask=column < half, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(row + half, mask=column < half, other=0.0).to(tl.float32)[None, :]
    first_head = tl.program_id(1) * BLOCK_HEADS
    if first_head < num_heads:
        base, head_stride, heads = q_ptr + token * q_token, q_head, num_heads
    else:
        first_head -= tl.cdiv(num_heads, BLOCK_HEADS) * BLOCK_HEADS
        base, head_stride, heads = k_ptr + token * k_token, k_head, num_kv_heads
    head = first_head + tl.arange(0, BLOCK_HEADS)
    x_ptr = base + head[:, None] * head_stride + column[None, :]
    inside = (head[:, None] < heads) & (column[None, :] < half)
    x1 = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(x_ptr, (x1 * cos - x2 * sin).to(q_ptr.dtype.element_ty), mask=inside)
    tl.store(x_ptr + half, (x2 * cos + x1 * sin).to(q_ptr.dtype.element_ty), mask=inside)


def launch(q: Tensor, k: Tensor, angles: Angles) -> None:
    cos_sin, positions = angles.cos_sin, angles.positions
    (num_tokens, num_heads, _), num_kv_heads, half = q.shape, k.shape[1], cos_sin.shape[1] // 2
    block_heads = min(triton.next_power_of_2(num_heads), 8)
    _rope[(num_tokens, triton.cdiv(num_heads, block_heads) + triton.cdiv(num_kv_heads, block_heads))](
        q, k, cos_sin, positions, q.stride(0), q.stride(1), k.stride(0), k.stride(1), num_heads, num_kv_heads, half,
        BLOCK_HEADS=block_heads, BLOCK_HALF=triton.next_power_of_2(half), num_warps=2,
    )  # fmt: skip


def make(num_tokens, num_heads, num_kv_heads, head_dim, rotary, dtype, fused=True, max_positions=512, device="cpu"):
    qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, device=device).to(dtype)
    q, k = qkv[:, :num_heads], qkv[:, num_heads : num_heads + num_kv_heads]
    if not fused:
        q, k = q.contiguous(), k.contiguous()
    angle = torch.arange(max_positions, device=device)[:, None] / 1e4 ** (torch.arange(rotary // 2, device=device) / 32)
    cos_sin = torch.cat((angle.cos(), angle.sin()), -1)
    positions = torch.randint(max_positions, (num_tokens,), device=device, dtype=torch.int32)
    return call(q, k, Angles(cos_sin, positions))


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=[
        *grid(num_tokens=(1, 7), num_heads=(9,), num_kv_heads=(3,), head_dim=(64,), rotary=(64, 24), dtype=FLOATS),
        *grid(
            num_tokens=(5,),
            num_heads=(4,),
            num_kv_heads=(4,),
            head_dim=(32,),
            rotary=(32,),
            dtype=FLOATS,
            fused=(False,),
        ),
    ],
    bench_cases=grid(
        num_tokens=(1, 16, 512),
        num_heads=(9,),
        num_kv_heads=(3,),
        head_dim=(64,),
        rotary=(64,),
        dtype=(torch.bfloat16,),
    ),
    num_bytes=lambda c: 2 * nbytes(*c.args[:2]),
    updates=(0, 1),
)
def rope(q: Tensor, k: Tensor, angles: Angles) -> None:
    """Rotate q [T, H, D] and k [T, KV, D] in place; ValueError when shapes or dtypes do not fit."""
    table, positions = angles.cos_sin, angles.positions
    rotary = table.shape[1]
    check(q.dim() == 3 and k.dim() == 3 and q.shape[::2] == k.shape[::2], "q and k are not [T, H, D] and [T, KV, D]")
    check(
        q.dtype == k.dtype and q.dtype in FLOATS and table.dtype == torch.float32,
        "dtypes of q, k and cos_sin do not fit",
    )
    check(rotary <= q.shape[2] and rotary % 2 == 0, "rotary is odd or larger than head_dim")
    check(positions.shape == q.shape[:1] and positions.dtype == torch.int32, "positions are not [T] i32")
    check(q.stride(2) == k.stride(2) == 1, "q or k are strided within their heads")
    check(table.is_contiguous() and positions.is_contiguous(), "cos_sin or positions are strided")
    if not q.is_cpu:
        return launch(q, k, angles)
    for x in (q, k):
        num_tokens, num_heads, _ = x.shape
        loops.run(
            loops.rotate, num_tokens, 4 * num_heads * rotary, x.data_ptr(), *x.stride()[:2], loops.KINDS[x.dtype],
            table.data_ptr(), positions.data_ptr(), num_heads, rotary,
        )  # fmt: skip
    return None
