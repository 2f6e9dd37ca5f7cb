"""POST /v1/chat/completions through the real client."""

import json
import socket
from typing import Any

import openai
import pytest

from cableway.ipc.messages import Failed
from tests.frontend.running import EOS_ID, MODEL, TOKENIZER, Frontend, says

USER = [{"role": "user", "content": "Hello"}]
TEXT = "Héllo 👋 wörld, 日本語 🇫🇷!"


def create(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=USER, **fields)


def prompt_of(frontend: Frontend) -> str:
    prompt = memoryview(frontend.core.generates[-1].prompt).cast("i").tolist()
    return TOKENIZER.decode(prompt, skip_special_tokens=False)


def test_whole(frontend: Frontend, client: openai.OpenAI) -> None:
    frontend.core.script = says(TEXT)
    answer = create(client)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == MODEL
    assert answer.system_fingerprint.startswith("fp_")
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", TEXT, "stop")
    assert choice.logprobs is None
    num_prompt = len(frontend.core.generates[-1].prompt) // 4
    num_made = len(TOKENIZER.encode(TEXT)) + 1
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
        num_prompt,
        num_made,
        num_prompt + num_made,
    )
    assert usage.prompt_tokens_details.cached_tokens == 3


def test_streamed(frontend: Frontend, client: openai.OpenAI) -> None:
    frontend.core.script = says(TEXT)
    frontend.core.step_s = 0.002  # a chunk a token, or nearly
    chunks = list(create(client, stream=True, stream_options={"include_usage": True}))
    *deltas, usage = chunks
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert deltas[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in deltas[1:])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in deltas) == TEXT
    assert not any("�" in (chunk.choices[0].delta.content or "") for chunk in deltas)
    assert len(deltas) > 5
    reasons = [chunk.choices[0].finish_reason for chunk in deltas]
    assert reasons == [None] * (len(deltas) - 1) + ["stop"]
    assert all(chunk.usage is None for chunk in deltas)
    assert usage.choices == []
    assert usage.usage.completion_tokens == len(TOKENIZER.encode(TEXT)) + 1


def test_the_stream_on_the_wire(frontend: Frontend) -> None:
    frontend.core.script = says('a "quoted"\nline')
    body = {"model": MODEL, "messages": USER, "stream": True}
    status, text, headers = frontend.ask("POST", "/v1/chat/completions", json.dumps(body).encode())
    assert status == 200
    assert headers["Content-Type"].startswith("text/event-stream")
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert all({"id", "object", "created", "model", "choices"} <= chunk.keys() for chunk in chunks)
    assert all("usage" not in chunk for chunk in chunks)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == 'a "quoted"\nline'


def test_a_stream_to_an_old_client(frontend: Frontend) -> None:
    """HTTP/1.0 knows no chunks: the body is the events, and ends with the connection."""
    frontend.core.script = says(TEXT)
    frontend.core.step_s = 0.002
    body = json.dumps({"model": MODEL, "messages": USER, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", frontend.port), timeout=10) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        received = b""
        while data := connection.recv(4096):
            received += data
    head, _, events = received.partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower()
    lines = [line for line in events.split(b"\n") if line]
    assert all(line.startswith(b"data: ") for line in lines)
    assert lines[-1] == b"data: [DONE]"
    chunks = [json.loads(line[6:]) for line in lines[:-1]]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == TEXT


def test_the_role_comes_though_the_first_token_is_half_a_character(frontend: Frontend, client: openai.OpenAI) -> None:
    half = TOKENIZER.encode("👋")
    assert len(half) > 1
    frontend.core.script = says("👋")
    frontend.core.step_s = 0.2
    stream = create(client, stream=True)
    first = next(iter(stream))
    assert first.choices[0].delta.role == "assistant"
    assert first.choices[0].delta.content == ""
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "👋"


def test_several_choices(frontend: Frontend, client: openai.OpenAI) -> None:
    texts = ["one", "and two", "three, at last"]
    frontend.core.script = lambda _, choice: [*TOKENIZER.encode(texts[choice]), EOS_ID]
    answer = create(client, n=3)
    assert [choice.message.content for choice in answer.choices] == texts
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    num_made = sum(len(TOKENIZER.encode(text)) + 1 for text in texts)
    assert answer.usage.completion_tokens == num_made
    assert answer.usage.prompt_tokens == len(frontend.core.generates[-1].prompt) // 4
    streamed = ["", "", ""]
    roles = set()
    for chunk in create(client, n=3, stream=True):
        (choice,) = chunk.choices
        if choice.delta.role:
            assert not streamed[choice.index]
            roles.add(choice.index)
        streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    assert roles == {0, 1, 2}


def test_length(frontend: Frontend, client: openai.OpenAI) -> None:
    frontend.core.script = says("one two three four five six seven eight")
    assert create(client, max_tokens=3).choices[0].finish_reason == "length"
    answer = create(client, max_completion_tokens=2, max_tokens=5)
    assert answer.usage.completion_tokens == 2
    assert answer.choices[0].message.content == "one two"


def test_without_a_limit_all_that_fits(frontend: Frontend, client: openai.OpenAI) -> None:
    frontend.core.script = says("x")
    create(client)
    generate = frontend.core.generates[-1]
    limit = json.loads(frontend.get("/v1/models")[1])["data"][0]["max_model_len"]
    assert generate.sampling.max_tokens == limit - len(generate.prompt) // 4


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_across_tokens(frontend: Frontend, client: openai.OpenAI, stream: bool) -> None:
    frontend.core.script = lambda *_: TOKENIZER.encode("alpha beta gam") + TOKENIZER.encode("ma delta epsilon")
    frontend.core.step_s = 0.001

    def ask(**fields: Any) -> tuple[str, str]:
        if not stream:
            choice = create(client, max_tokens=500, **fields).choices[0]
            return choice.message.content, choice.finish_reason
        chunks = list(create(client, max_tokens=500, stream=True, **fields))
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks), chunks[-1].choices[0].finish_reason

    assert ask(stop="gamma") == ("alpha beta ", "stop")
    assert ask(stop=["nothing", "a del"]) == ("alpha beta gamm", "stop")
    assert ask(stop=["gamma"], extra_body={"include_stop_str_in_output": True}) == ("alpha beta gamma", "stop")
    # The engine is told at once; otherwise it would go on to 500 tokens.
    frontend.wait_for(lambda: len(frontend.core.aborted) == 3)


def test_a_stop_string_is_not_looked_for_in_the_first_tokens(frontend: Frontend, client: openai.OpenAI) -> None:
    frontend.core.script = says("x end y end z")
    answer = create(client, stop="end", extra_body={"min_tokens": 3})
    assert answer.choices[0].message.content == "x end y "


def test_stop_tokens(frontend: Frontend, client: openai.OpenAI) -> None:
    (stop_id,) = TOKENIZER.encode(" three")
    frontend.core.script = says("one two three four")
    choice = create(client, extra_body={"stop_token_ids": [stop_id]}).choices[0]
    assert (choice.message.content, choice.finish_reason, choice.stop_reason) == ("one two", "stop", stop_id)
    choice = create(client, extra_body={"stop_token_ids": [stop_id], "include_stop_str_in_output": True}).choices[0]
    assert choice.message.content == "one two three"


def test_special_tokens(frontend: Frontend, client: openai.OpenAI) -> None:
    frontend.core.script = says("a<|im_start|>b")
    assert create(client).choices[0].message.content == "ab"
    kept = create(client, extra_body={"skip_special_tokens": False}).choices[0].message.content
    assert kept == "a<|im_start|>b"


def test_logprobs(frontend: Frontend, client: openai.OpenAI) -> None:
    text = "Hi 👋 there"
    frontend.core.script = says(text)
    whole = create(client, logprobs=True, top_logprobs=2).choices[0]
    chunks = [chunk.choices[0] for chunk in create(client, logprobs=True, top_logprobs=2, stream=True)]
    streamed = [entry for chunk in chunks if chunk.logprobs for entry in chunk.logprobs.content]
    assert streamed == whole.logprobs.content
    assert len(streamed) == len(TOKENIZER.encode(text))
    assert bytes(byte for entry in streamed for byte in entry.bytes).decode() == text
    for entry, token_id in zip(streamed, TOKENIZER.encode(text), strict=True):
        assert entry.token == TOKENIZER.token_text(token_id)
        assert entry.logprob == -0.5
        assert [top.logprob for top in entry.top_logprobs] == [-0.25, -1.25]
        assert entry.top_logprobs[0].token == TOKENIZER.token_text(token_id + 1)
    assert create(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_logprobs_of_what_a_stop_string_cut_off_are_not_told(frontend: Frontend, client: openai.OpenAI) -> None:
    frontend.core.script = says("alpha beta gamma delta")
    for stop, content, tokens in (
        ("gamma", "alpha beta ", ["alpha", " beta", " gamma"]),  # the last one began in the text
        (" gamma", "alpha beta", ["alpha", " beta"]),
        ("ta gam", "alpha be", ["alpha", " beta"]),
    ):
        choice = create(client, logprobs=True, stop=stop).choices[0]
        assert choice.message.content == content
        assert [entry.token for entry in choice.logprobs.content] == tokens
    told = [
        entry.token
        for chunk in create(client, logprobs=True, stop=["gamma delta!"], stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert "".join(told) == "alpha beta gamma delta"


def test_prompt_logprobs(frontend: Frontend, client: openai.OpenAI) -> None:
    frontend.core.script = says("x")
    answer = create(client, extra_body={"prompt_logprobs": 1, "return_token_ids": True})
    assert answer.prompt_logprobs[0] is None
    assert len(answer.prompt_logprobs) == len(answer.prompt_token_ids)
    for token_id, entry in zip(answer.prompt_token_ids[1:], answer.prompt_logprobs[1:], strict=True):
        own, other = entry[str(token_id)], entry[str(token_id + 1)]
        assert own == {"logprob": -0.5, "rank": 2, "decoded_token": TOKENIZER.token_text(token_id)}
        assert other["rank"] == 1
    assert answer.choices[0].token_ids == [*TOKENIZER.encode("x"), EOS_ID]


def test_the_prompt_is_the_template_s(frontend: Frontend, client: openai.OpenAI) -> None:
    frontend.core.script = says("x")
    client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        ],
    )
    assert prompt_of(frontend) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_message_is_continued(frontend: Frontend, client: openai.OpenAI) -> None:
    frontend.core.script = says(" end")
    client.chat.completions.create(
        model=MODEL,
        messages=[*USER, {"role": "assistant", "content": "The beginning, the"}],
        extra_body={"add_generation_prompt": False, "continue_final_message": True},
    )
    assert prompt_of(frontend).endswith("<|im_start|>assistant\nThe beginning, the")
    create(client, extra_body={"add_generation_prompt": False})
    assert prompt_of(frontend).endswith("Hello<|im_end|>\n")


def test_what_the_engine_refuses_has_a_status(frontend: Frontend, client: openai.OpenAI) -> None:
    frontend.core.refuses = Failed(0, 429, "queue_full", "The queue is full.")
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError) as caught:
            create(client, stream=stream)
        assert caught.value.code == "queue_full"
        assert caught.value.response.headers["Retry-After"] == "1"
    frontend.core.refuses = Failed(0, 500, "quarantined", "It kills workers.")
    with pytest.raises(openai.InternalServerError):
        create(client)


def test_an_error_amid_a_stream(frontend: Frontend, client: openai.OpenAI) -> None:
    frontend.core.script = says("word " * 50)
    frontend.core.step_s = 0.01
    stream = create(client, stream=True)
    next(iter(stream))
    frontend.core.fails = True
    with pytest.raises(openai.APIError, match="it broke"):
        list(stream)
