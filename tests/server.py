"""Real servers for tests: `with serve("--max-num-seqs", "4") as server:` runs `cableway serve` on a free port."""

import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from cableway.ipc import control, runtime
from cableway.ipc.control import Process

T = TypeVar("T")
COMMAND = [str(Path(sys.executable).parent / "cableway"), "serve"]


class Server:
    """A running `cableway serve`, or what is left of it."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path):
        self.process = process
        self._folder = folder
        self.base_url = ""

    @property
    def output(self) -> str:
        """What it wrote to stdout so far."""
        return (self._folder / "stdout").read_text()

    @property
    def errors(self) -> str:
        """What it and its children wrote to stderr so far."""
        return (self._folder / "stderr").read_text()

    @property
    def runtime_dir(self) -> Path:
        host, _, port = self.base_url.removeprefix("http://").rpartition(":")
        return runtime.folder_for(host, int(port))

    def processes(self, role: str = "") -> list[Process]:
        """What `cableway ps` knows, of one role or of all."""
        answer = control.ask(self.runtime_dir, timeout_s=10)
        assert answer is not None, f"no supervisor answers\n{self.errors}"
        return [process for process in answer.processes if role in ("", process.role)]

    def pids(self, role: str) -> list[int]:
        return [process.pid for process in self.processes(role)]

    def wait_replaced(self, role: str, old_pid: int, timeout_s: float = 60) -> Process:
        """Until rank 0 of `role` is ready in another process than `old_pid`."""

        def replaced() -> Process | None:
            process = self.processes(role)[0]
            return process if process.pid not in (0, old_pid) and process.state == "ready" else None

        return wait_for(replaced, timeout_s, lambda: f"{role} was not replaced\n{self.errors}")

    def wait_ready(self, timeout_s: float = 90) -> None:
        """Until it says where it serves; AssertionError with its stderr when it ends before."""

        def ready() -> re.Match[str] | None:
            assert self.process.poll() is None, f"ended with {self.process.returncode}\n{self.errors}"
            return re.search(r"^Cableway serves .* at (\S+)\n", self.output, re.MULTILINE)

        self.base_url = wait_for(ready, timeout_s, lambda: f"not ready\n{self.errors}")[1]

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 60) -> int:
        """Send a signal and wait for the end; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout_s)


def wait_for(found: Callable[[], T | None], timeout_s: float, complaint: Callable[[], str]) -> T:
    """Ask every few milliseconds until there is an answer."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if (answer := found()) is not None:
            return answer
        time.sleep(0.02)
    raise AssertionError(complaint())


@contextmanager
def start(*arguments: str, program: Sequence[str] = COMMAND, cwd: Path | None = None) -> Iterator[Server]:
    """Run `cableway serve` with these arguments, ready or not; killed at the end if it still runs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (folder / "stdout").open("wb") as stdout, (folder / "stderr").open("wb") as stderr:
            process = subprocess.Popen(
                [*program, *arguments], stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, cwd=cwd
            )
        try:
            yield Server(process, folder)
        finally:
            process.kill()
            process.wait()


@contextmanager
def serve(
    *flags: str, model: str = "smollm2-135m", program: Sequence[str] = COMMAND, cwd: Path | None = None
) -> Iterator[Server]:
    """A server that is ready, on a free port of 127.0.0.1; it must also end as it should."""
    with start(model, "--port", "0", *flags, program=program, cwd=cwd) as server:
        server.wait_ready()
        yield server
        if server.process.poll() is None:
            assert server.stop() == 0, server.errors
