"""POST /v1/completions through the real client."""

import threading
import time
from typing import Any

import openai
import pytest

from tests.frontend.running import EOS_ID, MODEL, TOKENIZER, Frontend, says

FIRST, SECOND = "one two", "three four five"


def create(client: openai.OpenAI, prompt: Any = FIRST, **fields: Any) -> Any:
    return client.completions.create(model=MODEL, prompt=prompt, **fields)


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        (FIRST, [FIRST]),
        ([FIRST, SECOND], [FIRST, SECOND]),
        (TOKENIZER.encode(FIRST), [FIRST]),
        ([TOKENIZER.encode(FIRST), TOKENIZER.encode(SECOND)], [FIRST, SECOND]),
    ],
)
def test_the_four_forms_of_a_prompt(client: openai.OpenAI, prompt: Any, texts: list[str]) -> None:
    """The fake model says its prompt back."""
    answer = create(client, prompt)
    assert (answer.object, answer.model) == ("text_completion", MODEL)
    assert answer.id.startswith("cmpl-")
    assert [choice.text for choice in answer.choices] == texts
    num_tokens = sum(len(TOKENIZER.encode(text)) for text in texts)
    assert answer.usage.prompt_tokens == num_tokens
    assert answer.usage.completion_tokens == num_tokens + len(texts)
    assert answer.usage.prompt_tokens_details.cached_tokens == 3 * len(texts)


def test_streamed_with_several_prompts_and_choices(client: openai.OpenAI) -> None:
    chunks = list(create(client, [FIRST, SECOND], n=2, stream=True, stream_options={"include_usage": True}))
    *deltas, usage = chunks
    texts, reasons = [""] * 4, [None] * 4
    for chunk in deltas:
        (choice,) = chunk.choices
        assert reasons[choice.index] is None
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason
    assert texts == [FIRST, FIRST, SECOND, SECOND]
    assert reasons == ["stop"] * 4
    num_tokens = len(TOKENIZER.encode(FIRST)) + len(TOKENIZER.encode(SECOND))
    assert usage.choices == []
    assert usage.usage.prompt_tokens == num_tokens
    assert usage.usage.completion_tokens == 2 * num_tokens + 4


def test_sixteen_tokens_unless_told_otherwise(frontend: Frontend, client: openai.OpenAI) -> None:
    frontend.core.script = says("word " * 40)
    answer = create(client)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (16, "length")
    assert create(client, max_tokens=5).usage.completion_tokens == 5


def test_logprobs(client: openai.OpenAI) -> None:
    token_ids = TOKENIZER.encode(SECOND)
    tokens = [TOKENIZER.token_text(token_id) for token_id in token_ids]
    logprobs = create(client, SECOND, logprobs=2).choices[0].logprobs
    assert logprobs.tokens == tokens
    assert logprobs.token_logprobs == [-0.5] * len(tokens)
    assert logprobs.text_offset == [SECOND.index(token.strip()) - token.startswith(" ") for token in tokens]
    likeliest = TOKENIZER.token_text(token_ids[0] + 1)
    assert logprobs.top_logprobs[0][tokens[0]] == -0.5
    assert logprobs.top_logprobs[0][likeliest] == -0.25
    assert len(logprobs.top_logprobs[0]) == 3
    assert create(client, SECOND, logprobs=0).choices[0].logprobs.top_logprobs[0] == {tokens[0]: -0.5}
    streamed: list[str] = []
    for chunk in create(client, SECOND, logprobs=2, stream=True):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.tokens
    assert streamed == tokens


@pytest.mark.parametrize("prompt", [FIRST, TOKENIZER.encode(FIRST)])
def test_echo(frontend: Frontend, client: openai.OpenAI, prompt: Any) -> None:
    frontend.core.script = says(" and on")
    choice = create(client, prompt, echo=True, logprobs=1).choices[0]
    assert choice.text == "one two and on"
    assert choice.logprobs.tokens == ["one", " two", " and", " on"]
    assert choice.logprobs.token_logprobs == [None, -0.5, -0.5, -0.5]
    assert choice.logprobs.top_logprobs[0] is None
    assert choice.logprobs.text_offset == [0, 3, 7, 11]
    chunks = list(create(client, prompt, echo=True, logprobs=1, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "one two and on"
    offsets = [
        offset for chunk in chunks if chunk.choices[0].logprobs for offset in chunk.choices[0].logprobs.text_offset
    ]
    assert offsets == [0, 3, 7, 11]


def test_special_tokens_of_a_prompt_are_echoed_as_they_were_sent(client: openai.OpenAI) -> None:
    """Offsets are those of the text that is shown, whether special tokens are in it or not."""
    written = "<|im_start|>one<|im_end|> two"
    token_ids = TOKENIZER.encode(written)
    pieces = [TOKENIZER.token_text(token_id) for token_id in token_ids]
    shown = [len("".join(pieces[:i])) for i in range(len(pieces))]
    for prompt, skips, text, offsets in (
        (written, True, written, shown),
        (token_ids, False, written, shown),
        (token_ids, True, "one two", [0, 0, 3, 3]),
    ):
        more = {"skip_special_tokens": skips}
        choice = create(client, prompt, echo=True, logprobs=0, max_tokens=0, extra_body=more).choices[0]
        assert choice.text == text
        assert choice.logprobs.tokens == pieces
        assert choice.logprobs.text_offset == offsets


def test_many_logprobs_for_many_choices(client: openai.OpenAI) -> None:
    prompt = list(range(100, 400))
    asked = {"prompt": prompt, "echo": True, "logprobs": 2, "n": 2, "max_tokens": 3}
    whole = create(client, **asked)
    streamed: dict[int, list[int]] = {0: [], 1: []}
    for chunk in create(client, **asked, stream=True):
        (choice,) = chunk.choices
        streamed[choice.index] += choice.logprobs.text_offset
    for choice in whole.choices:
        assert len(choice.logprobs.tokens) == len(choice.logprobs.top_logprobs) == 303
        assert choice.logprobs.text_offset == streamed[choice.index]
        offset = choice.logprobs.text_offset[300]
        assert choice.text[:offset] == TOKENIZER.decode(prompt)


def test_a_crowd_of_long_prompts_holds_nobody_up(frontend: Frontend, client: openai.OpenAI) -> None:
    frontend.core.script = says("")
    waits_s: list[float] = []
    done = threading.Event()

    def ask_health() -> None:
        while not done.is_set():
            began_s = time.perf_counter()
            frontend.get("/health?live")
            waits_s.append(time.perf_counter() - began_s)

    watcher = threading.Thread(target=ask_health)
    watcher.start()
    began_s = time.perf_counter()
    create(client, ["word " * 3000] * 80)
    took_s = time.perf_counter() - began_s
    done.set()
    watcher.join()
    assert max(waits_s) < took_s / 2


def test_no_tokens_but_the_prompt_s_logprobs(client: openai.OpenAI) -> None:
    answer = create(client, FIRST, echo=True, logprobs=0, max_tokens=0)
    (choice,) = answer.choices
    assert choice.text == FIRST
    assert choice.logprobs.tokens == ["one", " two"]
    assert choice.logprobs.token_logprobs == [None, -0.5]
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 0
    assert create(client, FIRST, max_tokens=0).choices[0].text == ""


def test_prompt_logprobs_and_token_ids(client: openai.OpenAI) -> None:
    choice = create(client, FIRST, extra_body={"prompt_logprobs": 0, "return_token_ids": True}).choices[0]
    first, second = TOKENIZER.encode(FIRST)
    assert choice.prompt_token_ids == [first, second]
    assert choice.token_ids == [first, second, EOS_ID]
    assert choice.prompt_logprobs == [
        None,
        {str(second): {"logprob": -0.5, "rank": 2, "decoded_token": " two"}},
    ]


def test_token_ids_of_a_stream(client: openai.OpenAI) -> None:
    chunks = list(create(client, [FIRST, SECOND], stream=True, extra_body={"return_token_ids": True}))
    for index, prompt in enumerate((FIRST, SECOND)):
        prompt_ids = TOKENIZER.encode(prompt)
        first, *others = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert first.prompt_token_ids == prompt_ids
        assert [choice.prompt_token_ids for choice in others] == [None] * len(others)
        assert [i for choice in (first, *others) for i in choice.token_ids] == [*prompt_ids, EOS_ID]


def test_tokens_by_their_ids(client: openai.OpenAI) -> None:
    more = {"return_tokens_as_token_ids": True}
    logprobs = create(client, SECOND, echo=True, logprobs=1, extra_body=more).choices[0].logprobs
    names = [f"token_id:{token_id}" for token_id in TOKENIZER.encode(SECOND)]
    assert logprobs.tokens == names * 2
    assert all(name.startswith("token_id:") for name in logprobs.top_logprobs[-1])


def test_usage_throughout_a_stream(client: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = create(client, SECOND, stream=True, stream_options=options)
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == last.usage.completion_tokens == len(TOKENIZER.encode(SECOND)) + 1
    assert {chunk.usage.prompt_tokens for chunk in chunks} == {last.usage.prompt_tokens}


def test_each_prompt_draws_its_own_seed(frontend: Frontend, client: openai.OpenAI) -> None:
    create(client, [FIRST, SECOND])
    seeds = {generate.sampling.seed for generate in frontend.core.generates}
    assert len(seeds) == 2
    assert all(0 <= seed < 2**63 for seed in seeds)
    create(client, [FIRST, SECOND], seed=-7)
    assert {generate.sampling.seed for generate in frontend.core.generates[2:]} == {2**63 - 7}
