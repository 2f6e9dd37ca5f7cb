"""Planned restarts, reloads and drains of whole servers with the real model, under load: no request is lost."""

import http.client
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from cableway.ipc.errors import EXIT_FAILED, EXIT_STOPPED
from tests.server import COMMAND, Server, serve, start, wait_for

pytestmark = pytest.mark.timeout(300)

MODEL = "smollm2-135m"
NUM_TOKENS = 24
ONE_THREAD = ("--num-threads", "1")  # under load for as long as processes take to start, which want the other core
SMALL = ("--max-model-len", "512", "--num-kv-blocks", "300", "--batch-invariant", "--dtype", "float32", *ONE_THREAD)


def cableway(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND[0], *arguments], capture_output=True, text=True, timeout=120)


def port_of(server: Server) -> str:
    return server.base_url.rpartition(":")[2]


class Load:
    """Clients that ask, one stream after another, each on one kept-alive connection, until they are told to stop."""

    def __init__(self, server: Server, num_clients: int):
        self.texts: list[tuple[int, str]] = []
        self.errors: list[BaseException] = []
        self.num_pieces = 0
        self._server = server
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(num_clients)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, client_id: int) -> None:
        with openai.OpenAI(base_url=f"{self._server.base_url}/v1", api_key="-", max_retries=0, timeout=60) as client:
            while not self._stopping.is_set():
                try:
                    self.texts.append((client_id, "".join(map(self._counted, streamed(client, client_id)))))
                except openai.APIError as error:
                    self.errors.append(error)
                time.sleep(0.05)  # the connection is idle now and then, as clients' are

    def _counted(self, piece: str) -> str:
        self.num_pieces += 1
        return piece


def streamed(client: openai.OpenAI, seed: int, **fields: Any) -> Iterator[str]:
    """Pieces of a sampled text; AssertionError when it is not complete."""
    stream = client.completions.create(
        model=MODEL,
        prompt=f"Story {seed}: once",
        stream=True,
        **{"max_tokens": NUM_TOKENS, "seed": seed, "extra_body": {"ignore_eos": True}} | fields,
    )
    reason = None
    for chunk in stream:
        yield chunk.choices[0].text
        reason = chunk.choices[0].finish_reason or reason
    assert reason == "length"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve("--frontends", "2", *SMALL) as running:
        yield running


@pytest.fixture(scope="module")
def expected(server: Server) -> dict[int, str]:
    """What each client's request gives on a server that nobody disturbs."""
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="-", max_retries=0, timeout=60) as client:
        return {i: "".join(streamed(client, i)) for i in range(3)}


@pytest.mark.parametrize("role", ["frontend", "worker", "all by SIGHUP"])
def test_a_restart_under_load_loses_no_request(server: Server, expected: dict[int, str], role: str) -> None:
    before = named_pids(server)
    concerned = {name for name in before if role.startswith("all") or name[0] == role}
    with Load(server, len(expected)) as load:
        time.sleep(0.5)
        if role.startswith("all"):
            num_done = server.errors.count("restart_done")
            server.process.send_signal(signal.SIGHUP)
            wait_for(lambda: server.errors.count("restart_done") > num_done or None, 60, lambda: server.errors)
        else:
            ran = cableway("restart", role, "--port", port_of(server))
            assert (ran.returncode, ran.stderr) == (0, "")
            assert len(ran.stdout.splitlines()) == len(concerned)
        time.sleep(0.5)
    assert load.errors == []
    assert len(load.texts) >= len(expected)
    assert [text for client_id, text in load.texts if text != expected[client_id]] == []
    after = named_pids(server)
    assert {name for name in before if before[name] != after[name]} == concerned


def named_pids(server: Server) -> dict[tuple[str, int], int]:
    return {(each.role, each.rank): each.pid for each in server.processes() if each.role != "supervisor"}


def test_an_idle_connection_outlives_its_frontends_restart(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", int(port_of(server)), timeout=30)
    connection.request("GET", "/v1/models")
    connection.getresponse().read()
    own_socket = connection.sock
    assert cableway("restart", "frontend", "--pid", str(server.process.pid)).returncode == 0

    def retiring() -> list[int]:
        return [pid for process in server.processes("frontend") for pid in process.retiring_pids]

    wait_for(lambda: len(retiring()) == 1 or None, 5, lambda: f"{retiring()}: not one that has a connection")
    connection.request("GET", "/v1/models")
    assert connection.sock is own_socket
    response = connection.getresponse()
    assert response.status == 200
    assert response.headers["Connection"] == "close"
    response.read()
    wait_for(lambda: not retiring() or None, 10, lambda: "still there")


def test_what_cannot_be_restarted_is_said(server: Server, tiny_folder: Path) -> None:
    ran = cableway("restart", "frontends")
    assert ran.returncode == 2
    assert "'frontends' is not one of 'frontend', 'enginecore', 'worker', 'all'" in ran.stderr
    ran = cableway("restart", "worker", "--port", "1")
    assert (ran.returncode, ran.stderr) == (1, "cableway: no server of yours runs on port 1; see `cableway ps`\n")
    with serve("--no-standby", model=str(tiny_folder)) as other:
        ran = cableway("restart", "worker")
        assert ran.returncode == 1
        assert re.match(r"cableway: \d+ servers of yours run: .*; choose one with --port or --pid\n", ran.stderr)
        assert f"{server.base_url} (pid {server.process.pid})" in ran.stderr
        listed = json.loads(cableway("ps", "--json", "--port", port_of(other)).stdout)
        assert {entry["pid"] for entry in listed} == {process.pid for process in other.processes()}


# ---------------------------------------------------------------------------------------------------------------------
# Reload


def test_reload_applies_what_it_can_and_says_what_it_cannot(tmp_path: Path, tiny_folder: Path) -> None:
    config = tmp_path / "server.toml"
    common = "max-model-len = 256\nnum-kv-blocks = 100\n"
    config.write_text(common + "max-num-seqs = 4\n")
    with serve("--config", str(config), "--drain-timeout-s", "20", model=str(tiny_folder)) as server:
        pids = {process.role: process.pid for process in server.processes()}

        def reload(*flags: str) -> subprocess.CompletedProcess[str]:
            return cableway("reload", "--port", port_of(server), *flags)

        assert reload().stdout == "nothing has changed\n"
        config.write_text(common + 'max-num-seqs = 4\napi-key = ["secret"]\nport = 1\nmodel = "other"\n')
        ran = reload()
        assert ran.returncode == 0, ran.stderr
        notes, (replaced,) = ran.stdout.splitlines()[:-1], ran.stdout.splitlines()[-1:]
        assert notes == ["api_key: changed"]  # MODEL and --port were given as flags, which win
        assert replaced.startswith("frontend 0: process ")
        after = {process.role: process.pid for process in server.processes()}
        assert {role for role in pids if pids[role] != after[role]} == {"frontend"}
        assert status_of(server, "/v1/models") == 401
        assert status_of(server, "/v1/models", "secret") == 200

        ran = reload("--", "--max-num-seqs", "2", "--frontends", "3")
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.splitlines()[:2] == [
            "max_num_seqs: 4 -> 2",
            "frontends: stays 1, not 3: their number is that of the start; stop and start the server to change it",
        ]
        written = json.loads((server.runtime_dir / "config.json").read_text())
        assert written["worker"]["max_num_seqs"] == 2
        assert reload().stdout == "nothing has changed\n"  # what was refused is not asked for again

        config.write_text("max-num-seqs = 0\n")
        ran = reload("--", "--max-num-seqs", "0")
        assert ran.returncode == 1
        assert ran.stderr == "cableway: max_num_seqs: expected int >= 1; nothing was changed\n"
        config.write_text(common)
        ran = reload("--", "--kv-cache-memory-bytes", "1000", "--num-kv-blocks", "0")
        assert ran.returncode == 1
        assert "worker 0: the new process ended before it could take over (the KV cache has room for" in ran.stderr
        assert json.loads((server.runtime_dir / "config.json").read_text()) == written
        assert status_of(server, "/v1/models", "secret") == 200


def status_of(server: Server, path: str, key: str = "") -> int:
    connection = http.client.HTTPConnection("127.0.0.1", int(port_of(server)), timeout=30)
    connection.request("GET", path, headers={"Authorization": f"Bearer {key}"} if key else {})
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status


# ---------------------------------------------------------------------------------------------------------------------
# Drain


def test_a_drain_under_load_finishes_some_and_fails_the_rest_at_its_deadline() -> None:
    """New requests get 503 and Retry-After, /health says draining, short streams end, endless ones get an error."""
    with start(MODEL, "--port", "0", "--drain-timeout-s", "6", "--max-model-len", "2048", *ONE_THREAD) as server:
        server.wait_ready()
        ends: dict[str, list[Any]] = {"short": [], "long": []}
        running = threading.Barrier(5)
        threads = [
            threading.Thread(target=follow, args=(server, running, ends[kind], {"short": 30, "long": 2000}[kind]))
            for kind in ("short", "short", "long", "long")
        ]
        for thread in threads:
            thread.start()
        running.wait(30)
        began_s = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        refusal = wait_for(lambda: draining(server), 3, lambda: "not draining")
        assert refusal["/health"][0] == 503
        assert json.loads(refusal["/health"][2])["status"] == "draining"
        assert json.loads(refusal["/health?live"][2])["status"] == "live"
        status, retry_after, body = refusal["/v1/models"]
        assert (status, retry_after) == (503, "5")
        assert json.loads(body)["error"]["code"] == "shutting_down"
        for thread in threads:
            thread.join()
        assert ends["short"] == ["length", "length"]
        assert all("shutting down" in str(end) for end in ends["long"])
        assert len(ends["long"]) == 2
        assert server.process.wait(10) in (EXIT_STOPPED, EXIT_FAILED)  # the latter if the rest took longer than it had
        assert 4 < time.monotonic() - began_s < 10


def follow(server: Server, running: threading.Barrier, ends: list[Any], num_tokens: int) -> None:
    """Read a stream to its end: how it finished, or the error it ended with. Begins with the other streams."""
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="-", max_retries=0, timeout=60) as client:
        try:
            pieces = streamed(client, 1, max_tokens=num_tokens)
            next(pieces)
            running.wait(30)
            list(pieces)
        except openai.APIError as error:
            ends.append(error)
        else:
            ends.append("length")


def draining(server: Server) -> dict[str, tuple[int, str, bytes]] | None:
    answers = {path: get(server, path) for path in ("/v1/models", "/health", "/health?live")}
    return answers if answers["/v1/models"][0] == 503 else None


def get(server: Server, path: str) -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", int(port_of(server)), timeout=10)
    connection.request("GET", path)
    response = connection.getresponse()
    answer = response.status, response.headers.get("Retry-After", ""), response.read()
    connection.close()
    return answer


# ---------------------------------------------------------------------------------------------------------------------
# Hangs


def test_a_stopped_frontend_blocks_nobody_and_is_replaced() -> None:
    with serve("--frontends", "2", "--heartbeat-timeout-s", "2", *ONE_THREAD) as server:
        victims = {process.pid for process in server.processes("frontend")}
        with Load(server, 6) as load:
            time.sleep(1)
            stopped_pid = min(victims, key=num_clients)  # the kernel deals connections out as it likes
            os.kill(stopped_pid, signal.SIGSTOP)
            stopped_s = time.monotonic()
            time.sleep(0.2)
            before = num_pieces = load.num_pieces

            def replaced() -> bool | None:
                return {process.pid for process in server.processes("frontend")} != victims or None

            while time.monotonic() - stopped_s < 1.5:  # stopped, and not yet found out
                num_pieces = load.num_pieces
                time.sleep(0.05)
            assert replaced() is None
            wait_for(replaced, 15, lambda: "not replaced")
            assert time.monotonic() - stopped_s < 6
        assert num_pieces > before  # the other frontend's clients went on meanwhile
        assert len(load.errors) <= 6  # its own clients lost their connections, once each


def num_clients(pid: int) -> int:
    return sum(each.status == psutil.CONN_ESTABLISHED for each in psutil.Process(pid).net_connections("inet"))
