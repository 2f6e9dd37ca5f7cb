"""Token statistics that penalties are taken over:  counts[rows[i], token_ids[i]] += 1.

counts     [num_rows, vocab]  i32, contiguous   see penalize.py
rows       [num]  i64
token_ids  [num]  i64   a (row, token) pair may be named more than once; -1 is none

Bound: latency; a few bytes an entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cableway.kernels.lang import jit, tl, triton
from cableway.kernels.registry import are_contiguous, call, check, grid, kernel, nbytes


def ref(counts: Tensor, rows: Tensor, token_ids: Tensor) -> None:
    for row, token_id in zip(rows.tolist(), token_ids.tolist(), strict=True):
        if token_id >= 0:
            counts[row, token_id] += 1


@jit(do_not_specialize=("token_ids_ptr", "num"))
def _count_tokens(counts_ptr, rows_ptr, token_ids_ptr, vocab, num, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < num
    row = tl.load(rows_ptr + i, mask=inside, other=0)
    token_id = tl.load(token_ids_ptr + i, mask=inside, other=-1)
    tl.atomic_add(counts_ptr + row * vocab + token_id, 1, mask=token_id >= 0)


def launch(counts: Tensor, rows: Tensor, token_ids: Tensor) -> None:
    check(are_contiguous(rows, token_ids), "rows or token_ids are strided")
    num = rows.shape[0]
    _count_tokens[(triton.cdiv(num, 128),)](counts, rows, token_ids, counts.shape[1], num, BLOCK=128, num_warps=1)


def make(num_rows: int, vocab: int, num: int, device="cpu"):
    rows = torch.randint(num_rows, (num,), device=device)
    counts = torch.randint(9, (num_rows, vocab), device=device, dtype=torch.int32)
    return call(counts, rows, torch.randint(-1, vocab, (num,), device=device))


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=grid(num_rows=(1, 3), vocab=(10,), num=(1, 40)),
    bench_cases=grid(num_rows=(16,), vocab=(49152,), num=(16,)),
    num_bytes=lambda c: 2 * nbytes(*c.args[1:]),
    updates=(0,),
)
def count_tokens(counts: Tensor, rows: Tensor, token_ids: Tensor) -> None:
    """Count token_ids [n] but for -1 in counts[rows [n]]; ValueError when shapes or dtypes do not fit."""
    check(counts.dtype == torch.int32 and counts.dim() == 2 and counts.is_contiguous(), "counts are not [R, V] i32")
    check(rows.shape == token_ids.shape and rows.dtype == token_ids.dtype == torch.int64, "not [n] i64")
    if counts.device.type != "cpu":
        return launch(counts, rows, token_ids)
    counts.index_put_((rows, token_ids.clamp_min(0)), (token_ids >= 0).int(), accumulate=True)
    return None
