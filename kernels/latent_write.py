"""The paged cache of latent attention, and the kernel that writes new rows into it: one row a token for all heads.

x      [num_tokens, width]                       dtype of cache   contiguous
cache  [1, num_blocks, block_size, 1, width]     bf16|f16|f32, contiguous
slots  [num_tokens]  i64   distinct; a negative slot writes nothing (padding of captured graphs)

Bound: bytes; reads x, writes as much.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cableway.kernels.lang import jit, tl, triton
from cableway.kernels.registry import FLOATS, call, check, grid, kernel, nbytes


def ref(x: Tensor, cache: Tensor, slots: Tensor) -> None:
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            cache.view(-1, x.shape[1])[slot] = x[token]


@jit
def _latent_write(x_ptr, cache_ptr, slots_ptr, width, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        column = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + token * width + column, mask=column < width)
        tl.store(cache_ptr + slot * width + column, x, mask=column < width)


def launch(x: Tensor, cache: Tensor, slots: Tensor) -> None:
    num_tokens, width = x.shape
    _latent_write[(num_tokens,)](x, cache, slots, width, BLOCK=triton.next_power_of_2(width), num_warps=4)


def make(num_tokens: int, width: int, dtype: torch.dtype, block_size: int = 16, num_blocks: int = 40, device="cpu"):
    cache = torch.randn(1, num_blocks, block_size, 1, width, device=device).to(dtype)
    slots = torch.randperm(num_blocks * block_size, device=device)[:num_tokens]
    return call(torch.randn(num_tokens, width, device=device).to(dtype), cache, slots)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=grid(num_tokens=(1, 33), width=(40, 576), dtype=FLOATS),
    bench_cases=grid(num_tokens=(1, 512), width=(576,), dtype=(torch.bfloat16,)),
    num_bytes=lambda c: 2 * nbytes(c.args[0]),
    updates=(1,),
)
def latent_write(x: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Write rows x [T, width] to their slots [T] i64; ValueError when shapes or dtypes do not fit.

    On a CPU no slot may be negative: there are no captured graphs to pad.
    """
    check(
        x.dim() == 2 and cache.dim() == 5 and cache.shape[0] == cache.shape[3] == 1, "x or cache has other dimensions"
    )
    check(x.shape[1] == cache.shape[4] and x.dtype == cache.dtype and x.dtype in FLOATS, "x does not fit the cache")
    check(slots.shape == x.shape[:1] and slots.dtype == torch.int64, "slots are not [T] i64")
    check(x.is_contiguous() and cache.is_contiguous() and slots.is_contiguous(), "x, cache or slots are strided")
    if x.is_cpu:
        cache.view(-1, x.shape[1]).index_copy_(0, slots, x)
    else:
        launch(x, cache, slots)
