"""Whatever a client sends, it gets OpenAI's error body and the server lives: see the `frontend` fixture."""

import gzip
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.frontend.running import EOS_ID, MODEL, TOKENIZER, Frontend, says, start_frontend

USER = [{"role": "user", "content": "Hello"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": USER, "max_tokens": 4} | fields


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "Hello", "max_tokens": 4} | fields


def error_of(answer: tuple[int, dict[str, Any]], status: int) -> dict[str, Any]:
    assert answer[0] == status, answer
    error: dict[str, Any] = answer[1]["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": []}, "temperature"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 10**30}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**18}, "max_tokens"),
        ({"max_tokens": 10**40}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 10**9}, "max_completion_tokens"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"seed": 10**30}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": -1}, "repetition_penalty"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias[...]"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"stop": ["x"] * 10_000}, "stop"),
        ({"stop": "x" * 100_000}, "stop"),
        ({"stop": ["ok", ""]}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop": {"a": 1}}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": list(range(1000))}, "stop_token_ids"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [5, 10**9]}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"allowed_token_ids": ["a"]}, "allowed_token_ids[0]"),
        ({"allowed_token_ids": [EOS_ID, 7], "min_tokens": 1, "stop_token_ids": [7]}, "allowed_token_ids"),
        ({"allowed_token_ids": TOKENIZER.encode("no"), "bad_words": ["no"]}, "allowed_token_ids"),
        ({"bad_words": "word"}, "bad_words"),
        ({"bad_words": [""]}, "bad_words[0]"),
        ({"bad_words": [" "]}, "bad_words"),
        ({"bad_words": [7]}, "bad_words[0]"),
        ({"bad_words": ["x"] * 300}, "bad_words"),
        ({"bad_words": ["x" * 300]}, "bad_words[0]"),
        ({"bad_words": ["q§" * 40]}, "bad_words"),
        ({"bad_words": ["\udc80"]}, None),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 5}, "logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 3}}, "stream_options.include_usage"),
        ({"priority": 2**40}, "priority"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"user": 7}, "user"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{}]}, "messages[0].role"),
        ({"messages": [*USER, {"role": 3}]}, "messages[1].role"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "\udc80"}]}, None),
        ({"chat_template_kwargs": {"add_generation_prompt": 1}}, "chat_template_kwargs.add_generation_prompt"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
        ({"model": 3}, "model"),
        ({"model": None}, "model"),
    ],
)
def test_fields_that_do_not_fit_chat(frontend: Frontend, fields: dict[str, Any], param: str | None) -> None:
    error = error_of(frontend.post(CHAT, chat(**fields)), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert frontend.core.generates == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[1], "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"prompt": [2**70]}, "prompt"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"prompt": [[1, "a"]]}, "prompt[0][1]"),
        ({"prompt": None}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a"] * 2000}, "prompt"),
        ({"prompt": ["a"] * 500, "n": 100}, "prompt"),
        ({"prompt": [5] * 4000, "n": 128, "echo": True, "logprobs": 20}, "logprobs"),
        ({"prompt": [5] * 4000, "n": 128, "prompt_logprobs": 20}, "prompt_logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"best_of": 21}, "best_of"),
        ({"max_tokens": -5}, "max_tokens"),
    ],
)
def test_fields_that_do_not_fit_completions(frontend: Frontend, fields: dict[str, Any], param: str) -> None:
    assert error_of(frontend.post(COMPLETIONS, completion(**fields)), 400)["param"] == param
    assert frontend.core.generates == []


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"functions": [{"name": "f"}]},
        {"function_call": {"name": "f"}},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
        {"guided_json": {"type": "object"}},
        {"guided_regex": "a+"},
        {"guided_choice": ["a"]},
        {"guided_grammar": "root ::= 'a'"},
        {"structured_outputs": {"regex": "a"}},
        {"audio": {"voice": "alloy"}},
        {"modalities": ["text", "audio"]},
        {"prediction": {"type": "content", "content": "x"}},
        {"web_search_options": {"x": 1}},
        {"store": True},
        {"use_beam_search": True},
        {"truncate_prompt_tokens": 5},
        {"chat_template": "{{ messages }}"},
    ],
)
def test_known_fields_that_are_not_served_are_never_passed_over(frontend: Frontend, fields: dict[str, Any]) -> None:
    error = error_of(frontend.post(CHAT, chat(**fields)), 400)
    assert error["param"] == next(iter(fields))
    assert error["code"] == "unsupported_parameter"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]},
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]},
        {"role": "tool", "content": "x", "tool_call_id": "1"},
        {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f"}}]},
    ],
)
def test_messages_that_are_not_served(frontend: Frontend, message: dict[str, Any]) -> None:
    error = error_of(frontend.post(CHAT, chat(messages=[message])), 400)
    assert error["code"] == "unsupported_parameter"
    assert error["param"].startswith("messages[0]")


@pytest.mark.parametrize("fields", [{"suffix": "x"}, {"best_of": 3, "n": 2}, {"prompt_embeds": "AAAA"}])
def test_completions_fields_that_are_not_served(frontend: Frontend, fields: dict[str, Any]) -> None:
    error = error_of(frontend.post(COMPLETIONS, completion(**fields)), 400)
    assert (error["param"], error["code"]) == (next(iter(fields)), "unsupported_parameter")


def test_harmless_forms_of_what_is_not_served(frontend: Frontend) -> None:
    frontend.core.script = says("x")
    fields = {
        "response_format": {"type": "text"}, "tools": [], "tool_choice": "auto", "modalities": ["text"],
        "best_of": 1, "store": False, "parallel_tool_calls": True, "some_unknown_field": {"deep": [1]},
    }  # fmt: skip
    assert frontend.post(CHAT, chat(**fields))[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"not json",
        b"[]",
        b"null",
        b'"text"',
        b'{"model": "m", "messages": [}',
        b'{"temperature": NaN}',
        b'{"temperature": Infinity}',
        b'{"temperature": 1e999}',
        b'{"model": "\xff"}',
        b'{"unknown": "\xff\xfe"}',
        b'{"model": "\\ud800"}',
        b"\x00\x01\x02",
        b"[" * 100_000,
        b'{"unknown": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"chat_template_kwargs": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
        b'{"seed": ' + b"9" * 100_000 + b"}",
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
def test_bodies_that_are_no_json_object(frontend: Frontend, path: str, body: bytes) -> None:
    error_of(frontend.post(path, body), 400)


def test_a_compressed_body(frontend: Frontend) -> None:
    body = gzip.compress(json.dumps(chat()).encode())
    error = error_of(frontend.post(CHAT, body, {"Content-Encoding": "gzip"}), 415)
    assert error["code"] == "unsupported_content_encoding"


def test_unknown_model(frontend: Frontend) -> None:
    for path, body in ((CHAT, chat(model="gpt-9")), (COMPLETIONS, completion(model="gpt-9"))):
        error = error_of(frontend.post(path, body), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_a_prompt_that_is_too_long(frontend: Frontend) -> None:
    limit = json.loads(frontend.get("/v1/models")[1])["data"][0]["max_model_len"]
    for path, body in (
        (CHAT, chat(messages=[{"role": "user", "content": "word " * 3 * limit}])),
        (COMPLETIONS, completion(prompt="word " * 3 * limit)),
        (COMPLETIONS, completion(prompt=[5] * limit)),
        (COMPLETIONS, completion(prompt=[5] * (limit - 3), max_tokens=4)),
    ):
        error = error_of(frontend.post(path, body), 400)
        assert error["code"] == "context_length_exceeded"
        assert str(limit) in error["message"]
    fits = completion(prompt=[5] * (limit - 3), max_tokens=3)
    assert frontend.post(COMPLETIONS, fits)[0] == 200


def test_unknown_routes_and_methods(frontend: Frontend) -> None:
    assert error_of(frontend.post("/v1/nothing", {}), 404)["code"] == "not_found"
    status, body, headers = frontend.ask("GET", CHAT)
    assert error_of((status, json.loads(body)), 405)["code"] == "method_not_allowed"
    assert headers["Allow"] == "POST"


def test_a_body_of_fifty_megabytes(frontend: Frontend) -> None:
    error_of(frontend.post(CHAT, b'{"x": "' + b"x" * 50_000_000 + b'"}'), 413)


def test_a_chunked_body_without_end(frontend: Frontend) -> None:
    with raw(frontend) as connection:
        connection.sendall(
            b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
        try:
            for _ in range(40):
                connection.sendall(chunk)
        except ConnectionError:
            pass  # it need not read on once it has answered
        assert read_all(connection).startswith(b"HTTP/1.1 413")


def test_bytes_that_are_no_http(frontend: Frontend) -> None:
    for nonsense in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\r\n\r\nx y z\r\n\r\n",
    ):
        with raw(frontend) as connection:
            connection.sendall(nonsense)
            connection.shutdown(socket.SHUT_WR)
            answer = read_all(connection)
            assert not answer or b" 400 " in answer.split(b"\r\n")[0]
    with raw(frontend) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 100_000 + b"\r\n\r\n")
        answer = read_all(connection)
        assert b" 400 " in answer.split(b"\r\n")[0]
        assert error_of((400, json.loads(answer.partition(b"\r\n\r\n")[2])), 400)["code"] == "invalid_http"
        assert b"\r\nServer: cableway\r\n" in answer


def test_a_half_closed_socket(frontend: Frontend) -> None:
    """A client that promises a body and stops sending leaves nothing behind."""
    with raw(frontend) as connection:
        connection.sendall(b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        connection.shutdown(socket.SHUT_WR)
        assert b" 200 " not in read_all(connection)
    frontend.wait_for(lambda: json.loads(frontend.get("/health")[1])["frontend"]["active_requests"] == 0)


@pytest.fixture(scope="module")
def hasty() -> Iterator[Frontend]:
    """A frontend of little patience."""
    with start_frontend(header_timeout_s=0.5, idle_timeout_s=1.0) as frontend:
        yield frontend


def test_slow_heads_and_bodies(hasty: Frontend) -> None:
    with raw(hasty) as head, raw(hasty) as body, raw(hasty) as idle:
        body.sendall(b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
        began_s = time.monotonic()
        head.sendall(b"GET /health HTTP/1.1\r\n")
        for connection in (head, body):
            try:
                while time.monotonic() < began_s + 0.4:
                    connection.sendall(b"X" if connection is body else b"X-Slow: 1\r\n")
                    time.sleep(0.1)
            except ConnectionError:
                pass
        for connection in (head, body):
            answer = read_all(connection)
            assert answer.startswith(b"HTTP/1.1 408")
            error_of((408, json.loads(answer.partition(b"\r\n\r\n")[2])), 408)
        assert read_all(idle) == b""
        assert time.monotonic() - began_s < 5
    assert hasty.get("/health")[0] == 200


def test_a_slow_head_on_a_kept_connection(hasty: Frontend) -> None:
    with raw(hasty) as connection:
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /version HT")
        assert read_all(connection).startswith(b"HTTP/1.1 408")


def test_a_template_that_raises_or_loops(tmp_path: Any) -> None:
    for source in (
        "{{ raise_exception('no') }}",
        "{% for i in range(100000000) %}{% for j in range(100000000) %}x{% endfor %}{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{{ nothing.of.the.kind }}",
    ):
        path = tmp_path / "template.jinja"
        path.write_text(source)
        with start_frontend(chat_template=str(path)) as frontend:
            assert error_of(frontend.post(CHAT, chat()), 400)["code"] == "chat_template_error"
            assert frontend.post(COMPLETIONS, completion())[0] == 200


def test_more_connections_than_it_can_have() -> None:
    """Those too many are closed at once; the others, the core's and the log's are not touched."""
    with start_frontend(wrapper=["prlimit", "--nofile=150:150"]) as frontend:
        connections = [raw(frontend) for _ in range(200)]
        time.sleep(0.2)
        num_closed = 0
        for connection in connections:
            connection.setblocking(False)
            try:
                num_closed += connection.recv(1) == b""
            except BlockingIOError:
                pass
            except ConnectionError:
                num_closed += 1
        assert 100 < num_closed < 150
        for connection in connections:
            connection.close()
        frontend.wait_health("ok")
        assert frontend.post(COMPLETIONS, completion())[0] == 200


def raw(frontend: Frontend) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", frontend.port), timeout=10)
    connection.settimeout(10)
    return connection


def read_all(connection: socket.socket) -> bytes:
    received = b""
    try:
        while data := connection.recv(1 << 16):
            received += data
            head, separator, body = received.partition(b"\r\n\r\n")
            if separator and b"Content-Length: %d" % len(body) in head:
                break
    except ConnectionError:
        pass
    return received
