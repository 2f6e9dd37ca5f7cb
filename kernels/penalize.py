"""Penalties for tokens that were already seen, on logits, in place.

    z > 0: z / repetition,  z <= 0: z * repetition     where the token is in the prompt or the output
    z - frequency * count - presence                   where it is in the output, `count` times

logits      [num_rows, vocab]  f32, contiguous rows
counts      [num_count_rows, vocab]  i32   occurrences in the output, plus IN_PROMPT when the prompt has the token
count_rows  [num_rows]  i64    the row of `counts` that belongs to a row of logits
presence, frequency, repetition  [num_rows]  f32   0, 0 and 1 change nothing

Bound: bytes; reads counts, reads and writes logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cableway.kernels.lang import jit, tl, triton
from cableway.kernels.registry import are_contiguous, call, check, grid, kernel, nbytes

IN_PROMPT = 1 << 30


def ref(logits, counts, count_rows, presence, frequency, repetition) -> None:
    for row in range(logits.shape[0]):
        seen = counts[count_rows[row]]
        output = (seen & IN_PROMPT - 1).float()
        z = logits[row]
        z = torch.where(seen > 0, torch.where(z > 0, z / repetition[row], z * repetition[row]), z)
        logits[row] = z - frequency[row] * output - presence[row] * (output > 0)


@jit(do_not_specialize=("presence_ptr", "frequency_ptr", "repetition_ptr"))  # rows of one table
def _penalize(
    logits_ptr, counts_ptr, count_rows_ptr, presence_ptr, frequency_ptr, repetition_ptr, stride, vocab,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    seen = tl.load(counts_ptr + tl.load(count_rows_ptr + row) * vocab + token, mask=inside, other=0)
    z = tl.load(logits_ptr + row * stride + token, mask=inside, other=0.0)
    repetition = tl.load(repetition_ptr + row)
    z = tl.where(seen > 0, tl.where(z > 0, z / repetition, z * repetition), z)
    output = (seen & 0x3FFFFFFF).to(tl.float32)
    z -= tl.load(frequency_ptr + row) * output + tl.where(output > 0, tl.load(presence_ptr + row), 0.0)
    tl.store(logits_ptr + row * stride + token, z, mask=inside)


def launch(logits, counts, count_rows, presence, frequency, repetition) -> None:
    check(are_contiguous(counts, count_rows, presence, frequency, repetition), "an argument beside logits is strided")
    num_rows, vocab = logits.shape
    _penalize[(num_rows, triton.cdiv(vocab, 1024))](
        logits, counts, count_rows, presence, frequency, repetition, logits.stride(0), vocab, BLOCK=1024, num_warps=4
    )


def make(num_rows: int, vocab: int, device="cpu"):
    counts = torch.randint(-6, 4, (num_rows + 2, vocab), device=device, dtype=torch.int32).clamp_min(0)
    counts += IN_PROMPT * torch.randint(2, counts.shape, device=device, dtype=torch.int32)
    presence, frequency = torch.randn(2, num_rows, device=device)
    return call(
        torch.randn(num_rows, vocab, device=device),
        counts,
        torch.randperm(num_rows + 2, device=device)[:num_rows],
        presence,
        frequency,
        torch.rand(num_rows, device=device) + 0.5,
    )


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=grid(num_rows=(1, 3), vocab=(100, 1030)),
    bench_cases=grid(num_rows=(1, 16), vocab=(49152,)),
    num_bytes=lambda c: 3 * nbytes(c.args[0]),
    updates=(0,),
)
def penalize(
    logits: Tensor, counts: Tensor, count_rows: Tensor, presence: Tensor, frequency: Tensor, repetition: Tensor
) -> None:
    """Apply presence, frequency and repetition penalties to logits [R, V] in place; ValueError when shapes differ."""
    check(logits.dtype == torch.float32 and logits.dim() == 2 and logits.stride(1) == 1, "logits are not float32 rows")
    check(counts.dtype == torch.int32 and counts.shape[1:] == logits.shape[1:], "counts are not [N, vocab] i32")
    check(count_rows.shape == logits.shape[:1] and count_rows.dtype == torch.int64, "count_rows are not [R] i64")
    check(presence.shape == frequency.shape == repetition.shape == count_rows.shape, "a penalty is not [R]")
    if logits.device.type != "cpu":
        return launch(logits, counts, count_rows, presence, frequency, repetition)
    seen = counts[count_rows]
    factor = torch.where(seen > 0, repetition[:, None], 1.0)
    logits.copy_(torch.where(logits > 0, logits / factor, logits * factor))
    output = (seen & IN_PROMPT - 1).float()
    logits.addcmul_(output, frequency[:, None], value=-1).addcmul_(output.clamp_max_(1), presence[:, None], value=-1)
    return None
