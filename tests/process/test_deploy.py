"""The files in deploy/, run for real: supervisord as it is, systemd's two protocols, and what its own tool says."""

import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest
import yaml

from tests.process.test_server import is_healthy
from tests.server import COMMAND, wait_for

pytestmark = pytest.mark.timeout(300)

DEPLOY = Path(__file__).parents[2] / "deploy"
UNITS = sorted(path.name for path in (DEPLOY / "systemd").iterdir() if path.suffix != ".sysusers")
ROLES = ("enginecore", "worker", "frontend")


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def folder(tmp_path: Path, port: int) -> Path:
    """deploy/ as it would be installed, with this checkout's command, a free port and folders of the test."""
    config = (DEPLOY / "cableway.toml").read_text().replace("8000", str(port)).replace("/run/cableway", f"{tmp_path}/r")
    (tmp_path / "cableway.toml").write_text(config + "max-model-len = 256\nnum-threads = 1\n")
    return tmp_path


def installed(text: str, folder: Path, port: int) -> str:
    """A deploy file with the paths of the test."""
    for written, real in {
        "/opt/cableway/bin/cableway": COMMAND[0],
        "/etc/cableway": str(folder),
        "/run/cableway": str(folder),
        "127.0.0.1:8000": f"127.0.0.1:{port}",
        "User=cableway": f"User={psutil.Process().username()}",
    }.items():
        text = text.replace(written, real)
    return text


# ---------------------------------------------------------------------------------------------------------------------
# supervisord


def test_supervisord_mends_each_process(folder: Path, port: int) -> None:
    (folder / "r").mkdir(mode=0o700)
    (folder / "supervisord.conf").write_text(installed((DEPLOY / "supervisord.conf").read_text(), folder, port))
    program = Path(sys.executable).parent / "supervisord"
    log = (folder / "log").open("wb")
    daemon = subprocess.Popen(
        [program, "-c", folder / "supervisord.conf"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
    )
    try:
        wait_for(lambda: is_healthy(port) or None, 60, (folder / "log").read_text)
        for role in ROLES:
            before = children_of(daemon.pid, role)
            before[0].kill()
            wait_for(partial(has_replaced, daemon.pid, role, before), 30, (folder / "log").read_text)
            wait_for(lambda: is_healthy(port) or None, 60, (folder / "log").read_text)
        assert len(children_of(daemon.pid, "frontend")) == 2
        children = psutil.Process(daemon.pid).children(recursive=True)
        daemon.terminate()
        assert daemon.wait(30) == 0
        assert not [child for child in children if child.is_running()]
    finally:
        left = psutil.Process(daemon.pid).children(recursive=True) if daemon.poll() is None else []
        daemon.kill()  # first, so that it starts no others
        daemon.wait()
        for child in left:
            child.kill()
        log.close()


def children_of(pid: int, role: str) -> list[psutil.Process]:
    module = "cableway.workers.main" if role == "worker" else f"cableway.{role}.main"
    found = []
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it dies just now
            if module in child.cmdline():
                found.append(child)
    return found


def has_replaced(pid: int, role: str, before: list[psutil.Process]) -> bool | None:
    """Whether all but the first of `before` are still there, and one more."""
    now = children_of(pid, role)
    return (len(now) == len(before) and before[0] not in now and set(before[1:]) < set(now)) or None


# ---------------------------------------------------------------------------------------------------------------------
# systemd


class Manager:
    """What systemd does for a unit: a socket for notifications, a listening socket, the variables that tell of them."""

    def __init__(self, folder: Path, port: int):
        self._folder = folder
        self._notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notified.bind(str(folder / "notify"))
        self._notified.settimeout(60)
        self._notified.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.listening = socket.create_server(("127.0.0.1", port))
        self.told: dict[int, list[str]] = {}
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, role: str) -> subprocess.Popen[bytes]:
        """Run a role as its unit would, and wait until it has told that it is ready."""
        shim = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); os.set_inheritable(3, True);"
            "os.environ |= {'LISTEN_PID': str(os.getpid()), 'LISTEN_FDS': '1'} if sys.argv[3] == 'frontend' else {};"
            "os.execv(sys.argv[2], sys.argv[2:])"
        )
        fd = self.listening.fileno()
        command = [
            sys.executable,
            "-c",
            shim,
            str(fd),
            COMMAND[0],
            role,
            "--config",
            str(self._folder / "cableway.toml"),
        ]
        variables = {"NOTIFY_SOCKET": str(self._folder / "notify"), "WATCHDOG_USEC": "1000000"}
        process = subprocess.Popen(command, pass_fds=[fd], env=os.environ | variables, stderr=subprocess.DEVNULL)
        self.processes.append(process)
        self.wait_told(process.pid, "READY=1")
        return process

    def close(self) -> None:
        self._notified.close()
        self.listening.close()

    def wait_told(self, pid: int, assignment: str) -> None:
        while assignment not in self.told.get(pid, []):
            text, ancillary, _, _ = self._notified.recvmsg(4096, socket.CMSG_SPACE(12))
            sender = int.from_bytes(ancillary[0][2][:4], sys.byteorder)
            self.told.setdefault(sender, []).extend(text.decode().splitlines())


@contextmanager
def manager_of(folder: Path, port: int) -> Iterator[Manager]:
    manager = Manager(folder, port)
    try:
        yield manager
    finally:
        for process in manager.processes:
            process.kill()
            process.wait()
        manager.close()


def test_each_process_tells_systemd_and_takes_its_socket(folder: Path, port: int) -> None:
    with manager_of(folder, port) as manager:
        processes = {role: manager.start(role) for role in ROLES}
        wait_for(lambda: is_healthy(port) or None, 30, lambda: "never healthy")
        for process in processes.values():
            manager.wait_told(process.pid, "WATCHDOG=1")
            # The variables are for this process alone.
            assert not {"NOTIFY_SOCKET", "LISTEN_FDS"} & environment_of_children(process.pid)

        old = processes["frontend"]
        old.terminate()
        manager.wait_told(old.pid, "STOPPING=1")
        assert old.wait(20) == 0
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/v1/models")  # nobody is there to accept it: it waits
        processes["frontend"] = manager.start("frontend")
        assert connection.getresponse().status == 200
        connection.close()

        for role in ("frontend", "enginecore", "worker"):
            processes[role].send_signal(signal.SIGTERM)
            assert processes[role].wait(20) == 0, role


def environment_of_children(pid: int) -> set[str]:
    return {name for child in psutil.Process(pid).children() for name in child.environ()}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed here")
def test_units_are_clean_and_locked_down(folder: Path, port: int) -> None:
    for name in UNITS:
        (folder / name).write_text(installed((DEPLOY / "systemd" / name).read_text(), folder, port))
    names = [str(folder / name.replace("@.", "@0.")) for name in UNITS]
    for name in UNITS:
        if "@." in name:
            (folder / name.replace("@.", "@0.")).symlink_to(folder / name)
    ran = subprocess.run(["systemd-analyze", "verify", *names], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    for name in (name for name in UNITS if name.endswith(".service")):
        command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", str(folder / name)]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert ran.returncode == 0, ran.stdout.splitlines()[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Kubernetes


def test_the_manifests_flags_and_probes_are_ones_that_exist() -> None:
    pod = yaml.safe_load((DEPLOY / "kubernetes.yaml").read_text())["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    probed = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")}
    assert probed == {"startup": "/health", "readiness": "/health", "liveness": "/health?live"}
    program, command, _, *flags = container["args"]
    known = subprocess.run([COMMAND[0], command, "--help"], capture_output=True, text=True, check=True).stdout
    assert program == "cableway"
    assert all(flag in known for flag in flags if flag.startswith("--"))
    drain_s = float(flags[flags.index("--drain-timeout-s") + 1])
    pause_s = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= drain_s + pause_s
