"""A server that gives its memory back for a while: what waits, what is known meanwhile, and what a death changes."""

import json
import os
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.server import Server, serve, wait_for

pytestmark = pytest.mark.timeout(300)
KEY = "secret"
TIMEOUT_S = 60


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    flags = "--frontends", "2", "--api-key", KEY, "--max-model-len", "512", "--num-threads", "1"
    with serve("--enable-sleep-mode", *flags) as running:
        yield running


def call(server: Server, path: str, *, post: bool = False, key: str = KEY) -> tuple[int, Any]:
    request = urllib.request.Request(server.base_url + path, method="POST" if post else "GET")
    request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            body = response.read()
            return response.status, json.loads(body) if body else None
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def is_sleeping(server: Server) -> bool:
    return call(server, "/is_sleeping")[1]["is_sleeping"]


class Stream(threading.Thread):
    """A greedy completion, read as it comes."""

    def __init__(self, server: Server, num_tokens: int = 120) -> None:
        super().__init__()
        self._client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key=KEY, max_retries=0, timeout=TIMEOUT_S)
        self._num_tokens = num_tokens
        self.text, self.finish = "", ""
        self.start()

    def run(self) -> None:
        settings = {"max_tokens": self._num_tokens, "temperature": 0, "extra_body": {"ignore_eos": True}}
        for chunk in self._client.completions.create(model="smollm2-135m", prompt="The sea", stream=True, **settings):
            self.text += chunk.choices[0].text
            self.finish = chunk.choices[0].finish_reason or self.finish

    def wait(self) -> str:
        self.join(TIMEOUT_S)
        assert self.finish == "length"
        return self.text


def test_requests_wait_until_the_engine_is_awake(server: Server):
    expected = Stream(server).wait()
    running = Stream(server)
    wait_for(lambda: running.text or None, TIMEOUT_S, lambda: "no token came")
    assert call(server, "/sleep", post=True) == (200, None)
    assert call(server, "/sleep?level=1", post=True)[0] == 200  # as it is already
    assert is_sleeping(server)
    late = Stream(server)
    late.join(0.5)  # what was under way to the reader has arrived by then
    so_far = running.text
    assert so_far != expected
    late.join(0.5)
    assert (late.text, running.text) == ("", so_far)
    status, health = call(server, "/health")
    assert (status, health["status"]) == (503, "asleep")
    assert call(server, "/wake_up", post=True) == (200, None)
    assert not is_sleeping(server)
    assert running.wait() == late.wait() == expected


@pytest.mark.parametrize("role", ["enginecore", "worker"])
def test_a_death_wakes_nobody(server: Server, role: str):
    expected = Stream(server, 40).wait()
    assert call(server, "/sleep", post=True)[0] == 200
    (before,) = server.pids(role)
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: server.pids(role) not in ([], [before]) or None, TIMEOUT_S, lambda: "it was not restarted")
    waiting = Stream(server, 40)
    wait_for(lambda: is_sleeping(server) or None, TIMEOUT_S, lambda: server.errors)
    waiting.join(0.5)
    assert waiting.text == ""
    assert call(server, "/wake_up", post=True)[0] == 200
    assert waiting.wait() == expected


def test_only_with_the_key(server: Server):
    for path in ("/sleep", "/wake_up"):
        assert call(server, path, post=True, key="wrong")[0] == 401
    assert call(server, "/is_sleeping", key="wrong")[0] == 401
    assert not is_sleeping(server)


def test_there_is_one_level(server: Server):
    status, body = call(server, "/sleep?level=2", post=True)
    assert (status, body["error"]["param"]) == (400, "level")
    assert not is_sleeping(server)


def test_what_is_counted(server: Server):
    request = urllib.request.Request(server.base_url + "/metrics", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        lines = response.read().decode().splitlines()
    assert 'cableway:engine_sleep_state{model_name="smollm2-135m"} 0.0' in lines
    assert 'cableway:kernel_compilations_after_ready_total{model_name="smollm2-135m"} 0.0' in lines
