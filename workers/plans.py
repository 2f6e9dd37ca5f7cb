"""What the core has planned and is still to be done: plan after plan, and each run step by step."""

from collections import deque

import msgspec

from cableway.ipc.messages import StepPlan


def rest_of_run(plan: StepPlan) -> StepPlan | None:
    """What is left of a plan when its first step is done: a shorter run, of rows as they are then."""
    if plan.num_steps == 1:
        return None
    changes_no_more = {"new": [], "freed": b"", "copies": b"", "blocks": b""}
    counts = {"step": plan.step + 1, "num_steps": plan.num_steps - 1, "num_new_blocks": bytes(len(plan.num_new_blocks))}
    return msgspec.structs.replace(plan, **counts, **changes_no_more)


class Plans:
    """Plans in order, taken step by step."""

    def __init__(self) -> None:
        self._waiting: deque[StepPlan] = deque()
        self._run: StepPlan | None = None  # what is left of the one that was begun

    def __bool__(self) -> bool:
        return self._run is not None or bool(self._waiting)

    @property
    def num_steps(self) -> int:
        """Steps to be done as far as is planned."""
        return sum(plan.num_steps for plan in self._waiting) + (self._run.num_steps if self._run else 0)

    @property
    def is_run_overtaken(self) -> bool:
        """Whether another plan waits behind a run that was begun: the core wants something else."""
        return self._run is not None and bool(self._waiting)

    def add(self, plan: StepPlan) -> None:
        self._waiting.append(plan)

    def take(self) -> tuple[StepPlan, bool]:
        """The next step, and whether it is one of a run."""
        plan, begins = (self._run, False) if self._run else (self._waiting.popleft(), True)
        self._run = rest_of_run(plan)
        return plan, not begins or self._run is not None

    def leave_run(self) -> StepPlan | None:
        """Do no more of the run that was begun; what was left of it, if anything."""
        left, self._run = self._run, None
        return left

    def clear(self) -> None:
        self._waiting.clear()
        self._run = None
