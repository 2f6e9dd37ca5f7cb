"""Clients that leave, health, metrics, drain, a core that dies, sockets of other kinds."""

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.frontend.running import MODEL, TOKENIZER, Frontend, says, start_frontend, start_sibling

USER: Any = [{"role": "user", "content": "Hello"}]
LONG = "word " * 400


def streamed(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=USER, stream=True, **fields)


@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_is_aborted_within_a_step(frontend: Frontend, n: int) -> None:
    frontend.core.script = says(LONG)
    frontend.core.step_s = 0.02
    with frontend.client() as client:
        stream = streamed(client, n=n)
        next(iter(stream))
        assert frontend.core.num_live == n
        left_s = time.monotonic()
        stream.close()
    frontend.wait_for(lambda: len(frontend.core.aborted) == n)
    assert max(frontend.core.aborted.values()) - left_s < 0.5
    assert frontend.core.num_live == 0


def test_many_may_knock_at_once(frontend: Frontend) -> None:
    """A connection that finds no place to wait asks again after a second, then three, then seven."""
    os.kill(frontend.process.pid, signal.SIGSTOP)
    knocking = [socket.socket() for _ in range(300)]
    try:
        for one in knocking:
            one.settimeout(0.5)
            one.connect(("127.0.0.1", frontend.port))
    finally:
        os.kill(frontend.process.pid, signal.SIGCONT)
        for one in knocking:
            one.close()


def test_a_client_that_leaves_before_its_answer(frontend: Frontend) -> None:
    frontend.core.script = says(LONG)
    frontend.core.step_s = 0.05
    body = json.dumps({"model": MODEL, "messages": USER}).encode()
    with socket.create_connection(("127.0.0.1", frontend.port)) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        frontend.wait_for(lambda: frontend.core.num_live == 1)
    frontend.wait_for(lambda: len(frontend.core.aborted) == 1)
    frontend.wait_for(lambda: '"status": 499' in frontend.log)


def test_a_reader_that_does_not_read_gets_all_at_the_end(frontend: Frontend) -> None:
    """Tokens wait in a mailbox and are merged: others go on, and nothing is lost."""
    text = "word " * 2000
    frontend.core.script = says(text)
    frontend.core.tokens_a_step = 50
    body = json.dumps({"model": MODEL, "messages": USER, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", frontend.port)) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        frontend.wait_for(lambda: len(frontend.core.generates) == 1 and frontend.core.num_live == 0)
        assert frontend.get("/version")[0] == 200
        received = b""
        while data := connection.recv(1 << 16):
            received += data
    texts = [
        json.loads(line[6:])["choices"][0]["delta"].get("content", "")
        for line in received.split(b"\n")
        if line.startswith(b"data: {")
    ]
    assert "".join(texts) == text


def test_health_tells_progress(frontend: Frontend) -> None:
    core = frontend.core
    status, text = frontend.get("/health")
    health = json.loads(text)
    assert (status, health["status"]) == (200, "ok")
    engine = health["engines"]["0"]
    assert (engine["steps"], engine["waiting"], engine["step_age_s"]) == (7, 5, 0.0)
    assert engine["worker_step_ages_s"] == [0.0]
    core.step_age_s = 1000.0
    frontend.wait_health("stuck")
    assert frontend.get("/health")[0] == 503
    core.step_age_s = 0.0
    core.is_ready = False
    frontend.wait_health("starting")
    assert frontend.get("/health")[0] == 503
    core.is_ready = True
    frontend.wait_health("ok")
    core.is_silent = True
    frontend.wait_health("stuck")
    core.is_silent = False
    frontend.wait_health("ok")


def metric(text: str, name: str, **labels: str) -> float:
    """The value of one sample of an exposition."""
    wanted = name + "{" + ",".join(f'{label}="{value}"' for label, value in sorted(labels.items())) + "} "
    (line,) = [line for line in text.splitlines() if line.startswith(wanted)]
    return float(line.removeprefix(wanted))


def test_metrics() -> None:
    with start_frontend(metrics_prefix="vllm") as frontend, frontend.client() as client:
        frontend.core.script = says("one two three")
        frontend.core.step_s = 0.005
        num = len(TOKENIZER.encode("one two three")) + 1
        client.completions.create(model=MODEL, prompt="a b", n=2)
        client.completions.create(model=MODEL, prompt="a b", max_tokens=2)
        list(streamed(client, max_tokens=50))
        text = frontend.get("/metrics")[1]
        model = {"model_name": MODEL}
        num_prompt = 2 * len(TOKENIZER.encode("a b")) + len(frontend.core.generates[-1].prompt) // 4
        assert metric(text, "vllm:prompt_tokens_total", **model) == num_prompt
        assert metric(text, "vllm:generation_tokens_total", **model) == 3 * num + 2
        assert metric(text, "vllm:request_success_total", finished_reason="stop", **model) == 3
        assert metric(text, "vllm:request_success_total", finished_reason="length", **model) == 1
        for name, count in (
            ("time_to_first_token_seconds", 3),
            ("e2e_request_latency_seconds", 3),
            ("request_queue_time_seconds", 4),
            ("request_prompt_tokens", 3),
            ("request_generation_tokens", 3),
        ):
            assert metric(text, f"vllm:{name}_count", **model) == count, name
        # Every token but the first of each choice has a gap before it, unless it came along with that.
        assert 0 < metric(text, "vllm:inter_token_latency_seconds_count", **model) <= 3 * (num - 1) + 1
        assert metric(text, "vllm:request_queue_time_seconds_sum", **model) == pytest.approx(4 * 0.25)
        assert metric(text, "vllm:request_generation_tokens_bucket", le="5.0", **model) == 2
        for name, value in (
            ("num_requests_waiting", 5),
            ("kv_cache_usage_perc", 0.5),
            ("prefix_cache_queries_total", 200),
            ("prefix_cache_hits_total", 80),
            ("num_preemptions_total", 2),
        ):
            assert metric(text, f"vllm:{name}", **model) == value, name
        assert metric(text, "vllm:num_requests_running", **model) == 0
        with start_sibling(frontend) as sibling:
            # Another frontend of the same server tells the same sums, and adds to them.
            assert metric(sibling.get("/metrics")[1], "vllm:prompt_tokens_total", **model) == num_prompt
            sibling.post("/v1/completions", {"model": MODEL, "prompt": [1, 2, 3]})
            for each in (frontend, sibling):
                assert metric(each.get("/metrics")[1], "vllm:prompt_tokens_total", **model) == num_prompt + 3


@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_outlives_its_core(frontend: Frontend, client: openai.OpenAI, n: int) -> None:
    text = "one two three four five six seven eight nine ten " * 4
    frontend.core.script = says(text)
    frontend.core.step_s = 0.01
    texts = [""] * n
    num_lives = 1
    for chunk in streamed(client, n=n):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        if len(texts[0]) > 40 * num_lives and num_lives < 4:
            frontend.core.die()
            frontend.core.live()
            num_lives += 1
    assert texts == [text] * n
    first, *resumed = frontend.core.generates
    assert len(resumed) >= 3
    assert not first.resumed
    assert all(generate.resumed and generate.prompt == first.prompt for generate in resumed)
    assert {generate.sampling.seed for generate in resumed} == {first.sampling.seed}
    outputs = [len(generate.choices[0].output) for generate in resumed]
    assert outputs == sorted(outputs)
    assert 0 < outputs[0] < outputs[-1]
    frontend.wait_health("ok")


def test_a_request_waits_for_a_core_that_is_away(frontend: Frontend, client: openai.OpenAI) -> None:
    frontend.core.script = says("here at last")
    frontend.core.die()
    frontend.wait_health("starting")
    answers: list[str] = []
    asking = threading.Thread(
        target=lambda: answers.append(
            client.chat.completions.create(model=MODEL, messages=USER).choices[0].message.content or ""
        )
    )
    asking.start()
    time.sleep(0.3)
    assert not answers
    frontend.core.live()
    asking.join(10)
    assert answers == ["here at last"]
    assert not frontend.core.generates[-1].resumed


def test_patience_and_memory_are_bounded_while_the_core_is_away() -> None:
    with start_frontend(step_timeout_s=1.5, max_queued_requests=2) as frontend, frontend.client() as client:
        frontend.core.die()
        frontend.wait_health("starting")
        failures: list[openai.APIStatusError] = []

        def ask() -> None:
            try:
                client.chat.completions.create(model=MODEL, messages=USER)
            except openai.APIStatusError as error:
                failures.append(error)

        asking = [threading.Thread(target=ask) for _ in range(3)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join(15)
        assert sorted(failure.status_code for failure in failures) == [429, 503, 503]
        assert {failure.code for failure in failures} == {"queue_full", "engine_unavailable"}
        assert all(failure.response.headers["Retry-After"] for failure in failures)
        frontend.core.live()
        frontend.wait_health("ok")
        assert client.chat.completions.create(model=MODEL, messages=USER, max_tokens=3)


def test_a_drain_lets_what_runs_end_and_nothing_begin() -> None:
    with start_frontend() as frontend, frontend.client() as client:
        text = "word " * 30
        frontend.core.script = says(text)
        frontend.core.step_s = 0.03
        stream = streamed(client)
        got = next(iter(stream)).choices[0].delta.content or ""
        frontend.process.send_signal(signal.SIGTERM)
        frontend.wait_health("draining")
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model=MODEL, messages=USER)
        assert caught.value.status_code == 503
        assert caught.value.code == "shutting_down"
        assert caught.value.response.headers["Retry-After"]
        status, _, headers = frontend.ask("GET", "/health")
        assert (status, headers["Connection"]) == (503, "close")
        got += "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert got == text
        assert frontend.process.wait(10) == 0


def test_a_second_signal_ends_it_at_once() -> None:
    with start_frontend() as frontend, frontend.client() as client:
        frontend.core.script = lambda *_: TOKENIZER.encode("word")
        frontend.core.step_s = 0.05
        stream = streamed(client)
        next(iter(stream))
        frontend.process.send_signal(signal.SIGTERM)
        frontend.wait_health("draining")
        time.sleep(1.1)
        frontend.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert frontend.process.wait(10) == 0


def test_a_drain_has_an_end() -> None:
    with start_frontend(drain_timeout_s=0.5) as frontend, frontend.client() as client:
        frontend.core.script = lambda *_: TOKENIZER.encode("word")
        frontend.core.step_s = 0.05
        stream = streamed(client)
        next(iter(stream))
        frontend.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert frontend.process.wait(10) == 0


def test_alone_on_a_unix_socket(tmp_path: Path) -> None:
    """Without inherited sockets it listens by itself; a name is no danger there, since no page reaches it."""
    path = tmp_path / "api.sock"
    with start_frontend(uds=str(path), inherits=False) as frontend:
        status, text = frontend.get("/v1/models", {"Host": "anything"})
        assert status == 200
        assert json.loads(text)["data"][0]["id"] == MODEL


def test_alone_on_a_port() -> None:
    with start_frontend(inherits=False) as frontend:
        assert frontend.get("/v1/models")[0] == 200
