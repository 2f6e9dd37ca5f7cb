"""Whole servers with the real model: kill, stop and drain their processes, and see what clients see."""

import http.client
import json
import os
import re
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from cableway.ipc import modelfiles
from tests.server import COMMAND, Server, serve, start, wait_for

pytestmark = pytest.mark.timeout(300)

ROLES = ("frontend", "enginecore", "worker")
CABLEWAY = COMMAND[0]
ONE_THREAD = ("--num-threads", "1")  # other tests want the other core


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One server for the tests that leave it whole."""
    with serve("--heartbeat-timeout-s", "3", "--frontends", "2", *ONE_THREAD) as running:
        yield running


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=60)


def answer(server: Server, **settings: Any) -> str:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    settings = {"max_tokens": 16, "temperature": 0} | settings
    made = client(server).chat.completions.create(model="smollm2-135m", messages=question, **settings)
    return made.choices[0].message.content


def listed(*arguments: str) -> list[dict[str, Any]]:
    ran = subprocess.run([CABLEWAY, "ps", "--json", *arguments], capture_output=True, text=True, check=True, timeout=60)
    return json.loads(ran.stdout)


def test_ps_lists_every_process(server: Server) -> None:
    mine = [entry for entry in listed() if entry["url"] == server.base_url]
    assert [entry["role"] for entry in mine] == ["supervisor", "frontend", "frontend", "enginecore", "worker"]
    assert [entry["rank"] for entry in mine] == [0, 0, 1, 0, 0]
    assert mine[0]["pid"] == server.process.pid
    for entry in mine:
        assert entry["state"] == "ready"
        assert entry["uptime_s"] > 0
        assert entry["restarts"] >= 0
        assert psutil.Process(entry["pid"]).username() == psutil.Process().username()
    table = subprocess.run([CABLEWAY, "ps"], capture_output=True, text=True, check=True, timeout=60).stdout
    assert all(re.search(rf"{entry['role']} .* {entry['pid']} ", table) for entry in mine)


@pytest.mark.parametrize("role", ROLES)
def test_a_killed_process_is_replaced_and_the_server_goes_on(server: Server, role: str) -> None:
    before = server.processes()
    expected = answer(server)
    victim = next(process for process in before if process.role == role)
    os.kill(victim.pid, signal.SIGKILL)
    replaced = server.wait_replaced(role, victim.pid)
    assert replaced.restarts == victim.restarts + 1
    assert answer(server) == expected
    others = {process.pid for process in before} - {victim.pid}
    assert others < {process.pid for process in server.processes()}


@pytest.mark.parametrize("role", ["worker", "enginecore"])
def test_a_stopped_process_is_killed_and_replaced(server: Server, role: str) -> None:
    (pid,) = server.pids(role)
    os.kill(pid, signal.SIGSTOP)
    server.wait_replaced(role, pid)
    assert not psutil.pid_exists(pid)
    assert answer(server)


def test_a_second_server_on_the_port_is_refused(server: Server) -> None:
    port = server.base_url.rpartition(":")[2]
    ran = subprocess.run([*COMMAND, "--port", port], capture_output=True, text=True, timeout=30)
    assert ran.returncode == 4
    assert ran.stderr == f"cableway: port {port} on 127.0.0.1 is taken by another program; choose one with --port\n"
    assert answer(server)


def test_two_servers_live_side_by_side(server: Server) -> None:
    with serve("--dtype", "float32", "--max-model-len", "256", *ONE_THREAD) as other:
        assert other.base_url != server.base_url
        assert {server.base_url, other.base_url} <= {entry["url"] for entry in listed()}
        assert not {p.pid for p in server.processes()} & {p.pid for p in other.processes()}
        assert answer(server)
        assert answer(other) == "The capital of France is Paris."
        runtime_dir = other.runtime_dir
        assert stat.S_IMODE(runtime_dir.stat().st_mode) == 0o700
    assert not runtime_dir.exists()
    assert answer(server)


def test_idle_processes_use_under_one_percent_of_a_cpu(server: Server) -> None:
    """In the quietest of three stretches: beside other jobs the same few wakes cost several times as much."""
    answer(server)
    processes = [psutil.Process(process.pid) for process in server.processes()]
    time.sleep(1)
    shares = []
    while len(shares) < 3 and min(shares, default=1.0) > 0.01:
        begin = [sum(process.cpu_times()[:2]) for process in processes]
        time.sleep(4)
        shares.append(max(sum(p.cpu_times()[:2]) - before for p, before in zip(processes, begin, strict=True)) / 4)
    assert min(shares) < 0.0101, shares  # times are in hundredths of a second


# ---------------------------------------------------------------------------------------------------------------------
# Ends


def test_no_process_outlives_a_killed_supervisor(tiny_folder: Path) -> None:
    with serve(model=str(tiny_folder)) as server:
        children = [psutil.Process(process.pid) for process in server.processes() if process.role != "supervisor"]
        folder = server.runtime_dir
        server.process.kill()
        gone, _ = psutil.wait_procs(children, timeout=5)
        assert len(gone) == len(children) == 3
        port = server.base_url.rpartition(":")[2]  # which the successor takes, with the folder left behind
        with start("--dtype", "float32", "--port", port, *ONE_THREAD) as successor:
            successor.wait_ready()
            assert answer(successor) == "The capital of France is Paris."
            assert successor.stop(signal.SIGINT) == 0
        assert not folder.exists()


def test_gives_up_quickly_on_a_truncated_model(tmp_path: Path) -> None:
    whole = Path(modelfiles.locate("smollm2-135m").path).read_bytes()
    (tmp_path / "header.gguf").write_bytes(whole[:5000])
    (tmp_path / "weights.gguf").write_bytes(whole[: len(whole) // 2])
    for name in ("header.gguf", "weights.gguf"):
        with start(str(tmp_path / name), "--port", "0", "--log-level", "error") as server:
            assert server.process.wait(60) == 3
            assert len(server.errors.splitlines()) == 1, server.errors
            assert server.errors.startswith("cableway: ")
            assert name in server.errors


# ---------------------------------------------------------------------------------------------------------------------
# Other ways to run


def test_a_kv_cache_of_8_bits_is_served() -> None:
    """In memory that holds its longest sequence in 8 bits alone; the same answer with and without a cached prefix."""
    question = [{"role": "user", "content": "Name three rivers of France and where each of them ends."}]
    flags = "--kv-cache-dtype", "fp8", "--batch-invariant", "--kv-cache-memory-bytes", str(96 << 20)
    with serve(*flags, *ONE_THREAD) as server:
        made = [
            client(server).chat.completions.create(
                model="smollm2-135m", messages=question, max_tokens=24, temperature=0
            )
            for _ in range(2)
        ]
    first, again = (one.choices[0].message.content for one in made)
    assert len(first.split()) > 8
    assert again == first
    assert [one.usage.prompt_tokens_details.cached_tokens for one in made] == [0, 32]


def test_a_unix_socket_is_served_to_its_user_alone(tmp_path: Path, tiny_folder: Path) -> None:
    path = tmp_path / "s.sock"
    with start(str(tiny_folder), "--uds", str(path)) as server:
        server.wait_ready()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        connection = http.client.HTTPConnection("localhost", timeout=30)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(path))
        connection.request("GET", "/v1/models")
        assert json.loads(connection.getresponse().read())["data"][0]["id"] == tiny_folder.name
        connection.close()
        assert server.stop() == 0
    assert not path.exists()


def test_each_process_can_be_run_alone_in_any_order(tmp_path: Path) -> None:
    """The other order is that of test_deploy."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = tmp_path / "server.toml"
    config.write_text(f'port = {port}\ndtype = "float32"\nnum-threads = 1\nruntime-dir = "{tmp_path / "run"}"\n')
    processes: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for role in ("frontend", "worker", "enginecore"):
            processes[role] = subprocess.Popen([CABLEWAY, role, "--config", str(config)], stderr=subprocess.DEVNULL)
            time.sleep(0.5)
        again = subprocess.run(
            [CABLEWAY, "worker", "--config", str(config)], capture_output=True, text=True, timeout=30
        )
        assert again.returncode == 4
        assert "is in use by another worker-0" in again.stderr
        wait_for(lambda: is_healthy(port) or None, 60, lambda: "never healthy")
        processes["enginecore"].kill()
        processes["enginecore"].wait()
        command = [CABLEWAY, "enginecore", "--config", str(config)]
        processes["enginecore"] = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        wait_for(lambda: is_healthy(port) or None, 60, lambda: "never healthy again")
        for role in ROLES:
            processes[role].terminate()
            assert processes[role].wait(20) == 0, role
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def is_healthy(port: int) -> bool:
    """Whether a request is answered."""
    one = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=10)
    try:
        made = one.completions.create(model="smollm2-135m", prompt="1, 2, 3, 4,", max_tokens=2)
    except (openai.APIConnectionError, openai.InternalServerError):
        return False
    return bool(made.choices[0].text)
