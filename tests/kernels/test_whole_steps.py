"""Whole steps as a GPU does them, in Triton's interpreter: its formats and kernels, wherever a worker calls one."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cableway.bench.driver import Driver
from cableway.ipc.config import WorkerConfig
from cableway.ipc.messages import Sampling
from cableway.kernels.registry import kernels
from cableway.workers import formats, memory, warm_up
from cableway.workers.batch import Decoder
from cableway.workers.formats.experts import Together
from cableway.workers.formats.gpu import OnGpu
from cableway.workers.runner import Runner
from tests import checkpoints
from tests.kernels import laws
from tests.models import harness
from tests.models.harness import prompt
from tests.models.zoo import ZOO
from tests.workers.running import load, prompt_of, worker_config

pytestmark = pytest.mark.skipif(not laws.INTERPRETED, reason="only where Triton's forms run on a CPU")
SAMPLINGS = (Sampling(temperature=0), Sampling(seed=3, top_k=9, top_p=0.9))


@pytest.fixture(params=["float32", "int8", "fp8_e4m3"])
def config(tmp_path: Path, request: pytest.FixtureRequest) -> WorkerConfig:
    small = {"max_num_seqs": 3, "max_num_batched_tokens": 24, "max_model_len": 32, "num_kv_blocks": 16}
    path = checkpoints.tiny(tmp_path, "qwen3", num_hidden_layers=2)
    return worker_config(path, kv_cache_dtype=request.param, **small)


def use_gpu_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that are loaded from now on are held and computed as on a GPU."""
    for kernel in kernels():
        for name, module in list(sys.modules.items()):
            if name.startswith("cableway.workers") and getattr(module, kernel.name, None) is kernel.function:
                monkeypatch.setattr(module, kernel.name, kernel.launch)

    def multiply(a: torch.Tensor, b: torch.Tensor, *dtype: Any, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(a @ b)  # into float32 whatever the factors are: on a GPU only

    monkeypatch.setattr(torch, "mm", multiply)
    monkeypatch.setattr(formats, "choose", lambda encodings, num_out, num_in, place: OnGpu(place))
    monkeypatch.setattr(formats, "choose_for_experts", lambda encodings, num_out, num_in, place: Together(place))


@pytest.fixture
def as_on_gpu(config: WorkerConfig, monkeypatch: pytest.MonkeyPatch) -> Decoder:
    use_gpu_forms(monkeypatch)
    return load(config)


def outputs(decoder: Decoder, config: WorkerConfig) -> list[list[int]]:
    driver = Driver(Runner(decoder, config), config.block_size, config.max_num_seqs)
    requests = [driver.add(prompt_of(5 + i, i), sampling) for i, sampling in enumerate(SAMPLINGS)]
    driver.generate(4)
    return [request.output[:4] for request in requests]


def test_tokens_are_those_of_a_cpu(config: WorkerConfig, request: pytest.FixtureRequest):
    expected = outputs(load(config), config)
    assert outputs(request.getfixturevalue("as_on_gpu"), config) == expected


def test_the_warm_up_can_be_carried_out(config: WorkerConfig, as_on_gpu: Decoder):
    runner = Runner(as_on_gpu, config)
    for plan in warm_up.plans(config.max_num_seqs, [group.kind for group in runner.state_groups]):
        assert runner.step(plan).failed == []


def test_a_dry_run_leaves_no_trace(config: WorkerConfig, as_on_gpu: Decoder):
    with torch.inference_mode():
        cache = memory.allocate(as_on_gpu, config, memory.kept_as(config), torch.device("cpu"))
        memory.dry_run(as_on_gpu, config, cache)
    assert not any(tensor.view(torch.uint8).any() for tensor in cache.tensors)


@pytest.mark.parametrize(
    "name",
    [
        *("Mamba2", "Qwen3Next", "DeepseekV3", "GptOss"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("Mamba", "RecurrentGemma")),
    ],
)
def test_chunks_of_prompts_and_tokens_beside_them(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of models whose kernels take what is long otherwise than what is short."""
    variant = ZOO[f"{name}ForCausalLM"][0]
    model_class = getattr(transformers, f"{name}ForCausalLM")
    known = model_class.config_class().to_dict().keys() | model_class.config_class.attribute_map.keys()
    fields = {key: value for key, value in checkpoints.SIZES.items() if key in known} | variant
    folder = checkpoints.save(checkpoints.random_model(model_class, fields), tmp_path)

    def logits() -> list[torch.Tensor]:
        session, a, b = harness.Session(harness.load(folder), num_seqs=2), prompt(40), prompt(40).flip(0)
        steps = [[(0, a[:27])], [(0, a[27:28]), (1, b[:20])], [(1, b[20:21]), (0, a[28:])], [(0, a[:1]), (1, b[21:22])]]
        steps.append([(1, b[22:23])])
        return [part for chunks in steps for part in session.step(chunks)]

    expected = logits()
    use_gpu_forms(monkeypatch)
    for one, other in zip(logits(), expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=0)  # sums of chunks, in another order
