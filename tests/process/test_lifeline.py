"""The child's side, started alone as an outside supervisor would: drained by signals, and nothing else."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from cableway.ipc.lifeline import child_arguments
from tests.process.fake_server import FAKE_CHILD


@pytest.fixture
def alone(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, FAKE_CHILD, request.param, "--config", "x"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def say_hello(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"


@pytest.mark.parametrize("alone", ["works"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(alone: subprocess.Popen[str], number: int) -> None:
    say_hello(alone)
    alone.send_signal(number)
    assert alone.wait(5) == 0


@pytest.mark.parametrize("alone", ["never-drains"], indirect=True)
def test_a_second_signal_aborts_but_not_within_a_second(alone: subprocess.Popen[str]) -> None:
    say_hello(alone)
    alone.terminate()
    time.sleep(0.3)
    alone.terminate()
    time.sleep(0.3)
    assert alone.poll() is None
    time.sleep(0.6)
    alone.terminate()
    assert alone.wait(5) == 1


@pytest.mark.parametrize("alone", ["gives-up"], indirect=True)
def test_giving_up_is_one_line_and_exit_code_3(alone: subprocess.Popen[str]) -> None:
    assert alone.wait(5) == 3
    assert alone.stderr is not None
    assert alone.stderr.read() == "cableway: model.gguf: not a GGUF file\n"


@pytest.mark.parametrize(("alone", "least_s"), [("hangs", 2.0), ("hangs-in-a-small-step", 0.5)], indirect=["alone"])
def test_a_hung_process_ends_itself(alone: subprocess.Popen[str], least_s: float) -> None:
    say_hello(alone)
    began_s = time.monotonic()
    assert alone.wait(5) == 1
    assert least_s - 0.2 < time.monotonic() - began_s < least_s + 1.5
    assert alone.stderr is not None
    assert alone.stderr.read().startswith("cableway: hung in one turn for ")


def test_arguments() -> None:
    given = child_arguments(["--config", "c.json", "--rank", "2", "--listen-fd", "5", "--listen-fd", "6"])
    assert (given.config_path, given.rank, given.lifeline_fd, given.listen_fds) == ("c.json", 2, None, [5, 6])
    with pytest.raises(SystemExit, match="2"):
        child_arguments(["--rank", "1"])


def test_signals_of_the_terminal_do_not_reach_a_supervised_child() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fd = theirs.fileno()
    command = [sys.executable, FAKE_CHILD, "works", "--config", "x", "--lifeline-fd", str(fd)]
    with ours, subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=[fd]) as process:
        theirs.close()
        say_hello(process)
        os.kill(process.pid, signal.SIGINT)
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
        ours.close()  # the supervisor is gone
        assert process.wait(5) == 1
