"""Requests that may be what keeps killing: each runs alone for a moment, and is cleared, or convicted.

Who was hit by two deaths without a step forward between them is a suspect. A suspect waits until the workers have been
well for a while without it, then computes alone until it has drawn a few tokens; the others pause. Two deaths there,
with a time of health before each, are no chance: that would have to hit two steps and spare everything around them.
"""

from cableway.enginecore.limits import Refusal
from cableway.enginecore.request import Request, State
from cableway.enginecore.waiting import WaitingQueue
from cableway.ipc.messages import IfLost, Standing

WELL_S = 1.0
TRIAL_TOKENS = 4
"""More than are on their way at a death: what is known to have been drawn lags behind the step that killed."""
HEARD_S = 0.02
"""After so long a frontend has what it was told, even if the core dies the moment after."""
QUARANTINED = Refusal(500, "quarantined", "the engine died twice while it computed this request and nothing else")


class Trials:
    """The suspects, and the one that runs alone now."""

    def __init__(self) -> None:
        self.waiting = WaitingQueue()
        self.current: Request | None = None
        self.wants_turn = False  # a frontend has to be told something before more can be planned
        self._goal = 0  # tokens that the one that runs alone has to have computed
        self._well_since_s: float | None = None

    def are_due(self, now_s: float) -> bool:
        """Whether suspects have their turn: there are any, and all has been well without them for long enough."""
        if self._well_since_s is None:
            self._well_since_s = now_s
        return self.current is not None or (self.waiting.num_requests > 0 and now_s - self._well_since_s >= WELL_S)

    def begin(self, request: Request) -> None:
        """The first of those that wait gets its row."""
        assert self.waiting.pop() is request
        self.current = request
        self._goal = len(request.tokens) + TRIAL_TOKENS - 1

    def announces(self, request: Request, span: tuple[int, int], now_s: float, *, alone: bool = False) -> bool:
        """Whether `request` has to wait: its frontend is being told what to say should the core die of what comes next.

        `span` says how much of it is computed, and will be after that.
        """
        standing = request.standing.after_death(*span, alone=alone)
        if standing != request.announced:
            self._tell(request, standing)
            request.announced_s = now_s
        is_told_now = now_s - request.announced_s < HEARD_S
        self.wants_turn |= is_told_now
        return is_told_now

    def judge(self) -> None:
        """After a commit, and before a plan: whoever drew its tokens, or ended, has stood its trial."""
        request = self.current
        if request is None:
            return
        if request.state is not State.RUNNING:
            self.current = None
        elif request.num_computed >= self._goal:
            request.standing = Standing()
            self._tell(request, request.standing)
            self.current = None
        elif request.num_computed > request.standing.reached:  # further; the next step may be the one that kills
            request.standing = Standing(request.standing.deaths, 0, request.num_computed)

    def workers_lost(self) -> None:
        self.current = None
        self._well_since_s = None

    def _tell(self, request: Request, standing: Standing) -> None:
        request.announced = standing
        request.outbox.if_lost.append(IfLost(request.key, standing))
