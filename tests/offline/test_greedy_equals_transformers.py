"""The tokens of the demo model are those of transformers, which runs the same GGUF weights in float32.

transformers (`demo_model`) reads each prompt with our continuation behind it, once: if at every place its likeliest
next token is the one that follows, its own greedy continuation is the same.
"""

import pytest
import torch

from cableway import LLM, SamplingParams
from tests.models.gguf_files import demo_model

NUM_TOKENS = 64
NEAR_TIE = 0.1
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at",
    "1, 1, 2, 3, 5, 8, 13,",
    "The three laws of thermodynamics are:\n1.",
    "Dear Sir or Madam,\n\nI am writing to",
    "SELECT name, price FROM products WHERE",
    "In 1969, the first humans",
    "To make a good omelette you need",
    "La tour Eiffel est",
    "Q: What is photosynthesis?\nA:",
    "#include <stdio.h>\n\nint main(",
    "The quick brown fox jumps over the lazy dog. " * 12 + "The quick",
    "Shakespeare wrote",
    "x",
    '{"name": "Alice", "age": 30, "city":',
    "    \n\n\t",
    "😀 Emoji are",
]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = [504, 3575, 282, 4649, 314, 7042, 30, 2]


def regrets(prompt_ids: list[int], output_ids: list[int]) -> torch.Tensor:
    """How far each of our tokens was, in logits, below the one that transformers would have taken there."""
    ids = torch.tensor([prompt_ids + output_ids])
    with torch.inference_mode():
        logits = demo_model()(ids).logits[0, len(prompt_ids) - 1 : -1]
    return logits.max(-1).values - logits.gather(-1, ids[0, len(prompt_ids) :, None]).squeeze(-1)


@pytest.mark.timeout(300)
def test_float32_is_equal(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    results = [*llm.chat(QUESTION, params, use_tqdm=False), *llm.generate(PROMPTS, params, use_tqdm=False)]
    assert len(results) == 20
    assert results[0].outputs[0].token_ids[: len(ANSWER)] == ANSWER
    for result in results:
        output_ids = result.outputs[0].token_ids
        assert len(output_ids) == NUM_TOKENS
        assert regrets(result.prompt_token_ids, output_ids).max() == 0, result.prompt


def test_the_comparison_sees_one_wrong_token(llm: LLM) -> None:
    (result,) = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    wrong_ids = [*result.outputs[0].token_ids[:5], 1000, *result.outputs[0].token_ids[6:]]
    assert regrets(result.prompt_token_ids, wrong_ids)[5] > NEAR_TIE


def test_logprobs_are_transformers(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=3, prompt_logprobs=2)
    (result,) = llm.generate("Water boils at a temperature", params, use_tqdm=False)
    (output,) = result.outputs
    ids = result.prompt_token_ids + output.token_ids
    with torch.inference_mode():
        expected = demo_model()(torch.tensor([ids])).logits[0].log_softmax(-1)
    places = [*(result.prompt_logprobs or [])[1:], *(output.logprobs or [])]
    assert len(places) == len(ids) - 1
    for position, place in enumerate(places):
        assert place is not None
        assert next(iter(place)) == ids[position + 1]
        num_wanted = 2 if position + 1 < len(result.prompt_token_ids) else 3
        likeliest = expected[position].topk(num_wanted).indices.tolist()
        assert set(place) == {ids[position + 1], *likeliest}
        for token_id, entry in place.items():
            assert entry.logprob == pytest.approx(expected[position, token_id].item(), abs=1e-3)
            assert entry.rank == 1 + int((expected[position] > expected[position, token_id]).sum())
    assert (result.prompt_logprobs or [0])[0] is None
    assert output.cumulative_logprob == pytest.approx(
        sum(p[i].logprob for p, i in zip(output.logprobs or [], output.token_ids, strict=True))
    )
