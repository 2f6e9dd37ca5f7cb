"""Parameters reach the engine as they were meant, after the model's own defaults; ids, models, tokenize."""

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from cableway.ipc.messages import Sampling
from tests.frontend.running import EOS_ID, FILES, MODEL, TOKENIZER, Frontend, start_frontend

USER = [{"role": "user", "content": "Hello"}]


def sampling(frontend: Frontend, client: openai.OpenAI, **extra: Any) -> Sampling:
    client.chat.completions.create(model=MODEL, messages=USER, max_tokens=4, extra_body=extra)
    return frontend.core.generates[-1].sampling


def test_defaults(frontend: Frontend, client: openai.OpenAI) -> None:
    plain = sampling(frontend, client)
    assert (plain.temperature, plain.top_p, plain.top_k, plain.min_p) == (1.0, 1.0, 0, 0.0)
    assert (plain.presence_penalty, plain.frequency_penalty, plain.repetition_penalty) == (0.0, 0.0, 1.0)
    assert (plain.logprobs, plain.prompt_logprobs, plain.min_tokens, plain.logit_bias) == (-1, -1, 0, {})
    assert memoryview(plain.eos_token_ids).cast("i").tolist() == [EOS_ID]
    assert plain.seed != sampling(frontend, client).seed


def test_null_is_the_same_as_absent(frontend: Frontend, client: openai.OpenAI) -> None:
    names = ["temperature", "top_p", "top_k", "seed", "stop", "logit_bias", "n", "tools", "response_format", "user"]
    assert sampling(frontend, client, **dict.fromkeys(names)).temperature == 1.0


@pytest.mark.parametrize(
    ("given", "field", "expected"),
    [
        ({"temperature": 0}, "temperature", 0.0),
        ({"temperature": 2}, "temperature", 2.0),
        ({"top_p": 0.3}, "top_p", 0.3),
        ({"top_k": 7}, "top_k", 7),
        ({"top_k": -1}, "top_k", 0),
        ({"min_p": 0.1}, "min_p", 0.1),
        ({"seed": 11}, "seed", 11),
        ({"min_tokens": 2}, "min_tokens", 2),
        ({"presence_penalty": -1.5}, "presence_penalty", -1.5),
        ({"frequency_penalty": 1.5}, "frequency_penalty", 1.5),
        ({"repetition_penalty": 1.1}, "repetition_penalty", 1.1),
        ({"logit_bias": {"5": -100, "7": 1.5}}, "logit_bias", {5: -100.0, 7: 1.5}),
        ({"ignore_eos": True}, "eos_token_ids", b""),
        ({"logprobs": True, "top_logprobs": 3}, "logprobs", 3),
        ({"prompt_logprobs": 2}, "prompt_logprobs", 2),
        ({"stop_token_ids": [3, 4, 3]}, "stop_token_ids", b"\3\0\0\0\4\0\0\0"),
        ({"allowed_token_ids": [3, 4, 3]}, "allowed_token_ids", b"\3\0\0\0\4\0\0\0"),
        ({"bad_words": []}, "bad_words", []),
    ],
)
def test_each_reaches_the_engine(
    frontend: Frontend, client: openai.OpenAI, given: dict[str, Any], field: str, expected: Any
) -> None:
    assert getattr(sampling(frontend, client, **given), field) == expected


def test_bad_words_are_said_at_the_start_and_after_a_space(frontend: Frontend, client: openai.OpenAI) -> None:
    packed = sampling(frontend, client, bad_words=["Paris", " Paris", "the capital city"]).bad_words
    words = [TOKENIZER.decode(memoryview(word).cast("i")) for word in packed]
    assert words == ["Paris", " Paris", "the capital city", " the capital city"]


def test_a_top_p_of_zero_leaves_the_likeliest(frontend: Frontend, client: openai.OpenAI) -> None:
    assert 0 < sampling(frontend, client, top_p=0).top_p < 1e-5


def test_what_goes_beside_sampling(frontend: Frontend, client: openai.OpenAI) -> None:
    sampling(frontend, client, priority=-3, cache_salt="tenant")
    generate = frontend.core.generates[-1]
    assert (generate.priority, generate.cache_salt) == (-3, "tenant")


def test_what_a_chat_s_chunks_tell_beside_text(frontend: Frontend, client: openai.OpenAI) -> None:
    *chunks, last = client.chat.completions.create(
        model=MODEL, messages=USER, max_tokens=4, logprobs=True, top_logprobs=1, stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        extra_body={"return_token_ids": True, "return_tokens_as_token_ids": True},
    )  # fmt: skip
    prompt_ids = memoryview(frontend.core.generates[-1].prompt).cast("i").tolist()
    assert chunks[0].prompt_token_ids == prompt_ids
    assert not any(hasattr(chunk, "prompt_token_ids") for chunk in chunks[1:])
    token_ids = [token_id for chunk in chunks[1:-1] for token_id in chunk.choices[0].token_ids]
    told = [entry for chunk in chunks[1:-1] for entry in chunk.choices[0].logprobs.content]
    assert [entry.token for entry in told] == [f"token_id:{token_id}" for token_id in token_ids]
    assert [bytes(entry.bytes).decode() for entry in told] == [TOKENIZER.token_text(token_id) for token_id in token_ids]
    assert all(entry.top_logprobs[0].token.startswith("token_id:") for entry in told)
    assert chunks[0].usage.prompt_tokens == last.usage.prompt_tokens == len(prompt_ids)
    assert chunks[-1].usage.completion_tokens == last.usage.completion_tokens == 4


def test_request_ids_go_in_and_come_out(frontend: Frontend, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=USER, extra_headers={"X-Request-Id": "mine-7"})
    assert answer._request_id == "mine-7"
    assert frontend.core.generates[-1].request_id == "mine-7"
    assert client.models.list()._request_id
    hostile = {"X-Request-Id": "a" * 500}
    own = client.chat.completions.create(model=MODEL, messages=USER, extra_headers=hostile)._request_id
    assert own
    assert len(own) < 100


def test_models(client: openai.OpenAI) -> None:
    (listed,) = client.models.list().data
    assert (listed.id, listed.object, listed.owned_by) == (MODEL, "model", "cableway")
    assert listed.max_model_len > 0
    assert client.models.retrieve(MODEL) == listed
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_tokenize_and_back(frontend: Frontend) -> None:
    text = "Hello, wörld 👋"
    status, answer = frontend.post("/tokenize", {"model": MODEL, "prompt": text, "return_token_strs": True})
    assert status == 200
    assert answer["tokens"] == TOKENIZER.encode(text)
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["token_strs"][0] == "Hello"
    assert answer["max_model_len"] > 0
    assert frontend.post("/detokenize", {"tokens": answer["tokens"]}) == (200, {"prompt": text})
    _, chat = frontend.post("/tokenize", {"messages": USER})
    _, rendered = frontend.post("/detokenize", {"tokens": chat["tokens"]})
    assert rendered["prompt"].endswith("user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert frontend.post("/tokenize", {})[0] == 400
    assert frontend.post("/detokenize", {"tokens": [1 << 40]})[0] == 400


def test_the_model_s_own_defaults(tmp_path: Path) -> None:
    """From generation_config.json, below what a request says and above OpenAI's; several served names."""
    folder = tmp_path / "model"
    write_tokenizer_folder(folder, {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "eos_token_id": [EOS_ID, 5]})
    with (
        start_frontend(
            model=str(folder), load_format="dummy", served_model_name=["shown", "also"], max_model_len=128
        ) as frontend,
        frontend.client() as client,
    ):
        client.completions.create(model="also", prompt="a", top_p=0.5)
        found = frontend.core.generates[-1].sampling
        assert (found.temperature, found.top_k, found.top_p) == (0.6, 20, 0.5)
        assert set(memoryview(found.eos_token_ids).cast("i")) == {EOS_ID, 5}
        assert [model.id for model in client.models.list()] == ["shown", "also"]
        assert [model.max_model_len for model in client.models.list()] == [128, 128]


def write_tokenizer_folder(folder: Path, generation_config: dict[str, Any]) -> None:
    """The demo model's tokenizer as a Hugging Face folder; nobody loads weights here."""
    folder.mkdir()
    TOKENIZER._library.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(FILES.config))
    (folder / "generation_config.json").write_text(json.dumps(generation_config))
