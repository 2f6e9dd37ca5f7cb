"""A real frontend process in front of a fake engine core."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import openai
import pytest

from cableway.ipc import config as configuration
from cableway.ipc.config import Options
from cableway.ipc.listen import Listener
from cableway.ipc.resolve import resolve
from tests.frontend.fake_core import FakeCore

MODEL = "smollm2-135m"


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

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

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
        config = resolve(Options(model=MODEL, port=listener.port, runtime_dir=str(runtime_dir), **options))
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


@pytest.fixture(scope="session")
def shared_frontend() -> Iterator[Frontend]:
    with start_frontend() as frontend:
        yield frontend


@pytest.fixture
def frontend(shared_frontend: Frontend) -> Iterator[Frontend]:
    """One frontend for many tests; its core is as new for each."""
    core = shared_frontend.core
    fresh = core.__dict__.copy() | {"generates": [], "aborted": {}}
    core.generates, core.aborted = [], {}
    yield shared_frontend
    for name in ("script", "step_s", "tokens_a_step", "refuses", "is_ready", "is_silent", "step_age_s"):
        setattr(core, name, fresh[name])
    assert shared_frontend.process.poll() is None, shared_frontend.log


@pytest.fixture
def client(frontend: Frontend) -> Iterator[openai.OpenAI]:
    with frontend.client() as client:
        yield client
