"""Permanent rows: what a worker remembers of each running request between steps.

A row's token ids and block tables stay on the device, so that a drawn token feeds the next step without the host. What
the host decides anyway (how many tokens a row has and how many are computed) stays on the host, which needs it to shape
the batch; a step uploads it as one small buffer.

Key: S rows of this step, T tokens of this step, G state groups.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cableway.ipc.messages import Ints, NewRow, StepPlan
from cableway.workers.batch import Batch


@dataclass(frozen=True, slots=True)
class Chunks:
    """The rows of one step on the host, in the plan's order: row `rows[i]` computes positions `starts[i]:ends[i]`."""

    rows: np.ndarray  # [S] i32
    starts: np.ndarray  # [S] i32
    ends: np.ndarray  # [S] i32
    samples: np.ndarray  # [S] bool
    query_start: np.ndarray  # [S + 1] i32


def unpack(packed: Ints) -> np.ndarray:
    """View packed int32 values as an array [n] i32."""
    return np.frombuffer(packed, np.int32)


def upload(values: np.ndarray, device: torch.device) -> Tensor:
    """Move an array of the host to the device; on a GPU without waiting for it."""
    tensor = torch.from_numpy(values if values.flags.writeable else values.copy())
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class Rows:
    """Token ids and block tables of `max_num_seqs` rows."""

    def __init__(
        self, max_num_seqs: int, max_model_len: int, block_size: int, num_groups: int, device: torch.device
    ) -> None:
        # One row more, that of nobody: it has no blocks, so nothing is written for what is computed in it.
        self.tokens = torch.zeros(max_num_seqs + 1, max_model_len, dtype=torch.int32, device=device)
        max_blocks = -(-max_model_len // block_size)
        self.block_tables = [
            torch.zeros(max_num_seqs + 1, max_blocks, dtype=torch.int32, device=device) for _ in range(num_groups)
        ]
        for table in self.block_tables:
            table[max_num_seqs] = -1
        self.num_tokens = np.zeros(max_num_seqs, np.int32)
        self.num_prompt_tokens = np.zeros(max_num_seqs, np.int32)
        self._num_computed = np.zeros(max_num_seqs, np.int32)
        self._num_blocks = np.zeros((max_num_seqs, num_groups), np.int32)
        self._block_size = block_size
        self._device = device

    def enter(self, new: NewRow) -> None:
        """Write a request into its row, over whatever was there."""
        tokens = unpack(new.tokens)
        if not 0 < len(tokens) <= self.tokens.shape[1]:
            raise ValueError(f"row {new.row} enters with {len(tokens)} tokens")
        self.tokens[new.row, : len(tokens)] = upload(tokens, self._device)
        self.num_tokens[new.row] = len(tokens)
        self.num_prompt_tokens[new.row] = new.num_prompt_tokens
        self._num_computed[new.row] = new.num_computed
        for group, packed in enumerate(new.blocks):
            blocks = unpack(packed)
            self.block_tables[group][new.row, : len(blocks)] = upload(blocks, self._device)
            self._num_blocks[new.row, group] = len(blocks)

    def leave(self, row: int) -> None:
        """The request in `row` has left; what the device holds of it is never read again."""
        self.num_tokens[row] = self._num_computed[row] = 0
        self._num_blocks[row] = 0

    def write(self, rows: np.ndarray, positions: np.ndarray, token_ids: Tensor) -> None:
        """Put drawn tokens [R] i32 where the next step finds them; -1, of a row that failed, becomes some token."""
        self.write_at(*upload(np.stack((rows, positions)), self._device), token_ids)

    def write_at(self, rows: Tensor, positions: Tensor, token_ids: Tensor) -> None:
        """The same from numbers on the device."""
        self.tokens[rows, positions] = token_ids.clamp_min(0)

    def append_blocks(self, plan: StepPlan) -> None:
        """Put the plan's new blocks behind those that its rows have."""
        if not plan.blocks:
            return
        counts = unpack(plan.num_new_blocks).reshape(-1, len(self.block_tables))
        rows, blocks = unpack(plan.rows), unpack(plan.blocks)
        owner = np.repeat(np.arange(counts.size), counts.ravel())
        nth_of_owner = np.arange(len(blocks)) - np.repeat(np.cumsum(counts) - counts.ravel(), counts.ravel())
        row, group = rows[owner // counts.shape[1]], owner % counts.shape[1]
        column = self._num_blocks[row, group] + nth_of_owner
        for index, table in enumerate(self.block_tables):
            here = group == index
            where = upload(np.stack((row[here], column[here])), self._device)
            table[where[0], where[1]] = upload(blocks[here], self._device)
        self._num_blocks[rows] += counts

    def chunk(self, plan: StepPlan) -> Chunks:
        """The step's rows, which count as computed from here on.

        Raises:
            ValueError: a row would compute tokens that it does not have, or draw more than fits.
        """
        rows, num_tokens, samples = unpack(plan.rows), unpack(plan.num_tokens), unpack(plan.samples) != 0
        starts = self._num_computed[rows]
        ends = starts + num_tokens
        known = self.num_tokens[rows]
        if (num_tokens < 1).any() or (ends > known).any() or (ends[samples] != known[samples]).any():
            raise ValueError(f"step {plan.step} computes tokens that its rows do not have")
        if (ends[samples] >= self.tokens.shape[1]).any():
            raise ValueError(f"step {plan.step} draws past the end of a row")
        self._num_computed[rows] = ends
        self.num_tokens[rows] += samples
        query_start = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(num_tokens, out=query_start[1:])
        return Chunks(rows, starts, ends, samples, query_start)

    def gather(self, chunks: Chunks, logits_at: np.ndarray, *, invariant: bool) -> Batch:
        """Inputs of the forward pass: `logits_at` [R] are the tokens of the step whose logits are wanted."""
        num_rows, lengths = len(chunks.rows), np.diff(chunks.query_start)
        if chunks.query_start[-1] == num_rows:
            token_rows, positions = chunks.rows, chunks.starts
        else:
            token_rows = np.repeat(chunks.rows, lengths)
            positions = np.arange(len(token_rows), dtype=np.int32)
            positions += np.repeat(chunks.starts - chunks.query_start[:-1], lengths)
        parts = (chunks.rows, chunks.ends, chunks.query_start, token_rows, positions, logits_at)
        rows, seq_lens, query_start, token_rows, positions, logits_at = upload(
            np.concatenate(parts, dtype=np.int32), self._device
        ).split([len(part) for part in parts])
        max_seq_len = int(chunks.ends.max())
        num_blocks = -(-max_seq_len // self._block_size)
        block, offset = positions // self._block_size, positions % self._block_size
        return Batch(
            token_ids=self.tokens[token_rows, positions],
            positions=positions,
            query_start=query_start,
            seq_lens=seq_lens,
            max_query_len=int(lengths.max()),
            max_seq_len=max_seq_len,
            block_tables=[table[:, :num_blocks].index_select(0, rows) for table in self.block_tables],
            slots=[(table[token_rows, block] * self._block_size + offset).long() for table in self.block_tables],
            logits_at=logits_at.long(),
            invariant=invariant,
        )

    def nobodies(self, num: int) -> np.ndarray:
        """What `gather_decode` takes for `num` rows of nobody: [3, num] i32."""
        nobody = np.zeros((3, num), np.int32)
        nobody[0] = len(self.num_tokens)
        return nobody

    def gather_decode(self, packed: Tensor, *, invariant: bool) -> Batch:
        """Inputs of a step of one token a row, from numbers on the device alone, so that it can be captured.

        Args:
            packed: [3, S] i32: rows, positions, and lengths, which are positions + 1, or 0 for rows of nobody.
        """
        rows, positions, seq_lens = packed
        num_rows = packed.shape[1]
        index = torch.arange(num_rows + 1, dtype=torch.int32, device=self._device)
        block, offset = positions // self._block_size, positions % self._block_size
        return Batch(
            token_ids=self.tokens[rows, positions],
            positions=positions,
            query_start=index,
            seq_lens=seq_lens,
            max_query_len=1,
            max_seq_len=self.tokens.shape[1],
            block_tables=[table.index_select(0, rows) for table in self.block_tables],
            slots=[(table[rows, block] * self._block_size + offset).long() for table in self.block_tables],
            logits_at=index[:num_rows].long(),
            invariant=invariant,
        )
