"""Keys, hosts, origins, request ids and what the log says."""

import json
from collections.abc import Iterator

import openai
import pytest

from tests.frontend.running import MODEL, Frontend, says, start_frontend

KEYS = ["first-key", "second-key"]
SECRET_TEXT = "a very private sentence"
ROUTES = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", f"/v1/models/{MODEL}"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/metrics"),
    ("GET", "/version"),
    ("GET", "/nothing"),
    ("GET", "/health/more"),
    ("DELETE", "/v1/models"),
]


@pytest.fixture(scope="module")
def guarded() -> Iterator[Frontend]:
    options = {
        "api_key": KEYS,
        "allowed_origins": ["https://friend.example"],
        "allowed_hosts": ["Cableway.example"],
    }
    with start_frontend(**options) as frontend:
        yield frontend


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer ", "Bearer first-key second-key", "Basic first-key"])
def test_every_route_needs_a_key(guarded: Frontend, method: str, path: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    status, body, answered = guarded.ask(method, path, b"{}" if method == "POST" else None, headers)
    assert status == 401
    assert json.loads(body)["error"]["code"] == "invalid_api_key"
    assert answered["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("key", KEYS)
def test_any_of_the_keys_will_do(guarded: Frontend, key: str) -> None:
    with guarded.client(key) as client:
        assert client.models.list().data[0].id == MODEL
        assert client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x"}], max_tokens=2)


def test_health_needs_none(guarded: Frontend) -> None:
    assert guarded.get("/health")[0] == 200


def test_the_client_sees_a_bad_key(guarded: Frontend) -> None:
    with guarded.client("wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "my-machine:8000", "127.0.0.1:8000", "127.9.9.9", "[::1]:8000"]
)
def test_hosts_that_are_ours(frontend: Frontend, host: str) -> None:
    assert frontend.get("/version", {"Host": host})[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "8.8.8.8", "[::2]"]
)
def test_hosts_that_are_not(frontend: Frontend, host: str) -> None:
    """A page whose name was pointed at 127.0.0.1 sends its own name."""
    status, body = frontend.get("/version", {"Host": host})
    assert status == 403
    assert json.loads(body)["error"]["code"] == "host_not_allowed"


def test_hosts_that_were_allowed(guarded: Frontend) -> None:
    headers = {"Host": "cableway.example", "Authorization": f"Bearer {KEYS[0]}"}
    assert guarded.get("/version", headers)[0] == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost:1", "https://friend.example.evil"]
)
def test_pages_of_other_origins_are_refused(frontend: Frontend, origin: str) -> None:
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "x"}]}).encode()
    headers = {"Origin": origin, "Content-Type": "text/plain"}
    status, text, answered = frontend.ask("POST", "/v1/chat/completions", body, headers)
    assert status == 403
    assert json.loads(text)["error"]["code"] == "origin_not_allowed"
    assert answered["Access-Control-Allow-Origin"] is None
    assert frontend.core.generates == []
    preflight = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    assert frontend.ask("OPTIONS", "/v1/chat/completions", None, preflight)[0] == 403


def test_our_own_pages_are_let_in(frontend: Frontend) -> None:
    assert frontend.get("/version", {"Origin": frontend.url})[0] == 200


def test_an_allowed_origin(guarded: Frontend) -> None:
    origin = "https://friend.example"
    preflight = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    status, _, answered = guarded.ask("OPTIONS", "/v1/chat/completions", None, preflight)
    assert status == 204
    assert answered["Access-Control-Allow-Origin"] == origin
    assert answered["Access-Control-Allow-Headers"] == "authorization,content-type"
    guarded.core.script = says("hi")
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "stream": True}
    headers = {"Origin": origin, "Authorization": f"Bearer {KEYS[1]}"}
    for method, path, raw in (("POST", "/v1/chat/completions", json.dumps(body).encode()), ("GET", "/nothing", None)):
        status, _, answered = guarded.ask(method, path, raw, headers)
        assert answered["Access-Control-Allow-Origin"] == origin
        assert answered["Vary"] == "Origin"
    refused = guarded.ask("GET", "/version", None, {"Origin": origin})
    assert refused[0] == 401


def test_the_log_has_a_line_a_request_and_no_secrets(guarded: Frontend) -> None:
    guarded.core.script = says(SECRET_TEXT)
    with guarded.client(KEYS[0]) as client:
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": SECRET_TEXT}],
            extra_headers={"X-Request-Id": "log-me"},
            extra_query={"token": "secret-in-query"},
        )
    guarded.get(f"/version?key={KEYS[0]}", {"Authorization": "Bearer not-a-key"})
    lines = [json.loads(line) for line in guarded.log.splitlines()]
    (line,) = [line for line in lines if line.get("request_id") == "log-me"]
    assert line["event"] == "request"
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/chat/completions", 200)
    assert line["completion_tokens"] > 0
    assert line["prompt_tokens"] > 0
    assert line["first_token_s"] <= line["seconds"]
    for secret in (*KEYS, SECRET_TEXT, "private", "secret-in-query", "not-a-key"):
        assert secret not in guarded.log


def test_a_handler_s_own_fault_is_told_and_logged(frontend: Frontend) -> None:
    """The log-probabilities of another width than were asked for are no client's fault."""
    frontend.core.loses_logprobs = True
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "logprobs": True, "max_tokens": 3}
    status, answer = frontend.post("/v1/chat/completions", body)
    assert status == 500
    assert answer["error"]["type"] == "server_error"
    assert "Traceback" in frontend.log
    assert frontend.post("/v1/chat/completions", body | {"stream": True})[0] == 500
    assert frontend.get("/health")[0] == 200
