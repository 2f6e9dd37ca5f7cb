"""linear for many tokens where gated, on Hopper's tensor cores: hopper_gated.cu. That contract, without `out`.

The matrix's rows lie on the side of a product that has 64 of them, tokens on the other, up to 256. 8 rows of a half and
the same 8 of the other lie in turns, so that a thread has both numbers that are multiplied. A program stays, and takes
tile after tile. Bound: FLOPs.

PERF, H200, us, in brackets the library's with silu_mul: 3072 x 1024, 8,192 tokens 156 (185); 14336 x 4096, 8,192 tokens
2,634 (2,787) and not shared out 2,665; of 96, 128, 192, 256, 768 tokens 64, 64, 77, 93, 259 (66, 71, 84, 101, 287), not
shared out 68, 67, 82, 99, 293. Slower: one warpgroup behind the other, so that its products overlap with that one's
results (0 to 1 %); clusters of 4, which never are at work on all processors (twice as long); bands of 4 or 16 tiles (1
to 8 %). Products without a gate are the library's: ours, though they added to the residual stream on their own, made
steps of 8,192 tokens 0.3 % shorter (llama-3.1-8b) to 5 % longer (qwen3-0.6b).
"""

from __future__ import annotations

import struct
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from cableway.kernels import compilation
from cableway.kernels.cuda import Constants, CudaKernel, address, tensor_map
from cableway.kernels.lang import gpu_capability, num_processors, triton

_KERNEL = CudaKernel("hopper_gated")
_NUM_THREADS = 384
_CLUSTER, _ROWS, _DEPTH = 2, 128, 64
_TILES = {128: 0.82, 192: 0.92, 256: 1.0}  # of tokens, and how fast they are multiplied, as of the largest
_ACROSS = 8  # tiles of tokens for some rows before the next rows
_MANY, _LEAST_IN = 1024, 1024
_SHARED_BYTES = 225 << 10
_LEAST_USE, _LEAST_USE_FEW, _FEW = 0.78, 0.55, 256  # as the library's, and its gate's
_SHARING_STEPS = 11  # what sharing takes, in time of a step: sums are written, and read


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether this is faster than others, and rows begin at multiples of 16 bytes."""
    is_aligned = (x.data_ptr() | weight.data_ptr()) % 16 == x.stride(0) % 8 == weight.shape[1] % 8 == 0
    is_aligned = is_aligned and weight.shape[0] % 16 == 0 and weight.shape[1] >= _LEAST_IN
    if not is_aligned or x.element_size() != 2 or gpu_capability() != 90:
        return False
    least_use = _LEAST_USE if len(x) > _FEW else _LEAST_USE_FEW
    # What is compiled ahead has to do for all numbers of tokens.
    return _plan(len(x), *weight.shape).use >= least_use or (x.is_meta and len(x) >= _MANY)


class Plan(NamedTuple):
    """How products become tiles."""

    tile: int  # tokens
    num_shared: int  # tiles (of clusters) that are shared out along `num_in`
    num_clusters: int
    use: float  # the part of what processors multiply meanwhile that are products of tokens and rows which there are


@lru_cache(4096)
def _plan(num_tokens: int, num_rows: int, num_in: int) -> Plan:
    plans = (_plan_of(tile, num_tokens, num_rows, num_in) for tile in _TILES)
    return max(plans, key=lambda plan: plan.use)


def _plan_of(tile: int, num_tokens: int, num_rows: int, num_in: int) -> Plan:
    """Tiles come in rounds; those of the last two are shared out, unless that takes longer."""
    at_once = num_processors() // _CLUSTER
    num_tiles = triton.cdiv(num_rows, _ROWS * _CLUSTER) * triton.cdiv(num_tokens, tile)
    num_steps = triton.cdiv(num_in, _DEPTH)
    in_rounds = triton.cdiv(num_tiles, at_once) * num_steps
    shared_out = num_tiles * num_steps / at_once + _SHARING_STEPS
    ideal = _TILES[tile] * num_tokens * num_rows * num_in / (at_once * tile * _ROWS * _CLUSTER * _DEPTH)
    num_clusters, is_shared = min(num_tiles, at_once), num_tiles > at_once and shared_out < in_rounds
    num_shared = at_once + num_tiles % at_once if is_shared else 0
    return Plan(tile, num_shared, num_clusters, ideal / (shared_out if is_shared else in_rounds))


def launch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    (num_tokens, num_in), num_out = x.shape, len(weight) // 2
    y = torch.empty(num_tokens, num_out, dtype=x.dtype, device=x.device)
    if x.is_meta:
        for tile in _TILES:
            compilation.in_background(_KERNEL.load, _constants(tile, x, bias))
        return y
    plan = _plan(num_tokens, *weight.shape)
    tile = plan.tile
    rows = weight.view(2, -1, 8, num_in).transpose(0, 1)
    arguments = struct.pack(
        "128s128s128s3P5i20x",
        tensor_map(rows, (_ROWS // 16, 2, 8, _DEPTH)),
        tensor_map(x, (tile // _CLUSTER, _DEPTH)),
        tensor_map(y, (tile, _ROWS // 4)),
        *map(address, (bias, *_parts(x.device))), num_in, num_out, num_tokens, _ACROSS, plan.num_shared,
    )  # fmt: skip
    _KERNEL(
        _constants(tile, x, bias),
        arguments,
        num_programs=plan.num_clusters * _CLUSTER,
        num_threads=_NUM_THREADS,
        shared_bytes=1024 + _out_bytes(tile) + _num_stages(tile) * _stage_bytes(tile),
        cluster=_CLUSTER,
        overlaps=True,
    )
    return y


@cache
def _parts(device: torch.device) -> tuple[Tensor, Tensor]:
    """Of tiles: sums, and for each warpgroup whether it has left some: zeros, which each launch leaves as zeros."""
    sums = torch.empty(num_processors(), _ROWS, max(_TILES), dtype=torch.float32, device=device)
    return sums, torch.zeros(num_processors(), 2, dtype=torch.int32, device=device)


def _constants(tile: int, x: Tensor, bias: Tensor | None) -> Constants:
    return (
        ("T_NAME", '"bf16"' if x.dtype == torch.bfloat16 else '"f16"'),
        ("TOKENS", tile), ("STAGES", _num_stages(tile)), ("HAS_BIAS", int(bias is not None)),
    )  # fmt: skip


def _num_stages(tile: int) -> int:
    return (_SHARED_BYTES - _out_bytes(tile)) // _stage_bytes(tile)


def _stage_bytes(tile: int) -> int:
    return (_ROWS + tile) * _DEPTH * 2


def _out_bytes(tile: int) -> int:
    """Of a tile's results."""
    return tile * _ROWS
