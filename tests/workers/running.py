"""Runners on tiny checkpoints, and what transformers says of the same."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cableway.bench.driver import Driver
from cableway.ipc.config import LogConfig, WorkerConfig
from cableway.ipc.messages import Sampling
from cableway.workers import runner
from cableway.workers.batch import Decoder
from cableway.workers.runner import Runner

if TYPE_CHECKING:
    import transformers

BLOCK_SIZE = 8
GREEDY = Sampling(temperature=0.0)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """Token ids that every tiny checkpoint has."""
    return random.Random(seed).choices(range(256), k=length)


def worker_config(model: Path | str, **overrides: Any) -> WorkerConfig:
    """A small worker on the CPU in float32; `overrides` are its fields."""
    fields: dict[str, Any] = {
        "runtime_dir": "",
        "engine": "0",
        "model": str(model),
        "load_format": "auto",
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": 192,
        "max_num_seqs": 80,
        "max_num_batched_tokens": 512,
        "block_size": BLOCK_SIZE,
        "kv_cache_memory_bytes": 0,
        "num_kv_blocks": 0,
        "kv_cache_dtype": overrides.get("dtype", "float32"),
        "batch_invariant": False,
        "enforce_eager": False,
        "num_threads": 1,
        "seed": 0,
        "stream_interval_s": 0.0,
        "log": LogConfig("warning", True),
    }
    return WorkerConfig(**fields | overrides)


def load(config: WorkerConfig) -> Decoder:
    """The decoder of a worker, with the number of threads that unit tests compute with."""
    decoder = runner.load(config)
    torch.set_num_threads(1)
    return decoder


def drive(decoder: Decoder, config: WorkerConfig) -> Driver:
    """A new runner of `decoder`, ready to be driven."""
    return Driver(Runner(decoder, config), config.block_size, config.max_num_seqs)


def generate_alone(driver: Driver, prompt: list[int], num_tokens: int, sampling: Sampling = GREEDY) -> list[int]:
    """What a request gives when nothing runs beside it; its row and blocks are free again."""
    request = driver.add(prompt, sampling)
    driver.generate(num_tokens)
    driver.remove(request)
    return request.output


@torch.inference_mode()
def expected_logprobs(oracle: transformers.PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """[len(tokens), V]: log-probabilities of what follows each token."""
    return oracle(torch.tensor([tokens])).logits[0].float().log_softmax(-1)


@torch.inference_mode()
def expected_greedy(oracle: transformers.PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """What transformers says is likeliest, token by token, past any end of sequence."""
    output: list[int] = []
    step = oracle(torch.tensor([prompt]), use_cache=True)
    for _ in range(num_tokens):
        output.append(int(step.logits[0, -1].argmax()))
        step = oracle(torch.tensor([output[-1:]]), past_key_values=step.past_key_values, use_cache=True)
    return output


def judged(decoder: Decoder, config: WorkerConfig, chunk_len: int = 100) -> torch.Tensor:
    """[99, V]: log-probabilities of what follows each token of a prompt but the last."""
    driver, prompt = drive(decoder, config), prompt_of(100)
    request = driver.add(prompt, Sampling(temperature=0.0, prompt_logprobs=decoder.vocab_size))
    while not request.output:
        driver.step({request.row: min(chunk_len, len(prompt) - request.num_computed)})
    rows = [dict(zip(p.token_ids, p.values, strict=True)) for _, p in sorted(request.logprobs.items())]
    return torch.tensor([[row[token_id] for token_id in range(decoder.vocab_size)] for row in rows])


def divergence(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """KL of log-probabilities, on average."""
    return float((expected.exp() * (expected - actual)).sum(-1).mean())
