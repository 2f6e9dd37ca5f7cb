"""LayerNorm over the last dimension.   y = (x - mean(x)) / sqrt(var(x) + eps) * w + b

x  [..., hidden]                       bf16|f16|f32   last dimension contiguous; leading dimensions may be strided
w  [hidden], or [num_heads, hidden]    f32            one a head where x is [num_tokens, num_heads, hidden]
b  [hidden] or None                    f32
y  [..., hidden]                       dtype of x, contiguous

Bound: bytes; reads x and w, writes y. Row-wise: a row's result does not depend on the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cableway.kernels.lang import jit, loops, tl, triton
from cableway.kernels.registry import FLOATS, are_contiguous, call, check, grid, kernel, nbytes


def ref(x: Tensor, w: Tensor, b: Tensor | None, *, eps: float) -> Tensor:
    h = x.float()
    h = h - h.mean(-1, keepdim=True)
    y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * w
    return (y if b is None else y + b).to(x.dtype)


@jit
def centred(h, inside, hidden, eps):
    """Rows h [ROWS, BLOCK] f32 with mean 0 and variance 1."""
    h = tl.where(inside, h - (tl.sum(h, 1) / hidden)[:, None], 0.0)
    return h * tl.rsqrt(tl.sum(h * h, 1) / hidden + eps)[:, None]


@jit
def _layer_norm(
    x_ptr, w_ptr, b_ptr, y_ptr, x_outer, x_inner, num_inner, num_rows, w_inner, hidden, eps,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < num_rows)[:, None] & (column < hidden)[None, :]
    start = row // num_inner * x_outer + row % num_inner * x_inner
    x = tl.load(x_ptr + start[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + (row % num_inner * w_inner)[:, None] + column[None, :], mask=inside, other=0.0)
    y = centred(x, inside, hidden, eps) * w
    if HAS_BIAS:
        y += tl.load(b_ptr + column, mask=column < hidden, other=0.0)[None, :]
    tl.store(y_ptr + row[:, None] * hidden + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


def launch(x: Tensor, w: Tensor, b: Tensor | None, *, eps: float) -> Tensor:
    hidden = x.shape[-1]
    rows = x if x.dim() == 3 else x.reshape(1, -1, hidden)
    num_rows = rows.shape[0] * rows.shape[1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(hidden)
    num_together = min(max(1024 // block, 1), 16)
    _layer_norm[(triton.cdiv(num_rows, num_together),)](
        rows, w, w if b is None else b, y, rows.stride(0), rows.stride(1), rows.shape[1], num_rows,
        hidden if w.dim() == 2 else 0, hidden, eps, HAS_BIAS=b is not None, ROWS=num_together, BLOCK=block,
        num_warps=min(max(num_together * block // 512, 1), 16),
    )  # fmt: skip
    return y


def make(
    num_tokens: int, hidden: int, dtype: torch.dtype, strided: bool = False, bias: bool = True, heads: int = 0,
    device="cpu",
):  # fmt: skip
    """`heads`: so many rows a token, beside others of a projection, each with weights of its own."""
    shape = (num_tokens, heads + 2, hidden) if heads else (num_tokens, hidden * (1 + strided))
    x = torch.randn(shape, device=device).add(0.5).to(dtype)
    w = torch.randn((heads, hidden) if heads else hidden, device=device)
    b = torch.randn(hidden, device=device) if bias else None
    return call(x[:, :heads] if heads else x[:, :hidden], w, b, eps=1e-5)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=[
        *grid(num_tokens=(1, 7), hidden=(80,), dtype=FLOATS, heads=(1, 5), bias=(False,)),
        *grid(num_tokens=(1, 7), hidden=(64, 576), dtype=FLOATS, strided=(False, True), bias=(False, True)),
    ],
    bench_cases=grid(num_tokens=(1, 16, 512), hidden=(576, 4096), dtype=(torch.bfloat16,)),
    num_bytes=lambda c: 2 * nbytes(c.args[0]) + nbytes(c.args[1]),
)
def layer_norm(x: Tensor, w: Tensor, b: Tensor | None, *, eps: float) -> Tensor:
    """Normalise the rows of x [..., hidden]; ValueError when w or b does not fit."""
    rows = x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1])
    num_outer, num_inner, size = rows.shape
    check(w.shape in (x.shape[-1:], (num_inner, size)) and (w.dim() == 1 or x.dim() == 3), "w does not fit x")
    check(w.dtype == torch.float32 and x.dtype in FLOATS and w.is_contiguous(), "dtypes of x or w, or w is strided")
    check(x.stride(-1) == 1, "x is strided within its rows")
    check(b is None or (b.shape == (size,) and b.dtype == torch.float32 and are_contiguous(b)), "b does not fit x")
    if not x.is_cpu:
        return launch(x, w, b, eps=eps)
    y = torch.empty(x.shape, dtype=x.dtype)
    loops.run(
        loops.centre, num_outer * num_inner, 6 * size, rows.data_ptr(), rows.stride(0), rows.stride(1), num_inner,
        loops.KINDS[x.dtype], 0, 0, 0, w.data_ptr(), size if w.dim() == 2 else 0, 0 if b is None else b.data_ptr(),
        y.data_ptr(), size, eps,
    )  # fmt: skip
    return y
