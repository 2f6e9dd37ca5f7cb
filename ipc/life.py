"""One supervised process from start to death: its link, its stderr, and whether it still counts as alive."""

import contextlib
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
from cableway.ipc.lifeline import Patience

_KEPT_BYTES = 8192
_CHUNK_BYTES = 1 << 16
_START_SILENCE_S = 60.0
"""Until it is ready a process imports libraries and reads files: long, and at times under the interpreter's lock."""
_decode = msgspec.msgpack.Decoder(lifeline.FromChild).decode


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
        self.stands_by = False
        """Whether it has prepared itself and waits for `begin`."""
        self.began_s = self._heard_s = time.monotonic()
        self.ready_s = 0.0
        self._turn = lifeline.Beat(0.0, 0.0)
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

    def hung(self, patience: Patience) -> str:
        """Why it counts as hung; empty when it does not."""
        if self._is_killed:
            return ""
        prepares = self.payload is None and not self.stands_by
        silent_s = time.monotonic() - self._heard_s
        if silent_s > max(patience.heartbeat_timeout_s, _START_SILENCE_S if prepares else 0.0):
            return f"silent for {silent_s:.1f} s"
        if not prepares and self._turn.turn_age_s > patience.turn_s(self._turn.share):
            return f"in one turn for {self._turn.turn_age_s:.1f} s"
        return ""

    def excuse(self, late_s: float) -> None:
        """Its silence of these seconds does not count: nobody listened."""
        self._heard_s += late_s

    def begin(self) -> None:
        """Set a process to work that stands by."""
        self.stands_by = False
        self.began_s = time.monotonic()
        self.tell(lifeline.Begin())

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
            case lifeline.Beat():
                self._turn = message
            case lifeline.StandingBy():
                self.stands_by = True
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
