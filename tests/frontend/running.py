"""A real frontend process in front of a fake engine core."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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

    def __init__(self, process: subprocess.Popen[bytes], core: FakeCore, port: int, folder: Path):
        self.process = process
        self.core = core
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.folder = folder

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
        request = urllib.request.Request(self.url + path, body, headers or {}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=20) as response:
                return response.status, response.read().decode(), response.headers
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode(), error.headers

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
            with suppress(ConnectionError):
                found = json.loads(self.get("/health")[1])["status"]
            time.sleep(0.02)


@contextmanager
def start_frontend(**options: object) -> Iterator[Frontend]:
    """`Options` by name; the process is ready, and must end cleanly on SIGTERM."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runtime_dir = folder / "run"
        runtime_dir.mkdir(mode=0o700)
        listener = Listener("127.0.0.1", 0)
        config = resolve(Options(**{"model": MODEL, "port": listener.port, "runtime_dir": str(runtime_dir)} | options))
        path = configuration.write(config)
        core = FakeCore(str(runtime_dir))
        command = [sys.executable, "-m", "cableway.frontend.main", "--config", path]
        command += [flag for fd in listener.descriptors() for flag in ("--listen-fd", str(fd))]
        with (folder / "stderr").open("wb") as stderr:
            process = subprocess.Popen(
                command, pass_fds=listener.descriptors(), stderr=stderr, stdin=subprocess.DEVNULL, cwd=os.sep
            )
        listener.close()
        frontend = Frontend(process, core, listener.port, folder)
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
