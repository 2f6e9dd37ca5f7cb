"""Admission: who of those that wait gets a row, with what is computed already of what it asks."""

from collections.abc import Iterator

from cableway.enginecore.kv.manager import KVManager, Match
from cableway.enginecore.request import Request, State
from cableway.enginecore.step import Step
from cableway.enginecore.trials import Trials
from cableway.enginecore.waiting import WaitingQueue


class Admission:
    """Lets in who waits, strictly in order: one that finds no room is not overtaken, so that it gets its turn."""

    def __init__(self, waiting: WaitingQueue, trials: Trials):
        self._waiting = waiting
        self._trials = trials
        self._blocked: tuple[Request | None, int] = None, 0  # who could not be let in, for want of how many blocks

    def forget(self) -> None:
        """Who was blocked may not be any more."""
        self._blocked = None, 0

    def entering(
        self, step: Step, kv: KVManager, *, num_rows: int, num_others: int, num_owed: int, now_s: float
    ) -> Iterator[tuple[Request, Match]]:
        """Those that enter their row in a step, while it has budget; each has its blocks before the next is looked for.

        Args:
            num_rows: that are free.
            num_others: requests that hold blocks, each of which can grow by one.
            num_owed: blocks for prompts that are computed in part already.
        """
        held = []
        while step.budget and num_rows and (request := self._waiting.first()):
            available = kv.num_available - num_owed - num_others
            if request is self._blocked[0] and self._blocked[1] > available:
                break  # PERF: spares a look-up of its whole prompt in every step
            match = _beginning(kv, request)
            if match is None or (request.standing.deaths and self._announces(request, match, step.budget, now_s)):
                held.append(self._waiting.pop())
                continue
            if self._trials.wants_turn:
                break  # those before it enter when their frontends have heard
            num_blocks = kv.num_new_blocks(match, request)
            if num_blocks > available:
                self._blocked = request, num_blocks
                break
            if kv.num_to_encode(match, request) >= step.budget:
                break  # a source is not cut: it waits for a step that has room for all of it
            yield self._waiting.pop(), match
            num_rows, num_others, num_owed = num_rows - 1, num_others + 1, num_owed + kv.num_owed(request)
        for request in held:
            self._waiting.push(request)

    def _announces(self, request: Request, match: Match, budget: int, now_s: float) -> bool:
        """Whether it has to wait a moment, because it was hit before and its frontend hears of the next time first."""
        span = match.num_tokens, min(match.num_tokens + budget, len(request.tokens))
        return self._trials.announces(request, span, now_s)


def _beginning(kv: KVManager, request: Request) -> Match | None:
    """The blocks a request begins with; None while its leader computes the prompt that they share."""
    leader = request.family.leader if request.family else None
    if leader and leader.state is State.RUNNING:
        num_shared = request.num_prompt - 1  # each computes the prompt's last token itself, and draws its own first
        if leader.num_computed < num_shared:
            return None
        if (fork := kv.fork(leader, num_shared)) and not request.num_output:
            return fork
    return kv.lookup(request)
