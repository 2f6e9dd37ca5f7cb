"""Nothing is compiled after ready: steps of any shape ask for the kernels that the rehearsal asked for."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cableway.ipc.config import WorkerConfig
from cableway.kernels import compilation
from cableway.kernels.cuda import CudaKernel
from cableway.workers import rehearsal
from cableway.workers.blocks.decoder import Decoder
from tests.models.published import ABOUT, EXACTLY
from tests.workers.running import worker_config
from tests.workers.test_rehearsal import AbsentGpu

triton = pytest.importorskip("triton")
NUM_STEPS = 12
LENGTHS = [1, 1, 2, 3, 7, 16, 17, 33, 64, 100, 250]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """All that would be compiled, as Triton knows it or with its constants. None is."""
    kernels: set[Any] = set()
    monkeypatch.setattr(triton.runtime.driver, "_active", AbsentGpu())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    compile_it = lambda function, key, *_: kernels.add((function.__name__, key))  # noqa: E731
    monkeypatch.setattr(triton.runtime.JITFunction, "_do_compile", compile_it)
    monkeypatch.setattr(CudaKernel, "load", lambda kernel, constants: kernels.add((kernel.name, constants)))
    return kernels


def rehearse(config: WorkerConfig) -> None:
    with torch.inference_mode(), compilation.ahead():
        rehearsal.rehearse(config)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
@pytest.mark.parametrize("model", ["Qwen3-0.6B", "Llama-3.1-8B", "Qwen3-30B-A3B", "DeepSeek-V2-Lite", "mamba-130m"])
def test_steps_ask_for_nothing_new(model: str, tmp_path: Path, asked, monkeypatch: pytest.MonkeyPatch):
    name, _, fields = (EXACTLY | ABOUT)[model]
    (tmp_path / "config.json").write_text(json.dumps({**fields, "architectures": [name]}))
    config = worker_config(
        tmp_path, load_format="dummy", dtype="bfloat16", max_model_len=1000, max_num_seqs=72,
        max_num_batched_tokens=1200, block_size=0,
    )  # fmt: skip
    rehearse(config)
    known = set(asked)
    assert known
    rng = random.Random(0)

    def other_steps(config: WorkerConfig) -> Iterator[Any]:
        for _ in range(NUM_STEPS):
            lengths = rng.choices(LENGTHS, k=rng.choice([1, 2, 5, 9, 20, 50]))
            while sum(lengths) > config.max_num_batched_tokens:
                lengths.pop()
            yield rehearsal._chunks(lengths)

    draw = rehearsal._draw
    monkeypatch.setattr(rehearsal, "_steps", other_steps)
    monkeypatch.setattr(rehearsal, "_draw", lambda *args: draw(args[0], rng.randint(1, 40), args[2]))
    monkeypatch.setattr(Decoder, "abridge", lambda decoder: None)
    rehearse(config)
    assert asked == known
