"""New keys and values, written into the paged KV cache of a layer.

k, v    [num_tokens, num_kv_heads, head_dim]  bf16|f16|f32   last two dimensions contiguous; tokens may be strided
cache   [2, num_blocks, block_rows, num_kv_heads, head_dim]  of that dtype, or of 8 bits; see kv_cache.py
slots   [num_tokens]  i64   distinct; a negative slot writes nothing (padding of captured graphs)
scales  of keys and of values, where the cache is f8

Bound: bytes; reads k and v, writes as much, or less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cableway.kernels import kv_cache
from cableway.kernels.kv_cache import NO_SCALES, KVScales, block_size_of, write_heads
from cableway.kernels.lang import jit, loops, tl, triton
from cableway.kernels.registry import FLOATS, call, check, grid, kernel, nbytes


def ref(k: Tensor, v: Tensor, cache: Tensor, slots: Tensor, scales: KVScales = NO_SCALES) -> None:
    block_size = block_size_of(cache)
    for plane, (x, scale) in enumerate(zip((k, v), scales, strict=True)):
        rows, row_scales = kv_cache.kept(x, cache.dtype, scale)
        for token, slot in enumerate(slots.tolist()):
            block, offset = divmod(slot, block_size)
            if slot >= 0:
                cache[plane, block, offset] = rows[token]
            if slot >= 0 and row_scales is not None:
                kv_cache.scales_of(cache)[plane, block, :, offset] = row_scales[token]


@jit
def _kv_write(
    k_ptr, v_ptr, cache_ptr, slots_ptr, k_stride, v_stride, value_offset, key_factor, value_factor,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS_A_BLOCK: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        head, dim = tl.arange(0, BLOCK_HEADS), tl.arange(0, BLOCK_DIM)
        head_inside = head < NUM_KV_HEADS
        inside = head_inside[:, None] & (dim < HEAD_DIM)[None, :]
        element = head[:, None] * HEAD_DIM + dim[None, :]
        k = tl.load(k_ptr + token * k_stride + element, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + token * v_stride + element, mask=inside, other=0.0).to(tl.float32)
        write_heads(
            cache_ptr, k, slot, head, dim, head_inside, key_factor, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, ROWS_A_BLOCK
        )
        write_heads(
            cache_ptr + value_offset, v, slot, head, dim, head_inside, value_factor,
            NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, ROWS_A_BLOCK,
        )  # fmt: skip


def launch(k: Tensor, v: Tensor, cache: Tensor, slots: Tensor, scales: KVScales = NO_SCALES) -> None:
    num_tokens, num_kv_heads, head_dim = k.shape
    block_heads, block_dim = triton.next_power_of_2(num_kv_heads), triton.next_power_of_2(head_dim)
    _kv_write[(num_tokens,)](
        k, v, cache, slots, k.stride(0), v.stride(0), cache.stride(0), 1 / scales.key, 1 / scales.value,
        NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size_of(cache), ROWS_A_BLOCK=cache.shape[2],
        BLOCK_HEADS=block_heads, BLOCK_DIM=block_dim, num_warps=min(max(block_heads * block_dim // 256, 1), 8),
    )  # fmt: skip


def make(
    num_tokens: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype,
    kept_as: torch.dtype | None = None, scales: KVScales = NO_SCALES, num_blocks: int = 16, device: str = "cpu",
):  # fmt: skip
    """`kept_as`: dtype of the cache, where it is another."""
    qkv = torch.randn(num_tokens, 4 * num_kv_heads, head_dim, device=device).to(dtype)
    before = torch.randn(2, num_blocks, block_size, num_kv_heads, head_dim, device=device)
    cache = kv_cache.cache_of(before, kept_as or dtype)
    slots = torch.randperm(num_blocks * block_size, device=device)[:num_tokens]
    return call(qkv[:, 2 * num_kv_heads : 3 * num_kv_heads], qkv[:, 3 * num_kv_heads :], cache, slots, scales)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=[
        *grid(num_tokens=(1, 33), num_kv_heads=(1, 3), head_dim=(64,), block_size=(16,), dtype=FLOATS),
        *grid(
            num_tokens=(5,),
            num_kv_heads=(3,),
            head_dim=(80,),
            block_size=(16, 24),
            dtype=FLOATS,
            kept_as=(torch.int8, *kv_cache.F8),
            scales=(KVScales(0.02, 0.004),),
        ),
    ],
    bench_cases=[
        *grid(
            num_tokens=(1, 16, 512),
            num_kv_heads=(3, 8),
            head_dim=(64,),
            block_size=(16,),
            num_blocks=(512,),
            dtype=(torch.bfloat16,),
        ),
        *grid(
            num_tokens=(512,),
            num_kv_heads=(8,),
            head_dim=(128,),
            block_size=(16,),
            num_blocks=(512,),
            dtype=(torch.bfloat16,),
            kept_as=(torch.int8, torch.float8_e4m3fn),
        ),
    ],
    num_bytes=lambda c: nbytes(*c.args[:2]) + 2 * c.args[0].numel() * c.args[2].element_size(),
    updates=(2,),
)
def kv_write(k: Tensor, v: Tensor, cache: Tensor, slots: Tensor, scales: KVScales = NO_SCALES) -> None:
    """Write keys and values [T, KV, D] to their slots [T] i64; ValueError when shapes or dtypes do not fit.

    On a CPU no slot may be negative: there are no captured graphs to pad.
    """
    kv_cache.check_cache(cache, k.dtype)
    check(k.shape == v.shape and k.shape[1:] == cache.shape[3:] and k.dtype == v.dtype, "k, v, cache")
    check(slots.shape == k.shape[:1] and slots.dtype == torch.int64, "slots are not [T] i64")
    check(k.stride()[1:] == v.stride()[1:] == (k.shape[2], 1), "k or v are strided within their tokens")
    check(slots.is_contiguous(), "slots are strided")
    if not k.is_cpu:
        return launch(k, v, cache, slots, scales)
    loops.run(
        loops.write_kv, len(slots), k.shape[1] * k.shape[2] // 4, k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0),
        loops.KINDS[k.dtype], slots.data_ptr(), *loops.integers_of(cache), 1 / scales.key, 1 / scales.value,
    )  # fmt: skip
    return None
