"""The paged KV cache as loops read and write it; what it holds: see kv_cache.py.

Loops take a cache as 7 integers: address, dtype as KINDS numbers it, elements of a plane, KV heads, size of a head,
tokens of a block, rows of a block.
"""

import numpy as np
import torch
from numba import float32, njit, uint8, uint16, uint32
from torch import Tensor

from cableway.kernels import kv_cache
from cableway.kernels.cpu import compiled
from cableway.kernels.cpu.compiled import (
    bits_of_f32,
    f32_at,
    f32_of_bits,
    f32_of_half,
    i8_at,
    read,
    u8_at,
    u16_at,
)

_F8E4M3, _F8E5M2, _INT8 = 3, 4, 5
_KINDS = {**compiled.KINDS, torch.float8_e4m3fn: _F8E4M3, torch.float8_e5m2: _F8E5M2, torch.int8: _INT8}
NUM_INTEGERS = 7


def integers_of(cache: Tensor) -> tuple[int, ...]:
    """A cache as loops take it."""
    _, _, block_rows, num_kv_heads, head_dim = cache.shape
    block_size = kv_cache.block_size_of(cache)
    return cache.data_ptr(), _KINDS[cache.dtype], cache.stride(0), num_kv_heads, head_dim, block_size, block_rows


@njit(inline="always")
def _f8_of_f32(x, mantissa_bits, bias):
    """To the nearest, even where two are; x is within what the dtype holds."""
    bits = bits_of_f32(x)
    sign, size = (bits >> uint32(24)) & uint32(0x80), bits & uint32(0x7FFFFFFF)
    shift = uint32(23 - mantissa_bits)
    least = uint32((127 - bias + 1) << 23)  # the least that is not subnormal
    if size < least:
        unit = uint32((127 - bias + 24 - mantissa_bits) << 23)  # a number whose last bit is the least subnormal
        small = bits_of_f32(f32_of_bits(size) + f32_of_bits(unit)) - unit
    else:
        odd = (size >> shift) & uint32(1)
        rounded = size + ((uint32(1) << (shift - uint32(1))) - uint32(1)) + odd
        small = (rounded - uint32((127 - bias) << 23)) >> shift
    return uint8(sign | small)


@njit(inline="always")
def _copy(source, start, target, to, size):
    """So many elements of 2 bytes from one address to another; places in such elements."""
    elements, into = u16_at(source), u16_at(target)
    for i in range(size):
        into[to + i] = elements[start + i]


@njit(inline="always")
def write_token(x, start, kind, cache, plane, slot, factor):
    """Keep a token's heads, which lie together in x, in its slot of a plane. `factor`: 1 / scale of f8."""
    address, kept_as, plane_len, num_heads, head_dim, block_size, block_rows = cache
    width = num_heads * head_dim
    block, offset = slot // block_size, slot % block_size
    first = plane * plane_len + block * block_rows * width
    if kept_as == kind:
        halves = 2 if kind == 0 else 1
        _copy(x, start * halves, address, (first + offset * width) * halves, width * halves)
        return
    h, bytes_, signed, scales = np.empty(head_dim, np.float32), u8_at(address), i8_at(address), f32_at(address)
    for head in range(num_heads):
        read(x, start + head * head_dim, head_dim, kind, h)
        to = first + offset * width + head * head_dim
        if kept_as == _INT8:
            top = float32(0)
            for i in range(head_dim):
                top = max(top, abs(h[i]))
            inverse = float32(127) / top if top > 0 else float32(0)
            for i in range(head_dim):
                signed[to + i] = np.int32(np.floor(h[i] * inverse + float32(0.5)))
            scales[(first + block_size * width) // 4 + head * block_size + offset] = top * float32(1 / 127)
        else:
            most = float32(448) if kept_as == _F8E4M3 else float32(57344)
            for i in range(head_dim):
                y = min(max(h[i] * factor, -most), most)
                bytes_[to + i] = _f8_of_f32(y, 3, 7) if kept_as == _F8E4M3 else _f8_of_f32(y, 2, 15)


@njit(inline="always")
def read_head(cache, plane, block, offset, head, into):
    """into[:] = a token's key or value for one head; what it is to be multiplied by is returned, that of int8."""
    address, kept_as, plane_len, num_heads, head_dim, block_size, block_rows = cache
    width = num_heads * head_dim
    first = plane * plane_len + block * block_rows * width
    start = first + offset * width + head * head_dim
    scale = float32(1)
    if kept_as == _F8E4M3:
        # With the bias of half precision the exponent is 8 less.
        kept = u8_at(address)
        for i in range(head_dim):
            byte = uint16(kept[start + i])
            half = uint16((byte & uint16(0x80)) << 8 | (byte & uint16(0x7F)) << 7)
            into[i] = f32_of_half(half) * float32(256)
    elif kept_as == _F8E5M2:
        kept = u8_at(address)
        for i in range(head_dim):
            into[i] = f32_of_half(uint16(uint16(kept[start + i]) << 8))
    elif kept_as == _INT8:
        signed = i8_at(address)
        for i in range(head_dim):
            into[i] = float32(signed[start + i])
        scale = f32_at(address)[(first + block_size * width) // 4 + head * block_size + offset]
    else:
        read(address, start, head_dim, kept_as, into)
    return scale
