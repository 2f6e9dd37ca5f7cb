"""Sparse changes of logits, in place:  logits[rows[i], token_ids[i]] += values[i].

Client biases, and -inf for tokens that must not be drawn (end of sequence below a minimum length).

logits     [num_rows, vocab]  f32, contiguous rows
rows       [num]  i64
token_ids  [num]  i64   a (row, token) pair may be named more than once
values     [num]  f32

Bound: latency; a few bytes an entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cableway.kernels.lang import jit, tl, triton
from cableway.kernels.registry import are_contiguous, call, check, grid, kernel, nbytes


def ref(logits: Tensor, rows: Tensor, token_ids: Tensor, values: Tensor) -> None:
    for row, token_id, value in zip(rows.tolist(), token_ids.tolist(), values.tolist(), strict=True):
        logits[row, token_id] += value


@jit(do_not_specialize=("num",))
def _add_at(logits_ptr, rows_ptr, token_ids_ptr, values_ptr, stride, num, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < num
    row = tl.load(rows_ptr + i, mask=inside, other=0)
    token_id = tl.load(token_ids_ptr + i, mask=inside, other=0)
    value = tl.load(values_ptr + i, mask=inside, other=0.0)
    tl.atomic_add(logits_ptr + row * stride + token_id, value, mask=inside)


def launch(logits: Tensor, rows: Tensor, token_ids: Tensor, values: Tensor) -> None:
    check(are_contiguous(rows, token_ids, values), "rows, token_ids or values are strided")
    num = rows.shape[0]
    _add_at[(triton.cdiv(num, 128),)](logits, rows, token_ids, values, logits.stride(0), num, BLOCK=128, num_warps=1)


def make(num_rows: int, vocab: int, num: int, device="cpu"):
    pairs = torch.randperm(num_rows * vocab, device=device)[:num]
    values = torch.randn(num, device=device)
    values[::3] = float("-inf")
    return call(torch.randn(num_rows, vocab, device=device), pairs // vocab, pairs % vocab, values)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=grid(num_rows=(1, 3), vocab=(100,), num=(1, 40)),
    bench_cases=grid(num_rows=(16,), vocab=(49152,), num=(300,)),
    num_bytes=lambda c: 2 * nbytes(*c.args[1:]),
    updates=(0,),
)
def add_at(logits: Tensor, rows: Tensor, token_ids: Tensor, values: Tensor) -> None:
    """Add values [n] to logits [R, V] at (rows [n], token_ids [n]); ValueError when shapes or dtypes do not fit."""
    check(logits.dtype == torch.float32 and logits.dim() == 2 and logits.stride(1) == 1, "logits are not float32 rows")
    check(rows.shape == token_ids.shape and rows.dtype == token_ids.dtype == torch.int64, "not [n] i64")
    check(values.shape == rows.shape and values.dtype == torch.float32, "values are not [n] f32")
    if logits.device.type != "cpu":
        return launch(logits, rows, token_ids, values)
    logits.index_put_((rows, token_ids), values, accumulate=True)
    return None
