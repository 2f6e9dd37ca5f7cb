"""What a role and rank goes through: one process after another, with the next one prepared beforehand where it pays."""

import sys
import time
from collections.abc import Iterator, Sequence

from cableway.ipc.life import Life
from cableway.ipc.lifeline import Retire

STARTING, READY, DRAINING, RESTARTING, STOPPED = "starting", "ready", "draining", "restarting", "stopped"

_STABLE_S = 5.0
_FIRST_DELAY_S = 0.1
_LONGEST_DELAY_S = 30.0


def python_module(name: str) -> list[str]:
    """The command that runs a module of this package in a fresh interpreter of the same environment.

    `-P` keeps the current folder off its path: what lies there must not pose as a library.
    """
    return [sys.executable, "-P", "-X", "faulthandler", "-m", name]


class Child:
    """The processes of one role and rank, one after another.

    Beside `life`, the one at work, there may be a `spare`, which has imported what it needs and steps in when `life`
    dies; a `successor`, which is to replace it in a planned restart; and those `retiring`, whom a successor has
    replaced and who finish what they had begun.

    Args:
        role, rank: what it is; `engine` names the model it serves, empty when it serves them all.
        command: program and first arguments, to which the standard ones of `lifeline.child_arguments` are added.
        listen_fds: listening sockets it inherits.
        overlaps: whether an old and a new one may both be at work for a while.
    """

    def __init__(
        self,
        role: str,
        rank: int,
        command: Sequence[str],
        *,
        engine: str = "",
        listen_fds: Sequence[int] = (),
        overlaps: bool = False,
    ):
        self.role = role
        self.rank = rank
        self.engine = engine
        self.overlaps = overlaps
        self.state = STARTING
        self.restarts = 0
        self.life: Life | None = None
        self.spare: Life | None = None
        self.successor: Life | None = None
        self.retiring: list[Life] = []
        self.start_at_s = time.monotonic()
        self.spare_at_s = 0.0
        """When a spare may be started."""
        self.deaths_before_ready = 0
        """Deaths so far, when it never was ready in any life."""
        self._was_ever_ready = False
        self._is_handing_over = False
        self._next_delay_s = 0.0
        self._command = [*command, "--rank", str(rank)]
        for fd in listen_fds:
            self._command += ["--listen-fd", str(fd)]
        self._listen_fds = list(listen_fds)

    @property
    def name(self) -> str:
        return f"{self.role} {self.rank}"

    def lives(self) -> Iterator[Life]:
        """Every process of it that there is now."""
        yield from (life for life in (self.life, self.spare, self.successor) if life is not None)
        yield from self.retiring

    def start(self, config_path: str) -> None:
        """Begin a life, with one that stands by if there is one; OSError when the machine has no room for it."""
        if self.state == RESTARTING:
            self.restarts += 1
        self.state = STARTING
        self._is_handing_over = False
        if self.successor is not None and self.successor.stands_by:
            self.life, self.successor = self.successor, None
        elif self.spare is not None and self.spare.stands_by:
            self.life, self.spare = self.spare, None
        else:
            self.life = self._new_life(config_path)
            return
        self.life.begin()

    def became_ready(self) -> bool:
        """Whether the process has said so since the last look."""
        if self.state != STARTING or self.life is None or self.life.payload is None:
            return False
        self.state = READY
        self._was_ever_ready = True
        return True

    def died(self) -> float:
        """Note the end of a life that should have gone on; seconds until the next one may begin.

        None after a life that was stable, then twice as many each time.
        """
        now_s = time.monotonic()
        if self.life is not None and self.life.payload is not None and now_s - self.life.ready_s > _STABLE_S:
            self._next_delay_s = 0.0
        delay_s = self._next_delay_s
        self._next_delay_s = min(2 * delay_s or _FIRST_DELAY_S, _LONGEST_DELAY_S)
        if not self._was_ever_ready:
            self.deaths_before_ready += 1
        self.life = None
        self.state = RESTARTING
        self.start_at_s = now_s + delay_s
        return delay_s

    def stopped(self) -> None:
        """Note the end of the last life."""
        self.life = None
        self.state = STOPPED

    # -----------------------------------------------------------------------------------------------------------------
    # Spares and planned restarts

    def prepare_spare(self, config_path: str) -> None:
        """Start a process that imports what it needs, then waits; OSError when the machine has no room for it."""
        self.spare = self._new_life(config_path, standby="imported")

    def spare_died(self, was_asked: bool) -> None:
        """Note the spare's end; one that died by itself, or could not be had, is not tried again for a while."""
        self.spare = None
        self.spare_at_s = time.monotonic() + (0.0 if was_asked else _LONGEST_DELAY_S)

    def call_successor(self, config_path: str) -> None:
        """Start the process that is to replace the one at work; OSError when the machine has no room for it."""
        self.successor = self._new_life(config_path, standby="" if self.overlaps else "loaded")

    @property
    def successor_is_able(self) -> bool:
        """Whether the successor could take over at once."""
        if self.successor is None:
            return False
        return self.successor.payload is not None if self.overlaps else self.successor.stands_by

    def hand_over(self, finish_within_s: float) -> None:
        """Put the able successor in the place of the process at work.

        Where both may work at once the old one finishes what it has begun. Otherwise it is killed, which costs no
        request (nothing depends on how a core or a worker ends), and `start` takes the successor once it is gone.
        """
        if not self.overlaps:
            self._is_handing_over = True
            if self.life is not None:
                self.life.kill()
            return
        if self.life is not None:
            self.life.tell(Retire(finish_within_s))
            self.retiring.append(self.life)
        self.life, self.successor = self.successor, None
        self.state = STARTING
        self.restarts += 1

    def handed_over(self) -> bool:
        """Whether the end of a life just seen was a planned one; its successor may then start at once."""
        if not self._is_handing_over:
            return False
        self.life = None
        self.state = RESTARTING
        self.start_at_s = time.monotonic()
        return True

    def _new_life(self, config_path: str, standby: str = "") -> Life:
        command = [*self._command, "--config", config_path, *(["--standby", standby] if standby else [])]
        return Life(command, self._listen_fds)
