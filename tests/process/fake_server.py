"""A supervisor over children that only pretend to work: for tests, in a thread, or as a program of its own.

`python fake_server.py FOLDER BEHAVIOUR...` runs one child a behaviour of fake_child.py, in roles frontend, enginecore,
worker.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from cableway.ipc import control
from cableway.ipc.child import Child
from cableway.ipc.config import LogConfig, SupervisorConfig
from cableway.ipc.control import Process
from cableway.ipc.lifeline import Patience
from cableway.ipc.runtime import Lock
from cableway.ipc.supervise import Supervisor

FAKE_CHILD = str(Path(__file__).parent / "fake_child.py")
ROLES = ("frontend", "enginecore", "worker")


def supervisor(
    folder: Path, behaviours: list[str], standby: bool = False, **settings: float
) -> tuple[Supervisor, threading.Event]:
    """A supervisor of `behaviours`, and the event set when all are ready."""
    times = {"drain_timeout_s": 5.0, "heartbeat_timeout_s": 5.0, "step_timeout_s": 5.0} | settings
    config = SupervisorConfig(
        runtime_dir=str(folder),
        frontends=1,
        workers=1,
        host="",
        port=0,
        uds="",
        log=LogConfig("error", True),
        patience=Patience(**times),
        restart_drain_timeout_s=60.0,
        standby=standby,
    )
    children = [
        Child(role, 0, [sys.executable, FAKE_CHILD, behaviour], overlaps=role == "frontend")
        for role, behaviour in zip(ROLES, behaviours, strict=False)
    ]
    ready = threading.Event()
    log = structlog.wrap_logger(structlog.PrintLogger(sys.stderr))
    return Supervisor(config, "config.json", children, log=log, on_ready=ready.set), ready


class Running:
    """A supervisor in a thread of this process."""

    def __init__(self, folder: Path, behaviours: list[str], standby: bool = False, **settings: float):
        self.folder = folder
        self.supervisor, self.ready = supervisor(folder, behaviours, standby, **settings)
        self.exit_code: int | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.exit_code = self.supervisor.run()

    def join(self, timeout_s: float = 20) -> int:
        """Wait for the end; the exit code."""
        self._thread.join(timeout_s)
        assert self.exit_code is not None, "still runs"
        return self.exit_code

    def processes(self) -> dict[str, Process]:
        answer = control.ask(self.folder, timeout_s=5)
        assert answer is not None
        return {process.role: process for process in answer.processes}

    def restart(self, role: str = "") -> tuple[list[str], str]:
        """Lines about a restart, and why it failed."""
        lines: list[str] = []
        return lines, control.carry_out(self.folder, control.Restart(role), lines.append)


@contextmanager
def running(folder: Path, *behaviours: str, standby: bool = False, **settings: float) -> Iterator[Running]:
    """A supervisor in a thread, whose children are ready; stopped at the end if it still runs."""
    started = Running(folder, list(behaviours), standby, **settings)
    try:
        assert started.ready.wait(20)
        yield started
    finally:
        if started.exit_code is None:
            started.supervisor.stop()
            started.join()


if __name__ == "__main__":
    lock = Lock(Path(sys.argv[1]))
    sys.exit(supervisor(Path(sys.argv[1]), sys.argv[2:])[0].run())
