"""Which tiles of query tokens the programs of prefill attention take: an item a tile, made on the device.

With `skips_singles` those that decode_work.py shares out are left out: they come first and bring one token each.
The tiles of a sequence stand from its last to its first, so that those that see most keys begin first. How many items
there are depends on shapes alone, not on lengths: a captured graph may replay it.

query_start  [num_seqs + 1] i32   tokens query_start[i]:query_start[i + 1] belong to sequence i
num_tokens   of all sequences
tile         so many tokens
returns      work [num_tokens // tile + min(num_seqs, num_tokens), 2] i32: sequence (-1: nothing to do), and the first
             of its tokens, counted from the first that it brings

Bound: latency; once a step.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from cableway.kernels.lang import jit, tl, triton
from cableway.kernels.registry import Call, call, check, grid, kernel, nbytes

_BLOCK_ITEMS = 16


def num_items(num_seqs: int, num_tokens: int, tile: int) -> int:
    """At least as many as there can be tiles: each sequence has one that is not full."""
    return num_tokens // tile + min(num_seqs, num_tokens)


def ref(query_start: Tensor, *, num_tokens: int, tile: int, skips_singles: bool) -> Tensor:
    starts = query_start.tolist()
    items = [
        (sequence, first)
        for sequence, (start, end) in enumerate(pairwise(starts))
        if not (skips_singles and (start, end) == (sequence, sequence + 1))
        for first in range(0, end - start, tile)
    ][::-1]
    items += [(-1, 0)] * (num_items(len(starts) - 1, num_tokens, tile) - len(items))
    return torch.tensor(items, dtype=torch.int32, device=query_start.device)


def heavy_first(work: Tensor, query_start: Tensor, seq_lens: Tensor) -> Tensor:
    """The items of `work`, those first whose tokens see most keys, and those with nothing to do last."""
    sequence, first = work.long().unbind(1)
    is_empty, sequence = sequence < 0, sequence.clamp(min=0)
    num_seen = (seq_lens - query_start.diff())[sequence] + first
    return work[num_seen.clamp(min=0).masked_fill(is_empty, -1).argsort(descending=True)]


@jit(do_not_specialize=("query_start_ptr", "num_seqs", "num_items", "tile"))  # one compilation for steps of every size
def _prefill_work(
    query_start_ptr, work_ptr, num_seqs, num_items, tile,
    SKIPS_SINGLES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_ITEMS: tl.constexpr,
):  # fmt: skip
    """BLOCK_ITEMS items; each program counts the tiles of all sequences."""
    sequence = tl.arange(0, BLOCK)
    inside = sequence < num_seqs
    start = tl.load(query_start_ptr + sequence, mask=inside, other=0)
    end = tl.load(query_start_ptr + sequence + 1, mask=inside, other=0)
    num_tiles = tl.cdiv(end - start, tile)
    if SKIPS_SINGLES:
        num_tiles = tl.where((start == sequence) & (end == sequence + 1), 0, num_tiles)
    item = tl.program_id(0) * BLOCK_ITEMS + tl.arange(0, BLOCK_ITEMS)
    nth = tl.sum(num_tiles, 0) - 1 - item  # in the order of tokens
    before = tl.cumsum(num_tiles, 0)[None, :] <= nth[:, None]  # sequences whose tiles all come before this one
    first_tile = nth - tl.sum(tl.where(before, num_tiles[None, :], 0), 1)
    of_sequence = tl.sum(before.to(tl.int32), 1)
    tl.store(work_ptr + item * 2, tl.where(nth >= 0, of_sequence, -1), mask=item < num_items)
    tl.store(work_ptr + item * 2 + 1, tl.where(nth >= 0, first_tile * tile, 0), mask=item < num_items)


def launch(query_start: Tensor, *, num_tokens: int, tile: int, skips_singles: bool) -> Tensor:
    num_seqs = len(query_start) - 1
    num = num_items(num_seqs, num_tokens, tile)
    work = torch.empty(num, 2, dtype=torch.int32, device=query_start.device)
    _prefill_work[(triton.cdiv(num, _BLOCK_ITEMS),)](
        query_start, work, num_seqs, num, tile,
        SKIPS_SINGLES=skips_singles, BLOCK=max(triton.next_power_of_2(num_seqs), 256), BLOCK_ITEMS=_BLOCK_ITEMS,
        num_warps=4,
    )  # fmt: skip
    return work


def make(query_lens: tuple[int, ...], tile: int, skips_singles: bool, spare_tokens: int = 0, device="cpu") -> Call:
    query_start = torch.tensor((0, *query_lens), device=device).cumsum(0).int()
    num_tokens = sum(query_lens) + spare_tokens
    return call(query_start, num_tokens=num_tokens, tile=tile, skips_singles=skips_singles)


LENGTHS = ((1,), (0, 5), (1,) * 40, (16,), (17, 0, 1, 1, 300, 2, 0), (1, 1, 64, 1, 64), (2, 0, 1), (3000,))


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=grid(query_lens=LENGTHS, tile=(16, 64), skips_singles=(False, True), spare_tokens=(0, 100)),
    bench_cases=grid(query_lens=((8192,), (1024,) * 8, (1,) * 256), tile=(64,), skips_singles=(True,)),
    num_bytes=lambda c: nbytes(c.args[0]),
)
def prefill_work(query_start: Tensor, *, num_tokens: int, tile: int, skips_singles: bool) -> Tensor:
    """Share out the tokens of those sequences; ValueError when shapes or counts do not fit.

    Args:
        num_tokens: at least as many as the sequences bring.
    """
    check(query_start.dim() == 1 and query_start.dtype == torch.int32, "query_start is not [num_seqs + 1] i32")
    check(query_start.is_contiguous() and len(query_start) > 1, "query_start is strided, or there is no sequence")
    check(min(num_tokens, tile) > 0, "a count is not positive")
    options = {"num_tokens": num_tokens, "tile": tile, "skips_singles": skips_singles}
    return (ref if query_start.is_cpu else launch)(query_start, **options)
