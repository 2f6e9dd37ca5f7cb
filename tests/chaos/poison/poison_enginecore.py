"""An engine-core process that dies when it has planned what `poison_pill` says."""

import os
import signal
import sys

from poison_pill import is_deadly

from cableway.enginecore import loop, main, scheduler
from cableway.ipc.messages import StepPlan


class Scheduler(scheduler.Scheduler):
    def plan(self, now_s: float) -> StepPlan | None:
        plan = super().plan(now_s)
        if plan is not None:
            step = self._in_flight[-1]
            for request, count in zip(step.requests, step.counts, strict=True):
                if is_deadly(request.tokens, request.num_planned - count * step.num_steps, request.num_planned):
                    os.kill(os.getpid(), signal.SIGKILL)
        return plan


if __name__ == "__main__":
    loop.Scheduler = Scheduler  # type: ignore[misc]
    main.main(sys.argv[1:])
