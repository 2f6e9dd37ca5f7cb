"""One token through a linear layer, with what comes before it and after it.   y = gate(W p(x) + b)

    p(x) = x, or with a residual   h = residual + x;   p(x) = h / sqrt(mean(h²) + eps) * norm
    gate(z) = z, or of halves   silu(z1) * z2

x         [1, num_in]        bf16|f16|f32, contiguous
weight    [rows, num_in]     dtype of x, contiguous; rows = num_out, or 2 * num_out where gated
bias      [rows]             dtype of x, or None
residual  [1, num_in]        f32, contiguous, or None; it is only read, and h is returned; `also_input`: and p(x)
norm      [num_in]           f32, where there is a residual
out       [1, num_out]       dtype of x, or f32, contiguous: where y is written, or None
y         [1, num_out]       dtype of x, or of out

The sum of h² is taken beside the product and applied to its result: the norm costs no pass of its own. A program holds
its rows of the matrix whole, so that all of them are on their way before the kernel that makes x is done.
Bound: bytes of the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cableway.kernels.lang import gdc_launch_dependents, gdc_wait, jit, overlapping, tl, triton
from cableway.kernels.registry import FLOATS, are_contiguous, call, check, grid, kernel, nbytes
from cableway.kernels.tuning import OF_BYTES, Tunable

MOST_IN = 1 << 15
"""Numbers in a row that a program can hold."""


def ref(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None,
    norm: Tensor | None = None, eps: float = 0.0, gated: bool = False, out: Tensor | None = None,
    also_input: bool = False,
) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
    h = x.float() if residual is None else x.float() + residual
    p = h if residual is None else h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * norm
    z = p @ weight.float().T + (0.0 if bias is None else bias.float())
    if gated:
        z = F.silu(z[:, : z.shape[1] // 2]) * z[:, z.shape[1] // 2 :]
    y = z.to(x.dtype) if out is None else out.copy_(z)
    return y if residual is None else (y, h, p.to(x.dtype)) if also_input else (y, h)


@jit
def _product(weight, p, scale, bias_ptr, row, row_inside, HAS_BIAS: tl.constexpr):
    z = tl.sum(weight.to(tl.float32) * p[None, :], 1) * scale
    if HAS_BIAS:
        z += tl.load(bias_ptr + row, mask=row_inside, other=0.0).to(tl.float32)
    return z


@jit
def _gemv(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, norm_ptr, y_ptr, h_ptr, p_ptr, eps,
    NUM_IN: tl.constexpr, NUM_OUT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, GATED: tl.constexpr,
    ALSO_INPUT: tl.constexpr, ROWS: tl.constexpr, BLOCK_IN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_IN)
    row_inside, column_inside = row < NUM_OUT, column < NUM_IN
    inside = row_inside[:, None] & column_inside[None, :]
    weight_ptr += row[:, None].to(tl.int64) * NUM_IN + column[None, :]
    weight = tl.load(weight_ptr, mask=inside, other=0.0, eviction_policy="evict_first")
    if GATED:
        up_weight = tl.load(weight_ptr + NUM_OUT * NUM_IN, mask=inside, other=0.0, eviction_policy="evict_first")
    if HAS_NORM:
        norm = tl.load(norm_ptr + column, mask=column_inside, other=0.0)
    if PDL:
        gdc_wait()

    p, scale = tl.load(x_ptr + column, mask=column_inside, other=0.0).to(tl.float32), 1.0
    if HAS_NORM:
        p += tl.load(residual_ptr + column, mask=column_inside, other=0.0)
        if tl.program_id(0) == 0:
            tl.store(h_ptr + column, p, mask=column_inside)
        scale = tl.rsqrt(tl.sum(p * p, 0) / NUM_IN + eps)
        p *= norm
        if ALSO_INPUT and tl.program_id(0) == 0:
            tl.store(p_ptr + column, (p * scale).to(p_ptr.dtype.element_ty), mask=column_inside)
    y = _product(weight, p, scale, bias_ptr, row, row_inside, HAS_BIAS)
    if GATED:
        up = _product(up_weight, p, scale, bias_ptr, NUM_OUT + row, row_inside, HAS_BIAS)
        y = y * tl.sigmoid(y) * up
    tl.store(y_ptr + row, y.to(y_ptr.dtype.element_ty), mask=row_inside)


class Tuning(NamedTuple):
    """How the rows are shared out."""

    rows: int  # of a program; where gated, of each half
    num_warps: int


class Key(NamedTuple):
    """What the best tuning depends on."""

    num_out: int
    num_in: int
    gated: bool
    item_bytes: int


_BYTES_A_THREAD = 64
"""Of the matrix; more where a row is longer, up to 256, which are a quarter of a thread's registers."""


def _rule(key: Key) -> Tuning:
    """What was best on an H200: as many programs as fill it while each thread has some loads."""
    row_bytes = triton.next_power_of_2(key.num_in) * key.item_bytes
    num_warps = min(max(row_bytes // 2048, 4), 16)
    return Tuning(max(32 * num_warps * _BYTES_A_THREAD // row_bytes, 1), num_warps)


def _candidates(key: Key) -> Iterator[Tuning]:
    row_bytes = triton.next_power_of_2(key.num_in) * key.item_bytes
    for rows, num_warps in product((1, 2, 4, 8), (1, 2, 4, 8, 16)):
        if 32 <= rows * row_bytes // (32 * num_warps) <= 256:
            yield Tuning(rows, num_warps)


def launch(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None,
    norm: Tensor | None = None, eps: float = 0.0, gated: bool = False, out: Tensor | None = None,
    also_input: bool = False, tuned: Tuning | None = None,
) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
    num_in, num_out = x.shape[1], weight.shape[0] // (1 + gated)
    rows, num_warps = tuned or tuning(Key(num_out, num_in, gated, x.element_size()))
    y = torch.empty(1, num_out, dtype=x.dtype, device=x.device) if out is None else out
    h = None if residual is None else torch.empty_like(residual)
    p = torch.empty_like(x) if also_input else None
    _gemv[(triton.cdiv(num_out, rows),)](
        x, weight, bias, residual, norm, y, h, p, eps,
        NUM_IN=num_in, NUM_OUT=num_out, HAS_BIAS=bias is not None, HAS_NORM=residual is not None, GATED=gated,
        ALSO_INPUT=also_input, ROWS=rows, BLOCK_IN=triton.next_power_of_2(num_in), num_warps=num_warps, **overlapping(),
    )  # fmt: skip
    return y if h is None else (y, h) if p is None else (y, h, p)


def make(
    num_out: int, num_in: int, dtype: torch.dtype, normed: bool = False, gated: bool = False, biased: bool = False,
    to_float32: bool = False, also_input: bool = False, device="cpu",
):  # fmt: skip
    rows = num_out * (1 + gated)
    weight = (torch.randn(rows, num_in, device=device) / num_in**0.5).to(dtype)
    x, bias = torch.randn(1, num_in, device=device).to(dtype), torch.randn(rows, device=device).to(dtype)
    options = {"gated": gated}
    if to_float32:
        options["out"] = torch.empty(1, num_out, device=device)
    if normed:
        residual, norm = torch.randn(2, num_in, device=device)
        options |= {"residual": residual[None], "norm": norm, "eps": 1e-5, "also_input": also_input}
    return call(x, weight, bias if biased else None, **options)


def _make(key: Key, device: str):
    return make(key.num_out, key.num_in, OF_BYTES[key.item_bytes], gated=key.gated, device=device)


tuning = Tunable("gemv", Key, Tuning, rule=_rule, candidates=_candidates, make=_make, launch=launch)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=[
        *grid(num_out=(5, 64), num_in=(64, 576), dtype=FLOATS, normed=(False, True), gated=(False, True)),
        *grid(num_out=(33,), num_in=(576,), dtype=FLOATS[1:], to_float32=(True,)),
        *grid(num_out=(33,), num_in=(100,), dtype=FLOATS, normed=(False, True), gated=(True, False), biased=(True,)),
        *grid(num_out=(33,), num_in=(100,), dtype=FLOATS, normed=(True,), also_input=(True,)),
    ],
    bench_cases=[
        *grid(num_out=(4096,), num_in=(1024, 4096), dtype=(torch.bfloat16,), normed=(False, True)),
        *grid(num_out=(3072,), num_in=(1024,), dtype=(torch.bfloat16,), normed=(True,), gated=(True,)),
    ],
    num_bytes=lambda c: nbytes(c.args[1]),
)
def gemv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None,
    norm: Tensor | None = None, eps: float = 0.0, gated: bool = False, out: Tensor | None = None,
    also_input: bool = False,
) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
    """y [1, num_out], where there is a residual h [1, num_in] f32, and if asked for p(x) [1, num_in]; ValueError when
    shapes or dtypes do not fit."""
    check(x.dim() == 2 and weight.dim() == 2 and x.shape[1:] == weight.shape[1:] and len(x) == 1, "x, weight")
    check(weight.shape[0] % (1 + gated) == 0 and x.shape[1] <= MOST_IN, "an odd number of rows, or too long ones")
    check(x.dtype == weight.dtype and x.dtype in FLOATS, "dtypes of x and weight do not fit")
    check(are_contiguous(x, weight), "x or weight is strided")
    if bias is not None:
        check(bias.shape == weight.shape[:1] and bias.dtype == x.dtype and bias.is_contiguous(), "bias does not fit")
    if residual is not None:
        check(residual.shape == x.shape and norm.shape == x.shape[1:], "residual or norm does not fit x")
        check(residual.dtype == norm.dtype == torch.float32 and are_contiguous(residual, norm), "residual or norm")
    if out is not None:
        fits = out.shape == (1, weight.shape[0] // (1 + gated)) and out.dtype in (x.dtype, torch.float32)
        check(fits and out.is_contiguous(), "out does not fit")
    check(residual is not None or not also_input, "x itself is what goes in")
    options = {"residual": residual, "norm": norm, "eps": eps, "gated": gated, "out": out, "also_input": also_input}
    return (ref if x.is_cpu else launch)(x, weight, bias, **options)
