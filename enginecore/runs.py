"""Runs: steps that the workers do one after another without being told each, and tell of together.

Core, frontends and clients are woken once for several tokens. Where the model is computed on the same cores, this is
worth more than all that could be saved in what they do when they are awake.
"""

from collections import deque
from collections.abc import Sequence

from cableway.enginecore.kv.manager import KVManager
from cableway.enginecore.request import Request
from cableway.enginecore.step import Step

LONGEST = 32
"""A run is left when anything comes between, so its length costs nothing but blocks that are taken early."""


def num_steps(running: Sequence[Request], kv: KVManager) -> int:
    """Steps, 1 or more, in which those that run need nothing but a token each, and none comes to its length limit.

    PERF: 0.2 µs a row, once a run.
    """
    lefts = [LONGEST]
    for request in running:
        left = request.compute_limit - request.num_planned
        if left > 0:  # else its last token is being drawn
            # One that was hit by a death goes step by step, so that what it had come to is known.
            if left == 1 or request.num_left > 1 or request.only_scores or request.standing.deaths:
                return 1
            lefts.append(left)
    most, num_rows = min(lefts), len(lefts) - 1
    num_blocks = num_rows * len(kv.groups) * (most // kv.block_size + 1)
    return most if num_rows and num_blocks <= kv.num_available else 1


class InFlight(deque[Step]):
    """Steps and runs that are planned and have not all been done, oldest first."""

    def __init__(self) -> None:
        super().__init__()
        self.is_overtaken = False  # somebody came or left since the last was planned

    @property
    def num_steps(self) -> int:
        return sum(step.num_steps for step in self)

    @property
    def has_run_to_cut(self) -> bool:
        """Whether a plan that comes now ends a run that was planned for others than there are now."""
        return self.is_overtaken and self.ends_with_run

    @property
    def ends_with_run(self) -> bool:
        return bool(self) and self[-1].num_steps > 1

    def launch(self, step: Step) -> None:
        self.append(step)
        self.is_overtaken = False

    def done(self) -> None:
        """The oldest step is."""
        step = self[0]
        step.number, step.num_steps = step.number + 1, step.num_steps - 1
        if not step.num_steps:
            self.popleft()

    def leave(self, number: int) -> bool:
        """Step `number` and what is left of its run will not be done; False when there is none of this number."""
        for step in self:
            num_steps = number - step.number  # that will
            if 0 <= num_steps < step.num_steps:
                for request in step.requests:
                    request.num_planned -= step.num_steps - num_steps
                step.num_steps = num_steps
                if not num_steps:
                    self.remove(step)
                return True
        return False
