"""The paged KV cache of one layer: how it lies in memory, and what becomes of numbers that are kept in 8 bits.

Layout: `cache [2, num_blocks, block_rows, num_kv_heads, head_dim]`, keys then values, contiguous. A block has a row for
each of its block_size tokens; a token's slot is `block_id * block_size + offset`. Why this one: on a CPU a sequence's
gathered blocks are one dense matrix [len, num_kv_heads * head_dim] without a further copy (with keys and values of a
token side by side, bfloat16 products over it take 3 to 5 times as long); on a GPU a tile of one head is rows of
head_dim elements, whole cache lines each.

What is kept of x, by the dtype of the cache:

    bf16 | f16 | f32   x
    f8e4m3 | f8e5m2    x / scale, within what the dtype holds; one scale for a layer's keys, one for its values
    int8               x / scale to the nearest integer; scale = max |x| / 127 of each token and head

The scales of int8 [num_kv_heads, block_size] f32 follow a block's tokens, in as many rows more as they take, so that a
block is one piece of memory whatever it holds: it is copied, shared and dropped as others are. Where blocks have 16
tokens of heads of 128 that is a row of 17. Other dtypes have a row a token, and no scales in memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cableway.kernels.lang import jit, tl
from cableway.kernels.registry import FLOATS, check

F8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_INT8_MAX = 127
_SCALE_BYTES = 4


class KVScales(NamedTuple):
    """Of a layer whose cache is f8: what its keys, and its values, are divided by."""

    key: float = 1.0
    value: float = 1.0


NO_SCALES = KVScales()


def kv_cache_shape(
    num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, num_planes: int = 2
) -> tuple[int, ...]:
    """Shape of one layer's cache; a block takes num_planes * block_rows * num_kv_heads * head_dim elements of it."""
    scale_rows = -(-_SCALE_BYTES * block_size // head_dim) if dtype == torch.int8 else 0
    return (num_planes, num_blocks, block_size + scale_rows, num_kv_heads, head_dim)


def block_size_of(cache: Tensor) -> int:
    """Tokens of a block: of int8 as many as there is room for with their scales."""
    rows, head_dim = cache.shape[2], cache.shape[4]
    return rows * head_dim // (head_dim + _SCALE_BYTES) if cache.dtype == torch.int8 else rows


def scales_of(cache: Tensor) -> Tensor:
    """Of an int8 cache, a view of the scales in it: [planes, num_blocks, num_kv_heads, block_size] f32."""
    block_size, num_kv_heads = block_size_of(cache), cache.shape[3]
    tail = cache[:, :, block_size:].flatten(2).view(torch.float32)
    return tail[..., : num_kv_heads * block_size].unflatten(2, (num_kv_heads, block_size))


def kept(x: Tensor, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor | None]:
    """What a cache of that dtype keeps of heads x [..., head_dim], and the scales [...] f32 of int8."""
    if dtype in FLOATS:
        return x.to(dtype), None
    if dtype in F8:
        most = torch.finfo(dtype).max
        return (x.float() * (1 / scale)).clamp(-most, most).to(dtype), None
    top = x.float().abs().amax(-1)
    factor = torch.where(top > 0, _INT8_MAX / top, 0.0)
    return (x.float() * factor[..., None] + 0.5).floor().to(torch.int8), top * (1 / _INT8_MAX)


def numbers(cache: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What those blocks of a cache say, the scales of f8 left out: [planes, num_blocks, block_size, KV, head_dim]."""
    if cache.dtype != torch.int8:
        return cache.to(dtype)
    rows = cache[:, :, : block_size_of(cache)]
    return (rows * scales_of(cache).transpose(2, 3)[..., None]).to(dtype)


def cache_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The cache that keeps x [2, num_blocks, block_size, num_kv_heads, head_dim]; what tests begin with."""
    rows, scales = kept(x, dtype)
    if scales is None:
        return rows
    cache = torch.zeros(kv_cache_shape(*x.shape[1:], dtype, len(x)), dtype=dtype, device=x.device)
    cache[:, :, : x.shape[2]] = rows
    scales_of(cache)[:] = scales.transpose(2, 3)
    return cache


def check_cache(cache: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError where a cache is not one that keeps numbers of `dtype`."""
    check(cache.dim() == 5 and cache.is_contiguous(), "cache is not [2, N, rows, KV, D], contiguous")
    check(dtype in FLOATS and cache.dtype in (dtype, *F8, torch.int8), "the cache is of a dtype that does not fit")
    if cache.dtype == torch.int8:
        of_its_block_size = kv_cache_shape(1, block_size_of(cache), *cache.shape[3:], torch.int8)
        check(cache.shape[4] % _SCALE_BYTES == 0 and cache.shape[2] == of_its_block_size[2], "cache is no int8 cache")


@jit
def write_heads(
    plane_ptr, y, slot, head, dim, head_inside, factor,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS_A_BLOCK: tl.constexpr,
):  # fmt: skip
    """Keep heads y [heads, dims] f32 of one token in its slot of the keys or of the values. `factor`: 1 / scale of f8.

    Past HEAD_DIM y is 0.
    """
    dtype: tl.constexpr = plane_ptr.dtype.element_ty
    inside = head_inside[:, None] & (dim < HEAD_DIM)[None, :]
    row = slot
    if ROWS_A_BLOCK != BLOCK_SIZE:
        row = slot // BLOCK_SIZE * ROWS_A_BLOCK + slot % BLOCK_SIZE
    place = plane_ptr + (row * NUM_KV_HEADS + head)[:, None] * HEAD_DIM + dim[None, :]
    if dtype == tl.int8:
        top = tl.max(tl.abs(y), 1)
        whole = tl.floor(y * tl.where(top > 0, tl.div_rn(127.0, top), 0.0)[:, None] + 0.5)
        tl.store(place, whole.to(tl.int8), mask=inside)
        WORDS: tl.constexpr = NUM_KV_HEADS * HEAD_DIM // 4
        scale_ptr = plane_ptr.to(tl.pointer_type(tl.float32)) + slot // BLOCK_SIZE * (ROWS_A_BLOCK * WORDS)
        scale_ptr += BLOCK_SIZE * WORDS + slot % BLOCK_SIZE
        tl.store(scale_ptr + head * BLOCK_SIZE, top * (1 / 127), mask=head_inside)
    elif dtype.is_fp8():
        MOST: tl.constexpr = 448.0 if dtype == tl.float8e4nv else 57344.0
        tl.store(place, tl.minimum(tl.maximum(y * factor, -MOST), MOST).to(dtype), mask=inside)
    else:
        tl.store(place, y.to(dtype), mask=inside)


@jit
def beside(q, kept_as: tl.constexpr):
    """Queries in the dtype of products with what is `kept_as`.

    PERF: a GPU converts 8-bit floats to f16 two at a time, and each of these to bf16 alone, at a quarter of the rate.
    """
    if kept_as.primitive_bitwidth == 8 and kept_as != tl.int8 and q.dtype == tl.bfloat16:
        q = q.to(tl.float16)
    return q


@jit
def as_factor(x, dtype: tl.constexpr):
    """What a cache keeps, as products take it. (From int8 to bf16 is by way of f32 for Triton's interpreter.)"""
    if x.dtype == tl.int8:
        x = x.to(tl.float32)
    return x.to(dtype)


@jit
def scales_at(plane_ptr, block, key, inside, kv_head, num_kv_heads, head_dim, block_size, rows_a_block):
    """What the keys, or values, of one head at positions `key` of int8 blocks `block` are to be multiplied by."""
    words = num_kv_heads * head_dim // 4
    scale_ptr = plane_ptr.to(tl.pointer_type(tl.float32)) + block.to(tl.int64) * (rows_a_block * words)
    scale_ptr += block_size * words + kv_head * block_size + key % block_size
    return tl.load(scale_ptr, mask=inside, other=0.0)
