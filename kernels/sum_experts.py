"""What the experts of a token give together.   y = sum over k of x_k;  with another, + other / (1 + exp(-gate))

x      [num_tokens, top_k, hidden]  bf16|f16|f32, contiguous
other  [num_tokens, hidden]         dtype of x, contiguous, or None: what all tokens go through
gate   [num_tokens, 1]              dtype of x, contiguous, or None: other counts whole
y      [num_tokens, hidden]         dtype of x, contiguous

Bound: bytes; reads x and other, writes y. A row's result does not depend on the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cableway.kernels.lang import gdc_launch_dependents, gdc_wait, jit, overlapping, tl, triton
from cableway.kernels.registry import FLOATS, call, check, grid, kernel, nbytes


def ref(x: Tensor, other: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
    y = x.float().sum(1)
    if other is not None:
        # As a gate of torch's own on a CPU computes the last few numbers of a tensor in another way than the others.
        y += other.float() if gate is None else other.float() * gate.float().neg().exp_().add_(1).reciprocal_()
    return y.to(x.dtype)


@jit
def _sum_experts(
    x_ptr, other_ptr, gate_ptr, y_ptr, hidden, TOP_K: tl.constexpr, HAS_OTHER: tl.constexpr, HAS_GATE: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < hidden
    y = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        y += tl.load(x_ptr + (token * TOP_K + k) * hidden + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_OTHER:
        other = tl.load(other_ptr + token * hidden + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_GATE:
            other *= tl.sigmoid(tl.load(gate_ptr + token).to(tl.float32))
        y += other
    tl.store(y_ptr + token * hidden + column, y.to(y_ptr.dtype.element_ty), mask=inside)


def launch(x: Tensor, other: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
    num_tokens, top_k, hidden = x.shape
    y = torch.empty(num_tokens, hidden, dtype=x.dtype, device=x.device)
    block = min(triton.next_power_of_2(hidden), 1024)
    _sum_experts[(num_tokens, triton.cdiv(hidden, block))](
        x, other, gate, y, hidden, TOP_K=top_k, HAS_OTHER=other is not None, HAS_GATE=gate is not None, BLOCK=block,
        num_warps=4, **overlapping(),
    )  # fmt: skip
    return y


def make(num_tokens: int, top_k: int, hidden: int, dtype: torch.dtype, shared: bool = False, gated=False, device="cpu"):
    x = torch.randn(num_tokens, top_k, hidden, device=device).to(dtype)
    other = torch.randn(num_tokens, hidden, device=device).to(dtype) if shared else None
    return call(x, other, torch.randn(num_tokens, 1, device=device).to(dtype) if gated else None)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=[
        *grid(num_tokens=(1, 7), top_k=(1, 6), hidden=(40, 1100), dtype=FLOATS),
        *grid(num_tokens=(1, 7), top_k=(3,), hidden=(40,), dtype=FLOATS, shared=(True,), gated=(False, True)),
    ],
    bench_cases=grid(num_tokens=(16, 8192), top_k=(8,), hidden=(2048,), dtype=(torch.bfloat16,)),
    num_bytes=lambda c: nbytes(c.args[0]) + nbytes(c.args[0][:, 0]) * (1 if c.args[1:2] in ((), (None,)) else 2),
)
def sum_experts(x: Tensor, other: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
    """x [num_tokens, top_k, hidden] -> [num_tokens, hidden]; ValueError when shapes or dtypes do not fit."""
    check(x.dim() == 3 and x.dtype in FLOATS and x.is_contiguous(), "x is not [tokens, k, hidden]")
    if other is not None:
        check(other.shape == (len(x), x.shape[2]) and other.dtype == x.dtype and other.is_contiguous(), "other")
    if gate is not None:
        check(other is not None and gate.shape == (len(x), 1), "a gate of nothing, or not [tokens, 1]")
        check(gate.dtype == x.dtype and gate.is_contiguous(), "a gate of another dtype, or strided")
    return (ref if x.is_cpu else launch)(x, other, gate)
