"""Which chunks of tokens the programs of recurrent layers take: an item a chunk, made on the device.

A chunk is those tokens that a step brings of the positions i * chunk_len … (i + 1) * chunk_len - 1 of a sequence, so
that no chunk reaches over the end of a block. Sequences that bring no more than `most_singly` tokens, and those of
length 0, have none. The chunks of a sequence follow each other. How many items there are depends on shapes alone: a
captured graph may replay it.

query_start  [num_seqs + 1] i32   tokens query_start[i]:query_start[i + 1] belong to sequence i
seq_lens     [num_seqs] i32       with the new ones
num_tokens   of all sequences
returns      work [num_items, 2] i32: sequence (-1: nothing to do), and i
             first_items [num_seqs] i32: the item of each sequence's first chunk, if it has one

Bound: latency; once a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cableway.kernels.lang import jit, tl, triton
from cableway.kernels.registry import call, check, grid, kernel, nbytes

_BLOCK_ITEMS = 16


def num_items(num_seqs: int, num_tokens: int, chunk_len: int, most_singly: int) -> int:
    """At least as many as there can be chunks: the first and the last of a sequence may not be full."""
    return max(num_tokens // chunk_len + 2 * min(num_seqs, num_tokens // (most_singly + 1)), 1)


def ref(
    query_start: Tensor, seq_lens: Tensor, *, num_tokens: int, chunk_len: int, most_singly: int
) -> tuple[Tensor, Tensor]:
    starts, items, first_items = query_start.tolist(), [], []
    for sequence, length in enumerate(seq_lens.tolist()):
        first_items.append(len(items))
        num_new = starts[sequence + 1] - starts[sequence]
        if length and num_new > most_singly:
            chunks = range((length - num_new) // chunk_len, -(-length // chunk_len))
            items += [(sequence, chunk) for chunk in chunks]
    items += [(-1, 0)] * (num_items(len(first_items), num_tokens, chunk_len, most_singly) - len(items))
    return tuple(torch.tensor(x, dtype=torch.int32, device=seq_lens.device) for x in (items, first_items))


_VARYING = ("query_start_ptr", "seq_lens_ptr", "num_seqs", "num_items", "chunk_len", "most_singly")


@jit(do_not_specialize=_VARYING)  # one compilation for steps of every size
def _chunk_work(
    query_start_ptr, seq_lens_ptr, work_ptr, first_items_ptr, num_seqs, num_items, chunk_len, most_singly,
    BLOCK: tl.constexpr, BLOCK_ITEMS: tl.constexpr,
):  # fmt: skip
    """BLOCK_ITEMS items; each program counts the chunks of all sequences."""
    sequence = tl.arange(0, BLOCK)
    inside = sequence < num_seqs
    start = tl.load(query_start_ptr + sequence, mask=inside, other=0)
    num_new = tl.load(query_start_ptr + sequence + 1, mask=inside, other=0) - start
    length = tl.load(seq_lens_ptr + sequence, mask=inside, other=0)
    has_any = (length > 0) & (num_new > most_singly)
    first_chunk = tl.where(has_any, length - num_new, 0) // chunk_len
    num_chunks = tl.where(has_any, tl.cdiv(length, chunk_len) - first_chunk, 0)
    ends = tl.cumsum(num_chunks, 0)
    if tl.program_id(0) == 0:
        tl.store(first_items_ptr + sequence, ends - num_chunks, mask=inside)
    item = tl.program_id(0) * BLOCK_ITEMS + tl.arange(0, BLOCK_ITEMS)
    before = ends[None, :] <= item[:, None]  # sequences whose chunks all come before this one
    of_sequence = tl.sum(before.to(tl.int32), 1)
    is_own = sequence[None, :] == of_sequence[:, None]
    chunk = item + tl.sum(tl.where(is_own, (first_chunk - ends + num_chunks)[None, :], 0), 1)
    has_work = item < tl.sum(num_chunks, 0)
    tl.store(work_ptr + item * 2, tl.where(has_work, of_sequence, -1), mask=item < num_items)
    tl.store(work_ptr + item * 2 + 1, tl.where(has_work, chunk, 0), mask=item < num_items)


def launch(
    query_start: Tensor, seq_lens: Tensor, *, num_tokens: int, chunk_len: int, most_singly: int
) -> tuple[Tensor, Tensor]:
    num_seqs = len(seq_lens)
    num = num_items(num_seqs, num_tokens, chunk_len, most_singly)
    work = torch.empty(num, 2, dtype=torch.int32, device=seq_lens.device)
    first_items = torch.empty(num_seqs, dtype=torch.int32, device=seq_lens.device)
    _chunk_work[(triton.cdiv(num, _BLOCK_ITEMS),)](
        query_start, seq_lens, work, first_items, num_seqs, num, chunk_len, most_singly,
        BLOCK=max(triton.next_power_of_2(num_seqs), 256), BLOCK_ITEMS=_BLOCK_ITEMS, num_warps=4,
    )  # fmt: skip
    return work, first_items


def make(spans: tuple[tuple[int, int], ...], chunk_len: int, most_singly: int, spare_tokens: int = 0, device="cpu"):
    """`spans`: (new tokens, length) of each sequence."""
    query_lens, seq_lens = zip(*spans, strict=True)
    query_start = torch.tensor((0, *query_lens), device=device).cumsum(0).int()
    lengths = torch.tensor(seq_lens, dtype=torch.int32, device=device)
    options = {"num_tokens": sum(query_lens) + spare_tokens, "chunk_len": chunk_len, "most_singly": most_singly}
    return call(query_start, lengths, **options)


SPANS = (
    ((1, 1),),
    ((0, 0), (5, 0), (40, 40)),
    ((1, 20), (12, 12), (70, 300), (9, 9), (1, 1), (64, 64), (65, 129), (8, 80)),
    ((1000, 1000), *((1, 7),) * 30, (18, 65), (3000, 0)),
)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=grid(spans=SPANS, chunk_len=(8, 64), most_singly=(0, 8), spare_tokens=(0, 100)),
    bench_cases=grid(spans=(((8192, 8192),), ((1024, 1024),) * 8), chunk_len=(64,), most_singly=(8,)),
    num_bytes=lambda c: nbytes(*c.args),
)
def chunk_work(
    query_start: Tensor, seq_lens: Tensor, *, num_tokens: int, chunk_len: int, most_singly: int
) -> tuple[Tensor, Tensor]:
    """Share out the tokens of those sequences; ValueError when shapes or counts do not fit.

    Args:
        num_tokens: at least as many as the sequences bring.
    """
    check(query_start.dtype == torch.int32 and query_start.is_contiguous(), "query_start is strided, or not i32")
    check(query_start.shape == (seq_lens.shape[0] + 1,), "query_start is not [num_seqs + 1]")
    check(seq_lens.dim() == 1 and seq_lens.dtype == torch.int32, "seq_lens is not [num_seqs] i32")
    check(seq_lens.is_contiguous() and len(seq_lens) > 0, "seq_lens is strided or empty")
    check(min(num_tokens, chunk_len) > 0 and most_singly >= 0, "a count is not positive")
    options = {"num_tokens": num_tokens, "chunk_len": chunk_len, "most_singly": most_singly}
    return (ref if seq_lens.is_cpu else launch)(query_start, seq_lens, **options)
