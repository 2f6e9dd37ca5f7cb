"""Permanent rows: what a worker remembers of each running request between steps.

A row's token ids and block tables stay on the device, so that a drawn token feeds the next step without the host. What
the host decides anyway (how many tokens a row has and how many are computed) stays on the host, which needs it to shape
the batch; a step uploads it as one small buffer.

Key: S rows of this step, T tokens of this step, G state groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cableway.ipc.messages import Ints, NewRow, StepPlan
from cableway.kernels.step_inputs import step_inputs
from cableway.workers.batch import Batch, Source


@dataclass(frozen=True, slots=True)
class Chunks:
    """The rows of one step on the host, in the plan's order: row `rows[i]` computes positions `starts[i]:ends[i]`."""

    rows: np.ndarray  # [S] i32
    starts: np.ndarray  # [S] i32
    ends: np.ndarray  # [S] i32
    samples: np.ndarray  # [S] bool
    query_start: np.ndarray  # [S + 1] i32

    @property
    def num_tokens(self) -> int:
        return int(self.query_start[-1])


NO_CHUNKS = Chunks(*np.zeros((3, 0), np.int32), np.zeros(0, bool), np.zeros(1, np.int32))


def unpack(packed: Ints) -> np.ndarray:
    """View packed int32 values as an array [n] i32."""
    return np.frombuffer(packed, np.int32)


def upload(values: np.ndarray, device: torch.device) -> Tensor:
    """Move an array of the host to the device; on a GPU without waiting for it."""
    tensor = torch.from_numpy(values if values.flags.writeable else values.copy())
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def upload_into(target: Tensor, values: np.ndarray) -> None:
    """Overwrite a tensor by an array of the host of its shape; on a GPU without waiting for it."""
    tensor = torch.from_numpy(values if values.flags.writeable else values.copy())
    target.copy_(tensor.pin_memory() if target.is_cuda else tensor, non_blocking=True)


class Rows:
    """Token ids and block tables of `max_num_seqs` rows.

    Args:
        kinds: of the state groups.
    """

    def __init__(
        self, max_num_seqs: int, max_model_len: int, block_size: int, kinds: Sequence[str], device: torch.device
    ) -> None:
        # One row more, that of nobody: it has no blocks, so nothing is written for what is computed in it.
        self.tokens = torch.zeros(max_num_seqs + 1, max_model_len, dtype=torch.int32, device=device)
        max_blocks, num_groups = -(-max_model_len // block_size), len(kinds)
        self.block_tables = torch.zeros(num_groups, max_num_seqs + 1, max_blocks, dtype=torch.int32, device=device)
        self.block_tables[:, max_num_seqs] = -1
        self._encoder_group = kinds.index("encoder") if "encoder" in kinds else None
        self._source_lens = torch.zeros(max_num_seqs + 1, dtype=torch.int32, device=device)
        self.num_tokens = np.zeros(max_num_seqs, np.int32)
        self.num_prompt_tokens = np.zeros(max_num_seqs, np.int32)
        self.stop_ids: list[frozenset[int]] = [frozenset()] * max_num_seqs  # tokens that end a row
        self._num_computed = np.zeros(max_num_seqs, np.int32)
        self._num_blocks = np.zeros((max_num_seqs, num_groups), np.int32)
        self._block_size = block_size
        self._device = device
        # Of steps of one token a row: where each begins, and which tokens' logits are wanted.
        self._index = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)

    def enter(self, new: NewRow) -> None:
        """Write a request into its row, over whatever was there."""
        tokens = unpack(new.tokens)
        if not 0 < len(tokens) <= self.tokens.shape[1]:
            raise ValueError(f"row {new.row} enters with {len(tokens)} tokens")
        upload_into(self.tokens[new.row, : len(tokens)], tokens)
        self.num_tokens[new.row] = len(tokens)
        self.num_prompt_tokens[new.row] = new.num_prompt_tokens
        self._num_computed[new.row] = new.num_computed
        self.stop_ids[new.row] = frozenset(unpack(new.sampling.eos_token_ids + new.sampling.stop_token_ids).tolist())
        if self._encoder_group is not None:
            upload_into(self._source_lens[new.row : new.row + 1], np.array([new.source_len], np.int32))
        for group, packed in enumerate(new.blocks):
            blocks = unpack(packed)
            self._num_blocks[new.row, group] = len(blocks)
            if len(blocks):
                upload_into(self.block_tables[group, new.row, : len(blocks)], blocks)

    def sources(self, entering: Sequence[NewRow]) -> Source | None:
        """What is to be encoded for those that enter; None when nothing is."""
        given = [new for new in entering if new.source]
        if not given:
            return None
        token_ids = [unpack(new.source) for new in given]
        positions = [np.arange(len(ids), dtype=np.int32) for ids in token_ids]
        slots = [
            unpack(new.blocks[self._encoder_group]).astype(np.int64)[place // self._block_size] * self._block_size
            + place % self._block_size
            for new, place in zip(given, positions, strict=True)
        ]
        lengths = [len(ids) for ids in token_ids]
        query_start = np.concatenate(([0], np.cumsum(lengths)), dtype=np.int32)
        parts = (np.concatenate(token_ids), np.concatenate(positions), query_start, np.concatenate(slots))
        return Source(*(upload(part, self._device) for part in parts), max_len=max(lengths))

    def leave(self, row: int) -> None:
        """The request in `row` has left; what the device holds of it is never read again."""
        self.num_tokens[row] = self._num_computed[row] = 0
        self._num_blocks[row] = 0

    def write(self, rows: np.ndarray, positions: np.ndarray, token_ids: Tensor) -> None:
        """Put drawn tokens [R] i32 where the next step finds them; -1, of a row that failed, becomes some token."""
        where = upload(np.stack((rows, positions)), self._device)
        self.tokens[where[0], where[1]] = token_ids.clamp_min(0)

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
        where = upload(np.stack((group, row, column, blocks)).astype(np.int64), self._device)
        self.block_tables[where[0], where[1], where[2]] = where[3].int()
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
        lengths, parts = np.diff(chunks.query_start), (chunks.rows, chunks.ends, chunks.query_start, logits_at)
        on_device = upload(np.concatenate(parts, dtype=np.int32), self._device)
        rows, seq_lens, query_start, wanted = on_device.split([len(part) for part in parts])
        are_all_wanted = np.array_equal(logits_at, np.arange(chunks.num_tokens))
        return self._batch(
            rows, seq_lens, query_start, chunks.num_tokens, int(lengths.max()), int(chunks.ends.max()),
            logits_at=None if are_all_wanted else wanted.long(), may_have_singles=bool(lengths[0] == 1),
            invariant=invariant,
        )  # fmt: skip

    def padded(self, chunks: Chunks, num_seqs: int, num_tokens: int) -> np.ndarray:
        """What `gather_padded` takes for a step made larger by nobody's tokens: [3 * num_seqs + 1] i32."""
        packed, used = np.zeros(3 * num_seqs + 1, np.int32), len(chunks.rows)
        rows, seq_lens, query_start = np.split(packed, (num_seqs, 2 * num_seqs))
        rows[:used], rows[used:], seq_lens[:used] = chunks.rows, len(self.num_tokens), chunks.ends
        query_start[: used + 1], query_start[used + 1 :] = chunks.query_start, num_tokens
        return packed

    def gather_padded(self, packed: Tensor, num_tokens: int, *, invariant: bool) -> Batch:
        """Inputs of a step of so many tokens, from numbers on the device alone, so that it can be captured.

        Logits are wanted at each sequence's last.

        Args:
            packed: [3 * S + 1] i32: rows, lengths and query_start. Sequences of length 0 are nobody's.
        """
        num_seqs = len(packed) // 3
        rows, seq_lens, query_start = packed.split((num_seqs, num_seqs, num_seqs + 1))
        return self._batch(
            rows, seq_lens, query_start, num_tokens, num_tokens, self.tokens.shape[1],
            logits_at=query_start[1:].long().sub_(1), may_have_singles=True, invariant=invariant,
        )  # fmt: skip

    def gather_singles(self, rows: Tensor, seq_lens: Tensor, *, most_tokens: int, invariant: bool) -> Batch:
        """Inputs of a step of one token a row, [S] i32 each, so that it can be captured. Length 0: nobody's.

        Args:
            most_tokens: of a sequence: no row has more.
        """
        num_seqs = len(rows)
        return self._batch(
            rows, seq_lens, self._index[: num_seqs + 1], num_seqs, 1, most_tokens,
            logits_at=None, may_have_singles=True, invariant=invariant,
        )  # fmt: skip

    def _batch(
        self, rows: Tensor, seq_lens: Tensor, query_start: Tensor, num_tokens: int, max_query_len: int,
        max_seq_len: int, **rest,
    ) -> Batch:  # fmt: skip
        block_size, num_blocks = self._block_size, -(-max_seq_len // self._block_size)
        token_ids, positions, slots = step_inputs(
            self.tokens, self.block_tables, rows, query_start, seq_lens, num_tokens=num_tokens, block_size=block_size
        )
        widths = [num_blocks if group != self._encoder_group else None for group in range(len(self.block_tables))]
        tables = [
            table[:, :width].index_select(0, rows) for table, width in zip(self.block_tables, widths, strict=True)
        ]
        source_lens = None if self._encoder_group is None else self._source_lens.index_select(0, rows)
        return Batch(
            token_ids, positions, query_start, seq_lens, max_query_len, max_seq_len, tables, list(slots),
            block_size=block_size, source_lens=source_lens, **rest,
        )  # fmt: skip
