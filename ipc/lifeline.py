"""The child's side of supervision: how a process tells that it is ready and alive, and is told to stop.

The link is an inherited Unix socketpair of packets, one msgpack message each. Its end of file means that the supervisor
is gone, and then the process goes too, so that nothing is ever orphaned. A process started without a link (by systemd,
supervisord, or a person) drains on SIGTERM and SIGINT instead.
"""

import argparse
import ctypes
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import msgspec

from cableway.ipc.errors import EXIT_UNMENDABLE

BEAT_INTERVAL_S = 0.5
_SECOND_SIGNAL_S = 1.0
_PR_SET_PDEATHSIG = 1


class Started(msgspec.Struct, tag="ready", array_like=True, frozen=True):
    """The child does its work from now on. `payload` goes to whoever waits for it."""

    payload: dict[str, Any]


class Beat(msgspec.Struct, tag="beat", array_like=True, frozen=True):
    """The child lives. `turn_age_s` is how long its main loop has been in one turn; 0 while it waits for input."""

    turn_age_s: float


class Unmendable(msgspec.Struct, tag="unmendable", array_like=True, frozen=True):
    """The child ends now, and starting it again would end the same way."""

    reason: str


class Drain(msgspec.Struct, tag="drain", array_like=True, frozen=True):
    """Take nothing new, finish what runs within `deadline_s`, exit 0."""

    deadline_s: float


class AbortNow(msgspec.Struct, tag="abort", array_like=True, frozen=True):
    """Exit at once, telling clients if that takes no time."""


FromChild = Started | Beat | Unmendable
ToChild = Drain | AbortNow

MAX_MESSAGE_BYTES = 1 << 16


class ChildArguments(msgspec.Struct, frozen=True):
    """What `python -m cableway.<folder>.main` is started with."""

    config_path: str
    rank: int
    lifeline_fd: int | None
    listen_fds: list[int]


def child_arguments(argv: Sequence[str]) -> ChildArguments:
    """Parse the arguments every main takes (`argv` without the program's name); a wrong one exits with code 2."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="config.json of the runtime folder")
    parser.add_argument("--rank", type=int, default=0, help="which of the processes of this role")
    parser.add_argument("--lifeline-fd", type=int, help="inherited link to the supervisor")
    parser.add_argument("--listen-fd", type=int, action="append", default=[], help="inherited listening socket")
    given = parser.parse_args(argv)
    return ChildArguments(given.config, given.rank, given.lifeline_fd, given.listen_fd)


class Lifeline:
    """Link of this process to its supervisor; made once, in the main thread, as early as can be.

    Args:
        fd: inherited socket; None when an outside supervisor started this process, which is then drained by signals.
        drain_timeout_s: deadline given to `on_drain` when a signal asks for it.
    """

    def __init__(self, fd: int | None, drain_timeout_s: float = 30.0):
        self._turn_began_s: float | None = None
        self._drain_timeout_s = drain_timeout_s
        self._drain: Callable[[float], None] | None = None
        self._abort: Callable[[], None] | None = None
        self._signalled_s: float | None = None
        self._link: socket.socket | None = None
        self._signal_pipe = os.pipe()
        if fd is None:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: os.write(self._signal_pipe[1], b"s"))
        else:
            self._link = socket.socket(fileno=fd)
            os.set_inheritable(fd, False)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            _die_with_parent()
        threading.Thread(target=self._run, name="lifeline", daemon=True).start()

    def ready(self, payload: dict[str, Any] | None = None) -> None:
        """Tell that the work begins; `payload` holds plain values, at most 64 KiB of them."""
        self._tell(Started(payload or {}))

    def beat(self) -> None:
        """The main loop begins a turn. Costs one clock reading."""
        self._turn_began_s = time.monotonic()

    def idle(self) -> None:
        """The main loop is about to wait for input: until the next beat, nothing can be late."""
        self._turn_began_s = None

    def on_drain(self, callback: Callable[[float], None]) -> None:
        """Call `callback(deadline_s)`, from the lifeline's thread, when the process is to finish its work and exit.

        Without a callback it exits at once: it had not begun to work.
        """
        self._drain = callback

    def on_abort(self, callback: Callable[[], None]) -> None:
        """Call `callback()`, from the lifeline's thread, when the process is to exit now. Without one it just exits."""
        self._abort = callback

    def give_up(self, reason: str) -> NoReturn:
        """End with exit code 3 and one line: the supervisor shows it and does not try again."""
        if self._link is None:
            print(f"cableway: {reason}", file=sys.stderr, flush=True)
        else:
            self._tell(Unmendable(reason))
        raise SystemExit(EXIT_UNMENDABLE)

    def _tell(self, message: FromChild, flags: int = 0) -> None:
        if self._link is not None:
            self._link.send(msgspec.msgpack.encode(message), flags)

    def _run(self) -> None:
        decoder = msgspec.msgpack.Decoder(ToChild)
        sources: list[Any] = [self._signal_pipe[0]] if self._link is None else [self._link]
        interval_s = None if self._link is None else BEAT_INTERVAL_S
        while True:
            readable = select.select(sources, [], [], interval_s)[0]
            if self._link is None:
                os.read(self._signal_pipe[0], 64)
                self._signalled()
                continue
            if readable:
                self._obey(decoder.decode(_received_or_exit(self._link)))
            began_s = self._turn_began_s
            try:
                self._tell(Beat(0.0 if began_s is None else time.monotonic() - began_s), socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass  # a stopped supervisor reads no beats; it needs none either
            except OSError:
                os._exit(1)

    def _signalled(self) -> None:
        now_s = time.monotonic()
        if self._signalled_s is None:
            self._signalled_s = now_s
            self._obey(Drain(self._drain_timeout_s))
        elif now_s - self._signalled_s >= _SECOND_SIGNAL_S:
            self._obey(AbortNow())

    def _obey(self, message: ToChild) -> None:
        match message:
            case Drain(deadline_s):
                if self._drain is None:
                    os._exit(0)
                self._drain(deadline_s)
            case AbortNow():
                if self._abort is None:
                    os._exit(1)
                self._abort()


def _received_or_exit(link: socket.socket) -> bytes:
    """The next packet. End of file: the supervisor is gone, and nothing may outlive it."""
    try:
        packet = link.recv(MAX_MESSAGE_BYTES)
    except ConnectionResetError:
        packet = b""
    if not packet:
        os._exit(1)
    return packet


def _die_with_parent() -> None:
    """Have the kernel kill this process with its parent: a stopped process would not see the link's end."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
