"""SiLU gate of an MLP.   y = silu(gate) * up,  silu(z) = z / (1 + exp(-z))

gate_up  [num_tokens, 2 * ffn]  bf16|f16|f32   gate, then up; rows may be strided
y        [num_tokens, ffn]      dtype of gate_up, contiguous

Bound: bytes; reads gate_up, writes y. Element-wise: a row's result does not depend on the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cableway.kernels.lang import gdc_launch_dependents, gdc_wait, jit, loops, overlapping, tl, triton
from cableway.kernels.registry import FLOATS, call, check, grid, kernel, nbytes


def ref(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


@jit
def _silu_mul(x_ptr, y_ptr, x_stride, ffn, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < ffn
    gate = tl.load(x_ptr + row * x_stride + column, mask=inside).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + ffn + column, mask=inside).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * ffn + column, y.to(y_ptr.dtype.element_ty), mask=inside)


def launch(gate_up: Tensor) -> Tensor:
    num_tokens, ffn = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty(num_tokens, ffn, dtype=gate_up.dtype, device=gate_up.device)
    block = min(triton.next_power_of_2(ffn), 1024)
    _silu_mul[(num_tokens, triton.cdiv(ffn, block))](
        gate_up, y, gate_up.stride(0), ffn, BLOCK=block, num_warps=4, **overlapping()
    )
    return y


def make(num_tokens: int, ffn: int, dtype: torch.dtype, strided: bool = False, device="cpu"):
    return call(torch.randn(num_tokens, 2 * ffn + 64 * strided, device=device).to(dtype)[:, : 2 * ffn])


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=grid(num_tokens=(1, 7), ffn=(64, 1536), dtype=FLOATS, strided=(False, True)),
    bench_cases=grid(num_tokens=(1, 16, 512), ffn=(1536, 14336), dtype=(torch.bfloat16,)),
    num_bytes=lambda c: nbytes(c.args[0]) * 3 // 2,
)
def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [num_tokens, 2 * ffn] -> [num_tokens, ffn]; ValueError when the last dimension is odd."""
    check(gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0, "gate_up is not [num_tokens, 2 * ffn]")
    check(gate_up.stride(1) == 1 and gate_up.dtype in FLOATS, "gate_up is strided within its rows, or no float")
    if not gate_up.is_cpu:
        return launch(gate_up)
    num_tokens, ffn = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty(num_tokens, ffn, dtype=gate_up.dtype)
    loops.run(
        loops.silu_mul, num_tokens, 16 * ffn, gate_up.data_ptr(), gate_up.stride(0), y.data_ptr(), loops.KINDS[y.dtype],
        ffn,
    )  # fmt: skip
    return y
