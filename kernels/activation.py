"""Activation of an MLP, alone or as a gate.   y = act(x), or y = act(gate) * up

    silu       z / (1 + exp(-z))
    gelu       z / 2 * (1 + erf(z / sqrt(2)))
    gelu_tanh  z / 2 * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 z³)))
    relu       max(z, 0)
    relu2      max(z, 0)²
    xielu      z > 0: a z² + z / 2;  else  c (exp(min(z, -1e-6)) - 1 - z) + z / 2       of parameters (a, c)
    swiglu_oai gate alone: g / (1 + exp(-a g)) * (u + 1), g = min(gate, c), u = clamp(up, -c, c)  of parameters (a, c)

x  [num_tokens, ffn], or [num_tokens, 2 * ffn] where gated: gate, then up   bf16|f16|f32   rows may be strided
y  [num_tokens, ffn]  dtype of x, contiguous

The gate of most families, silu, has a kernel of its own (silu_mul.py).
Bound: bytes; reads x, writes y. Element-wise: a row's result does not depend on the others.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cableway.kernels.lang import jit, loops, tl, triton
from cableway.kernels.registry import FLOATS, call, check, grid, kernel, nbytes

KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4, "xielu": 5, "swiglu_oai": 6}


def ref(x: Tensor, *, kind: str, gated: bool = False, a: float = 0.0, c: float = 0.0) -> Tensor:
    gate, up = x.float().chunk(2, -1) if gated else (x.float(), None)
    match kind:
        case "silu":
            y = F.silu(gate)
        case "gelu":
            y = F.gelu(gate)
        case "gelu_tanh":
            y = F.gelu(gate, approximate="tanh")
        case "relu":
            y = F.relu(gate)
        case "relu2":
            y = F.relu(gate).square()
        case "xielu":
            negative = c * (torch.expm1(gate.clamp(max=-1e-6)) - gate)
            y = torch.where(gate > 0, a * gate * gate, negative) + gate / 2
        case "swiglu_oai":
            gate, up = gate.clamp(max=c), up.clamp(-c, c) + 1
            y = gate * torch.sigmoid(a * gate)
    return (y if up is None else y * up).to(x.dtype)


@jit
def _activation(x_ptr, y_ptr, x_stride, ffn, a, c, KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < ffn
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if KIND == 6:
        x = tl.minimum(x, c)
    if KIND == 0:
        y = x * tl.sigmoid(x)
    elif KIND == 1:
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif KIND == 2:
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # (1 + tanh(z)) / 2 = sigmoid(2 z)
    elif KIND == 3:
        y = tl.maximum(x, 0.0)
    elif KIND == 4:
        y = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    elif KIND == 5:
        y = tl.where(x > 0, a * x * x, c * (tl.exp(tl.minimum(x, -1e-6)) - 1 - x)) + 0.5 * x
    else:
        y = x * tl.sigmoid(a * x)
    if GATED:
        up = tl.load(x_ptr + row * x_stride + ffn + column, mask=inside, other=0.0).to(tl.float32)
        if KIND == 6:
            up = tl.minimum(tl.maximum(up, -c), c) + 1
        y *= up
    tl.store(y_ptr + row * ffn + column, y.to(y_ptr.dtype.element_ty), mask=inside)


def launch(x: Tensor, *, kind: str, gated: bool = False, a: float = 0.0, c: float = 0.0) -> Tensor:
    num_tokens, ffn = x.shape[0], x.shape[1] // (2 if gated else 1)
    y = torch.empty(num_tokens, ffn, dtype=x.dtype, device=x.device)
    block = min(triton.next_power_of_2(ffn), 1024)
    _activation[(num_tokens, triton.cdiv(ffn, block))](
        x, y, x.stride(0), ffn, a, c, KIND=KINDS[kind], GATED=gated, BLOCK=block, num_warps=4
    )
    return y


def make(num_tokens: int, ffn: int, dtype: torch.dtype, kind: str, gated: bool = False, strided=False, device="cpu"):
    width = ffn * (1 + gated)
    x = torch.randn(num_tokens, width + 64 * strided, device=device).mul(2).to(dtype)[:, :width]
    return call(x, kind=kind, gated=gated, a=0.75, c=1.5)


_PLAIN = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "xielu")


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=[
        *grid(num_tokens=(1, 7), ffn=(64,), dtype=FLOATS, kind=_PLAIN, gated=(False,), strided=(False, True)),
        *grid(num_tokens=(1,), ffn=(1100,), dtype=FLOATS[:2], kind=(*_PLAIN, "swiglu_oai"), gated=(True,)),
    ],
    bench_cases=grid(num_tokens=(1, 512), ffn=(14336,), dtype=(torch.bfloat16,), kind=("gelu_tanh",), gated=(True,)),
    num_bytes=lambda c: nbytes(c.args[0]) * (3 if c.kwargs["gated"] else 4) // 2,
)
def activation(x: Tensor, *, kind: str, gated: bool = False, a: float = 0.0, c: float = 0.0) -> Tensor:
    """Activate x [num_tokens, ffn or 2 * ffn]; ValueError when the kind is not known or x does not fit."""
    check(kind in KINDS and (gated or kind != "swiglu_oai"), f"no such activation: {kind!r}")
    check(x.dim() == 2 and not (gated and x.shape[1] % 2), "x is not [num_tokens, ffn] or [num_tokens, 2 * ffn]")
    check(x.stride(1) == 1 and x.dtype in FLOATS, "x is strided within its rows, or no float")
    if not x.is_cpu:
        return launch(x, kind=kind, gated=gated, a=a, c=c)
    num_tokens, ffn = x.shape[0], x.shape[1] // (2 if gated else 1)
    y = torch.empty(num_tokens, ffn, dtype=x.dtype)
    loops.run(
        loops.activate, num_tokens, 16 * ffn, x.data_ptr(), x.stride(0), y.data_ptr(), loops.KINDS[x.dtype], ffn,
        KINDS[kind], gated, a, c,
    )  # fmt: skip
    return y
