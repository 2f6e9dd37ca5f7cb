"""Where the states of recurrent layers lie: shared by the kernels that read and write them.

A state is a row of numbers that stands for all tokens of a sequence so far. Rows are kept by block: that of block i is
the state after the block's last token, or after the sequence's last one where the block is not full. So a step goes on
from the row of the last token computed before, and leaves one in every block that it touches: full blocks are a prefix
that any sequence may begin with. Rows may have 16 bits a number; within a step states are float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cableway.kernels import chunk_work
from cableway.kernels.lang import jit, num_processors, tl, triton
from cableway.kernels.registry import FLOATS, check

_LEAST_COLUMNS = 64
"""Of tiles of 16 bits. How operands of products lie in shared memory depends on the width of their rows; where a kernel
has two of the narrower ways, ptxas 12.8, which Triton 3.6 brings, makes code that takes an address from a register that
nothing wrote."""
_FEW_TOKENS = 8
"""A sequence that brings more in one step is taken chunk by chunk by kernels that can, not token by token."""
_LEAST_PROGRAMS, _PIECES = 15, (4, 8)
"""Of a processor, and of a program at least and at most where there is more than one."""


@dataclass(frozen=True)
class RecurrentPlan:
    """Which tokens and which rows each sequence has; the first three as in an AttentionPlan."""

    query_start: Tensor  # [num_seqs + 1] i32
    seq_lens: Tensor  # [num_seqs] i32; 0 of nobody, whose tokens have no result
    block_table: Tensor  # [num_seqs, max_blocks] i32; entries past a sequence's length are any valid block
    block_size: int  # tokens
    max_query_len: int
    invariant: bool = False  # as of an AttentionPlan: token by token, whatever there is of them
    _chunk_works: dict[tuple, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def num_seqs(self) -> int:
        return len(self.seq_lens)

    @property
    def has_chunks(self) -> bool:
        """Whether there may be sequences to take chunk by chunk."""
        return self.max_query_len > _FEW_TOKENS and not self.invariant

    @property
    def most_singly(self) -> int:
        """New tokens of a sequence that is still taken token by token."""
        return _FEW_TOKENS if self.has_chunks else self.max_query_len

    def chunk_len(self, most: int) -> int:
        """Tokens of a chunk: as many as a power of two up to `most` has that blocks are made of."""
        return math.gcd(self.block_size, most)

    def chunk_work(self, num_tokens: int, chunk_len: int) -> tuple[Tensor, Tensor]:
        """What programs that take chunks work from, see chunk_work.py; made by the first layer that asks."""
        key = num_tokens, chunk_len
        if key not in self._chunk_works:
            options = {"num_tokens": num_tokens, "chunk_len": chunk_len, "most_singly": self.most_singly}
            self._chunk_works[key] = chunk_work.launch(self.query_start, self.seq_lens, **options)
        return self._chunk_works[key]

    def spans(self) -> list[tuple[int, int, int]]:
        """(first token, end token, sequence length) of each sequence, on the host: waits for the device."""
        starts = self.query_start.tolist()
        return list(zip(starts[:-1], starts[1:], self.seq_lens.tolist(), strict=True))

    def row(self, sequence: int, position: int) -> int:
        """Where the state after the token at `position` is kept."""
        return int(self.block_table[sequence, position // self.block_size])

    def keeps(self, position: int, length: int) -> bool:
        """Whether the state after that token is kept."""
        return (position + 1) % self.block_size == 0 or position + 1 == length


MIXED = ((1, 20), (12, 12), (7, 30), (1, 1), (19, 24))
LONG = ((1, 9), (150, 150), (9, 130), (3, 70), (100, 231))
MANY = ((1, 9),) * 29 + ((3, 11),)
"""(new tokens, length) of sequences, for cases: of the last, programs take several pieces."""
NARROW = {"dtype": (torch.bfloat16,), "kept_as": (torch.bfloat16,)}


def check_states(states: Tensor, state_len: int, plan: RecurrentPlan) -> None:
    """Raise ValueError where states are not rows of that many numbers."""
    check(states.dim() == 2 and states.shape[1] == state_len and states.dtype in FLOATS, "states")
    check(states.stride(1) == 1 and plan.block_table.stride(1) == 1, "states or the block table are strided in rows")
    check(plan.query_start.dtype == plan.seq_lens.dtype == plan.block_table.dtype == torch.int32, "plan is not i32")


def make_plan(spans: tuple[tuple[int, int], ...], block_size: int, device: str) -> tuple[RecurrentPlan, int]:
    """A plan of sequences of (new tokens, length), and how many rows it has."""
    query_lens, seq_lens = zip(*spans, strict=True)
    width = -(-max(seq_lens) // block_size) + 1
    table = torch.randperm(len(spans) * width, device=device).view(-1, width).int()
    starts = torch.tensor((0, *query_lens), device=device).cumsum(0).int()
    lengths = torch.tensor(seq_lens, dtype=torch.int32, device=device)
    return RecurrentPlan(starts, lengths, table, block_size, max(query_lens)), table.numel()


def tile_width(num_columns: int, dtype: torch.dtype) -> int:
    """Columns of a tile that is an operand of products and holds so many, the rest to spare."""
    return max(triton.next_power_of_2(num_columns), 16 if dtype == torch.float32 else _LEAST_COLUMNS)


def pieces_at_once(num_pieces: int, num_seqs: int) -> int:
    """Of the pieces that a sequence's states are cut into, how many a program takes one after another.

    PERF: the next is on its way while one is computed, which takes registers from other programs: 256 sequences of
    Mamba2-2.7b 263 us by one, 239 by two, 206 by eight; one that brings none ahead 225.
    """
    at_once = num_pieces * num_seqs // (_LEAST_PROGRAMS * num_processors())
    least, most = _PIECES
    return min(at_once, most) if at_once >= least else 1


@jit
def span(query_start_ptr, seq_lens_ptr, sequence):
    """First token of a sequence (i64), how many were computed before it, and the sequence's length, 0 of nobody."""
    start, end = tl.load(query_start_ptr + sequence), tl.load(query_start_ptr + sequence + 1)
    length = tl.load(seq_lens_ptr + sequence)
    return start.to(tl.int64), tl.where(length > 0, length - (end - start), 0), length


@jit
def resumed(states_ptr, table_ptr, place, inside, before, state_stride, block_size):
    """Those numbers, f32, of the state that a sequence of a row of the block table goes on from."""
    row_ptr = row_before(states_ptr, table_ptr, before, state_stride, block_size)
    return as_kept(row_ptr, place, inside, before).to(tl.float32)


@jit
def row_before(states_ptr, table_ptr, before, state_stride, block_size):
    """Where the state begins that a sequence of a row of the block table goes on from."""
    return states_ptr + tl.load(table_ptr + tl.maximum(before - 1, 0) // block_size).to(tl.int64) * state_stride


@jit
def as_kept(row_ptr, place, inside, before):
    """Those numbers of the state that begins there, as they are kept."""
    end = tl.where(before > 0, 1 << 30, 0)  # there is none before the first token; a power of two keeps loads wide
    return tl.load(row_ptr + place, mask=inside & (place < end), other=0.0)


@jit
def piece_of(
    row_ptr, piece, end, before,
    PIECES: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Of heads [HEAD_DIM, WIDTH], each cut into PIECES of BLOCK_DIM rows, one piece as it is kept; zeros from `end`."""
    dim, n = piece % PIECES * BLOCK_DIM + tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_WIDTH)
    inside = (dim < tl.where(piece < end, HEAD_DIM, 0))[:, None] & (n < WIDTH)[None, :]
    return as_kept(row_ptr, (piece // PIECES * HEAD_DIM + dim)[:, None] * WIDTH + n[None, :], inside, before)


@jit
def rows_of(x_ptr, row, row_inside, stride, column, column_inside):
    """Those rows and columns of a matrix, zeros outside."""
    inside = row_inside[:, None] & column_inside[None, :]
    return tl.load(x_ptr + row[:, None] * stride + column[None, :], mask=inside, other=0.0)


@jit
def keep(states_ptr, table_ptr, place, inside, h, num_done, length, state_stride, block_size):
    """Write h to those numbers of the state after `num_done` tokens, if it is one that is kept."""
    if (num_done % block_size == 0) | (num_done == length):
        row = tl.load(table_ptr + (num_done - 1) // block_size).to(tl.int64)
        tl.store(states_ptr + row * state_stride + place, h, mask=inside)
