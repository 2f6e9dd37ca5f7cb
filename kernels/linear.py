"""Tokens through a linear layer.   y = gate(x Wᵀ + b);  gate(z) = z, or of halves silu(z1) * z2

x       [num_tokens, num_in]   bf16|f16|f32   rows may be strided
weight  [rows, num_in]         dtype of x, contiguous; rows = num_out, or 2 * num_out where gated
bias    [rows]                 dtype of x, or None
out     [num_tokens, num_out]  dtype of x, or f32, contiguous: where y is written, or None
y       [num_tokens, num_out]  dtype of x, or of out

The matrix lies on the side of a product that has many rows; tokens are columns. Where a program can hold its rows
whole, they are on their way before the kernel that makes x is done. On a GPU a row's result is the same whatever rows
are beside it, where the tuning is the same.
Bound: bytes of the matrix; of many tokens, for which there is a kernel on Hopper where gated, FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cableway.kernels import hopper_gated, hopper_linear
from cableway.kernels.lang import gdc_launch_dependents, gdc_wait, jit, overlapping, tl, triton
from cableway.kernels.registry import FLOATS, call, check, grid, kernel, nbytes
from cableway.kernels.tuning import OF_BYTES, Tunable


def ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gated: bool = False,
    out: Tensor | None = None,
    invariant: bool = False,
) -> Tensor:
    z = x.float() @ weight.float().T + (0.0 if bias is None else bias.float())
    if gated:
        z = F.silu(z[:, : z.shape[1] // 2]) * z[:, z.shape[1] // 2 :]
    return z.to(x.dtype) if out is None else out.copy_(z)


@jit(do_not_specialize=("num_tokens",))
def _linear(
    x_ptr, weight_ptr, bias_ptr, y_ptr, x_stride, num_tokens,
    NUM_IN: tl.constexpr, NUM_OUT: tl.constexpr, HAS_BIAS: tl.constexpr, GATED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, PARTS: tl.constexpr,
    EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """PARTS: each warp sums over a part of `num_in`. EARLY: tiles of the matrix are loaded one ahead, to registers."""
    PART_IN: tl.constexpr = (NUM_IN + PARTS * BLOCK_IN - 1) // (PARTS * BLOCK_IN) * BLOCK_IN
    first_out = tl.program_id(0) * BLOCK_OUT
    out = first_out + tl.arange(0, BLOCK_OUT)
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    if PARTS > 1:
        k = (tl.arange(0, PARTS) * PART_IN)[:, None] + tl.arange(0, BLOCK_IN)[None, :]
        w_ptr = weight_ptr + out[None, :, None].to(tl.int64) * NUM_IN + k[:, None, :]
        x_ptr += token[None, None, :].to(tl.int64) * x_stride + k[:, :, None]
        out_inside, token_inside = (out < NUM_OUT)[None, :, None], (token < num_tokens)[None, None, :]
        z = tl.zeros((PARTS, BLOCK_OUT, BLOCK_TOKENS), tl.float32)
        w_k, x_k = k[:, None, :], k[:, :, None]
    else:
        k = tl.arange(0, BLOCK_IN)
        w_ptr = weight_ptr + out[:, None].to(tl.int64) * NUM_IN + k[None, :]
        x_ptr += token[None, :].to(tl.int64) * x_stride + k[:, None]
        out_inside, token_inside = (out < NUM_OUT)[:, None], (token < num_tokens)[None, :]
        z = tl.zeros((BLOCK_OUT, BLOCK_TOKENS), tl.float32)
        w_k, x_k = k[None, :], k[:, None]
    up = z
    UP: tl.constexpr = NUM_OUT * NUM_IN
    if PDL:
        gdc_launch_dependents()
    if EARLY:
        next_w = tl.load(w_ptr, mask=(w_k < NUM_IN) & out_inside, other=0.0)
        if GATED:
            next_up_w = tl.load(w_ptr + UP, mask=(w_k < NUM_IN) & out_inside, other=0.0)
    if PDL:
        gdc_wait()
    for first in range(0, PART_IN, BLOCK_IN):
        x = tl.load(x_ptr + first, mask=(first + x_k < NUM_IN) & token_inside, other=0.0)
        if EARLY:
            w = next_w
            end = tl.where(first + BLOCK_IN < PART_IN, NUM_IN, 0)
            w_inside = (first + BLOCK_IN + w_k < end) & out_inside
            next_w = tl.load(w_ptr + first + BLOCK_IN, mask=w_inside, other=0.0)
            if GATED:
                up_w = next_up_w
                next_up_w = tl.load(w_ptr + UP + first + BLOCK_IN, mask=w_inside, other=0.0)
        else:
            w_inside = (first + w_k < NUM_IN) & out_inside
            w = tl.load(w_ptr + first, mask=w_inside, other=0.0)
            if GATED:
                up_w = tl.load(w_ptr + UP + first, mask=w_inside, other=0.0)
        z = tl.dot(w, x, z, input_precision="ieee")
        if GATED:
            up = tl.dot(up_w, x, up, input_precision="ieee")
    if PARTS > 1:
        z, up = tl.sum(z, 0), tl.sum(up, 0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + out, mask=out < NUM_OUT, other=0.0).to(tl.float32)[:, None]
    if GATED:
        if HAS_BIAS:
            up += tl.load(bias_ptr + NUM_OUT + out, mask=out < NUM_OUT, other=0.0).to(tl.float32)[:, None]
        z = z * tl.sigmoid(z) * up
    inside = (out < NUM_OUT)[:, None] & (token < num_tokens)[None, :]
    y_ptr += token[None, :].to(tl.int64) * NUM_OUT + out[:, None]
    tl.store(y_ptr, z.to(y_ptr.dtype.element_ty), mask=inside)


class Tuning(NamedTuple):
    """Shape of a program's tile, and how much of the matrix is on its way."""

    block_out: int
    block_in: int
    parts: int
    num_warps: int
    num_stages: int
    block_tokens: int = 16
    early: bool = False


INVARIANT = Tuning(block_out=64, block_in=64, parts=1, num_warps=4, num_stages=3, block_tokens=64)
"""For any number of rows, so that it never decides how a row is summed up."""


_WIDE = Tuning(block_out=16, block_in=256, parts=4, num_warps=4, num_stages=1, early=True)
_WIDER = _WIDE._replace(parts=8, num_warps=8)
_LONG = Tuning(block_out=16, block_in=128, parts=4, num_warps=4, num_stages=3)
_MOST_TOKENS, _MOST_IN, _MOST_BYTES = 16, 3072, 1 << 24


def pays(x: Tensor, matrix: Tensor, *, gated: bool) -> bool:
    """Whether this is faster than a library's product, as it is where matrices are small, or Hopper's kernels fit."""
    if hopper_linear.fits(x, matrix, gated=gated) or (gated and hopper_gated.fits(x, matrix)):
        return True
    is_small = matrix.shape[1] <= _MOST_IN and matrix.nbytes <= _MOST_BYTES and matrix.element_size() == 2
    return is_small and len(x) <= _MOST_TOKENS


class Key(NamedTuple):
    """What the best tuning depends on."""

    num_out: int
    num_in: int
    gated: bool
    item_bytes: int


def _rule(key: Key) -> Tuning:
    """Where a program can hold its rows whole it does; otherwise they go through shared memory.

    PERF, H200, us for 4 / 16 tokens, and the library's: 4096 x 1024 4.5 / 5.0 (5.3 / 5.4), 1024 x 2048 3.4 / 3.8
    (9.9 / 6.0), 1024 x 3072 6.5 / 6.4 (7.6 / 7.8), 2 x 3072 x 1024 gated 5.7 / 6.0 (7.8 / 7.9 with its gate).
    """
    if key.item_bytes > 2:
        return _LONG._replace(block_in=64)
    return _WIDE if key.num_in <= 1024 else _WIDER if key.num_in <= 2048 else _LONG


def _candidates(key: Key) -> Iterator[Tuning]:
    for wide in (_WIDE, _WIDER):
        if wide.block_in * wide.parts >= key.num_in:
            yield from (wide, wide._replace(block_out=32))
    for block_out, num_stages in product((16, 32), (3, 4)):
        yield _LONG._replace(block_out=block_out, num_stages=num_stages)
        yield _LONG._replace(block_out=block_out, num_stages=num_stages, parts=8, num_warps=8)


def launch(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gated: bool = False,
    out: Tensor | None = None, invariant: bool = False, tuned: Tuning | None = None,
) -> Tensor:  # fmt: skip
    if out is None and not tuned and not invariant:
        if hopper_linear.fits(x, weight, gated=gated):
            return hopper_linear.launch(x, weight, bias, gated=gated)
        if gated and hopper_gated.fits(x, weight):
            return hopper_gated.launch(x, weight, bias)
    (num_tokens, num_in), num_out = x.shape, weight.shape[0] // (1 + gated)
    t = tuned or (INVARIANT if invariant else tuning(Key(num_out, num_in, gated, x.element_size())))
    y = torch.empty(num_tokens, num_out, dtype=x.dtype, device=x.device) if out is None else out
    _linear[(triton.cdiv(num_out, t.block_out), triton.cdiv(num_tokens, t.block_tokens))](
        x, weight, bias, y, x.stride(0), num_tokens,
        NUM_IN=num_in, NUM_OUT=num_out, HAS_BIAS=bias is not None, GATED=gated,
        BLOCK_TOKENS=t.block_tokens, BLOCK_OUT=t.block_out, BLOCK_IN=t.block_in, PARTS=t.parts,
        EARLY=t.early, num_warps=t.num_warps, num_stages=t.num_stages, **overlapping(),
    )  # fmt: skip
    return y


def make(
    num_tokens: int, num_out: int, num_in: int, dtype: torch.dtype, gated: bool = False, biased: bool = False,
    strided: bool = False, to_float32: bool = False, invariant: bool = False, device="cpu",
):  # fmt: skip
    rows = num_out * (1 + gated)
    weight = (torch.randn(rows, num_in, device=device) / num_in**0.5).to(dtype)
    x = torch.randn(num_tokens, num_in * (1 + strided), device=device).to(dtype)[:, :num_in]
    bias = torch.randn(rows, device=device).to(dtype)
    out = torch.empty(num_tokens, num_out, device=device) if to_float32 else None
    return call(x, weight, bias if biased else None, gated=gated, out=out, invariant=invariant)


def _make(key: Key, device: str):
    return make(_MOST_TOKENS, key.num_out, key.num_in, OF_BYTES[key.item_bytes], gated=key.gated, device=device)


tuning = Tunable("linear", Key, Tuning, rule=_rule, candidates=_candidates, make=_make, launch=launch)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=[
        *grid(num_tokens=(1, 7), num_out=(5, 64), num_in=(64, 576), dtype=FLOATS, gated=(False, True)),
        *grid(num_tokens=(33,), num_out=(40,), num_in=(576,), dtype=FLOATS[1:], to_float32=(True,)),
        *grid(
            num_tokens=(16, 17, 100),
            num_out=(208,),
            num_in=(1096,),
            dtype=FLOATS[1:],
            gated=(False, True),
            biased=(True,),
        ),
        *grid(num_tokens=(70,), num_out=(40,), num_in=(200,), dtype=FLOATS, gated=(False, True), invariant=(True,)),
        *grid(
            num_tokens=(5,),
            num_out=(33,),
            num_in=(100,),
            dtype=FLOATS,
            gated=(True, False),
            biased=(True,),
            strided=(True,),
        ),
    ],
    bench_cases=[
        *grid(num_tokens=(4, 16), num_out=(4096,), num_in=(1024, 4096), dtype=(torch.bfloat16,)),
        *grid(
            num_tokens=(16,),
            num_out=(3072,),
            num_in=(1024,),
            dtype=(torch.bfloat16,),
            gated=(True,),
            invariant=(False, True),
        ),
    ],
    num_bytes=lambda c: nbytes(c.args[1]),
)
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gated: bool = False,
    out: Tensor | None = None,
    invariant: bool = False,
) -> Tensor:
    """x [num_tokens, num_in] -> y [num_tokens, num_out]; ValueError when shapes or dtypes do not fit."""
    check(x.dim() == 2 and weight.dim() == 2 and x.shape[1:] == weight.shape[1:], "x and weight do not fit")
    check(weight.shape[0] % (1 + gated) == 0, "an odd number of rows")
    check(x.dtype == weight.dtype and x.dtype in FLOATS, "dtypes of x and weight do not fit")
    check(x.stride(1) == 1 and weight.is_contiguous(), "x is strided within its rows, or weight")
    if out is not None:
        fits = out.shape == (len(x), weight.shape[0] // (1 + gated)) and out.dtype in (x.dtype, torch.float32)
        check(fits and out.is_contiguous(), "out does not fit")
    if bias is not None:
        check(bias.shape == weight.shape[:1] and bias.dtype == x.dtype and bias.is_contiguous(), "bias does not fit")
    return (ref if x.is_cpu else launch)(x, weight, bias, gated=gated, out=out, invariant=invariant)
