"""Planned restarts and spares, over children that only pretend to work."""

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from cableway.ipc import control
from cableway.ipc.errors import EXIT_STOPPED
from tests.process.fake_server import ROLES, Running, running
from tests.server import wait_for


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


def pids(server: Running) -> dict[str, int]:
    return {role: process.pid for role, process in server.processes().items()}


def num_children() -> int:
    """Of this process, which is the supervisor, and may have others from other tests."""
    return len(psutil.Process().children())


def wait_spares(server: Running) -> dict[str, control.Process]:
    """Until core and worker have a spare that stands by."""

    def found() -> dict[str, control.Process] | None:
        processes = server.processes()
        spares = [processes[role].spare_pid for role in ("enginecore", "worker")]
        return processes if all(spares) else None

    processes = wait_for(found, 10, lambda: "no spares")
    time.sleep(0.5)  # started, but not yet prepared
    return processes


@pytest.mark.parametrize("role", ROLES)
def test_a_restart_replaces_one_role_and_leaves_the_others(folder: Path, role: str) -> None:
    with running(folder, "works", "works", "works") as server:
        before = pids(server)
        lines, failure = server.restart(role)
        after = server.processes()
    assert failure == ""
    assert len(lines) == 1
    assert lines[0].startswith(f"{role} 0: process {before[role]} replaced by {after[role].pid}")
    assert after[role].state == "ready"
    assert after[role].restarts == 1
    assert {name for name in before if before[name] != after[name].pid} == {role}


def test_a_signal_or_an_empty_role_replaces_all_in_order(folder: Path) -> None:
    with running(folder, "works", "works", "works", standby=True) as server:
        before = pids(server)
        lines, failure = server.restart()
        assert failure == ""
        assert [line.split()[0] for line in lines] == ["worker", "enginecore", "frontend"]
        between = pids(server)
        assert not {between[role] for role in ROLES} & set(before.values())
        server.supervisor.restart()
        wait_for(lambda: (pids(server)["frontend"] != between["frontend"]) or None, 10, lambda: "not replaced")
        after = server.processes()
    assert [after[role].restarts for role in ROLES] == [2, 2, 2]
    assert all(not psutil.pid_exists(pid) for role, pid in before.items() if role != "supervisor")


def test_a_successor_that_fails_changes_nothing(folder: Path) -> None:
    with running(folder, "works", "works", "has-no-heir") as server:
        before = pids(server)
        lines, failure = server.restart("worker")
        assert failure == "worker 0: the new process ended before it could take over (exit code 1); the old one stays"
        assert lines == []
        assert pids(server) == before
        assert server.restart("enginecore")[1] == ""  # and nothing is stuck


def test_what_cannot_be_restarted_now_is_said(folder: Path) -> None:
    with running(folder, "works", "works", "slow-heir") as server:
        assert server.restart("bogus")[1] == "this server has no bogus"
        failures: list[str] = []
        waiting = threading.Thread(target=lambda: failures.append(server.restart("worker")[1]))
        before = num_children()
        waiting.start()
        wait_for(lambda: num_children() == before + 1 or None, 5, lambda: "no successor")
        assert server.restart("frontend")[1] == "a restart is under way"
        server.supervisor.stop()
        assert server.join() == EXIT_STOPPED
        waiting.join()
        assert failures == ["the server is stopping"]
        assert num_children() == before - len(ROLES)


def test_a_spare_steps_in_at_a_death_and_gets_a_spare(folder: Path) -> None:
    with running(folder, "works", "works", "works", standby=True) as server:
        before = wait_spares(server)
        assert before["frontend"].spare_pid == 0
        os.kill(before["worker"].pid, signal.SIGKILL)
        wait_for(lambda: (pids(server)["worker"] == before["worker"].spare_pid) or None, 5, lambda: "no heir")
        after = wait_spares(server)
        assert after["worker"].restarts == 1
        assert after["worker"].spare_pid not in (0, after["worker"].pid)
        spares = [after[role].spare_pid for role in ("enginecore", "worker")]
        server.supervisor.stop()
        assert server.join() == EXIT_STOPPED
        assert not any(psutil.pid_exists(pid) for pid in spares)


def test_a_stopped_spare_is_replaced_and_never_used(folder: Path) -> None:
    with running(folder, "works", "works", "works", standby=True, heartbeat_timeout_s=1.0) as server:
        spare_pid = wait_spares(server)["worker"].spare_pid
        os.kill(spare_pid, signal.SIGSTOP)
        wait_for(lambda: (server.processes()["worker"].spare_pid != spare_pid) or None, 5, lambda: "still there")
        wait_for(lambda: not psutil.pid_exists(spare_pid) or None, 5, lambda: "not killed")
        assert server.processes()["worker"].restarts == 0


def test_the_old_one_dies_while_its_successor_prepares(folder: Path) -> None:
    with running(folder, "works", "works", "slow-heir") as server:
        old_pid = pids(server)["worker"]
        before = num_children()
        threading.Thread(target=server.restart, args=("worker",)).start()
        wait_for(lambda: num_children() == before + 1 or None, 5, lambda: "no successor")
        os.kill(old_pid, signal.SIGKILL)
        wait_for(lambda: pids(server)["worker"] not in (0, old_pid) or None, 5, lambda: "not replaced")
