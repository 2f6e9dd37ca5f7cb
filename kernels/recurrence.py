"""Where the states of recurrent layers lie: shared by the kernels that read and write them.

A state is a row of float32 numbers that stands for all tokens of a sequence so far. Rows are kept by block: that of
block i is the state after the block's last token, or after the sequence's last one where the block is not full. So a
step goes on from the row of the last token computed before, and leaves one in every block that it touches: full blocks
are a prefix that any sequence may begin with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cableway.kernels.registry import check


@dataclass(frozen=True)
class RecurrentPlan:
    """Which tokens and which rows each sequence has; the first three as in an AttentionPlan."""

    query_start: Tensor  # [num_seqs + 1] i32
    seq_lens: Tensor  # [num_seqs] i32; 0 of nobody, whose tokens have no result
    block_table: Tensor  # [num_seqs, max_blocks] i32; entries past a sequence's length are any valid block
    block_size: int  # tokens

    @property
    def num_seqs(self) -> int:
        return len(self.seq_lens)

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
"""(new tokens, length) of sequences, for cases."""


def check_states(states: Tensor, state_len: int, plan: RecurrentPlan) -> None:
    """Raise ValueError where states are not rows of that many numbers."""
    check(states.dim() == 2 and states.shape[1] == state_len and states.dtype == torch.float32, "states")
    check(states.stride(1) == 1 and plan.block_table.stride(1) == 1, "states or the block table are strided in rows")
    check(plan.query_start.dtype == plan.seq_lens.dtype == plan.block_table.dtype == torch.int32, "plan is not i32")


def make_plan(spans: tuple[tuple[int, int], ...], block_size: int, device: str) -> tuple[RecurrentPlan, int]:
    """A plan of sequences of (new tokens, length), and how many rows it has."""
    query_lens, seq_lens = zip(*spans, strict=True)
    width = -(-max(seq_lens) // block_size) + 1
    table = torch.randperm(len(spans) * width, device=device).view(-1, width).int()
    starts = torch.tensor((0, *query_lens), device=device).cumsum(0).int()
    lengths = torch.tensor(seq_lens, dtype=torch.int32, device=device)
    return RecurrentPlan(starts, lengths, table, block_size), table.numel()
