"""Where the seconds of a start go."""

import time
from typing import Any


class Account:
    """Seconds of one thread by what they were spent on, in order: together they are all of its time."""

    def __init__(self) -> None:
        self.beside: dict[str, Account] = {}
        """What other threads did meanwhile, by their names."""
        self._seconds: dict[str, float] = {}
        self._since_s = time.monotonic()

    def note(self, phase: str) -> None:
        """All since the last note went to `phase`, which is named `<what>_s`."""
        now_s = time.monotonic()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now_s - self._since_s
        self._since_s = now_s

    def skip(self) -> None:
        """What has passed since the last note is not part of the start."""
        self._since_s = time.monotonic()

    @property
    def total_s(self) -> float:
        return sum(self._seconds.values())

    def fields(self) -> dict[str, Any]:
        """For a line of a log: seconds by phase, and those of other threads by their names."""
        own = {phase: round(seconds, 3) for phase, seconds in self._seconds.items()}
        return own | {name: other.fields() for name, other in self.beside.items()}
