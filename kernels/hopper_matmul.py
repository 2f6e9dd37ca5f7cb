"""few_rows for many tokens, on Hopper's tensor cores: hopper_matmul.cu. The contract is few_rows.py's.

The matrix's rows lie on the side of a product that has 64 of them, 256 tokens on the other; where gated, 8 rows of a half
and the same 8 of the other lie in turns, so that a thread has both numbers that are multiplied. Programs stay, and take
tile after tile. Bound: FLOPs.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from cableway.kernels import compilation
from cableway.kernels.cuda import CudaKernel, address, tensor_map
from cableway.kernels.lang import gpu_capability, num_processors, triton

_KERNEL = CudaKernel("hopper_matmul")
_NUM_THREADS = 384
_ROWS, _DEPTH = 128, 64
_LEAST_IN = 512


class Tuning(NamedTuple):
    """Shape of a program's tile, and how tiles follow one another; see hopper_matmul.cu."""

    tokens: int = 256
    stages: int = 4
    turns: int = 2
    sharers: int = 2
    parts: int = 1
    lag: int = 2
    across: int = 8


def fits(x: Tensor, weight: Tensor, *, gated: bool) -> bool:
    """Whether this is faster than others, and rows begin at multiples of 16 bytes."""
    is_aligned = (x.data_ptr() | weight.data_ptr()) % 16 == x.stride(0) % 8 == weight.shape[1] % 8 == 0
    is_aligned = is_aligned and weight.shape[0] % (8 * (1 + gated)) == 0 and weight.shape[1] >= _LEAST_IN
    return is_aligned and len(x) > 128 and x.element_size() == 2 and gpu_capability() == 90


def launch(x: Tensor, weight: Tensor, bias: Tensor | None, *, gated: bool, tuned: Tuning | None = None) -> Tensor:
    (num_tokens, num_in), num_out = x.shape, weight.shape[0] // (1 + gated)
    y = torch.empty(num_tokens, num_out, dtype=x.dtype, device=x.device)
    t = tuned or Tuning(turns=1 if gated else 2)
    constants = (
        ("T_NAME", '"bf16"' if x.dtype == torch.bfloat16 else '"f16"'),
        ("TOKENS", t.tokens), ("STAGES", t.stages), ("TURNS", t.turns), ("SHARERS", t.sharers), ("PARTS", t.parts), ("LAG", t.lag),
        ("GATED", int(gated)), ("HAS_BIAS", int(bias is not None)),
    )  # fmt: skip
    if x.is_meta:
        compilation.in_background(_KERNEL.cubin, constants)
        return y
    halves, out_columns = 1 + gated, 32 if gated else 64
    rows = weight.view(halves, -1, 8, num_in).transpose(0, 1)
    arguments = struct.pack(
        "128s128s128sP4i40x",
        tensor_map(rows, (_ROWS // 8 // halves, halves, 8, _DEPTH)),
        tensor_map(x, (t.tokens // t.sharers, _DEPTH)),
        tensor_map(y, (t.tokens // t.parts // t.turns, out_columns)),
        address(bias), num_in, num_out, num_tokens, t.across,
    )  # fmt: skip
    num_tiles = triton.cdiv(num_out, _ROWS // halves * t.sharers) * triton.cdiv(num_tokens, t.tokens)
    cluster = t.sharers * t.parts
    ring_bytes = t.stages * (_ROWS + t.tokens) * _DEPTH * 2
    _KERNEL(
        constants,
        arguments,
        num_programs=cluster * (num_tiles if t.parts > 1 else min(num_tiles, num_processors() // cluster)),
        num_threads=_NUM_THREADS,
        shared_bytes=1024 + ring_bytes + 2 * t.tokens // t.parts // t.turns * out_columns * 2,
        cluster=cluster,
        overlaps=True,
    )
    return y
