"""A KV cache of 8 bits: logits near those of the whole one, half its bytes, scales of a checkpoint, what cannot be."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cableway.ipc.messages import Sampling
from cableway.ipc.modelfiles import ModelError
from cableway.workers import memory
from cableway.workers.batch import Decoder, StateSpec
from tests import checkpoints
from tests.workers.running import divergence, drive, judged, load, prompt_of, worker_config

DTYPES = ("int8", "fp8_e4m3", "fp8_e5m2")
KL = {"int8": 2e-4, "fp8_e4m3": 6e-3, "fp8_e5m2": 2.5e-2}
"""To what follows each token of a prompt with the whole cache, on average; measured 0.6e-4, 2.0e-3 and 8.4e-3."""
PROMPT = prompt_of(100)


@pytest.mark.parametrize("chunk_len", [100, 1])
@pytest.mark.parametrize("kept_as", DTYPES)
def test_logits_are_near_those_of_the_whole_cache(decoder: Decoder, checkpoint: Path, kept_as: str, chunk_len: int):
    expected = judged(decoder, worker_config(checkpoint))
    actual = judged(decoder, worker_config(checkpoint, kv_cache_dtype=kept_as), chunk_len)
    assert 1e-6 < divergence(expected, actual) < KL[kept_as]


@pytest.mark.parametrize(("kept_as", "more_blocks"), [("fp8_e4m3", 2), ("fp8_e5m2", 2), ("int8", 32 / 17)])
def test_as_many_bytes_hold_twice_the_tokens(kept_as: str, more_blocks: float):
    """Of int8 a block of 16 tokens with heads of 128 has a row more, for its scales."""
    config = worker_config("", block_size=16, kv_cache_memory_bytes=1 << 28)
    group = StateSpec("paged", (0, 1), num_kv_heads=8, head_dim=128)

    class Outline:
        def state_groups(self) -> list[StateSpec]:
            return [group]

    def num_blocks(name: str) -> int:
        numbers = memory.kept_as(worker_config("", kv_cache_dtype=name))
        return memory.outline(Outline(), config, numbers).num_blocks

    assert num_blocks(kept_as) == pytest.approx(num_blocks("bfloat16") * more_blocks, abs=1)


@pytest.fixture
def with_scales(tmp_path: Path) -> Path:
    """A checkpoint that gives each layer other scales, in each of the ways that these are named."""
    folder = checkpoints.tiny(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    attention = "model.layers.{}.self_attn.{}"
    tensors |= {
        attention.format(0, "k_scale"): torch.tensor(0.0625),
        attention.format(0, "v_scale"): torch.tensor(0.03),
        attention.format(1, "k_proj.k_scale"): torch.tensor([0.02]),
        attention.format(1, "v_proj.v_scale"): torch.tensor([0.05]),
        attention.format(2, "kv_scale"): torch.tensor([0.04]),
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_scales_of_a_checkpoint_are_those_of_f8_and_of_nothing_else(with_scales: Path, checkpoint: Path):
    decoder, without = load(worker_config(with_scales)), load(worker_config(checkpoint))
    scales = torch.tensor([layer.mix.scales() for layer in decoder.layers])
    torch.testing.assert_close(scales, torch.tensor([(0.0625, 0.03), (0.02, 0.05), (0.04, 0.04)]))
    whole = judged(decoder, worker_config(with_scales))
    for kept_as in ("float32", "int8"):
        config = worker_config(with_scales, kv_cache_dtype=kept_as)
        assert torch.equal(judged(decoder, config), judged(without, config))
    config = worker_config(with_scales, kv_cache_dtype="fp8_e4m3")
    assert not torch.equal(judged(decoder, config), judged(without, config))
    assert divergence(whole, judged(decoder, config)) < KL["fp8_e4m3"]


def test_a_scale_that_is_none_is_one_clear_line(with_scales: Path):
    tensors = load_file(with_scales / "model.safetensors")
    save_file(tensors | {"model.layers.1.self_attn.k_proj.k_scale": torch.zeros(1)}, with_scales / "model.safetensors")
    with pytest.raises(ModelError, match=r"k_proj\.k_scale.*not positive"):
        load(worker_config(with_scales))


@pytest.mark.parametrize(
    ("spec", "kept_as", "complaint"),
    [
        ({"kind": "latent", "num_kv_heads": 1, "head_dim": 40, "num_planes": 1}, "fp8_e5m2", "latents"),
        ({"kind": "paged", "num_kv_heads": 2, "head_dim": 18}, "int8", "not of 18"),
    ],
)
def test_what_cannot_be_kept_in_8_bits_is_said_at_start(spec: Mapping, kept_as: str, complaint: str):
    config = worker_config("", kv_cache_dtype=kept_as)
    with pytest.raises(ModelError, match=complaint):
        memory.block_memory(StateSpec(layers=(0,), **spec), 16, memory.kept_as(config))
    recurrent = StateSpec("recurrent", (0,), 0, 0, state_len=100)
    assert memory.block_memory(recurrent, 16, memory.kept_as(config))[1] == torch.float32


@pytest.mark.parametrize(("capability", "is_known"), [(80, False), (86, False), (89, True), (90, True)])
def test_old_gpus_do_not_know_e4m3(monkeypatch: pytest.MonkeyPatch, capability: int, is_known: bool):
    monkeypatch.setattr(memory, "gpu_capability", lambda: capability)
    assert memory.kept_as(worker_config("", device="cuda", kv_cache_dtype="fp8_e5m2")) == torch.float8_e5m2
    config = worker_config("", device="cuda", kv_cache_dtype="fp8_e4m3")
    if is_known:
        assert memory.kept_as(config) == torch.float8_e4m3fn
    else:
        with pytest.raises(ModelError, match=r"capability 8\.9"):
            memory.kept_as(config)


@pytest.mark.parametrize(("dtype", "kept_as"), [("bfloat16", "int8"), ("float32", "fp8_e4m3")])
def test_invariant_results_stay_so(checkpoint: Path, dtype: str, kept_as: str):
    """Bit for bit: in chunks, beside others, and with a prefix that was cached, a block of it copied."""
    config = worker_config(checkpoint, dtype=dtype, kv_cache_dtype=kept_as, batch_invariant=True, max_num_seqs=8)
    driver, sampling = drive(load(config), config), Sampling(temperature=0.0, logprobs=2)
    alone = driver.add(PROMPT, sampling)
    driver.generate(6)
    in_chunks = driver.add(PROMPT, sampling)
    while not in_chunks.output:
        driver.step({in_chunks.row: min(19, len(PROMPT) - in_chunks.num_computed)})
    cached = driver.add(PROMPT, sampling, shared=(alone, 83))
    others = [driver.add(prompt_of(10 + seed, seed), Sampling(seed=seed)) for seed in range(3)]
    driver.remove(alone)
    driver.generate(6)
    assert all(len(other.output) >= 6 for other in others)
    for same in (in_chunks, cached):
        assert same.output[:6] == alone.output[:6]
        positions = range(len(PROMPT), len(PROMPT) + 6)
        assert [same.logprobs[at] for at in positions] == [alone.logprobs[at] for at in positions]
