"""One choice of a request, as the core sees it: its tokens, how far they are computed, and where it stands."""

from __future__ import annotations

import array
from enum import Enum

from cableway.enginecore.kv.prefix import PrefixChain
from cableway.enginecore.outbox import Outbox
from cableway.ipc.messages import Choice, Finish, Generate, Standing


class State(Enum):
    WAITING = "waiting"  # in the queue; owns no row and no blocks
    RUNNING = "running"  # owns a row and blocks
    PREEMPTED = "preempted"  # lost its place; its row and blocks drain until the last step it is in is committed
    FINISHED = "finished"  # told the frontend so; row and blocks, if any, drain likewise


_LEGAL = {
    State.WAITING: {State.RUNNING, State.FINISHED},
    State.RUNNING: {State.PREEMPTED, State.WAITING, State.FINISHED},
    State.PREEMPTED: {State.WAITING, State.FINISHED},
    State.FINISHED: set[State](),
}


class IllegalTransition(Exception):
    """A fault of the core's own: a request was moved to a state that cannot follow the one it is in."""


class Family:
    """The choices of one request with n > 1. They share the prompt's blocks: `leader` computes, the others fork."""

    __slots__ = ("leader",)

    def __init__(self) -> None:
        self.leader: Request | None = None


class Request:
    """Counts: 0 <= num_computed <= num_planned, and until it ends <= len(tokens) + tokens that steps in flight draw.

    `num_computed` tokens have their state in the cache for certain (their steps are committed); `num_planned` will have
    once the steps in flight are done.
    """

    __slots__ = (
        "announced",
        "announced_s",
        "arrived_s",
        "chain",
        "compute_limit",
        "decodes_until",
        "family",
        "frontend",
        "index",
        "key",
        "max_len",
        "next_border",
        "num_cached",
        "num_computed",
        "num_planned",
        "num_prompt",
        "num_slots",
        "num_windowed",
        "order",
        "outbox",
        "queue_s",
        "request_id",
        "row",
        "sampling",
        "source",
        "source_is_new",
        "standing",
        "state",
        "stop_ids",
        "tables",
        "tokens",
    )

    def __init__(self, generate: Generate, choice: Choice, *, order: tuple[int, int], max_model_len: int, now_s: float):
        self.key = choice.key
        self.index = choice.index
        self.request_id = generate.request_id
        self.sampling = generate.sampling
        self.tokens = array.array("i", generate.prompt)
        self.num_prompt = len(self.tokens)
        self.tokens.frombytes(choice.output)
        self.order = order  # (priority, arrival): lower is served first
        self.arrived_s = now_s
        self.queue_s = -1.0  # until first admitted
        self.num_cached = -1  # tokens of prompt or source found in the cache at first admission
        self.source = generate.source
        self.chain = PrefixChain(generate.cache_salt, generate.source)
        self.stop_ids = _ids(self.sampling.eos_token_ids) | _ids(self.sampling.stop_token_ids)
        self.limit(max_model_len)
        self.standing = choice.standing
        self.announced: Standing | None = None  # what its frontend says of it if the core dies
        self.announced_s = 0.0
        self.state = State.WAITING
        self.family: Family | None = None
        self.frontend = b""
        self.outbox = Outbox()
        self.num_computed = 0
        self.reset()

    def limit(self, max_len: int) -> None:
        """Let the sequence have at most `max_len` tokens, or fewer by its own max_tokens."""
        self.max_len = min(self.num_prompt + self.sampling.max_tokens, max_len)
        # The last token drawn is never computed; a request that draws none has its whole prompt computed.
        self.compute_limit = self.max_len - 1 if self.sampling.max_tokens else self.max_len

    def reset(self) -> None:
        """Forget everything that is on the workers: the tokens so far are to be computed again."""
        if self.standing.deaths:
            self.standing = self.standing.after(self.num_computed)
        self.num_computed = self.num_planned = 0
        self.decodes_until = 0  # so far it is planned token by token: it has the blocks, and is not at its limit
        self.row = -1
        self.tables: list[list[int]] = []  # a state group: block ids; owned by kv/
        self.num_slots = 0  # tokens that the blocks can hold
        self.next_border = 0  # number of computed tokens at which kv/ wants to be told
        self.num_windowed: list[int] = []  # a state group: leading blocks given back, out of sight
        self.source_is_new = False  # its blocks hold nothing until the step in which it enters is done

    def move(self, state: State) -> None:
        if state not in _LEGAL[self.state]:
            raise IllegalTransition(f"request {self.request_id!r} key {self.key}: {self.state.name} to {state.name}")
        self.state = state

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def source_len(self) -> int:
        """Tokens that an encoder takes."""
        return len(self.source) // 4

    @property
    def num_left(self) -> int:
        """Known tokens not planned yet; none or less where the next one is being drawn."""
        return len(self.tokens) - self.num_planned

    @property
    def is_in_flight(self) -> bool:
        """Whether a step that it is in has not been committed."""
        return self.num_planned > self.num_computed

    @property
    def reads_prefix_cache(self) -> bool:
        """Log-probabilities of the prompt come from computing it; once a token is drawn they have been delivered."""
        return self.sampling.prompt_logprobs < 0 or self.num_output > 0

    @property
    def only_scores(self) -> bool:
        """Draws no token, but has its prompt computed for the log-probabilities."""
        return self.sampling.max_tokens == 0 and self.sampling.prompt_logprobs >= 0

    def ending(self) -> Finish | None:
        """How the tokens so far end this request, if they do."""
        if self.num_output:
            token_id = self.tokens[-1]
            if token_id in self.stop_ids and self.num_output > self.sampling.min_tokens:
                is_end_of_sequence = token_id in _ids(self.sampling.eos_token_ids)
                return self._finish("stop", None if is_end_of_sequence else token_id)
        if len(self.tokens) >= self.max_len and (self.num_computed >= self.num_prompt or not self.only_scores):
            return self._finish("length")
        return None

    def _finish(self, reason: str, stop_token: int | None = None) -> Finish:
        return Finish(self.key, reason, stop_token, max(self.num_cached, 0), max(self.queue_s, 0.0))


def _ids(packed: bytes) -> set[int]:
    return set(array.array("i", packed))
