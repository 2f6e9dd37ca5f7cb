"""What the model reads of a step, found on the device: each token's id, its position, and the slots of its state.

The last n of the tokens that row r has so far, n = query_start[i + 1] - query_start[i] and r = rows[i], stand at
query_start[i] … of the step: token t is at position p = seq_lens[i] - query_start[i + 1] + t.

    token_ids[t] = tokens[r, p],   positions[t] = p,   slots[g, t] = b * block_size + p % block_size
    with b = tables[g, r, p // block_size], and -1 where b is

tokens       [num_rows, max_len] i32
tables       [num_groups, num_rows, max_blocks] i32   blocks of each row; -1: none
rows         [num_seqs] i32
query_start  [num_seqs + 1] i32   ascending; tokens after the last belong to nobody, nor do those of length 0
seq_lens     [num_seqs] i32       tokens that the row has, these included; 0 of nobody
returns      token_ids [num_tokens] i32, positions [num_tokens] i32, slots [num_groups, num_tokens] i64; 0, 0 and -1 for
             the tokens of nobody

Bound: latency; once a step.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cableway.kernels.lang import jit, tl, triton
from cableway.kernels.registry import Call, are_contiguous, call, check, grid, kernel, nbytes

_BLOCK = 16


def ref(
    tokens: Tensor, tables: Tensor, rows: Tensor, query_start: Tensor, seq_lens: Tensor, *, num_tokens: int,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    token_ids, positions = torch.zeros(2, num_tokens, dtype=torch.int32, device=tokens.device)
    slots = torch.full((len(tables), num_tokens), -1, dtype=torch.int64, device=tokens.device)
    starts = query_start.tolist()
    for i, (row, length) in enumerate(zip(rows.tolist(), seq_lens.tolist(), strict=True)):
        for t in range(starts[i], starts[i + 1] if length else starts[i]):
            p = length - starts[i + 1] + t
            token_ids[t], positions[t] = tokens[row, p], p
            blocks = tables[:, row, p // block_size].long()
            slots[:, t] = torch.where(blocks < 0, -1, blocks * block_size + p % block_size)
    return token_ids, positions, slots


_VARYING = ("rows_ptr", "query_start_ptr", "seq_lens_ptr", "positions_ptr", "num_seqs", "num_tokens")


@jit(do_not_specialize=_VARYING)  # one compilation for steps of every size
def _step_inputs(
    tokens_ptr, tables_ptr, rows_ptr, query_start_ptr, seq_lens_ptr, token_ids_ptr, positions_ptr, slots_ptr,
    num_seqs, num_tokens, tokens_stride, group_stride, table_stride, block_size,
    NUM_GROUPS: tl.constexpr, BLOCK_SEQS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK tokens; each program looks through all sequences for theirs."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = t < num_tokens
    i = tl.arange(0, BLOCK_SEQS)
    end = tl.load(query_start_ptr + 1 + i, mask=i < num_seqs, other=0x7FFFFFFF)
    sequence = tl.sum((end[None, :] <= t[:, None]).to(tl.int32), 1)
    is_some = inside & (sequence < num_seqs)
    length = tl.load(seq_lens_ptr + sequence, mask=is_some, other=0)
    is_some = is_some & (length > 0)
    row = tl.load(rows_ptr + sequence, mask=is_some, other=0).to(tl.int64)
    position = tl.where(is_some, length - tl.load(query_start_ptr + 1 + sequence, mask=is_some, other=0) + t, 0)
    token_id = tl.load(tokens_ptr + row * tokens_stride + position, mask=is_some, other=0)
    tl.store(token_ids_ptr + t, token_id, mask=inside)
    tl.store(positions_ptr + t, position, mask=inside)
    block_ptr = tables_ptr + row * table_stride + position // block_size
    for group in tl.static_range(NUM_GROUPS):
        block = tl.load(block_ptr + group * group_stride, mask=is_some, other=-1).to(tl.int64)
        slot = tl.where(block < 0, -1, block * block_size + position % block_size)
        tl.store(slots_ptr + group * num_tokens.to(tl.int64) + t, slot, mask=inside)


def launch(
    tokens: Tensor, tables: Tensor, rows: Tensor, query_start: Tensor, seq_lens: Tensor, *, num_tokens: int,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    token_ids, positions = torch.empty(2, num_tokens, dtype=torch.int32, device=tokens.device)
    slots = torch.empty(len(tables), num_tokens, dtype=torch.int64, device=tokens.device)
    _step_inputs[(triton.cdiv(num_tokens, _BLOCK),)](
        tokens, tables, rows, query_start, seq_lens, token_ids, positions, slots,
        len(rows), num_tokens, tokens.stride(0), tables.stride(0), tables.stride(1), block_size,
        NUM_GROUPS=len(tables), BLOCK_SEQS=max(triton.next_power_of_2(len(rows)), 256), BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return token_ids, positions, slots


def make(
    query_lens: tuple[int, ...], num_groups: int = 1, spare_tokens: int = 0, nobodies: int = 0, block_size: int = 8,
    device="cpu",
) -> Call:  # fmt: skip
    num_seqs, max_len = len(query_lens), 40 + max(query_lens)
    num_rows = num_seqs + 3
    tokens = torch.randint(0, 1000, (num_rows, max_len), dtype=torch.int32, device=device)
    tables = torch.randint(-1, 99, (num_groups, num_rows, -(-max_len // block_size)), dtype=torch.int32, device=device)
    rows = torch.randperm(num_rows, device=device)[:num_seqs].int()
    query_lens_there = torch.tensor(query_lens, dtype=torch.int32, device=device)
    seq_lens = query_lens_there + torch.randint(0, 40, (num_seqs,), dtype=torch.int32, device=device)
    seq_lens[num_seqs - nobodies :] = 0
    query_start = torch.tensor((0, *query_lens), device=device).cumsum(0).int()
    num_tokens = sum(query_lens) + spare_tokens
    return call(tokens, tables, rows, query_start, seq_lens, num_tokens=num_tokens, block_size=block_size)


@kernel(
    ref=ref,
    launch=launch,
    make=make,
    cases=[
        *grid(query_lens=((1,), (1,) * 20, (30,), (1, 17, 2, 1)), num_groups=(1, 3)),
        *grid(query_lens=((1, 7, 5), (1, 1, 1)), num_groups=(2,), nobodies=(1, 2), spare_tokens=(0, 9)),
    ],
    bench_cases=grid(query_lens=((1,), (1,) * 256, (1024,) * 8)),
    num_bytes=lambda c: 4 * nbytes(c.args[2]),
)
def step_inputs(
    tokens: Tensor, tables: Tensor, rows: Tensor, query_start: Tensor, seq_lens: Tensor, *, num_tokens: int,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Token ids [T], positions [T] and slots [G, T] of a step of T tokens; ValueError when shapes do not fit."""
    check(all(x.dtype == torch.int32 for x in (tokens, tables, rows, query_start, seq_lens)), "not all i32")
    check(
        tokens.dim() == 2 and tables.dim() == 3 and tables.shape[1] == tokens.shape[0], "tokens and tables do not fit"
    )
    check(tables.shape[2] * block_size >= tokens.shape[1], "rows of tables are too short")
    check(rows.dim() == 1 and rows.shape == seq_lens.shape, "rows and seq_lens do not fit")
    check(query_start.shape == (rows.shape[0] + 1,), "query_start is not [num_seqs + 1]")
    check(tokens.stride(1) == tables.stride(2) == 1, "tokens or tables are strided within their rows")
    check(are_contiguous(rows, query_start, seq_lens), "rows, query_start or seq_lens is strided")
    form = _on_cpu if tokens.is_cpu else launch
    return form(tokens, tables, rows, query_start, seq_lens, num_tokens=num_tokens, block_size=block_size)


def _on_cpu(
    tokens: Tensor, tables: Tensor, rows: Tensor, query_start: Tensor, seq_lens: Tensor, *, num_tokens: int,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tokens, tables, rows, query_start, seq_lens = (x.numpy() for x in (tokens, tables, rows, query_start, seq_lens))
    lengths = np.diff(query_start)
    lengths[seq_lens == 0] = 0
    token_ids, positions = np.zeros((2, num_tokens), np.int32)
    slots = np.full((len(tables), num_tokens), -1)
    where = np.repeat(query_start[:-1], lengths)
    t = np.arange(len(where), dtype=np.int32)
    where += t - np.repeat(np.cumsum(lengths, dtype=np.int32) - lengths, lengths)
    token_rows = np.repeat(rows, lengths)
    p = where + np.repeat(seq_lens - query_start[1:], lengths)
    token_ids[where], positions[where] = tokens[token_rows, p], p
    blocks = tables[:, token_rows, p // block_size]
    slots[:, where] = np.where(blocks < 0, -1, blocks * np.int64(block_size) + p % block_size)
    return tuple(torch.from_numpy(array) for array in (token_ids, positions, slots))
