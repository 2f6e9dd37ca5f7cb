"""Nothing is compiled after ready: steps of any shape ask for the kernels that the rehearsal asked for, or its list."""

import gc
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cableway.ipc.config import WorkerConfig
from cableway.kernels import compilation
from cableway.kernels.compilation import Kernel
from cableway.kernels.cuda import CudaKernel
from cableway.workers import rehearsal, repertoire
from cableway.workers.blocks.decoder import Decoder
from tests.models.published import ABOUT, EXACTLY
from tests.workers.running import worker_config
from tests.workers.test_rehearsal import AbsentGpu

triton = pytest.importorskip("triton")
NUM_STEPS = 12
LENGTHS = [1, 1, 2, 3, 7, 16, 17, 33, 64, 100, 250]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> set[Kernel]:
    """All that would be compiled. None is."""
    counter = compilation.Counter()
    kernels: set[Kernel] = set()

    def note(**what: Any) -> bool:
        counter(**what)
        kernels.add(counter.kernels.pop())
        return True  # Triton compiles nothing then

    def note_cuda(kernel: CudaKernel, constants: Any) -> None:
        kernels.add(Kernel(kernel.name, constants))

    monkeypatch.setattr(triton.runtime.driver, "_active", AbsentGpu())
    for function in gc.get_objects():
        if issubclass(type(function), triton.runtime.JITFunction):  # as in a new process
            monkeypatch.setattr(function, "device_caches", defaultdict(function.create_binder))
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", note)
    monkeypatch.setattr(CudaKernel, "load", note_cuda)
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
    assert {type(kernel.made_for) for kernel in known} == {str, tuple}
    asked.clear()
    with compilation.ahead():
        repertoire.load(known)
    assert asked == known, "what a list has made loaded is not what steps ask for"
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
