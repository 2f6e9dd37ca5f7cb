"""Penalties for tokens that were already seen, and tokens that may not be drawn: one pass over logits, in place.

    z > 0: z / repetition,  z <= 0: z * repetition     where the token is in the prompt or the output
    z - frequency * count - presence                   where it is in the output, `count` times
    -inf                                               where its bit is not set

logits  [num_rows, vocab]  f32   contiguous rows
rows    [n]  i64                 those that are changed, each once
counts  [num_counts, vocab]  i32  occurrences in the output, plus IN_PROMPT when the prompt has the token
masks   [num_masks, ceil(vocab / 32)]  i32   bit t % 32 of word t // 32 is set where token t may be drawn
slots   [2, n]  i64              which of the counts and which of the masks is a row's; -1 = none
weights [3, n]  f32              presence, frequency and repetition; 0, 0 and 1 change nothing

Bound: bytes; reads counts and masks, reads and writes logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cableway.kernels.lang import jit, tl, triton
from cableway.kernels.registry import are_contiguous, call, check, grid, kernel, nbytes

IN_PROMPT = 1 << 30
_BITS = 32


def num_words(vocab_size: int) -> int:
    """Of a mask."""
    return -(-vocab_size // _BITS)


def ref(logits: Tensor, rows: Tensor, counts: Tensor, masks: Tensor, slots: Tensor, weights: Tensor) -> None:
    for row, (count_slot, mask_slot), (presence, frequency, repetition) in zip(
        rows.tolist(), slots.T.tolist(), weights.T.tolist(), strict=True
    ):
        z = logits[row]
        if count_slot >= 0:
            seen = counts[count_slot]
            output = (seen & IN_PROMPT - 1).float()
            z = torch.where(seen > 0, torch.where(z > 0, z / repetition, z * repetition), z)
            z = z - frequency * output - presence * (output > 0)
        if mask_slot >= 0:
            bits = [word >> bit & 1 for word in masks[mask_slot].tolist() for bit in range(_BITS)]
            z = z.masked_fill(torch.tensor(bits[: len(z)], device=z.device) == 0, float("-inf"))
        logits[row] = z


@jit(do_not_specialize=("slots_ptr", "weights_ptr", "num"))  # one compilation for steps of every size
def _penalize(
    logits_ptr, rows_ptr, counts_ptr, masks_ptr, slots_ptr, weights_ptr, stride, vocab, num_words, num,
    BLOCK: tl.constexpr,
):  # fmt: skip
    nth = tl.program_id(0)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab
    logits_ptr += tl.load(rows_ptr + nth) * stride + token
    z = tl.load(logits_ptr, mask=inside, other=0.0)
    slot, mask_slot = tl.load(slots_ptr + nth), tl.load(slots_ptr + num + nth)
    if slot >= 0:
        seen = tl.load(counts_ptr + slot * vocab + token, mask=inside, other=0)
        repetition = tl.load(weights_ptr + 2 * num + nth)
        z = tl.where(seen > 0, tl.where(z > 0, z / repetition, z * repetition), z)
        output = (seen & 0x3FFFFFFF).to(tl.float32)
        presence = tl.where(output > 0, tl.load(weights_ptr + nth), 0.0)
        z -= tl.load(weights_ptr + num + nth) * output + presence
    if mask_slot >= 0:
        word = tl.load(masks_ptr + mask_slot * num_words + token // 32, mask=inside, other=0)
        z = tl.where((word >> (token % 32)) & 1 == 1, z, float("-inf"))
    tl.store(logits_ptr, z, mask=inside)


def launch(logits: Tensor, rows: Tensor, counts: Tensor, masks: Tensor, slots: Tensor, weights: Tensor) -> None:
    check(are_contiguous(rows, counts, masks, slots, weights), "an argument beside logits is strided")
    vocab, num = logits.shape[1], len(rows)
    _penalize[(num, triton.cdiv(vocab, 1024))](
        logits, rows, counts, masks, slots, weights, logits.stride(0), vocab, masks.shape[1], num,
        BLOCK=1024, num_warps=4,
    )  # fmt: skip


def make(num_rows: int, vocab: int, num_changed: int, has_masks: bool = True, device="cpu"):
    counts = torch.randint(-6, 4, (num_changed + 1, vocab), device=device, dtype=torch.int32).clamp_min(0)
    counts += IN_PROMPT * torch.randint(2, counts.shape, device=device, dtype=torch.int32)
    limits, shape = torch.iinfo(torch.int32), (num_changed + 1, num_words(vocab))
    masks = torch.randint(limits.min, limits.max, shape, device=device, dtype=torch.int32)
    slots = torch.stack([torch.randperm(num_changed + 2, device=device)[:num_changed] - 1 for _ in range(2)])
    weights = torch.randn(3, num_changed, device=device)
    weights[2] = torch.rand(num_changed, device=device) + 0.5
    if not has_masks:
        masks, slots[1] = masks[:0], -1
    rows = torch.randperm(num_rows, device=device)[:num_changed]
    return call(torch.randn(num_rows, vocab, device=device), rows, counts, masks, slots, weights)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=[
        *grid(num_rows=(4,), vocab=(100, 1030), num_changed=(1, 3), has_masks=(False, True)),
        *grid(num_rows=(9,), vocab=(2000,), num_changed=(9,)),
    ],
    bench_cases=grid(num_rows=(16,), vocab=(49152,), num_changed=(1, 16)),
    num_bytes=lambda c: len(c.args[1]) * (3 * nbytes(c.args[0][0]) + nbytes(c.args[3][0])),
    updates=(0,),
)
def penalize(logits: Tensor, rows: Tensor, counts: Tensor, masks: Tensor, slots: Tensor, weights: Tensor) -> None:
    """Change some rows of logits [R, V] in place; ValueError when shapes or dtypes do not fit."""
    check(logits.dtype == torch.float32 and logits.dim() == 2 and logits.stride(1) == 1, "logits are not float32 rows")
    check(counts.dtype == torch.int32 and counts.shape[1:] == logits.shape[1:], "counts are not [N, vocab] i32")
    check(masks.dtype == torch.int32 and masks.shape[1:] == (num_words(logits.shape[1]),), "masks are not [N, W] i32")
    check(rows.dim() == 1 and rows.dtype == slots.dtype == torch.int64, "rows are not [n] i64, or slots not i64")
    check(slots.shape == (2, len(rows)), "slots are not [2, n]")
    check(weights.shape == (3, len(rows)) and weights.dtype == torch.float32, "weights are not [3, n] f32")
    if not logits.is_cpu:
        return launch(logits, rows, counts, masks, slots, weights)
    _penalize_seen(logits, rows, counts, slots[0], weights)
    _mask(logits, rows, masks, slots[1])
    return None


def _penalize_seen(logits: Tensor, rows: Tensor, counts: Tensor, slots: Tensor, weights: Tensor) -> None:
    has_counts = slots >= 0
    if not has_counts.any():
        return
    seen, (presence, frequency, repetition) = counts[slots[has_counts]], weights[:, has_counts, None]
    z = logits[rows[has_counts]]
    factor = torch.where(seen > 0, repetition, 1.0)
    z = torch.where(z > 0, z / factor, z * factor)
    output = (seen & IN_PROMPT - 1).float()
    z.addcmul_(output, frequency, value=-1).addcmul_(output.clamp_max_(1), presence, value=-1)
    logits[rows[has_counts]] = z


def _mask(logits: Tensor, rows: Tensor, masks: Tensor, slots: Tensor) -> None:
    has_mask = slots >= 0
    if not has_mask.any():
        return
    bits = masks[slots[has_mask], :, None] >> torch.arange(_BITS, dtype=torch.int32) & 1
    allowed = bits.flatten(1)[:, : logits.shape[1]]
    logits[rows[has_mask]] = logits[rows[has_mask]].masked_fill(allowed == 0, float("-inf"))
