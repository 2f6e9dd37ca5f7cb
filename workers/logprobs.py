"""Log-probabilities on their way to the core, and those of prompts: what the model thought of each token sent to it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cableway.ipc.messages import Logprobs, NewRow
from cableway.kernels.logprobs import logprobs
from cableway.workers.rows import Chunks, Rows

_LOGITS_BYTES = 16 << 20
"""Logits held at once: few enough rows to stay in a CPU's cache, for a prompt of any length."""


class TopLogprobs(NamedTuple):
    """Log-probabilities of n tokens, and of the likeliest beside each: width - 1 of them, in falling order."""

    token_ids: Tensor  # [n, width] i32; first the token itself
    values: Tensor  # [n, width] f32
    ranks: Tensor  # [n] i32

    def narrowed(self, index: int, num_top: int) -> "TopLogprobs":
        """Only the token at `index`, with only `num_top` of the likeliest."""
        one = slice(index, index + 1)
        return TopLogprobs(self.token_ids[one, : 1 + num_top], self.values[one, : 1 + num_top], self.ranks[one])

    def on_its_way_to_host(self) -> "TopLogprobs":
        """The same in memory of the host, once the device has come that far."""
        return TopLogprobs(*(part.to("cpu", non_blocking=True) for part in self))

    def message(self, row: int, first_position: int, *, prompt: bool = False) -> Logprobs:
        """As the core is told."""
        token_ids, values, ranks = (part.cpu().numpy().tobytes() for part in self)
        num, width = self.token_ids.shape
        return Logprobs(row, first_position, num, width, token_ids, values, ranks, prompt)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive tokens of one row whose next token belongs to the prompt, too."""

    row: int
    num_top: int  # likeliest tokens wanted beside the prompt's own
    first_position: int  # of the first token that is given a log-probability
    tokens: range  # of the step; the logits after token tokens[i] judge position first_position + i


class PromptLogprobs:
    """Which rows want them, and how many of the likeliest tokens beside the prompt's own."""

    def __init__(self, vocab_size: int) -> None:
        self._num_top: dict[int, int] = {}
        self._vocab_size = vocab_size

    def enter(self, new: NewRow) -> None:
        """Take over a row for a request."""
        self.leave(new.row)
        if new.sampling.prompt_logprobs >= 0:
            self._num_top[new.row] = min(new.sampling.prompt_logprobs, self._vocab_size)

    def leave(self, row: int) -> None:
        """The request in `row` has left."""
        self._num_top.pop(row, None)

    def stretches(self, chunks: Chunks, rows: Rows) -> list[Stretch]:
        """What of this step's chunks is to be judged."""
        found = []
        if self._num_top:
            for index, row in enumerate(chunks.rows.tolist()):
                start, end = int(chunks.starts[index]), int(chunks.ends[index])
                num = min(end, int(rows.num_prompt_tokens[row]) - 1) - start
                if num > 0 and row in self._num_top:
                    first = int(chunks.query_start[index])
                    found.append(Stretch(row, self._num_top[row], start + 1, range(first, first + num)))
        return found

    def judge(
        self, stretches: Sequence[Stretch], hidden: Tensor, rows: Rows, logits: Callable[[Tensor], Tensor]
    ) -> list[Logprobs]:
        """Log-probabilities of each stretch.

        Args:
            hidden: [R, E] of the stretches' tokens, one stretch after another.
            logits: hidden [n, E] -> [n, V] f32.
        """
        piece_len = max(1, _LOGITS_BYTES // (4 * self._vocab_size))
        judged = []
        states_of = hidden.split([len(stretch.tokens) for stretch in stretches]) if stretches else ()
        for stretch, states in zip(stretches, states_of, strict=True):
            own = rows.tokens[stretch.row, stretch.first_position :][: len(stretch.tokens)].long()
            pieces = [
                logprobs(logits(states_piece), own_piece, stretch.num_top)
                for states_piece, own_piece in zip(states.split(piece_len), own.split(piece_len), strict=True)
            ]
            found = TopLogprobs(*(torch.cat(part) for part in zip(*pieces, strict=True)))
            judged.append(found.message(stretch.row, stretch.first_position, prompt=True))
        return judged
