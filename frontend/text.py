"""One choice's way from token ids to text: detokenizer, stop strings, log-probabilities, finish reason."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from cableway.frontend.job import Update
from cableway.frontend.tokens import Detokenizer, StopStrings, Tokenizer
from cableway.ipc.messages import Logprobs, unpack_floats, unpack_ints


class TokenLogprob(NamedTuple):
    """A token's log-probability, and the likeliest tokens in its place."""

    token_id: int
    logprob: float | None  # None for a prompt's first token
    rank: int  # 1 = likeliest
    top: list[tuple[int, float]]  # (token id, log-probability), likeliest first


class Delta(msgspec.Struct):
    """What is new of one choice. `finish_reason` is set in its last delta.

    `logprobs` belong to the text sent so far, each with the offset in it where its token begins: a token of a stop
    string that is held back or cut off has none.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: Sequence[tuple[int, TokenLogprob]] = ()
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class TextOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a request wants its text cut."""

    stops: list[str] = []
    include_stop: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0  # stop strings are not looked for in these
    logprobs: bool = False
    discard: bool = False  # `max_tokens` 0: the engine makes one token, which nobody asked for

    @property
    def is_plain(self) -> bool:
        """Whether tokens become text and nothing else, until the choice ends."""
        return not (self.stops or self.logprobs or self.discard)


def token_logprobs(packed: Logprobs) -> Iterator[TokenLogprob]:
    """Unpack one message's log-probabilities, a token at a time."""
    token_ids: list[int] = unpack_ints(packed.token_ids).tolist()
    values = list(unpack_floats(packed.values))
    ranks = unpack_ints(packed.ranks).tolist()
    for row in range(packed.num):
        start, end = row * packed.width, (row + 1) * packed.width
        top = list(zip(token_ids[start + 1 : end], values[start + 1 : end], strict=True))
        yield TokenLogprob(token_ids[start], values[start], ranks[row], top)


class ChoiceText:
    """The text of one choice, fed with its updates in order.

    The text does not depend on how tokens were grouped into updates: with stop strings or log-probabilities they are
    taken one by one.
    """

    __slots__ = (
        "_held",
        "_is_plain",
        "_num_chars_made",
        "_num_chars_sent",
        "_options",
        "_stops",
        "detokenizer",
        "fed_s",
        "index",
        "num_tokens",
    )

    def __init__(self, index: int, tokenizer: Tokenizer, prompt_ids: Sequence[int], options: TextOptions):
        self.index = index
        self.num_tokens = 0
        self.fed_s = 0.0
        """When it was last fed, or 0: for whoever measures that."""
        self._options = options
        self.detokenizer = Detokenizer(tokenizer, prompt_ids[-16:], options.skip_special_tokens)
        self._stops = StopStrings(options.stops, options.include_stop) if options.stops else None
        self._is_plain = options.is_plain
        self._num_chars_made = 0
        self._num_chars_sent = 0
        self._held: list[tuple[int, TokenLogprob]] = []

    def feed(self, update: Update) -> Delta:
        """The delta that `update` makes; its text may be empty."""
        token_ids, finish = update.token_ids, update.finish
        delta = Delta(self.index, "", [])
        if self._options.discard:
            delta.finish_reason = "length" if finish is not None else None
            return delta
        visible = token_ids
        if finish is not None and finish.reason == "stop" and not self._options.include_stop:
            visible = token_ids[:-1]  # the token that ended it is no part of the text
        if self._is_plain:
            delta.text = self.detokenizer.feed(visible)
            self.num_tokens += len(token_ids)
            delta.token_ids = token_ids
        else:
            self._feed_singly(visible, update, delta)
            if delta.finish_reason is None:
                self.num_tokens += len(token_ids) - len(visible)
                delta.token_ids.extend(token_ids[len(visible) :])
        if finish is not None and delta.finish_reason is None:
            self._end(delta)
            if delta.finish_reason is None:
                delta.finish_reason = finish.reason
                delta.stop_reason = finish.stop_token
        return delta

    def _feed_singly(self, token_ids: list[int], update: Update, delta: Delta) -> None:
        logprobs = [entry for packed in update.logprobs for entry in token_logprobs(packed)]
        for number, token_id in enumerate(token_ids):
            self.num_tokens += 1
            delta.token_ids.append(token_id)
            if self._options.logprobs:
                self._held.append((self._num_chars_made, logprobs[number]))
            self._take(self.detokenizer.feed([token_id]), delta)
            if delta.finish_reason is not None:
                return

    def _take(self, piece: str, delta: Delta) -> None:
        """Pass on what no stop string can begin in; sets `finish_reason` where one is found."""
        self._num_chars_made += len(piece)
        matched = None
        if self._stops is not None and self.num_tokens > self._options.min_tokens:
            piece, matched = self._stops.feed(piece)
        delta.text += piece
        self._num_chars_sent += len(piece)
        if matched is not None:
            delta.finish_reason, delta.stop_reason = "stop", matched
            self._release(delta, all_made=False)
        elif self._held:
            self._release(delta, all_made=self._num_chars_sent == self._num_chars_made)

    def _end(self, delta: Delta) -> None:
        """The engine ended the choice: nothing is held back any longer."""
        self._take(self.detokenizer.finish(), delta)
        if delta.finish_reason is None:
            if self._stops is not None:
                rest = self._stops.finish()
                delta.text += rest
                self._num_chars_sent += len(rest)
            self._release(delta, all_made=True)

    def _release(self, delta: Delta, *, all_made: bool) -> None:
        num = 0
        while num < len(self._held) and (all_made or self._held[num][0] < self._num_chars_sent):
            num += 1
        delta.logprobs = [*delta.logprobs, *self._held[:num]]
        del self._held[:num]
