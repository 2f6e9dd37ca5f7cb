"""Copies of whole KV blocks inside a cache: copy-on-write, when a continuation leaves the prefix it shared.

cache  [2, num_blocks, block_rows, num_kv_heads, head_dim]  any dtype, contiguous; see kv_cache.py
pairs  [num_pairs, 2]  i64   (from_block, to_block); a to_block is named once, and is no pair's from_block

Bound: bytes; reads and writes each block once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cableway.kernels.kv_cache import F8, kv_cache_shape
from cableway.kernels.lang import jit, tl, triton
from cableway.kernels.registry import FLOATS, are_contiguous, call, check, grid, kernel, nbytes


def ref(cache: Tensor, pairs: Tensor) -> None:
    for source, target in pairs.tolist():
        cache[:, target] = cache[:, source]


@jit
def _block_copy(cache_ptr, pairs_ptr, block_len, value_offset, BLOCK: tl.constexpr):
    pair = tl.program_id(0)
    source = tl.load(pairs_ptr + 2 * pair)
    target = tl.load(pairs_ptr + 2 * pair + 1)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    base = cache_ptr + tl.program_id(2).to(tl.int64) * value_offset + element
    x = tl.load(base + source * block_len, mask=element < block_len)
    tl.store(base + target * block_len, x, mask=element < block_len)


def launch(cache: Tensor, pairs: Tensor) -> None:
    check(are_contiguous(cache, pairs), "cache or pairs are strided")
    block_len = cache[0, 0].numel()
    _block_copy[(pairs.shape[0], triton.cdiv(block_len, 1024), cache.shape[0])](
        cache, pairs, block_len, cache.stride(0), BLOCK=1024, num_warps=4
    )


def make(num_pairs, block_size, num_kv_heads, head_dim, dtype, num_blocks=16, device="cpu"):
    cache = torch.randn(kv_cache_shape(num_blocks, block_size, num_kv_heads, head_dim, dtype), device=device).to(dtype)
    return call(cache, torch.randperm(num_blocks, device=device)[: 2 * num_pairs].view(-1, 2))


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=grid(num_pairs=(1, 5), block_size=(16,), num_kv_heads=(3,), head_dim=(64,), dtype=(torch.int8, *F8, *FLOATS)),
    bench_cases=grid(
        num_pairs=(64,),
        block_size=(16,),
        num_kv_heads=(8,),
        head_dim=(128,),
        num_blocks=(256,),
        dtype=(torch.bfloat16,),
    ),
    num_bytes=lambda c: 4 * nbytes(c.args[0][0, 0]) * c.args[1].shape[0],
    updates=(0,),
)
def block_copy(cache: Tensor, pairs: Tensor) -> None:
    """Copy block pairs[i, 0] over block pairs[i, 1], keys and values; ValueError when shapes or dtypes do not fit."""
    check(cache.dim() == 5, "cache is not [planes, num_blocks, block_rows, num_kv_heads, head_dim]")
    check(pairs.dim() == 2 and pairs.shape[1] == 2 and pairs.dtype == torch.int64, "pairs are not [num_pairs, 2] i64")
    if cache.device.type != "cpu":
        return launch(cache, pairs)
    cache[:, pairs[:, 1]] = cache[:, pairs[:, 0]]
    return None
