"""What `cableway ps` asks a supervisor, over a socket in the runtime folder."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from cableway.ipc import runtime
from cableway.ipc.endpoint import Endpoint, identity
from cableway.ipc.messages import Message


class ListProcesses(Message, frozen=True, tag="list"):
    """Which processes are there?"""


class Process(Message, frozen=True):
    role: str  # supervisor | frontend | enginecore | worker
    engine: str  # the model it serves; empty when it serves them all
    rank: int
    pid: int  # 0 while there is none
    uptime_s: float
    restarts: int
    state: str  # starting | ready | draining | restarting | stopped


class Processes(Message, frozen=True, tag="processes"):
    url: str
    processes: list[Process]


Question = ListProcesses
Answer = Processes


def address(folder: Path) -> str:
    return f"ipc://{folder / runtime.SUPERVISOR_SOCKET}"


class Control:
    """The supervisor's end: answers each question with `describe()`."""

    def __init__(self, folder: Path, describe: Callable[[], Processes]):
        self._describe = describe
        self._endpoint = Endpoint(address(folder), Question, bind=True)

    @property
    def sockets(self) -> list[Any]:
        """What to poll for questions."""
        return self._endpoint.sockets

    def answer(self) -> None:
        """Answer whatever was asked."""
        for arrival in self._endpoint.receive():
            if isinstance(arrival.message, ListProcesses):
                self._endpoint.send(self._describe(), to=arrival.peer)

    def close(self) -> None:
        self._endpoint.close()


def ask(folder: Path, timeout_s: float = 2.0) -> Processes | None:
    """The processes of the server in `folder`; None when its supervisor does not answer in time."""
    endpoint = Endpoint(address(folder), Answer, own_identity=identity("ps", 0))
    poller = zmq.Poller()
    for each in endpoint.sockets:
        poller.register(each, zmq.POLLIN)
    deadline_s = time.monotonic() + timeout_s
    try:
        endpoint.send(ListProcesses())
        while (left_s := deadline_s - time.monotonic()) > 0:
            poller.poll(int(left_s * 1000) + 1)
            for arrival in endpoint.receive():
                if isinstance(arrival.message, Processes):
                    return arrival.message
        return None
    finally:
        endpoint.close()
