"""The child's side of supervision: how a process tells that it is ready and alive, and is told to stop.

The link is an inherited Unix socketpair of packets, one msgpack message each. Its end of file means that the supervisor
is gone, and then the process goes too, so that nothing is ever orphaned. A process started without a link (by systemd,
supervisord, or a person) drains on SIGTERM and SIGINT instead, and speaks sd_notify where it is asked to.
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

from cableway.ipc.errors import EXIT_FAILED, EXIT_STOPPED, EXIT_UNMENDABLE
from cableway.ipc.notify import ServiceManager

BEAT_INTERVAL_S = 0.5
_SECOND_SIGNAL_S = 1.0
_PR_SET_PDEATHSIG = 1


class Started(msgspec.Struct, tag="ready", array_like=True, frozen=True):
    """The child does its work from now on. `payload` goes to whoever waits for it."""

    payload: dict[str, Any]


class Beat(msgspec.Struct, tag="beat", array_like=True, frozen=True):
    """The child lives. `turn_age_s` is how long its main loop has been in one turn; 0 while it waits for input."""

    turn_age_s: float
    share: float
    """How much of the longest step this turn is; see `Patience.turn_s`."""


class StandingBy(msgspec.Struct, tag="standing-by", array_like=True, frozen=True):
    """The child has prepared what it can, and waits for Begin."""


class Unmendable(msgspec.Struct, tag="unmendable", array_like=True, frozen=True):
    """The child ends now, and starting it again would end the same way."""

    reason: str


class Drain(msgspec.Struct, tag="drain", array_like=True, frozen=True):
    """Take nothing new, finish what runs within `deadline_s`, exit 0."""

    deadline_s: float


class AbortNow(msgspec.Struct, tag="abort", array_like=True, frozen=True):
    """Exit at once, telling clients if that takes no time."""


class Retire(msgspec.Struct, tag="retire", array_like=True, frozen=True):
    """Another process has taken over: accept no more connections, serve those there are, exit 0 when they have ended.

    After `deadline_s` a drain follows.
    """

    deadline_s: float


class Begin(msgspec.Struct, tag="begin", array_like=True, frozen=True):
    """To a child that stands by: go to work now."""


FromChild = Started | Beat | StandingBy | Unmendable
ToChild = Drain | AbortNow | Retire | Begin

MAX_MESSAGE_BYTES = 1 << 16


class Patience(msgspec.Struct, frozen=True):
    """How long a process may take before it is taken for hung, and to finish its work when it is told to end."""

    drain_timeout_s: float = 30.0
    heartbeat_timeout_s: float = 5.0
    step_timeout_s: float = 120.0

    def turn_s(self, share: float) -> float:
        """Longest turn of a main loop that does `share` of the largest step: 1 = a full one, 0 = none at all."""
        return max(self.heartbeat_timeout_s, self.step_timeout_s * share)


class ChildArguments(msgspec.Struct, frozen=True):
    """What `python -m cableway.<folder>.main` is started with."""

    config_path: str
    rank: int
    lifeline_fd: int | None
    listen_fds: list[int]
    lent_sockets: bool
    """Somebody keeps the listening sockets for the next process: once this one drains it accepts no more."""
    standby: str
    """Prepare, then wait at `Lifeline.stand_by`: with what is `imported`, or also `loaded`. Empty: go to work."""


def child_arguments(argv: Sequence[str]) -> ChildArguments:
    """Parse the arguments every main takes (`argv` without the program's name); a wrong one exits with code 2."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="config.json of the runtime folder")
    parser.add_argument("--rank", type=int, default=0, help="which of the processes of this role")
    parser.add_argument("--lifeline-fd", type=int, help="inherited link to the supervisor")
    parser.add_argument("--listen-fd", type=int, action="append", default=[], help="inherited listening socket")
    parser.add_argument("--lent-sockets", action="store_true", help="others accept once this process drains")
    parser.add_argument("--standby", choices=("imported", "loaded"), default="", help="wait, so far prepared")
    given = parser.parse_args(argv)
    return ChildArguments(
        given.config, given.rank, given.lifeline_fd, given.listen_fd, given.lent_sockets, given.standby
    )


class Lifeline:
    """Link of this process to its supervisor; made once, in the main thread, as early as can be.

    Args:
        fd: inherited socket; None when an outside supervisor started this process. It is then drained by signals, tells
            systemd what it would tell a supervisor of ours, and ends itself when its main loop hangs.
        patience: how long it may take for what, where no supervisor of ours says so.
    """

    def __init__(self, fd: int | None, patience: Patience | None = None):
        self._patience = patience or Patience()
        self._turn_began_s: float | None = None
        self._share = 0.0
        self._drain: Callable[[float], None] | None = None
        self._retire: Callable[[float], None] | None = None
        self._abort: Callable[[], None] | None = None
        self._begun = threading.Event()
        self._signalled_s: float | None = None
        self._link: socket.socket | None = None
        self._manager: ServiceManager | None = None
        self._signal_pipe = os.pipe()
        if fd is None:
            self._manager = ServiceManager()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: os.write(self._signal_pipe[1], b"s"))
        else:
            self._link = socket.socket(fileno=fd)
            os.set_inheritable(fd, False)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            die_with_parent()
        run = self._run_alone if fd is None else self._run_linked
        threading.Thread(target=run, name="lifeline", daemon=True).start()

    def ready(self, payload: dict[str, Any] | None = None) -> None:
        """Tell that the work begins; `payload` holds plain values, at most 64 KiB of them."""
        self._tell(Started(payload or {}))
        if self._manager is not None:
            self._manager.tell("READY=1", *(f"STATUS={name}: {value}" for name, value in (payload or {}).items()))

    def stand_by(self) -> None:
        """Wait until the supervisor wants this process at work: it was started with `--standby`."""
        self._tell(StandingBy())
        self._begun.wait()

    def beat(self, share: float = 0.0) -> None:
        """The main loop begins a turn, which does `share` of the longest step. Costs one clock reading."""
        self._share = share
        self._turn_began_s = time.monotonic()

    def idle(self) -> None:
        """The main loop is about to wait for input: until the next beat, nothing can be late."""
        self._turn_began_s = None

    def on_drain(self, callback: Callable[[float], None]) -> None:
        """Call `callback(deadline_s)`, from the lifeline's thread, when the process is to finish its work and exit.

        Without a callback it exits at once: it had not begun to work.
        """
        self._drain = callback

    def on_retire(self, callback: Callable[[float], None]) -> None:
        """Call `callback(deadline_s)`, from the lifeline's thread, when another has taken over; see `Retire`."""
        self._retire = callback

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

    def _turn_age_s(self) -> float:
        began_s = self._turn_began_s
        return 0.0 if began_s is None else time.monotonic() - began_s

    def _run_linked(self) -> None:
        assert self._link is not None
        decoder = msgspec.msgpack.Decoder(ToChild)
        while True:
            if select.select([self._link], [], [], BEAT_INTERVAL_S)[0]:
                self._obey(decoder.decode(_received_or_exit(self._link)))
            try:
                self._tell(Beat(self._turn_age_s(), self._share), socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass  # a stopped supervisor reads no beats; it needs none either
            except OSError:
                os._exit(EXIT_FAILED)

    def _run_alone(self) -> None:
        assert self._manager is not None
        interval_s = min(BEAT_INTERVAL_S, self._manager.watchdog_s / 2 or BEAT_INTERVAL_S)
        while True:
            if select.select([self._signal_pipe[0]], [], [], interval_s)[0]:
                os.read(self._signal_pipe[0], 64)
                self._signalled()
            if (age_s := self._turn_age_s()) > self._patience.turn_s(self._share):
                print(f"cableway: hung in one turn for {age_s:.1f} s", file=sys.stderr, flush=True)
                os._exit(EXIT_FAILED)
            if self._manager.watchdog_s:
                self._manager.tell("WATCHDOG=1")

    def _signalled(self) -> None:
        now_s = time.monotonic()
        if self._signalled_s is None:
            self._signalled_s = now_s
            assert self._manager is not None
            self._manager.tell("STOPPING=1")
            self._obey(Drain(self._patience.drain_timeout_s))
        elif now_s - self._signalled_s >= _SECOND_SIGNAL_S:
            self._obey(AbortNow())

    def _obey(self, message: ToChild) -> None:
        match message:
            case Begin():
                self._begun.set()
            case Drain(deadline_s):
                if self._drain is None:
                    os._exit(EXIT_STOPPED)
                self._drain(deadline_s)
            case Retire(deadline_s):
                if self._retire is None:
                    os._exit(EXIT_STOPPED)
                self._retire(deadline_s)
            case AbortNow():
                if self._abort is None:
                    os._exit(EXIT_FAILED)
                self._abort()


def _received_or_exit(link: socket.socket) -> bytes:
    """The next packet. End of file: the supervisor is gone, and nothing may outlive it."""
    try:
        packet = link.recv(MAX_MESSAGE_BYTES)
    except ConnectionResetError:
        packet = b""
    if not packet:
        os._exit(EXIT_FAILED)
    return packet


def die_with_parent() -> None:
    """Have the kernel kill this process with its parent: a stopped process would not see the link's end."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
