"""What a server holds on to: compared before and after, when nothing is asked of it."""

import os
import re
import urllib.request
from collections import Counter
from pathlib import Path

import psutil

from cableway.ipc import runtime
from tests.server import Server, wait_for

_BUSY = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
_SHARED_MEMORY = Path("/dev/shm")


def wait_idle(server: Server) -> None:
    """Until the core says that no request has anything: no row, no place in the queue, not one block."""

    def idle() -> bool | None:
        text = urllib.request.urlopen(f"{server.base_url}/metrics", timeout=10).read().decode()
        values = re.findall(rf"^\S+:({'|'.join(_BUSY)}){{.*}} (\S+)$", text, re.MULTILINE)
        return True if len(values) == len(_BUSY) and all(float(value) == 0 for _, value in values) else None

    wait_for(idle, 20, lambda: f"never idle\n{server.errors[-4000:]}")


def holdings(server: Server) -> dict[str, object]:
    """Processes by role with the kinds of descriptors they hold, files of the runtime folder, shared memory."""
    wait_idle(server)
    held: dict[str, object] = {
        f"{process.role} {process.rank}": _descriptors(process.pid) for process in server.processes()
    }
    held["processes"] = len(psutil.Process(server.process.pid).children(recursive=True))
    held["runtime folder"] = sorted(path.name for path in server.runtime_dir.iterdir())
    held["shared memory"] = sorted(os.listdir(_SHARED_MEMORY)) if _SHARED_MEMORY.is_dir() else []
    return held


def assert_holds_again(server: Server, before: dict[str, object]) -> None:
    """What it held before, soon: the last question to it, or a spare process, may still be on its way."""
    wait_for(lambda: holdings(server) == before or None, 15, lambda: f"{holdings(server)}\nbefore: {before}")


def assert_nothing_left(server: Server, folder: Path) -> None:
    """After the server has ended."""
    assert not folder.exists()
    assert not [path for path in runtime.base_folder().iterdir() if path == folder]
    left = [process.pid for process in psutil.process_iter(["cmdline"]) if str(folder) in _command(process)]
    assert not left, left


def _descriptors(pid: int) -> Counter[str]:
    folder = f"/proc/{pid}/fd"
    kinds: Counter[str] = Counter()
    for name in os.listdir(folder):
        try:
            target = os.readlink(f"{folder}/{name}")
        except FileNotFoundError:
            continue
        kinds["file" if target.startswith("/") else target.partition(":")[0]] += 1
    return kinds


def _command(process: psutil.Process) -> str:
    return " ".join(process.info["cmdline"] or ())
