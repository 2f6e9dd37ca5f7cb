"""What `cableway ps`, `restart` and `reload` ask a supervisor, over a socket in the runtime folder."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from cableway.ipc import runtime
from cableway.ipc.endpoint import Endpoint, PeerDown, PeerUp, Undecodable, identity
from cableway.ipc.messages import Message


class ListProcesses(Message, frozen=True, tag="list"):
    """Which processes are there?"""


class Restart(Message, frozen=True, tag="restart"):
    """Replace the processes of a role one by one; of every role when it is empty."""

    role: str


class Reload(Message, frozen=True, tag="reload"):
    """Read the configuration again, with these flags over those the server was started with, and apply it."""

    flags: dict[str, Any]


class Process(Message, frozen=True):
    role: str  # supervisor | frontend | enginecore | worker
    engine: str  # the model it serves; empty when it serves them all
    rank: int
    pid: int  # 0 while there is none
    uptime_s: float
    restarts: int
    state: str  # starting | ready | draining | restarting | stopped
    spare_pid: int = 0  # a prepared process that steps in when this one dies; 0 while there is none
    retiring_pids: tuple[int, ...] = ()  # replaced ones that still answer what they had begun


class Processes(Message, frozen=True, tag="processes"):
    url: str
    processes: list[Process]


class Progress(Message, frozen=True, tag="progress"):
    """A line about a restart or reload that is under way."""

    text: str


class Outcome(Message, frozen=True, tag="outcome"):
    """A restart or reload is over; `failure` says why it is not complete, and is empty when it is."""

    failure: str = ""


Question = ListProcesses | Restart | Reload
Answer = Processes | Progress | Outcome
Reply = Callable[[Answer], None]


def address(folder: Path) -> str:
    return f"ipc://{folder / runtime.SUPERVISOR_SOCKET}"


class Control:
    """The supervisor's end: hands each question to `answer`, with a function that replies to whoever asked."""

    def __init__(self, folder: Path, answer: Callable[[Question, Reply], None]):
        self._answer = answer
        self._endpoint = Endpoint(address(folder), Question, bind=True)

    @property
    def sockets(self) -> list[Any]:
        """What to poll for questions."""
        return self._endpoint.sockets

    def answer(self) -> None:
        """Have answered whatever was asked."""
        for arrival in self._endpoint.receive():
            match arrival.message:
                case ListProcesses() | Restart() | Reload() as question:
                    self._answer(question, self._replier(arrival.peer))
                case Undecodable(reason):
                    self._replier(arrival.peer)(Outcome(f"the supervisor is of another version: {reason}"))

    def close(self) -> None:
        self._endpoint.socket.setsockopt(zmq.LINGER, 200)  # last outcomes still leave
        self._endpoint.close()

    def _replier(self, peer: bytes) -> Reply:
        def reply(answer: Answer) -> None:
            self._endpoint.send(answer, to=peer)

        return reply


def ask(folder: Path, timeout_s: float = 2.0) -> Processes | None:
    """The processes of the server in `folder`; None when its supervisor does not answer in time."""
    for answer in _conversation(folder, ListProcesses(), timeout_s):
        if isinstance(answer, Processes):
            return answer
    return None


def carry_out(folder: Path, question: Restart | Reload, show: Callable[[str], None]) -> str:
    """Have the supervisor in `folder` do something that takes its time; why it failed, or an empty text.

    Args:
        show: called with each line about how it goes.
    """
    for answer in _conversation(folder, question, None):
        match answer:
            case Progress(text):
                show(text)
            case Outcome(failure):
                return failure
    return "the supervisor ended meanwhile"


def _conversation(folder: Path, question: Question, timeout_s: float | None) -> Any:
    """Ask, and yield each answer until the supervisor is gone or, with a time limit, silent for so long."""
    endpoint = Endpoint(address(folder), Answer, own_identity=identity("control", 0))
    poller = zmq.Poller()
    for each in endpoint.sockets:
        poller.register(each, zmq.POLLIN)
    deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
    try:
        endpoint.send(question)
        while deadline_s is None or time.monotonic() < deadline_s:
            poller.poll(None if deadline_s is None else max(0, int((deadline_s - time.monotonic()) * 1000)) + 1)
            for arrival in endpoint.receive():
                if isinstance(arrival.message, PeerDown):
                    return
                if not isinstance(arrival.message, PeerUp):
                    yield arrival.message
    finally:
        endpoint.close()
