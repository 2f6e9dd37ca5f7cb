"""Drawing tokens: each row's sampling parameters as columns on the device, and what a row's logits go through.

The raw logits of a row give its log-probabilities; what its request asks for then changes them in place (edits.py), and
one kernel draws. Rows that use none of this cost nothing for it.

Key: R rows that draw in this step, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cableway.ipc.messages import NewRow
from cableway.kernels.logprobs import logprobs
from cableway.kernels.sample import sample
from cableway.workers.edits import Edits
from cableway.workers.logprobs import TopLogprobs
from cableway.workers.rows import upload


@dataclass(frozen=True, slots=True)
class Drawn:
    """What one step drew. `logprob_rows` are the indices among the R rows that asked for `logprobs`."""

    token_ids: Tensor  # [R] i32; -1 where a row's logits are broken
    logprob_rows: np.ndarray
    logprobs: TopLogprobs | None

    def on_its_way_to_host(self) -> "Drawn":
        """The same in memory of the host, once the device has come that far."""
        logprobs = self.logprobs and self.logprobs.on_its_way_to_host()
        return Drawn(self.token_ids.to("cpu", non_blocking=True), self.logprob_rows, logprobs)


class Sampler:
    """Sampling state of the rows of `tokens` [max_num_seqs + 1, max_model_len] i32, the last of which is nobody's."""

    def __init__(self, tokens: Tensor, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        num_rows, device = len(tokens), tokens.device
        self._device = device
        self._columns = torch.zeros(5, num_rows, dtype=torch.int32, device=device)
        self._fractions = self._columns[:3].view(torch.float32)  # temperature, top_p, min_p
        self._integers = self._columns[3:]  # top_k, choice
        self._seeds = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._num_logprobs = np.full(num_rows - 1, -1, np.int32)
        self._is_plain = np.ones(num_rows - 1, bool)
        self._edits = Edits(tokens, vocab_size)

    def enter(self, entering: Sequence[NewRow]) -> None:
        """Take over rows for requests."""
        fractions = [(s.temperature, s.top_p, s.min_p) for s in (new.sampling for new in entering)]
        integers = [(new.sampling.top_k, new.choice) for new in entering]
        bits = np.concatenate((np.array(fractions, np.float32).view(np.int32), np.array(integers, np.int32)), 1)
        rows_and_seeds = np.array([(new.row, new.sampling.seed) for new in entering], np.int64)
        rows, seeds = upload(np.ascontiguousarray(rows_and_seeds.T), self._device)
        self._columns.index_copy_(1, rows, upload(np.ascontiguousarray(bits.T), self._device))
        self._seeds.index_copy_(0, rows, seeds)
        for new in entering:
            self._num_logprobs[new.row] = min(new.sampling.logprobs, self._vocab_size)
            is_edited = self._edits.enter(new)
            self._is_plain[new.row] = not is_edited and new.sampling.logprobs < 0

    def leave(self, row: int) -> None:
        """The request in `row` has left."""
        self._edits.leave(row)

    def draw(self, logits: Tensor, rows: np.ndarray, positions: np.ndarray, num_drawn: np.ndarray) -> Drawn:
        """Draw a token for each row.

        Args:
            logits: [R, V] f32; overwritten.
            rows: [R] the worker's rows.
            positions: [R] i32, of the tokens to be drawn, in prompt and output.
            num_drawn: [R] i32, tokens that each output has so far.
        """
        logprob_rows = np.flatnonzero(self._num_logprobs[rows] >= 0)
        raw = logits[upload(logprob_rows, self._device)] if len(logprob_rows) else None
        index, positions_device = upload(np.stack((rows, positions)), self._device)
        self._edits.apply(logits, rows, positions, num_drawn)
        token_ids = self.draw_plain(logits, index, positions_device)
        self._edits.count(token_ids, rows)
        if raw is None:
            return Drawn(token_ids, logprob_rows, None)
        width = int(self._num_logprobs[rows].max())
        drawn = token_ids[upload(logprob_rows, self._device)].long()
        return Drawn(token_ids, logprob_rows, TopLogprobs(*logprobs(raw, drawn, width)))

    def is_plain(self, rows: np.ndarray) -> bool:
        """Whether these rows [R] are drawn from their raw logits, and nothing else is asked of them."""
        return bool(self._is_plain[rows].all())

    def draw_plain(
        self, logits: Tensor, rows: Tensor, positions: Tensor, tokens: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Draw a token for each of `rows` [R], at `positions` [R] i32, from logits [R, V] as they are: [R] i32.

        They are written into `out` [R] and to their positions in the rows of `tokens`, where these are given.
        """
        return sample(logits, rows, self._fractions, self._integers, self._seeds, positions, tokens, out=out)

    def num_logprobs(self, row: int) -> int:
        """How many of the likeliest tokens the request in `row` wants to see; -1 = no log-probabilities at all."""
        return int(self._num_logprobs[row])
