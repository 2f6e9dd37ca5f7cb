"""Encoder-decoders through the whole engine and through HTTP: the prompt is what the encoder takes."""

import json
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from cableway import LLM, SamplingParams
from tests.checkpoints import save, write_tokenizer
from tests.models.test_zoo import oracle
from tests.models.zoo import ZOO
from tests.server import serve

NUM_TOKENS = 20
BEGIN = [2, 0]
SHARED = [7, 250, 3, 99, 180, 12, 45, 201] * 4
PROMPTS = [SHARED, [1, 2, 3], [*SHARED, 8], SHARED[:30], SHARED, [250, 3]]


def checkpoint(name: str, folder: Path) -> Any:
    """A tiny model of that architecture, saved with a tokenizer; its decoder begins with `BEGIN`."""
    starts = {"decoder_start_token_id": BEGIN[0], "eos_token_id": 257}
    model = oracle(name, {**ZOO[name][0], "vocab_size": 300, "pad_token_id": 1, "forced_eos_token_id": None, **starts})
    save(model, folder)
    write_tokenizer(folder)
    (folder / "generation_config.json").write_text(json.dumps({**starts, "forced_bos_token_id": BEGIN[1]}))
    return model


def regret(model: Any, source: list[int], output: list[int]) -> float:
    """How far tokens were below those that transformers would have taken, in logits, at most."""
    ids = torch.tensor([[*BEGIN, *output]])
    with torch.inference_mode():
        logits = model(torch.tensor([source]), decoder_input_ids=ids).logits[0, len(BEGIN) - 1 : -1]
    chosen = logits.gather(-1, ids[0, len(BEGIN) :, None]).squeeze(-1)
    return float((logits.max(-1).values - chosen).max())


@pytest.mark.parametrize("name", ["BartForConditionalGeneration", "T5ForConditionalGeneration"])
def test_greedy_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    """With choices that share a source, sources found again, and too few blocks for all at once."""
    model = checkpoint(name, tmp_path)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, n=2)
    options = {"dtype": "float32", "num_threads": 1, "max_num_seqs": 4, "max_model_len": 64, "num_kv_blocks": 14}
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    with LLM(tmp_path, **options, max_num_batched_tokens=40) as llm:
        results = [*llm.generate(prompts, params, use_tqdm=False), *llm.generate(prompts, params, use_tqdm=False)]
        (again,) = llm.generate(prompts[-1], params, use_tqdm=False)
        assert again.num_cached_tokens == len(PROMPTS[-1])
        with pytest.raises(ValueError, match="takes the prompt"):
            llm.generate(prompts, SamplingParams(prompt_logprobs=1), use_tqdm=False)
    for result in results:
        for output in result.outputs:
            assert len(output.token_ids) == NUM_TOKENS
            assert regret(model, result.prompt_token_ids, output.token_ids) < 1e-3


def test_over_http(tmp_path: Path) -> None:
    model = checkpoint("BartForConditionalGeneration", tmp_path)
    flags = ("--dtype", "float32", "--num-threads", "1", "--max-model-len", "64", "--max-num-seqs", "4")
    with serve(*flags, model=str(tmp_path)) as server:
        client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)
        more = {"ignore_eos": True, "return_token_ids": True}
        options: dict[str, Any] = {"model": client.models.list().data[0].id, "temperature": 0, "max_tokens": NUM_TOKENS}
        answer = client.completions.create(prompt="the source", **options, extra_body=more)
        chat = client.chat.completions.create(messages=[{"role": "user", "content": "ab"}], **options, extra_body=more)
        with pytest.raises(openai.BadRequestError, match="encoder takes the prompt"):
            client.completions.create(prompt="x", **options, echo=True)
        with pytest.raises(openai.BadRequestError, match="maximum context length"):
            client.completions.create(prompt="x" * 65, **options)
    source = list(b"the source")
    assert answer.usage.prompt_tokens == len(source)
    assert answer.usage.completion_tokens == NUM_TOKENS
    for choice, ids in ((answer.choices[0], source), (chat.choices[0], chat.prompt_token_ids)):
        assert regret(model, ids, choice.token_ids) < 1e-3
