"""Drawing tokens: each row's sampling parameters as columns on the device, and what a row's logits go through.

The raw logits of a row give its log-probabilities; penalties, biases and forbidden tokens then change them in place,
and one kernel draws. Rows that use none of this cost nothing for it.

Key: R rows that draw in this step, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cableway.ipc.messages import NewRow, Sampling
from cableway.kernels.add_at import add_at
from cableway.kernels.count_tokens import count_tokens
from cableway.kernels.logprobs import logprobs
from cableway.kernels.penalize import IN_PROMPT, penalize
from cableway.kernels.sample import sample
from cableway.workers.logprobs import TopLogprobs
from cableway.workers.rows import unpack, upload


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
    """Sampling state of `max_num_seqs` rows."""

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        num_rows = max_num_seqs + 1  # the last is nobody's
        self._columns = torch.zeros(5, num_rows, dtype=torch.int32, device=device)
        self._fractions = self._columns[:3].view(torch.float32)  # temperature, top_p, min_p
        self._integers = self._columns[3:]  # top_k, choice
        self._seeds = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._num_logprobs = np.full(max_num_seqs, -1, np.int32)
        self._changes: list[_Changes | None] = [None] * max_num_seqs
        self._penalties = Penalties(max_num_seqs, vocab_size, device)

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
            self._note(new)

    def _note(self, new: NewRow) -> None:
        """What the host remembers of a request."""
        sampling = new.sampling
        self._num_logprobs[new.row] = min(sampling.logprobs, self._vocab_size)
        self._changes[new.row] = _Changes.of(sampling, self._vocab_size)
        self._penalties.leave(new.row)
        if sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1:
            self._penalties.enter(new)

    def leave(self, row: int) -> None:
        """The request in `row` has left."""
        self._penalties.leave(row)

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
        self._penalties.apply(logits, rows)
        self._change(logits, rows, num_drawn)
        token_ids = self.draw_plain(logits, index, positions_device)
        self._penalties.count(token_ids, rows)
        if raw is None:
            return Drawn(token_ids, logprob_rows, None)
        width = int(self._num_logprobs[rows].max())
        drawn = token_ids[upload(logprob_rows, self._device)].clamp_min(0).long()
        return Drawn(token_ids, logprob_rows, TopLogprobs(*logprobs(raw, drawn, width)))

    def is_plain(self, rows: np.ndarray) -> bool:
        """Whether these rows [R] are drawn from their raw logits, and nothing else is asked of them."""
        return not (
            (self._num_logprobs[rows] >= 0).any()
            or self._penalties.any_of(rows)
            or any(self._changes[row] for row in rows.tolist())
        )

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

    def _change(self, logits: Tensor, rows: np.ndarray, num_drawn: np.ndarray) -> None:
        """Add biases, and forbid the ends of outputs that are too short."""
        parts = [
            (index, *part)
            for index, (row, num) in enumerate(zip(rows.tolist(), num_drawn.tolist(), strict=True))
            if (changes := self._changes[row]) is not None
            for part in changes.at(num)
        ]
        if not parts:
            return
        where = np.repeat([index for index, _, _ in parts], [len(token_ids) for _, token_ids, _ in parts])
        token_ids, values = (np.concatenate([part[i] for part in parts]) for i in (1, 2))
        add_at(logits, *(upload(array, self._device) for array in (where, token_ids, values)))


@dataclass(frozen=True, slots=True)
class _Changes:
    """What is added to one request's logits; tokens outside the vocabulary cannot be drawn and are left out."""

    biased: np.ndarray  # [n] i64
    biases: np.ndarray  # [n] f32
    ends: np.ndarray  # [m] i64, forbidden below `min_tokens`
    min_tokens: int

    @classmethod
    def of(cls, sampling: Sampling, vocab_size: int) -> "_Changes | None":
        biased = {token_id: bias for token_id, bias in sampling.logit_bias.items() if 0 <= token_id < vocab_size}
        ends = np.unique(unpack(sampling.eos_token_ids + sampling.stop_token_ids)).astype(np.int64)
        ends = ends[(ends >= 0) & (ends < vocab_size)]
        min_tokens = sampling.min_tokens if len(ends) else 0
        if not biased and not min_tokens:
            return None
        return cls(
            np.fromiter(biased.keys(), np.int64, len(biased)),
            np.fromiter(biased.values(), np.float32, len(biased)),
            ends,
            min_tokens,
        )

    def at(self, num_drawn: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(token_ids, values) to add when `num_drawn` tokens have been drawn."""
        changes = [(self.biased, self.biases)] if len(self.biased) else []
        if num_drawn < self.min_tokens:
            changes.append((self.ends, np.full(len(self.ends), -np.inf, np.float32)))
        return changes


class Penalties:
    """Counts of seen tokens for the rows whose requests ask for penalties, and only for them.

    Counts are made anew whenever a request enters a row, so that preemption leaves nothing behind.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self._counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._slot_of = np.full(max_num_seqs, -1, np.int64)
        self._weights = np.zeros((3, max_num_seqs), np.float32)  # presence, frequency, repetition
        self._free: list[int] = []
        self._device = device

    def enter(self, new: NewRow) -> None:
        """Count the request's tokens so far."""
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self._slot_of[new.row] = slot
        sampling = new.sampling
        self._weights[:, new.row] = sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty
        tokens = upload(unpack(new.tokens).astype(np.int64), self._device)
        prompt, output = tokens[: new.num_prompt_tokens], tokens[new.num_prompt_tokens :]
        self._counts[slot].zero_().index_fill_(0, prompt, IN_PROMPT)
        count_tokens(self._counts, torch.full_like(output, slot), output)

    def leave(self, row: int) -> None:
        """Give up what is kept for a row, if anything is."""
        if self._slot_of[row] >= 0:
            self._free.append(int(self._slot_of[row]))
            self._slot_of[row] = -1

    def any_of(self, rows: np.ndarray) -> bool:
        """Whether any of these rows [R] is penalised."""
        return bool(self._slot_of[rows].max() >= 0)

    def apply(self, logits: Tensor, rows: np.ndarray) -> None:
        """Penalise logits [R, V] in place."""
        if not self.any_of(rows):
            return
        slots = self._slot_of[rows]
        here = np.flatnonzero(slots >= 0)
        index = upload(here, self._device)
        penalised = logits[index]
        weights = upload(np.ascontiguousarray(self._weights[:, rows[here]]), self._device)
        penalize(penalised, self._counts, upload(slots[here], self._device), *weights)
        logits[index] = penalised

    def count(self, token_ids: Tensor, rows: np.ndarray) -> None:
        """Count drawn tokens [R] i32."""
        if not self.any_of(rows):
            return
        slots = self._slot_of[rows]
        here = np.flatnonzero(slots >= 0)
        drawn = token_ids[upload(here, self._device)].clamp_min(0).long()
        count_tokens(self._counts, upload(slots[here], self._device), drawn)

    def _grow(self) -> None:
        old = len(self._counts)
        more = max(4, old)
        self._counts = torch.cat((self._counts, self._counts.new_zeros(more, self._counts.shape[1])))
        self._free.extend(range(old, old + more))
