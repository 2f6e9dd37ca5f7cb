"""Models that keep other state than keys and values go through the whole engine: prefix cache, chunks, copies."""

from pathlib import Path

import pytest
import torch

from cableway import LLM, SamplingParams
from tests.checkpoints import save, write_tokenizer
from tests.models.test_zoo import oracle
from tests.models.zoo import ZOO

NUM_TOKENS = 20
PREFIX = [7, 250, 3, 99, 180, 12, 45, 201] * 6  # whole blocks of 16 tokens, and a part of one with what follows
PROMPTS = [[*PREFIX, 5, 17], [1, 2, 3], [*PREFIX, 8], [*PREFIX[:30], 9], PREFIX]


@pytest.mark.parametrize(
    "name",
    [
        "JambaForCausalLM",
        "Mamba2ForCausalLM",
        "Lfm2ForCausalLM",
        "DeepseekV32ForCausalLM",
        "Gemma2ForCausalLM",
        "KimiLinearForCausalLM",
        "RwkvForCausalLM",
        "Zamba2ForCausalLM",
    ],
)
def test_greedy_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    fields = {**ZOO[name][0], "vocab_size": 300, "max_position_embeddings": 256}
    model = oracle(name, fields)
    folder = save(model, tmp_path)
    write_tokenizer(folder)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, n=2)
    options = {"dtype": "float32", "num_threads": 1, "max_num_seqs": 4, "max_model_len": 128, "num_kv_blocks": 64}
    with LLM(folder, **options, max_num_batched_tokens=40) as llm:
        results = [*llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], params, use_tqdm=False)]
        results += llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], params, use_tqdm=False)
    for result in results:
        for output in result.outputs:
            ids = torch.tensor([result.prompt_token_ids + output.token_ids])
            with torch.inference_mode():
                logits = model(ids).logits[0, len(result.prompt_token_ids) - 1 : -1]
            chosen = logits.gather(-1, ids[0, len(result.prompt_token_ids) :, None]).squeeze(-1)
            assert (logits.max(-1).values - chosen).max() < 1e-3
