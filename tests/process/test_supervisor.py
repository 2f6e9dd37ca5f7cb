"""The supervisor over children that only pretend to work: real processes, real signals, no model."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cableway.ipc import control
from cableway.ipc.errors import EXIT_FAILED, EXIT_STOPPED, EXIT_UNMENDABLE
from tests.process.fake_server import ROLES, Running, running
from tests.server import wait_for


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


def replaced(server: Running, role: str, old_pid: int, timeout_s: float = 10) -> control.Process:
    def found() -> control.Process | None:
        process = server.processes()[role]
        return process if process.pid not in (0, old_pid) and process.state == "ready" else None

    return wait_for(found, timeout_s, lambda: f"{role} was not replaced: {server.processes()}")


def test_lists_itself_and_every_child(folder: Path) -> None:
    with running(folder, "works", "works", "works") as server:
        processes = server.processes()
    assert set(processes) == {"supervisor", *ROLES}
    assert all(process.state == "ready" and process.restarts == 0 for process in processes.values())
    assert processes["supervisor"].pid == os.getpid()
    assert len({process.pid for process in processes.values()}) == 4
    assert all(0 < process.uptime_s < 30 for process in processes.values())


def test_stop_ends_children_in_order_and_exits_0(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with running(folder, "works", "works", "works") as server:
        pids = [process.pid for role, process in server.processes().items() if role != "supervisor"]
        server.supervisor.stop()
        assert server.join() == EXIT_STOPPED
    assert not any(psutil.pid_exists(pid) for pid in pids)
    stopped = [line for line in capfd.readouterr().err.splitlines() if "process_stopped" in line]
    assert [next(role for role in ROLES if role in line) for line in stopped] == list(ROLES)


@pytest.mark.parametrize("role", ROLES)
def test_a_killed_child_is_replaced_and_the_others_stay(folder: Path, role: str) -> None:
    with running(folder, "works", "works", "works") as server:
        before = server.processes()
        os.kill(before[role].pid, signal.SIGKILL)
        after = replaced(server, role, before[role].pid)
        others = {name: process.pid for name, process in server.processes().items() if name != role}
    assert after.restarts == 1
    assert others == {name: process.pid for name, process in before.items() if name != role}


def test_a_stopped_child_is_killed_and_replaced(folder: Path) -> None:
    with running(folder, "works", heartbeat_timeout_s=1.5) as server:
        pid = server.processes()["frontend"].pid
        os.kill(pid, signal.SIGSTOP)
        replaced(server, "frontend", pid)
    assert not psutil.pid_exists(pid)


def test_a_child_stuck_in_a_step_is_killed_though_it_beats(folder: Path) -> None:
    with running(folder, "hangs", step_timeout_s=1.0, heartbeat_timeout_s=1.5) as server:
        pid = server.processes()["frontend"].pid
        replaced(server, "frontend", pid)
        server.supervisor.stop()
        time.sleep(1.1)
        server.supervisor.stop()  # it does not drain either


def test_a_small_step_may_take_less_than_a_full_one(folder: Path) -> None:
    """A hundredth of 200 s, and not less than a heartbeat's time: 2 s."""
    with running(folder, "hangs", "hangs-in-a-small-step", step_timeout_s=200.0, heartbeat_timeout_s=1.0) as server:
        pids = {role: process.pid for role, process in server.processes().items()}
        began_s = time.monotonic()
        replaced(server, "enginecore", pids["enginecore"])
        assert time.monotonic() - began_s > 1.5
        assert server.processes()["frontend"].pid == pids["frontend"]
        server.supervisor.stop()
        time.sleep(1.1)
        server.supervisor.stop()


def test_a_child_at_work_or_idle_is_left_alone(folder: Path) -> None:
    with running(folder, "works", "idles", heartbeat_timeout_s=1.5, step_timeout_s=1.0) as server:
        time.sleep(2.5)
        assert [process.restarts for process in server.processes().values()] == [0, 0, 0]


def test_restarts_come_at_once_and_then_ever_later(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with running(folder, "dies-when-ready") as server:
        wait_for(lambda: server.processes()["frontend"].restarts >= 4 or None, 10, lambda: "no restarts")
    delays = [
        line.split("restart_in_s=")[1].split()[0] for line in capfd.readouterr().err.splitlines() if "died" in line
    ]
    assert delays[:4] == ["0.0", "0.1", "0.2", "0.4"]


def test_gives_up_on_a_child_that_never_was_ready(folder: Path) -> None:
    server = Running(folder, ["works", "dies"])
    assert server.join() == EXIT_FAILED
    first, *last_words = server.supervisor.failure.splitlines()
    assert first.startswith("enginecore 0 ended 5 times before it was ready (exit code 1)")
    assert last_words == ["some noise", "the last words"]


@pytest.mark.parametrize("behaviour", ["gives-up", "exits-3"])
def test_gives_up_at_once_when_no_restart_can_mend_it(folder: Path, behaviour: str) -> None:
    began_s = time.monotonic()
    server = Running(folder, ["works", behaviour])
    assert server.join() == EXIT_UNMENDABLE
    assert server.supervisor.failure == "enginecore 0: model.gguf: not a GGUF file"
    assert time.monotonic() - began_s < 5


def test_a_drain_past_its_deadline_is_an_abort(folder: Path) -> None:
    with running(folder, "never-drains", "works", drain_timeout_s=0.5) as server:
        began_s = time.monotonic()
        server.supervisor.stop()
        assert server.join() == EXIT_FAILED
    assert 0.5 <= time.monotonic() - began_s < 4


def test_a_second_stop_aborts_but_not_within_a_second(folder: Path) -> None:
    with running(folder, "never-drains", drain_timeout_s=60) as server:
        server.supervisor.stop()
        time.sleep(0.2)
        server.supervisor.stop()  # the same Ctrl-C, reaching it by another way
        time.sleep(0.3)
        assert server.exit_code is None
        assert server.processes()["frontend"].state == "draining"
        time.sleep(0.7)
        server.supervisor.stop()
        assert server.join(5) == EXIT_FAILED


def test_the_core_is_replaced_while_frontends_drain(folder: Path) -> None:
    with running(folder, "never-drains", "works", drain_timeout_s=3) as server:
        pid = server.processes()["enginecore"].pid
        server.supervisor.stop()
        time.sleep(0.2)
        os.kill(pid, signal.SIGKILL)
        replaced(server, "enginecore", pid)


def test_nothing_is_orphaned_when_the_supervisor_is_killed(folder: Path) -> None:
    script = Path(__file__).parent / "fake_server.py"
    program = subprocess.Popen([sys.executable, str(script), str(folder), "works", "works", "hangs"])
    try:
        answer = wait_for(lambda: all_ready(folder), 20, lambda: "not ready")
        children = [psutil.Process(process.pid) for process in answer.processes if process.role != "supervisor"]
        children[1].suspend()  # a stopped process sees no end of file
    finally:
        program.kill()
        program.wait()
    gone, alive = psutil.wait_procs(children, timeout=5)
    for child in alive:
        child.kill()
    assert len(gone) == 3


def all_ready(folder: Path) -> control.Processes | None:
    if not (folder / "supervisor.sock").exists():
        return None
    answer = control.ask(folder)
    return answer if answer and all(process.state == "ready" for process in answer.processes[1:]) else None


def test_idle_processes_use_no_cpu(folder: Path) -> None:
    with running(folder, "works", "works", "works") as server:
        pids = {process.pid for process in server.processes().values()} - {os.getpid()}  # which does other things, too
        children = [psutil.Process(pid) for pid in pids]
        begin = [child.cpu_times() for child in children]
        time.sleep(3)
        end = [child.cpu_times() for child in children]
    used_s = [after.user + after.system - before.user - before.system for before, after in zip(begin, end, strict=True)]
    assert max(used_s) <= 0.03, used_s
