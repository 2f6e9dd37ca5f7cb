"""A real frontend process in front of a fake engine core."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from email.message import Message
from pathlib import Path
from typing import Any

import openai

from cableway.frontend.tokens import Tokenizer
from cableway.ipc import config as configuration
from cableway.ipc import modelfiles
from cableway.ipc.config import Options
from cableway.ipc.listen import Listener
from cableway.ipc.messages import Generate
from cableway.ipc.resolve import resolve
from tests.frontend.fake_core import FakeCore

MODEL = "smollm2-135m"
FILES = modelfiles.locate(MODEL)
TOKENIZER = Tokenizer.load(FILES)
EOS_ID = TOKENIZER.eos_token_ids[0]


def says(text: str) -> Callable[[Generate, int], list[int]]:
    """A script of the fake core: these words, then end-of-sequence."""
    token_ids = [*TOKENIZER.encode(text), EOS_ID]
    return lambda _generate, _choice: token_ids


class Frontend:
    """A frontend process and the fake core it speaks to."""

    def __init__(self, process: subprocess.Popen[bytes], core: FakeCore, port: int, folder: Path, uds: str = ""):
        self.process = process
        self.core = core
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.folder = folder
        self.uds = uds

    @property
    def log(self) -> str:
        return (self.folder / "stderr").read_text()

    def client(self, key: str = "none", **options: object) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=30, **options)

    def get(self, path: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
        status, body, _ = self.ask("GET", path, None, headers)
        return status, body

    def post(self, path: str, body: object, headers: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
        """`body` as JSON, or as it is when it is bytes."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, text, _ = self.ask("POST", path, raw, {"Content-Type": "application/json", **(headers or {})})
        return status, json.loads(text)

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, str, Message]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with closing(connection):
            if self.uds:
                connection.sock = socket.socket(socket.AF_UNIX)
                connection.sock.connect(self.uds)
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, response.read().decode(), response.headers

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 10) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline_s, self.log
            time.sleep(0.005)

    def wait_health(self, state: str, timeout_s: float = 20) -> None:
        deadline_s = time.monotonic() + timeout_s
        found = None
        while found != state:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline_s, f"{found}, not {state}\n{self.log}"
            with suppress(ConnectionError, FileNotFoundError):
                found = json.loads(self.get("/health")[1])["status"]
            time.sleep(0.02)


@contextmanager
def start_frontend(*, inherits: bool = True, wrapper: Sequence[str] = (), **options: Any) -> Iterator[Frontend]:
    """A frontend with these `Options`, ready; it must end cleanly on SIGTERM.

    Args:
        inherits: whether it is given its listening socket, or opens it by itself.
        wrapper: a program with its arguments, which starts it.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runtime_dir = folder / "run"
        runtime_dir.mkdir(mode=0o700)
        listener = Listener("127.0.0.1", 0)
        chosen = {"model": MODEL, "port": listener.port, "runtime_dir": str(runtime_dir)} | options
        path = configuration.write(resolve(Options(**chosen)))
        core = FakeCore(str(runtime_dir))
        process = launch(path, listener, folder / "stderr", inherits=inherits, wrapper=wrapper)
        frontend = Frontend(process, core, listener.port, folder, chosen.get("uds", ""))
        try:
            frontend.wait_health("ok")
            yield frontend
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                assert process.wait(20) == 0, frontend.log
        finally:
            process.kill()
            process.wait()
            core.die()


@contextmanager
def start_sibling(frontend: Frontend) -> Iterator[Frontend]:
    """One more frontend of the same server, on a socket of its own."""
    listener = Listener("127.0.0.1", 0)
    process = launch(str(frontend.folder / "run" / "config.json"), listener, frontend.folder / "stderr2", rank=1)
    sibling = Frontend(process, frontend.core, listener.port, frontend.folder)
    try:
        sibling.wait_health("ok")
        yield sibling
    finally:
        process.kill()
        process.wait()


def launch(
    config_path: str,
    listener: Listener,
    log: Path,
    *,
    inherits: bool = True,
    rank: int = 0,
    wrapper: Sequence[str] = (),
) -> subprocess.Popen[bytes]:
    """Start the process, which gets the listener's sockets or nothing; the listener is closed here."""
    descriptors = listener.descriptors() if inherits else []
    command = [*wrapper, sys.executable, "-m", "cableway.frontend.main", "--config", config_path, "--rank", str(rank)]
    command += [flag for fd in descriptors for flag in ("--listen-fd", str(fd))]
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, pass_fds=descriptors, stderr=stderr, stdin=subprocess.DEVNULL, cwd=os.sep)
    listener.close()
    return process
