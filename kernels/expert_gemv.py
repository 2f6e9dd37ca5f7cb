"""One token through the experts it chose.   y_k = gate(W_e x_k + b_e), e = experts[k];  with weights, their sum

    gate(z) = z, or of halves silu(z1) * z2

x        [1, in], or [top_k, in]       bf16|f16|f32, contiguous; one row for all experts, or one for each
w        [num_experts, out, in]        dtype of x, contiguous; where gated [num_experts, 2 * out, in]
experts  [1, top_k]                    i32, contiguous
bias     [num_experts, out or 2 * out] dtype of x, or None
weights  [1, top_k]                    f32, contiguous, or None
y        [top_k, out], or with weights [1, out]   dtype of x, contiguous

Bound: bytes of the experts' matrices.
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


def ref(
    x: Tensor, w: Tensor, experts: Tensor, bias: Tensor | None = None, *, gated: bool = False,
    weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    chosen = experts[0].long()
    z = (w[chosen].float() @ x.float().expand(len(chosen), -1)[:, :, None])[..., 0]
    if bias is not None:
        z += bias[chosen].float()
    if gated:
        z = F.silu(z[:, : z.shape[1] // 2]) * z[:, z.shape[1] // 2 :]
    return (z if weights is None else weights @ z).to(x.dtype)


@jit
def _expert_gemv(
    x_ptr, w_ptr, experts_ptr, bias_ptr, weights_ptr, y_ptr,
    TOP_K: tl.constexpr, NUM_OUT: tl.constexpr, NUM_IN: tl.constexpr, X_STRIDE: tl.constexpr,
    HAS_BIAS: tl.constexpr, GATED: tl.constexpr, SUMS: tl.constexpr,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_IN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ROWS rows of SLOTS experts' matrices: of one, or where it sums of all."""
    WIDTH: tl.constexpr = NUM_OUT * (1 + GATED)
    line, part = tl.arange(0, SLOTS * ROWS), tl.arange(0, BLOCK_IN)
    slot = tl.program_id(1) * SLOTS + line // ROWS
    row = tl.program_id(0) * ROWS + line % ROWS
    inside = (slot < TOP_K) & (row < NUM_OUT)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    expert = tl.load(experts_ptr + slot, mask=slot < TOP_K, other=0)
    first = expert.to(tl.int64) * WIDTH + row
    w_row = w_ptr + first[:, None] * NUM_IN + part[None, :]
    if SUMS:
        x_row = x_ptr + slot[:, None] * X_STRIDE + part[None, :]
    else:
        x_row = x_ptr + tl.program_id(1) * X_STRIDE + part[None, :]
    z = tl.zeros((SLOTS * ROWS,), tl.float32)
    up = z
    for done in tl.static_range(0, NUM_IN, BLOCK_IN):
        is_in = (part < NUM_IN - done)[None, :]
        w = tl.load(w_row + done, mask=inside[:, None] & is_in, other=0.0, eviction_policy="evict_first")
        if GATED:
            up_w = tl.load(
                w_row + NUM_OUT * NUM_IN + done, mask=inside[:, None] & is_in, other=0.0, eviction_policy="evict_first"
            )
        x = tl.load(x_row + done, mask=((slot < TOP_K)[:, None] & is_in) if SUMS else is_in, other=0.0).to(tl.float32)
        z += tl.sum(w.to(tl.float32) * x, 1)
        if GATED:
            up += tl.sum(up_w.to(tl.float32) * x, 1)
    if HAS_BIAS:
        z += tl.load(bias_ptr + first, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            up += tl.load(bias_ptr + NUM_OUT + first, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        z = z * tl.sigmoid(z) * up
    if SUMS:
        z *= tl.load(weights_ptr + slot, mask=slot < TOP_K, other=0.0)
        z = tl.sum(tl.reshape(z, (SLOTS, ROWS)), 0)
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        tl.store(y_ptr + row, z.to(y_ptr.dtype.element_ty), mask=row < NUM_OUT)
    else:
        tl.store(y_ptr + slot * NUM_OUT + row, z.to(y_ptr.dtype.element_ty), mask=inside)


class Tuning(NamedTuple):
    """How rows are shared out."""

    rows: int  # of a program, and of each expert it looks at; where gated, of each half
    block_in: int
    num_warps: int


class Key(NamedTuple):
    """What the best tuning depends on."""

    top_k: int
    num_out: int
    num_in: int
    gated: bool
    sums: bool
    item_bytes: int


def _rule(key: Key) -> Tuning:
    """Some tens of numbers a thread.

    PERF, H200, us for experts of 2 x 768 x 2048 gated and of 2048 x 768, 8 of 128: 12.8 and 8.4 (3.9 and 3.0 TB/s), of
    512 in place of 768, 10 of 512: 12.0 and 7.3. Matrices of the sum asked for before the kernel that makes x is done:
    no faster, in programs that hold their rows whole.
    """
    if not key.sums:
        return Tuning(2 if key.gated else 4, min(triton.next_power_of_2(key.num_in), 2048 // key.item_bytes), 4)
    block_in = min(triton.next_power_of_2(key.num_in), 512 // key.item_bytes)
    return Tuning(2, block_in, 4) if key.top_k <= 8 else Tuning(4, block_in, 8)


def _candidates(key: Key) -> Iterator[Tuning]:
    whole = triton.next_power_of_2(key.num_in)
    for rows, block_in, num_warps in product((1, 2, 4), (256, 512, 1024, 2048), (2, 4, 8)):
        lines = rows * (triton.next_power_of_2(key.top_k) if key.sums else 1 + key.gated)
        if block_in <= whole and 16 <= lines * block_in // (32 * num_warps) <= 128:
            yield Tuning(rows, block_in, num_warps)


def launch(
    x: Tensor, w: Tensor, experts: Tensor, bias: Tensor | None = None, *, gated: bool = False,
    weights: Tensor | None = None, tuned: Tuning | None = None,
) -> Tensor:  # fmt: skip
    top_k, num_out, num_in, sums = experts.shape[1], w.shape[1] // (1 + gated), w.shape[2], weights is not None
    t = tuned or tuning(Key(top_k, num_out, num_in, gated, sums, x.element_size()))
    y = torch.empty(1 if sums else top_k, num_out, dtype=x.dtype, device=x.device)
    _expert_gemv[(triton.cdiv(num_out, t.rows), 1 if sums else top_k)](
        x, w, experts, bias, weights, y,
        TOP_K=top_k, NUM_OUT=num_out, NUM_IN=num_in, X_STRIDE=num_in if len(x) > 1 else 0, HAS_BIAS=bias is not None,
        GATED=gated, SUMS=sums, SLOTS=triton.next_power_of_2(top_k) if sums else 1, ROWS=t.rows,
        BLOCK_IN=t.block_in, num_warps=t.num_warps, **overlapping(),
    )  # fmt: skip
    return y


def make(
    num_experts: int, top_k: int, num_out: int, num_in: int, dtype: torch.dtype, gated: bool = False,
    biased: bool = False, sums: bool = False, device="cpu",
):  # fmt: skip
    w = torch.randn(num_experts, num_out * (1 + gated), num_in, device=device).mul(num_in**-0.5).to(dtype)
    x = torch.randn(top_k if sums else 1, num_in, device=device).to(dtype)
    experts = torch.randperm(num_experts, device=device)[None, :top_k].int()
    bias = torch.randn(w.shape[:2], device=device).to(dtype) if biased else None
    return call(x, w, experts, bias, gated=gated, weights=torch.rand(1, top_k, device=device) if sums else None)


def _make(key: Key, device: str):
    return make(
        2 * key.top_k, key.top_k, key.num_out, key.num_in, OF_BYTES[key.item_bytes], gated=key.gated, sums=key.sums,
        device=device,
    )  # fmt: skip


tuning = Tunable("expert_gemv", Key, Tuning, rule=_rule, candidates=_candidates, make=_make, launch=launch)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=[
        *grid(
            num_experts=(6,), top_k=(1, 3), num_out=(20,), num_in=(40, 1100), dtype=FLOATS, gated=(False, True),
            biased=(False, True),
        ),
        *grid(
            num_experts=(6,), top_k=(1, 3), num_out=(20,), num_in=(40, 1100), dtype=FLOATS, biased=(False, True),
            sums=(True,),
        ),
    ],
    bench_cases=[
        *grid(num_experts=(128,), top_k=(8,), num_out=(768,), num_in=(2048,), dtype=(torch.bfloat16,), gated=(True,)),
        *grid(num_experts=(128,), top_k=(8,), num_out=(2048,), num_in=(768,), dtype=(torch.bfloat16,), sums=(True,)),
    ],
    num_bytes=lambda c: c.args[2].numel() * nbytes(c.args[1][0]),
)  # fmt: skip
def expert_gemv(
    x: Tensor, w: Tensor, experts: Tensor, bias: Tensor | None = None, *, gated: bool = False,
    weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y [top_k, out], or with weights [1, out]; ValueError when shapes or dtypes do not fit."""
    check(x.dim() == 2 and w.dim() == 3 and x.shape[1] == w.shape[2], "x and w are not [rows, in], [experts, out, in]")
    check(experts.dim() == 2 and len(experts) == 1 and experts.dtype == torch.int32, "experts are not [1, top_k] i32")
    check(len(x) in (1, experts.shape[1]) and w.shape[1] % (1 + gated) == 0, "x is not for these, or no halves")
    check(x.dtype == w.dtype and x.dtype in FLOATS and are_contiguous(x, w, experts), "dtypes, or x or w is strided")
    if bias is not None:
        check(bias.shape == w.shape[:2] and bias.dtype == x.dtype and bias.is_contiguous(), "bias does not fit")
    if weights is not None:
        fits = weights.shape == experts.shape and weights.dtype == torch.float32 and weights.is_contiguous()
        check(fits and not gated, "weights are not [1, top_k] f32, or there is a gate")
    return (ref if x.is_cpu else launch)(x, w, experts, bias, gated=gated, weights=weights)
