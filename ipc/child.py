"""Supervised processes: `Life` is one process from start to death, `Child` what a role and rank goes through."""

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec

from cableway.ipc import lifeline
from cableway.ipc.errors import EXIT_UNMENDABLE

STARTING, READY, DRAINING, RESTARTING, STOPPED = "starting", "ready", "draining", "restarting", "stopped"

_KEPT_BYTES = 8192
_CHUNK_BYTES = 1 << 16
_START_SILENCE_S = 60.0
"""Until it is ready a process imports libraries and reads files: long, and at times under the interpreter's lock."""
_STABLE_S = 5.0
_FIRST_DELAY_S = 0.1
_LONGEST_DELAY_S = 30.0
_decode = msgspec.msgpack.Decoder(lifeline.FromChild).decode


def python_module(name: str) -> list[str]:
    """The command that runs a module of this package in a fresh interpreter of the same environment.

    `-P` keeps the current folder off its path: what lies there must not pose as a library.
    """
    return [sys.executable, "-P", "-X", "faulthandler", "-m", name]


class Life:
    """One process, in a session of its own, so that signals of the terminal reach the supervisor alone.

    Args:
        command: program and arguments; `--lifeline-fd` is appended.
        inherited_fds: descriptors it gets beside its lifeline.

    Raises:
        OSError: it could not be started.
    """

    def __init__(self, command: Sequence[str], inherited_fds: Sequence[int] = ()):
        self.payload: dict[str, Any] | None = None
        """What it said with its readiness; None until then."""
        self.unmendable = ""
        self.began_s = self._heard_s = time.monotonic()
        self.ready_s = 0.0
        self._turn_age_s = 0.0
        self._is_killed = False
        self._last_words: deque[bytes] = deque()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        stderr, their_stderr = os.pipe()
        os.set_blocking(stderr, False)
        try:
            self._process = subprocess.Popen(
                [*command, "--lifeline-fd", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stderr=their_stderr,
                pass_fds=[theirs.fileno(), *inherited_fds],
                start_new_session=True,
            )
        except OSError:
            ours.close()
            os.close(stderr)
            raise
        finally:
            theirs.close()
            os.close(their_stderr)
        self._link: socket.socket | None = ours
        self._stderr = stderr

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def last_words(self) -> str:
        """The end of what it wrote to stderr."""
        return b"".join(self._last_words)[-_KEPT_BYTES:].decode(errors="replace").strip()

    def descriptors(self) -> list[int]:
        """What to wait on for `listen` to have something to do."""
        link = [self._link.fileno()] if self._link is not None else []
        return link + ([self._stderr] if self._stderr >= 0 else [])

    def listen(self) -> None:
        """Take in what it says on its lifeline, and pass on what it writes to stderr."""
        self._pass_stderr()
        while self._link is not None:
            try:
                packet = self._link.recv(lifeline.MAX_MESSAGE_BYTES)
            except BlockingIOError:
                return
            except ConnectionResetError:
                packet = b""
            if packet:
                self._heard(_decode(packet))
            else:
                self._link.close()
                self._link = None
                self.kill()  # without a lifeline it must not go on, if it still does

    def ended(self) -> str:
        """How it ended, in words; empty while it runs. Its last words are complete after this."""
        code = self._process.poll()
        if code is None:
            return ""
        self._pass_stderr()
        self._close_stderr()
        if self._link is not None:
            self.listen()
        if code == EXIT_UNMENDABLE and not self.unmendable:
            self.unmendable = self.last_words.rpartition("\n")[2]
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def hung(self, heartbeat_timeout_s: float, step_timeout_s: float) -> str:
        """Why it counts as hung; empty when it does not."""
        if self._is_killed:
            return ""
        silent_s = time.monotonic() - self._heard_s
        if self.payload is None:
            heartbeat_timeout_s, step_timeout_s = max(heartbeat_timeout_s, _START_SILENCE_S), math.inf
        if silent_s > heartbeat_timeout_s:
            return f"silent for {silent_s:.1f} s"
        return f"in one step for {self._turn_age_s:.1f} s" if self._turn_age_s > step_timeout_s else ""

    def tell(self, message: lifeline.ToChild) -> None:
        """Send a message. One that is gone, or stopped with its socket full, cannot hear it and is found out anyway."""
        if self._link is not None:
            with contextlib.suppress(OSError):
                self._link.send(msgspec.msgpack.encode(message))

    def kill(self) -> None:
        self._is_killed = True
        self._process.kill()

    @property
    def is_dying(self) -> bool:
        """Whether its end is only a matter of moments."""
        return self._is_killed

    def _heard(self, message: lifeline.FromChild) -> None:
        self._heard_s = time.monotonic()
        match message:
            case lifeline.Started(payload):
                self.payload = payload
                self.ready_s = self._heard_s
            case lifeline.Beat(turn_age_s):
                self._turn_age_s = turn_age_s
            case lifeline.Unmendable(reason):
                self.unmendable = reason

    def _pass_stderr(self) -> None:
        while self._stderr >= 0:
            try:
                chunk = os.read(self._stderr, _CHUNK_BYTES)
            except BlockingIOError:
                return
            if not chunk:
                self._close_stderr()
                return
            self._last_words.append(chunk[-_KEPT_BYTES:])
            while sum(map(len, self._last_words)) - len(self._last_words[0]) >= _KEPT_BYTES:
                self._last_words.popleft()
            with contextlib.suppress(OSError):  # nobody reads our stderr any more; the child's is still kept
                sys.stderr.buffer.write(chunk)
                sys.stderr.buffer.flush()

    def _close_stderr(self) -> None:
        if self._stderr >= 0:
            os.close(self._stderr)
            self._stderr = -1


class Child:
    """The processes of one role and rank, one after another.

    Args:
        role, rank: what it is; `engine` names the model it serves, empty when it serves them all.
        command: program and first arguments, to which the standard ones of `lifeline.child_arguments` are added.
        listen_fds: listening sockets it inherits.
    """

    def __init__(
        self, role: str, rank: int, command: Sequence[str], *, engine: str = "", listen_fds: Sequence[int] = ()
    ):
        self.role = role
        self.rank = rank
        self.engine = engine
        self.state = STARTING
        self.restarts = 0
        self.life: Life | None = None
        self.start_at_s = time.monotonic()
        self.deaths_before_ready = 0
        """Deaths so far, when it never was ready in any life."""
        self._was_ever_ready = False
        self._next_delay_s = 0.0
        self._command = [*command, "--rank", str(rank)]
        for fd in listen_fds:
            self._command += ["--listen-fd", str(fd)]
        self._listen_fds = list(listen_fds)

    @property
    def name(self) -> str:
        return f"{self.role} {self.rank}"

    def start(self, config_path: str) -> None:
        """Begin a life; OSError when the machine has no room for it."""
        if self.state == RESTARTING:
            self.restarts += 1
        self.state = STARTING
        self.life = Life([*self._command, "--config", config_path], self._listen_fds)

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
