"""Results of offline requests, under the names that vLLM's users know."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from cableway.frontend.text import TokenLogprob
from cableway.frontend.tokens import Tokenizer


@dataclass(slots=True)
class Logprob:
    """A token's log-probability where it stands, and its rank there (1 = likeliest)."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None  # None without a tokenizer


LogprobsAt = dict[int, Logprob]
"""At one place: the token that is there first, then the likeliest that were asked for."""


@dataclass(slots=True)
class CompletionOutput:
    """One continuation of a prompt.

    `token_ids` include the token that ended it, `text` does not. `finish_reason` is stop or length; `stop_reason` the
    stop string or stop token that ended it, None when that was the end of sequence.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[LogprobsAt] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def finished(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its continuations. `prompt_logprobs` has an entry a prompt token, the first one None."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[LogprobsAt | None] | None = None
    finished: bool = False
    num_cached_tokens: int = 0


def logprobs_at(entry: TokenLogprob, tokenizer: Tokenizer | None) -> LogprobsAt:
    """One token's place as a dictionary by token id."""

    def text(token_id: int) -> str | None:
        return None if tokenizer is None else tokenizer.token_text(token_id)

    assert entry.logprob is not None
    found = {entry.token_id: Logprob(entry.logprob, entry.rank, text(entry.token_id))}
    for rank, (token_id, logprob) in enumerate(entry.top, 1):
        found.setdefault(token_id, Logprob(logprob, rank, text(token_id)))
    return found


def prompt_logprobs(entries: Iterable[TokenLogprob], tokenizer: Tokenizer | None) -> list[LogprobsAt | None]:
    """A prompt's places; nothing precedes the first token, so there is nothing to say of it."""
    return [None, *(logprobs_at(entry, tokenizer) for entry in entries)]
