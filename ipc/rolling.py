"""Planned restarts: processes are replaced one by one, each only when the one that replaces it is able to."""

import time
from collections.abc import Callable, Sequence

from cableway.ipc.child import READY, Child
from cableway.ipc.life import Life


class Roll:
    """One planned restart, driven by the supervisor's turns.

    Until a successor is able to take over, the process at work stays; a successor that fails changes nothing.

    Args:
        children: whom to replace, in this order.
        finish_within_s: what a process that overlaps with its successor gets to finish what it had begun.
        tell: called with a line for each one replaced.
        done: called once, with why it ended early, or an empty text.
    """

    def __init__(
        self,
        children: Sequence[Child],
        config_path: str,
        finish_within_s: float,
        tell: Callable[[str], None],
        done: Callable[[str], None],
    ):
        self.is_over = False
        self._left = list(children)
        self._config_path = config_path
        self._finish_within_s = finish_within_s
        self._tell = tell
        self._done = done
        self._old_pid = 0
        self._new: Life | None = None
        self._handed_over_s = 0.0
        for child in self._left:
            if child.spare is not None:
                child.spare.kill()  # it has read the configuration, and imported the code, of before

    def advance(self) -> None:
        """Do what can be done now."""
        while self._left and not self.is_over and self._advance(self._left[0]):
            pass
        if not self._left:
            self._end("")

    def cancel(self, reason: str) -> None:
        """Leave the rest as it is."""
        for child in self._left:
            if child.successor is not None:
                child.successor.kill()
                child.retiring.append(child.successor)
                child.successor = None
        self._end(reason)

    def _advance(self, child: Child) -> bool:
        """Whether there may be more to do at once."""
        if self._new is None:
            return self._call(child)
        if child.successor is self._new:
            return self._hand_over(child)
        if child.life is not self._new:
            return self._wait_for_old(child)
        if child.state != READY:
            return False
        gap = "" if child.overlaps else f", {time.monotonic() - self._handed_over_s:.2f} s without one"
        self._tell(f"{child.name}: process {self._old_pid} replaced by {self._new.pid}{gap}")
        self._left.pop(0)
        self._new = None
        self._handed_over_s = 0.0
        return True

    def _call(self, child: Child) -> bool:
        if child.state != READY or child.life is None:
            return False  # it is coming up; what comes up may be replaced then
        try:
            child.call_successor(self._config_path)
        except OSError as error:
            self._end(f"{child.name}: a new process could not be started: {error}")
            return False
        self._old_pid, self._new = child.life.pid, child.successor
        return True

    def _hand_over(self, child: Child) -> bool:
        assert self._new is not None
        if child.successor_is_able:
            if not self._handed_over_s:
                self._handed_over_s = time.monotonic()
                child.hand_over(self._finish_within_s)
            return child.life is self._new
        if how := self._new.ended():
            child.successor = None
            why = self._new.unmendable or how
            self._end(f"{child.name}: the new process ended before it could take over ({why}); the old one stays")
        return False

    def _wait_for_old(self, child: Child) -> bool:
        """The new one is neither successor nor at work any more: it took over, and has died since."""
        self._end(f"{child.name}: the new process died as it took over; it is being restarted")
        return False

    def _end(self, failure: str) -> None:
        if not self.is_over:
            self.is_over = True
            self._done(failure)
