"""States of recurrent layers in 16 bits: logits near those of float32, half the bytes."""

from pathlib import Path

import pytest
import transformers

from cableway.workers import memory
from tests import checkpoints
from tests.workers.running import divergence, judged, load, worker_config

SIZES = {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 10, "hidden_size": 64, "vocab_size": 300}


@pytest.fixture(scope="module")
def mamba2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = checkpoints.random_model(transformers.Mamba2ForCausalLM, {**SIZES, "num_hidden_layers": 3})
    return checkpoints.save(model, tmp_path_factory.mktemp("mamba2"))


@pytest.mark.parametrize("chunk_len", [100, 30, 1])
def test_logits_are_near_those_of_float32(mamba2: Path, chunk_len: int):
    """Those of a whole prompt are equal: states are rounded where they are kept alone."""
    decoder = load(worker_config(mamba2))
    expected = judged(decoder, worker_config(mamba2))
    apart = divergence(expected, judged(decoder, worker_config(mamba2, state_dtype="bfloat16"), chunk_len))
    assert apart == 0 if chunk_len == 100 else 1e-9 < apart < 2e-5


def test_as_many_bytes_hold_twice_the_states(mamba2: Path):
    decoder = load(worker_config(mamba2))

    def num_blocks(state_dtype: str) -> int:
        config = worker_config(mamba2, kv_cache_memory_bytes=1 << 24, state_dtype=state_dtype)
        return memory.outline(decoder, config, memory.kept_as(config)).num_blocks

    assert num_blocks("bfloat16") == pytest.approx(2 * num_blocks("float32"), abs=1)
