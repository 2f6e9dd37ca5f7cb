"""What requests ask to be done to their logits: penalties, biases, and tokens and words that may not be drawn.

What a request needs for it lies in lines of tables on the device. They are written whenever it enters a row, so that
preemption leaves nothing behind, and a request that needs none costs nothing.

Key: R rows that draw in this step, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cableway.ipc.messages import Ints, NewRow, Sampling
from cableway.kernels.add_at import add_at
from cableway.kernels.count_tokens import count_tokens
from cableway.kernels.forbid_words import forbid_words
from cableway.kernels.penalize import IN_PROMPT, num_words, penalize
from cableway.workers.rows import unpack, upload

_FEWEST_LINES = 4


class Table:
    """A table [lines, ...] i32 on the device, with a line for each row that needs one; it grows with them."""

    def __init__(self, max_num_seqs: int, line: Sequence[int], device: torch.device) -> None:
        self.lines = torch.zeros(0, *line, dtype=torch.int32, device=device)
        self.line_of = np.full(max_num_seqs, -1, np.int64)
        self._free: list[int] = []

    def take(self, row: int) -> int:
        """The number of a line for a row, which has none; the line holds what was left there."""
        if not self._free:
            old = len(self.lines)
            lines = self.lines.new_zeros(max(_FEWEST_LINES, 2 * old), *self.lines.shape[1:])
            lines[:old] = self.lines
            self.lines = lines
            self._free.extend(range(old, len(self.lines)))
        self.line_of[row] = self._free.pop()
        return int(self.line_of[row])

    def leave(self, row: int) -> None:
        """Give up a row's line, if it has one."""
        if self.line_of[row] >= 0:
            self._free.append(int(self.line_of[row]))
            self.line_of[row] = -1


class Edits:
    """The changes that the requests in `tokens` [max_num_seqs + 1, max_model_len] i32 ask for."""

    def __init__(self, tokens: Tensor, vocab_size: int) -> None:
        self._tokens, self._vocab_size, self._device = tokens, vocab_size, tokens.device
        max_num_seqs = len(tokens) - 1
        self._counts = Table(max_num_seqs, [vocab_size], self._device)
        self._masks = Table(max_num_seqs, [num_words(vocab_size)], self._device)
        self._words = Table(max_num_seqs, [1, 1], self._device)
        self._weights = np.zeros((3, max_num_seqs), np.float32)  # presence, frequency, repetition
        self._weights[2] = 1
        self._sums: list[_Sums | None] = [None] * max_num_seqs

    def enter(self, new: NewRow) -> bool:
        """Note what a request asks for, in place of the one before; whether it is anything at all."""
        self.leave(new.row)
        sampling = new.sampling
        weights = sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty
        if weights != (0, 0, 1):
            self._weights[:, new.row] = weights
            self._count_all(new)
        if sampling.allowed_token_ids:
            line = self._masks.take(new.row)
            self._masks.lines[line] = upload(_mask(sampling.allowed_token_ids, self._vocab_size), self._device)
        if words := _words(sampling.bad_words, self._vocab_size):
            self._keep(new.row, words)
        self._sums[new.row] = _Sums.of(sampling, self._vocab_size)
        lines = (table.line_of[new.row] for table in (self._counts, self._masks, self._words))
        return self._sums[new.row] is not None or any(line >= 0 for line in lines)

    def leave(self, row: int) -> None:
        """The request in `row` has left."""
        for table in (self._counts, self._masks, self._words):
            table.leave(row)
        self._sums[row] = None

    def apply(self, logits: Tensor, rows: np.ndarray, positions: np.ndarray, num_drawn: np.ndarray) -> None:
        """Change logits [R, V] f32 in place, before tokens at `positions` [R] are drawn after `num_drawn` others."""
        self._penalize(logits, rows)
        self._forbid_words(logits, rows, positions, num_drawn)
        self._add(logits, rows, num_drawn)

    def count(self, token_ids: Tensor, rows: np.ndarray) -> None:
        """Count drawn tokens [R] i32, where penalties are taken for them."""
        lines = self._counts.line_of[rows]
        here = np.flatnonzero(lines >= 0)
        if len(here):
            drawn = token_ids[upload(here, self._device)].long()
            count_tokens(self._counts.lines, upload(lines[here], self._device), drawn)

    def _count_all(self, new: NewRow) -> None:
        """Count a request's tokens so far."""
        line = self._counts.take(new.row)
        tokens = upload(unpack(new.tokens).astype(np.int64), self._device)
        prompt, output = tokens[: new.num_prompt_tokens], tokens[new.num_prompt_tokens :]
        self._counts.lines[line].zero_().index_fill_(0, prompt, IN_PROMPT)
        count_tokens(self._counts.lines, torch.full_like(output, line), output)

    def _keep(self, row: int, words: Sequence[np.ndarray]) -> None:
        """Write a request's words as forbid_words.py has them; the table has room for the most and longest ever."""
        line, (_, most, longest) = self._words.take(row), self._words.lines.shape
        more, longer = max(len(words) - most, 0), max(max(map(len, words)) - longest, 0)
        if more or longer:
            self._words.lines = F.pad(self._words.lines, (longer, 0, 0, more), value=-1)
        packed = np.full(self._words.lines.shape[1:], -1, np.int32)
        for number, word in enumerate(words):
            packed[number, -len(word) :] = word
        self._words.lines[line] = upload(packed, self._device)

    def _penalize(self, logits: Tensor, rows: np.ndarray) -> None:
        lines = np.stack((self._counts.line_of[rows], self._masks.line_of[rows]))
        here = np.flatnonzero(lines.max(0) >= 0)
        if not len(here):
            return
        rows_and_lines = upload(np.ascontiguousarray([here, *lines[:, here]]), self._device)
        weights = upload(np.ascontiguousarray(self._weights[:, rows[here]]), self._device)
        penalize(logits, rows_and_lines[0], self._counts.lines, self._masks.lines, rows_and_lines[1:], weights)

    def _forbid_words(self, logits: Tensor, rows: np.ndarray, positions: np.ndarray, num_drawn: np.ndarray) -> None:
        lines = self._words.line_of[rows]
        here = np.flatnonzero(lines >= 0)
        if len(here):
            where = np.stack((here, lines[here], rows[here], positions[here], (positions - num_drawn)[here]))
            forbid_words(logits, self._words.lines, self._tokens, upload(where.astype(np.int64), self._device))

    def _add(self, logits: Tensor, rows: np.ndarray, num_drawn: np.ndarray) -> None:
        parts = [
            (index, *part)
            for index, (row, num) in enumerate(zip(rows.tolist(), num_drawn.tolist(), strict=True))
            if (sums := self._sums[row]) is not None
            for part in sums.at(num)
        ]
        if not parts:
            return
        where = np.repeat([index for index, _, _ in parts], [len(token_ids) for _, token_ids, _ in parts])
        token_ids, values = (np.concatenate([part[i] for part in parts]) for i in (1, 2))
        add_at(logits, *(upload(array, self._device) for array in (where, token_ids, values)))


def _mask(allowed: Ints, vocab_size: int) -> np.ndarray:
    """Bits of the tokens that may be drawn, see penalize.py: [num_words] i32."""
    token_ids = unpack(allowed)
    bits = np.zeros(num_words(vocab_size) * 32, bool)
    bits[token_ids[(token_ids >= 0) & (token_ids < vocab_size)]] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


def _words(packed: Sequence[Ints], vocab_size: int) -> list[np.ndarray]:
    """Token ids of words; those that name a token outside the vocabulary cannot be said."""
    words = [unpack(word) for word in packed]
    return [word for word in words if len(word) and word.min() >= 0 and word.max() < vocab_size]


@dataclass(frozen=True, slots=True)
class _Sums:
    """What is added to one request's logits; tokens outside the vocabulary cannot be drawn and are left out."""

    biased: np.ndarray  # [n] i64
    biases: np.ndarray  # [n] f32
    ends: np.ndarray  # [m] i64, forbidden below `min_tokens`
    min_tokens: int

    @classmethod
    def of(cls, sampling: Sampling, vocab_size: int) -> "_Sums | None":
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
        sums = [(self.biased, self.biases)] if len(self.biased) else []
        if num_drawn < self.min_tokens:
            sums.append((self.ends, np.full(len(self.ends), -np.inf, np.float32)))
        return sums
