"""`LLM` and `SamplingParams`: what users may ask, and what they get."""

import math
from typing import Any

import numpy
import pytest

from cableway import LLM, SamplingParams
from cableway.frontend.errors import RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
SOME = SamplingParams(temperature=1, max_tokens=8, ignore_eos=True)


def text_of(results: Any) -> list[str]:
    return [output.text for result in results for output in result.outputs]


def test_prompts_come_in_many_forms(tiny: LLM) -> None:
    ids = tiny.get_tokenizer().encode("hello")
    forms: list[Any] = ["hello", ids, {"prompt": "hello"}, {"prompt_token_ids": ids}]
    several = tiny.generate(forms, GREEDY, use_tqdm=False)
    assert [result.prompt_token_ids for result in several] == [ids] * 4
    assert [result.prompt for result in several] == ["hello", None, "hello", None]
    assert len({tuple(result.outputs[0].token_ids) for result in several}) == 1
    for form in forms:
        (alone,) = tiny.generate(form, GREEDY, use_tqdm=False)
        assert alone.outputs[0].token_ids == several[0].outputs[0].token_ids
        assert alone.finished
        assert alone.outputs[0].finished()
    assert tiny.generate([], GREEDY, use_tqdm=False) == []


def test_results_keep_the_order_of_many_prompts(tiny: LLM) -> None:
    """More than the engine may hold at a time, each with parameters of its own."""
    prompts = [[i % 250, 1 + i % 7] for i in range(60)]
    params = [SamplingParams(temperature=0, max_tokens=1 + i % 5, ignore_eos=True) for i in range(60)]
    results = tiny.generate(prompts, params, use_tqdm=False)
    assert [result.prompt_token_ids for result in results] == prompts
    assert [len(result.outputs[0].token_ids) for result in results] == [1 + i % 5 for i in range(60)]
    assert len({result.request_id for result in results}) == 60


def test_n_continuations_differ_and_seeds_repeat(tiny: LLM) -> None:
    params = SamplingParams(temperature=1, max_tokens=12, n=3, seed=11, ignore_eos=True)
    first, second = (tiny.generate("hello", params, use_tqdm=False)[0] for _ in range(2))
    assert [output.index for output in first.outputs] == [0, 1, 2]
    assert len({tuple(output.token_ids) for output in first.outputs}) == 3
    assert text_of([first]) == text_of([second])
    unseeded = [tuple(tiny.generate("hello", SOME, use_tqdm=False)[0].outputs[0].token_ids) for _ in range(4)]
    assert len(set(unseeded)) > 1


def test_stop_strings_and_tokens(tiny: LLM) -> None:
    (plain,) = tiny.generate("hello", SamplingParams(temperature=0, max_tokens=24, ignore_eos=True), use_tqdm=False)
    text, ids = plain.outputs[0].text, plain.outputs[0].token_ids
    assert (plain.outputs[0].finish_reason, plain.outputs[0].stop_reason) == ("length", None)
    stop = text[10:13]
    cut = text.index(stop)
    for include in (False, True):
        params = SamplingParams(
            temperature=0, max_tokens=24, stop=stop, include_stop_str_in_output=include, logprobs=0, ignore_eos=True
        )
        (output,) = tiny.generate("hello", params, use_tqdm=False)[0].outputs
        assert output.text == text[: cut + (len(stop) if include else 0)]
        assert (output.finish_reason, output.stop_reason) == ("stop", stop)
        assert output.token_ids == ids[: len(output.token_ids)]
        assert len(output.logprobs or []) == len(output.token_ids)
    stop_id = ids[6]
    params = SamplingParams(temperature=0, max_tokens=24, stop_token_ids=[stop_id], ignore_eos=True)
    (output,) = tiny.generate("hello", params, use_tqdm=False)[0].outputs
    assert (output.finish_reason, output.stop_reason) == ("stop", stop_id)
    assert output.token_ids == ids[: ids.index(stop_id) + 1]
    assert text.startswith(output.text)


def test_without_text(tiny: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False, logprobs=1)
    (silent,) = tiny.generate("hello", params, use_tqdm=False)[0].outputs
    (plain,) = tiny.generate("hello", GREEDY, use_tqdm=False)[0].outputs
    assert (silent.text, silent.token_ids, silent.finish_reason) == ("", plain.token_ids, "length")
    assert [next(iter(place)) for place in silent.logprobs or []] == plain.token_ids
    assert (plain.logprobs, plain.cumulative_logprob) == (None, None)


def test_room_is_never_exceeded(tiny: LLM) -> None:
    limit = tiny.config.frontend.max_model_len
    prompt = [5] * (limit - 10)
    for max_tokens in (None, 500):
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        (output,) = tiny.generate(prompt, params, use_tqdm=False)[0].outputs
        assert (len(output.token_ids), output.finish_reason) == (10, "length")


def test_bad_words_and_allowed_tokens(tiny: LLM) -> None:
    (plain,) = tiny.generate("hello", GREEDY, use_tqdm=False)
    text = plain.outputs[0].text
    said = next(character for character in text if "!" <= character <= "~")
    params = [
        SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, bad_words=[said, "hello"]),
        SamplingParams(temperature=1, max_tokens=8, allowed_token_ids=[65, 66, 67]),
        GREEDY,
    ]
    without, only, same = tiny.generate(["hello"] * 3, params, use_tqdm=False)
    assert without.outputs[0].text.startswith(text[: text.index(said)])
    assert said not in without.outputs[0].text
    assert set(only.outputs[0].token_ids) <= {65, 66, 67}
    assert same.outputs[0].token_ids == plain.outputs[0].token_ids


@pytest.mark.parametrize(
    ("prompt", "params", "said"),
    [
        ([], {}, "at least one token"),
        ([5] * 256, {}, "leaves no room in max_model_len = 256"),
        ([299, 300], {}, "token id 300 is not in the vocabulary of 300"),
        ([-1], {}, "token id -1"),
        ({"text": "hello"}, {}, "a prompt is a str"),
        ([5], {"logit_bias": {300: 1.0}}, "token id 300"),
        ([5], {"stop_token_ids": [-5]}, "token id -5"),
        ([5], {"allowed_token_ids": [5, 300]}, "token id 300"),
        ([5], {"allowed_token_ids": [257], "min_tokens": 1}, "no token of allowed_token_ids is left"),
        ([5], {"bad_words": [" "]}, "bad word must not be empty"),
        ([5], {"bad_words": ["x" * 33]}, "33 tokens, and at most 32"),
        ([5], {"logprobs": 21}, "at most max_logprobs = 20"),
        ([5], {"prompt_logprobs": 21}, "at most max_logprobs = 20"),
        ([5, 1.5], {}, "prompt_token_ids: Expected `int`"),
        ({"prompt_token_ids": "hello"}, {}, "prompt_token_ids: Expected `array`"),
        ({"prompt": "hello", "multi_modal_data": {"image": "x"}}, {}, "multi_modal_data of a prompt is not supported"),
        (5, {}, "prompt_token_ids: Expected `array`"),
        (None, {}, "a prompt is a str"),
    ],
)
def test_prompts_that_cannot_be(tiny: LLM, prompt: Any, params: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tiny.generate([[5], prompt], SamplingParams(**params), use_tqdm=False)


@pytest.mark.parametrize("prompt", [None, 5, 1.5, [1.5, 2], [True]])
def test_one_prompt_that_cannot_be(tiny: LLM, prompt: Any) -> None:
    with pytest.raises(ValueError, match="prompt"):
        tiny.generate(prompt, GREEDY, use_tqdm=False)


def test_numbers_in_any_container(tiny: LLM) -> None:
    ids = [5, 6, 7]
    named = range(10, 20)
    (plain,) = tiny.generate(
        ids, SamplingParams(temperature=0, max_tokens=4, allowed_token_ids=list(named)), use_tqdm=False
    )
    params = SamplingParams(temperature=0, max_tokens=numpy.int64(4), allowed_token_ids=named, stop_token_ids={299})
    for prompts in (numpy.array(ids), [numpy.array(ids)], (tuple(ids) for _ in range(1))):
        (result,) = tiny.generate(prompts, params, use_tqdm=False)
        assert result.prompt_token_ids == ids
        assert result.outputs[0].token_ids == plain.outputs[0].token_ids


def test_as_many_params_as_prompts(tiny: LLM) -> None:
    with pytest.raises(ValueError, match="2 prompts, but 1 sampling_params"):
        tiny.generate(["a", "b"], [GREEDY], use_tqdm=False)
    for wrong in ({"n": 1}, [{"n": 1}]):
        with pytest.raises(ValueError, match="sampling_params are SamplingParams"):
            tiny.generate("a", wrong, use_tqdm=False)  # type: ignore[arg-type]


def test_params_that_were_changed(tiny: LLM) -> None:
    params = SamplingParams(temperature=0, ignore_eos=True)
    params.max_tokens = 3
    assert len(tiny.generate("hello", params, use_tqdm=False)[0].outputs[0].token_ids) == 3
    params.top_k = 1.5  # type: ignore[assignment]
    with pytest.raises(ValueError, match="top_k"):
        tiny.generate("hello", params, use_tqdm=False)


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_k": -2},
        {"min_p": 2},
        {"max_tokens": 0},
        {"min_tokens": 20},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -3},
        {"repetition_penalty": 0},
        {"logprobs": -1},
        {"stop": ["a", ""]},
        {"stop": "a", "detokenize": False},
        {"logit_bias": {1: math.inf}},
        {"allowed_token_ids": []},
        {"temperature": "hot"},
        {"temperature": None},
        {"n": "2"},
        {"top_k": 1.5},
        {"seed": 1.5},
        {"max_tokens": True},
        {"stop_token_ids": 5},
        {"stop_token_ids": ["a"]},
        {"logit_bias": {"5": 1.0}},
        {"logit_bias": [5]},
        {"bad_words": "word"},
        {"ignore_eos": "no"},
    ],
)
def test_params_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="stop string" if wrong.get("stop") else next(iter(wrong))):
        SamplingParams(**wrong)
    with pytest.raises(TypeError):
        SamplingParams(best_off=2)  # type: ignore[call-arg]


def test_chat_uses_the_template(llm: LLM) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    params = SamplingParams(temperature=0, max_tokens=20)
    (result,) = llm.chat(question, params, use_tqdm=False)
    assert result.outputs[0].text == "The capital of France is Paris."
    assert result.outputs[0].finish_reason == "stop"
    assert result.prompt is not None
    assert result.prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]}]
    two = llm.chat([question, parts], params, use_tqdm=False)
    assert text_of(two) == [result.outputs[0].text] * 2
    begun = [*question, {"role": "assistant", "content": "The capital of France"}]
    (goes_on,) = llm.chat(begun, params, use_tqdm=False, add_generation_prompt=False, continue_final_message=True)
    assert goes_on.outputs[0].text == " is Paris."
    own = "{{ messages[0].content }} {{ who }}"
    (other,) = llm.chat(question, params, False, chat_template=own, chat_template_kwargs={"who": "Answer:"})
    assert other.prompt == "What is the capital of France? Answer:"
    with pytest.raises(RequestError, match="no"):
        llm.chat(question, params, False, chat_template="{{ raise_exception('no') }}")
    with pytest.raises(ValueError, match="messages are dictionaries"):
        llm.chat("What is the capital of France?", params)  # type: ignore[arg-type]


def test_models_own_defaults(llm: LLM, tiny: LLM) -> None:
    assert tiny.get_default_sampling_params() == SamplingParams()
    assert SamplingParams.with_defaults({"temperature": 0.2, "max_new_tokens": 7}) == SamplingParams(
        temperature=0.2, max_tokens=7
    )
    (result,) = llm.generate("One two three", use_tqdm=False)
    assert 1 <= len(result.outputs[0].token_ids) <= 16


def test_progress_is_shown_on_stderr(tiny: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.generate(["hello"] * 3, GREEDY)
    shown = capsys.readouterr()
    assert "3/3" in shown.err
    assert "tok/s" in shown.err
    tiny.generate(["hello"] * 3, GREEDY, use_tqdm=False)
    assert shown.out == capsys.readouterr().err == ""
