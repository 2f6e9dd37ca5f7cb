"""linear for Hopper's tensor cores, up to 256 tokens: hopper_linear.cu. That contract, without `out`.

The matrix's rows lie on the side of a product that has 64 of them, tokens on the other. A program takes 128 rows (where
gated, 64 of each half) and a part of `num_in`; programs that share rows are a cluster and put their parts together in
shared memory, so that small matrices keep enough processors busy.

PERF, H200, us at 2, 16, 24, 64 and 128 tokens, and in brackets the library's: 4096 x 1024 3.8, 4.7, 4.1, 4.5, 5.7 (4.9,
5.4, 5.2, 5.4, 5.6), 1024 x 2048 3.0, 3.5, 3.7, 4.7, 5.2 (12.8, 5.9, 6.1, 5.9, 6.3), 1024 x 3072 3.5, 4.1, 3.8, 4.8, 6.5
(6.8, 7.1, 7.5, 7.3, 7.6), gated 3072 x 1024 5.1, 5.6, 5.8, 6.7, 7.7 (with its gate 7.1, 7.3, 7.3, 7.6, 7.9). Larger
matrices are no faster alone, but in a step they come while the kernel before ends: llama-3.1-8b, ms a step of 8, 24, 64
and 128 rows 4.90, 5.23, 6.31, 9.50 (5.05, 5.37, 6.44, 7.79). A layer of qwen3-0.6b but for attention, 128, 160, 192,
224 and 256 rows 28.1, 31.3, 31.8, 35.4, 35.2 (33.3, 35.3, 35.8, 37.8, 37.2). Slower, too: tiles of 128 tokens,
programs on all processors, and parts that are read from other programs' memory in place of sent (0.7 TB/s in all).
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from cableway.kernels import compilation
from cableway.kernels.cuda import CudaKernel, address, tensor_map
from cableway.kernels.lang import gpu_capability, num_processors, triton

_KERNEL = CudaKernel("hopper_linear")
_NUM_THREADS = 288
_ROWS, _DEPTH = 128, 64
_TILES = (16, 32, 64)  # of tokens
_MOST_TOKENS = 64
_MOST_TOKENS_OF_SMALL, _SMALL_BYTES = 128, 1 << 24
_MOST_TOKENS_OF_MEDIUM, _MEDIUM_BYTES = 256, 1 << 22  # not gated: hopper_gated does those that are better
_MOST_PARTS = 8
_RING_BYTES = 220 << 10
_TOKEN_STRIDE = (_ROWS + 4) * 4  # of sums


def fits(x: Tensor, weight: Tensor, *, gated: bool) -> bool:
    """Whether this is faster than others, and rows begin at multiples of 16 bytes."""
    is_aligned = (x.data_ptr() | weight.data_ptr()) % 16 == x.stride(0) % 8 == weight.shape[1] % 8 == 0
    is_aligned = is_aligned and weight.shape[0] % 16 == 0
    return (
        len(x) <= _most_tokens(weight.nbytes, gated) and is_aligned and x.element_size() == 2 and gpu_capability() == 90
    )


def _most_tokens(num_bytes: int, gated: bool) -> int:
    if num_bytes > _SMALL_BYTES:
        return _MOST_TOKENS
    return _MOST_TOKENS_OF_SMALL if gated or num_bytes < _MEDIUM_BYTES else _MOST_TOKENS_OF_MEDIUM


def launch(x: Tensor, weight: Tensor, bias: Tensor | None, *, gated: bool) -> Tensor:
    (num_tokens, num_in), num_out = x.shape, weight.shape[0] // (1 + gated)
    y = torch.empty(num_tokens, num_out, dtype=x.dtype, device=x.device)
    tile = next((tile for tile in _TILES if tile >= num_tokens), _TILES[-1])
    num_tiles = triton.cdiv(num_out, _ROWS // (1 + gated)) * triton.cdiv(num_tokens, tile)
    num_steps = triton.cdiv(num_in, _DEPTH)
    parts = _num_parts(num_tiles, num_steps, num_processors())
    stages = min(_RING_BYTES // _stage_bytes(tile), triton.cdiv(num_steps, parts))
    constants = (
        ("T_NAME", '"bf16"' if x.dtype == torch.bfloat16 else '"f16"'),
        ("TOKENS", tile), ("STAGES", stages), ("PARTS", parts),
        ("GATED", int(gated)), ("HAS_BIAS", int(bias is not None)),
    )  # fmt: skip
    if x.is_meta:
        compilation.in_background(_KERNEL.load, constants)
        return y
    arguments = struct.pack(
        "128s128s2P3i36x",
        tensor_map(weight, (64, _DEPTH)), tensor_map(x, (tile, _DEPTH)),
        address(bias), address(y), num_in, num_out, num_tokens,
    )  # fmt: skip
    _KERNEL(
        constants,
        arguments,
        num_programs=num_tiles * parts,
        num_threads=_NUM_THREADS,
        shared_bytes=1024 + max(stages * _stage_bytes(tile), tile * _TOKEN_STRIDE * 2),
        cluster=parts,
        overlaps=True,
    )
    return y


def _num_parts(num_tiles: int, num_steps: int, num_processors: int) -> int:
    """As many as leave a quarter of the processors to the next kernel, whose matrix comes meanwhile."""
    parts = 1
    while 2 * parts <= min(_MOST_PARTS, num_processors * 3 // 4 // num_tiles, num_steps // 2):
        parts *= 2
    return parts


def _stage_bytes(tile: int) -> int:
    return (_ROWS + tile) * _DEPTH * 2
