"""How much of a GPU the KV cache takes; the GPU is played."""

import msgspec
import pytest
import torch

from cableway.ipc.config import WorkerConfig
from cableway.ipc.modelfiles import ModelError
from cableway.workers import memory
from cableway.workers.batch import Decoder, StateSpec

GIB = 1 << 30
TOTAL, RESERVED, STEP = 40 * GIB, 10 * GIB, 2 * GIB


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """One of 40 GiB, of which weights have 10 and somebody else 3; its largest step takes 2."""
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (TOTAL - RESERVED - 3 * GIB, TOTAL))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: RESERVED)
    monkeypatch.setattr(memory, "_dry_run_bytes", lambda *_: STEP)
    monkeypatch.setattr(memory, "_zeros", lambda shape, dtype, device: torch.empty(shape, dtype=dtype, device="meta"))
    return torch.device("cuda")


def cache_bytes(decoder: Decoder, config: WorkerConfig, device: torch.device, **changes) -> int:
    cache = memory.allocate(decoder, msgspec.structs.replace(config, **changes), torch.float32, device)
    assert cache.num_blocks == cache.tensors[0].shape[1]
    return sum(tensor.numel() * 4 for tensor in cache.tensors)


def close(measured: int, expected: float) -> bool:
    """But for less than a block, and some megabytes of logits."""
    return expected - 64 * (1 << 20) < measured <= expected


def test_the_share_is_for_weights_steps_and_cache_together(decoder: Decoder, config: WorkerConfig, gpu: torch.device):
    assert close(cache_bytes(decoder, config, gpu), 0.9 * TOTAL - RESERVED - 2 * STEP)
    assert close(cache_bytes(decoder, config, gpu, gpu_memory_utilization=0.5), 0.5 * TOTAL - RESERVED - 2 * STEP)
    assert close(cache_bytes(decoder, config, gpu, enforce_eager=True), 0.9 * TOTAL - RESERVED - STEP)


def test_no_more_than_is_free(decoder: Decoder, config: WorkerConfig, gpu: torch.device):
    assert close(cache_bytes(decoder, config, gpu, gpu_memory_utilization=1.0), 27 * GIB - 2 * STEP)


def test_a_size_in_bytes_wins(decoder: Decoder, config: WorkerConfig, gpu: torch.device):
    changes = {"kv_cache_memory_bytes": GIB, "gpu_memory_utilization": 0.01}
    assert close(cache_bytes(decoder, config, gpu, **changes), GIB)


def test_too_little_for_one_sequence_is_one_clear_line(decoder: Decoder, config: WorkerConfig, gpu: torch.device):
    expected = r"room for 0 tokens, but max_model_len is 192.*gpu_memory_utilization"
    with pytest.raises(ModelError, match=expected) as told:
        cache_bytes(decoder, config, gpu, gpu_memory_utilization=0.2)
    assert "\n" not in str(told.value)


def test_more_than_the_gpu_has_is_one_clear_line(
    decoder: Decoder, config: WorkerConfig, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(memory, "_zeros", refuse)
    with pytest.raises(ModelError, match=r"was to have 64\.0 GiB, but only 27\.0 GiB"):
        cache_bytes(decoder, config, gpu, kv_cache_memory_bytes=64 * GIB)


def test_blocks_that_keep_a_state_are_longer(config: WorkerConfig):
    paged = StateSpec("paged", (0,), 2, 16)
    state = StateSpec("recurrent", (1,), 0, 0, state_len=100)
    left = msgspec.structs.replace(config, block_size=0)
    assert memory.settled(left, [paged]).block_size == 16
    assert memory.settled(left, [paged, state]).block_size == 256
    assert memory.settled(config, [paged, state]) == config
