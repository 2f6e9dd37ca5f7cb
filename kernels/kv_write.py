"""The paged KV cache of one layer, and the kernel that writes new keys and values into it.

Layout: `cache [2, num_blocks, block_size, num_kv_heads, head_dim]`, keys then values, contiguous. A token's slot is
`block_id * block_size + offset`: `cache.view(2, num_slots, num_kv_heads, head_dim)[0, slot]` is its key. Why this one:
on a CPU a sequence's gathered blocks are one dense matrix [len, num_kv_heads * head_dim] without a further copy (with
keys and values of a token side by side, bfloat16 products over it take 3 to 5 times as long); on a GPU a tile of one
head is rows of head_dim elements, whole cache lines each.

k, v   [num_tokens, num_kv_heads, head_dim]  dtype of cache  last two dimensions contiguous; tokens may be strided
cache  [2, num_blocks, block_size, num_kv_heads, head_dim]   bf16|f16|f32, contiguous
slots  [num_tokens]  i64   distinct; a negative slot writes nothing (padding of captured graphs)

Bound: bytes; reads k and v, writes as much.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cableway.kernels.lang import jit, loops, tl, triton
from cableway.kernels.registry import FLOATS, call, check, grid, kernel, nbytes


def kv_cache_shape(
    num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, num_planes: int = 2
) -> tuple[int, ...]:
    """Shape of one layer's cache; a block takes num_planes * block_size * num_kv_heads * head_dim elements of it."""
    return (num_planes, num_blocks, block_size, num_kv_heads, head_dim)


def ref(k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
    block_size = cache.shape[2]
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            cache[0, slot // block_size, slot % block_size] = k[token]
            cache[1, slot // block_size, slot % block_size] = v[token]


@jit
def _kv_write(k_ptr, v_ptr, cache_ptr, slots_ptr, k_stride, v_stride, width, value_offset, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        column = tl.arange(0, BLOCK)
        inside = column < width
        k = tl.load(k_ptr + token * k_stride + column, mask=inside)
        v = tl.load(v_ptr + token * v_stride + column, mask=inside)
        tl.store(cache_ptr + slot * width + column, k, mask=inside)
        tl.store(cache_ptr + value_offset + slot * width + column, v, mask=inside)


def launch(k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
    width = k.shape[1] * k.shape[2]
    block = triton.next_power_of_2(width)
    _kv_write[(k.shape[0],)](
        k,
        v,
        cache,
        slots,
        k.stride(0),
        v.stride(0),
        width,
        cache.stride(0),
        BLOCK=block,
        num_warps=min(max(block // 256, 1), 8),
    )


def make(num_tokens, num_kv_heads, head_dim, block_size, dtype, num_blocks=16, device="cpu"):
    qkv = torch.randn(num_tokens, 4 * num_kv_heads, head_dim, device=device).to(dtype)
    cache = torch.randn(kv_cache_shape(num_blocks, block_size, num_kv_heads, head_dim), device=device).to(dtype)
    slots = torch.randperm(num_blocks * block_size, device=device)[:num_tokens]
    return call(qkv[:, 2 * num_kv_heads : 3 * num_kv_heads], qkv[:, 3 * num_kv_heads :], cache, slots)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=grid(num_tokens=(1, 33), num_kv_heads=(1, 3), head_dim=(64,), block_size=(16,), dtype=FLOATS),
    bench_cases=grid(
        num_tokens=(1, 16, 512),
        num_kv_heads=(3, 8),
        head_dim=(64,),
        block_size=(16,),
        num_blocks=(512,),
        dtype=(torch.bfloat16,),
    ),
    num_bytes=lambda c: 2 * nbytes(*c.args[:2]),
    updates=(2,),
)
def kv_write(k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Write keys and values [T, KV, D] to their slots [T] i64; ValueError when shapes or dtypes do not fit.

    On a CPU no slot may be negative: there are no captured graphs to pad.
    """
    check(k.shape == v.shape and k.shape[1:] == cache.shape[3:] and k.dtype == v.dtype == cache.dtype, "k, v, cache")
    check(k.dtype in FLOATS, "k is no float")
    check(slots.shape == k.shape[:1] and slots.dtype == torch.int64, "slots are not [T] i64")
    check(k.stride()[1:] == v.stride()[1:] == (k.shape[2], 1), "k or v are strided within their tokens")
    check(cache.is_contiguous() and slots.is_contiguous(), "cache or slots are strided")
    if not k.is_cpu:
        return launch(k, v, cache, slots)
    halves = k.element_size() // 2
    width, value_offset = k.shape[1] * k.shape[2] * halves, cache.stride(0) * halves
    loops.run(
        loops.write_kv, len(slots), width // 8, k.data_ptr(), k.stride(0) * halves, v.data_ptr(), v.stride(0) * halves,
        cache.data_ptr(), value_offset, slots.data_ptr(), width,
    )  # fmt: skip
    return None
