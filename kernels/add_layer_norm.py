"""Fused residual add and LayerNorm.   h = x + r;  y = (h - mean(h)) / sqrt(var(h) + eps) * w + b

x  [num_tokens, hidden]  bf16|f16|f32   rows may be strided
r  [num_tokens, hidden]  that or f32    rows may be strided; h is written over it
w  [hidden]              f32
b  [hidden] or None      f32
y  [num_tokens, hidden]  dtype of x, contiguous

h is rounded to the dtype of r before it is normalised, so that the sum that is kept is the one that was normalised.
Bound: bytes; reads x, r and w, writes r and y. Row-wise: a row's result does not depend on the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cableway.kernels import layer_norm
from cableway.kernels.lang import jit, loops, tl, triton
from cableway.kernels.layer_norm import centred
from cableway.kernels.registry import FLOATS, call, check, grid, kernel, nbytes


def ref(x: Tensor, r: Tensor, w: Tensor, b: Tensor | None, *, eps: float) -> Tensor:
    r.copy_(x.float() + r.float())
    return layer_norm.ref(r.float(), w, b, eps=eps).to(x.dtype)


@jit
def _add_layer_norm(
    x_ptr, r_ptr, w_ptr, b_ptr, y_ptr, x_stride, r_stride, hidden, eps, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < hidden
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    r = tl.load(r_ptr + row * r_stride + column, mask=inside, other=0.0).to(tl.float32)
    rounded = (x + r).to(r_ptr.dtype.element_ty)
    tl.store(r_ptr + row * r_stride + column, rounded, mask=inside)
    y = centred(rounded.to(tl.float32), inside, hidden, eps) * tl.load(w_ptr + column, mask=inside, other=0.0)
    if HAS_BIAS:
        y += tl.load(b_ptr + column, mask=inside, other=0.0)
    tl.store(y_ptr + row * hidden + column, y.to(y_ptr.dtype.element_ty), mask=inside)


def launch(x: Tensor, r: Tensor, w: Tensor, b: Tensor | None, *, eps: float) -> Tensor:
    num_tokens, hidden = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(hidden)
    _add_layer_norm[(num_tokens,)](
        x, r, w, w if b is None else b, y, x.stride(0), r.stride(0), hidden, eps, HAS_BIAS=b is not None, BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
    )  # fmt: skip
    return y


def make(
    num_tokens: int, hidden: int, dtype: torch.dtype, sum_dtype: torch.dtype | None = None, strided: bool = False,
    bias: bool = True, device="cpu",
):  # fmt: skip
    x, r = torch.randn(2, num_tokens, hidden * (1 + strided), device=device)
    x, r = x.to(dtype)[:, :hidden], r.add(0.5).to(sum_dtype or dtype)[:, :hidden]
    w, b = torch.randn(2, hidden, device=device)
    return call(x, r, w, b if bias else None, eps=1e-5)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=[
        *grid(num_tokens=(1, 7), hidden=(64, 576), dtype=FLOATS, strided=(False, True), bias=(False, True)),
        *grid(num_tokens=(1, 7), hidden=(576,), dtype=FLOATS[1:], sum_dtype=(torch.float32,)),
    ],
    bench_cases=grid(
        num_tokens=(1, 16, 512), hidden=(576, 4096), dtype=(torch.bfloat16,), sum_dtype=(torch.bfloat16, torch.float32)
    ),
    num_bytes=lambda c: 2 * nbytes(c.args[0]) + 2 * nbytes(c.args[1]) + nbytes(c.args[2]),
    updates=(1,),
)
def add_layer_norm(x: Tensor, residual: Tensor, w: Tensor, b: Tensor | None, *, eps: float) -> Tensor:
    """Add x to `residual` in place and return the normalised sum; ValueError when shapes or dtypes do not fit."""
    check(x.dim() == 2 and x.shape == residual.shape and w.shape == x.shape[1:], "shapes of x, residual, w do not fit")
    check(x.dtype in FLOATS and residual.dtype in (x.dtype, torch.float32), "residual is not of the dtype of x, or f32")
    check(w.dtype == torch.float32 and x.stride(1) == residual.stride(1) == w.stride(0) == 1, "w, or strides of rows")
    check(b is None or (b.shape == w.shape and b.dtype == torch.float32 and b.stride(0) == 1), "b does not fit w")
    if not x.is_cpu:
        return launch(x, residual, w, b, eps=eps)
    y, (num_tokens, hidden) = torch.empty_like(x), x.shape
    loops.run(
        loops.centre, num_tokens, 6 * hidden, x.data_ptr(), 0, x.stride(0), num_tokens, loops.KINDS[x.dtype],
        residual.data_ptr(), residual.stride(0), loops.KINDS[residual.dtype], w.data_ptr(), 0,
        0 if b is None else b.data_ptr(), y.data_ptr(), hidden, eps,
    )  # fmt: skip
    return y
