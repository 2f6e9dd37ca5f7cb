"""What is compiled before the first step. There is no GPU: kernels are compiled for one that is absent."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cableway.ipc import modelfiles
from cableway.ipc.config import WorkerConfig
from cableway.ipc.messages import Sampling
from cableway.kernels import compilation, tuning
from cableway.kernels.block_copy import block_copy
from cableway.kernels.cuda import CudaKernel
from cableway.workers.rehearsal import rehearse
from cableway.workers.warm_up import SAMPLINGS, plans
from tests import checkpoints
from tests.workers.running import worker_config

triton = pytest.importorskip("triton")
KERNELS = {"_step_inputs", "_add_rms_norm", "_rope_and_write", "_paged_decode", "_decode_work", "_prefill_work"}
OF_DRAWS = {"_sample", "_logprobs", "_penalize", "_count_tokens", "_add_at", "_forbid_words", "_block_copy"}


class AbsentGpu:
    """A Triton driver that compiles for a Hopper GPU that is not here; `loaded` are the kernels it was given."""

    def __init__(self) -> None:
        self.utils = self
        self.loaded: list[str] = []

    def launcher_cls(self, source: Any, metadata: Any) -> str:
        return source.name

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448}

    def load_binary(self, name: str, *_: Any) -> tuple[None, str, int, int, int]:
        self.loaded.append(name)
        return None, name, 0, 0, 1024  # no module, which would have to be given back to this GPU

    def get_current_device(self) -> int:
        return 90

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, warp_size=32)


@pytest.fixture
def absent_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.runtime.driver, "_active", AbsentGpu())
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", None)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
def test_kernels_are_compiled_side_by_side_loaded_and_counted(absent_gpu):
    counter = compilation.watch()
    cache, pairs = torch.empty(2, 4, 8, 2, 16, device="meta"), torch.empty(1, 2, dtype=torch.int64, device="meta")
    with compilation.ahead():
        block_copy(cache, pairs)
        block_copy(cache.half(), pairs)
        block_copy(cache.half(), pairs)
    assert [kernel.name for kernel in counter.kernels] == ["cableway.kernels.block_copy._block_copy"] * 2
    assert len(triton.runtime.driver.active.loaded) == 2, "the first launch would do it"


def rehearsed(config: WorkerConfig, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the kernels that a rehearsal would compile. None is launched."""
    names = set()

    def only_note(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        assert warmup
        names.add(function.__name__)

    monkeypatch.setattr(triton.runtime.JITFunction, "run", only_note)
    monkeypatch.setattr(CudaKernel, "load", lambda kernel, constants: names.add(kernel.name))
    with torch.inference_mode(), compilation.ahead():
        rehearse(config)
    return names


@pytest.mark.parametrize("enforce_eager", [True, False])
def test_every_kind_of_step_is_rehearsed_and_none_is_run(
    checkpoint: Path, absent_gpu, monkeypatch: pytest.MonkeyPatch, enforce_eager: bool
):
    config = worker_config(checkpoint, dtype="float16", max_num_seqs=20, enforce_eager=enforce_eager)
    found = rehearsed(config, monkeypatch)
    assert found >= KERNELS | OF_DRAWS | {"hopper_linear"}
    assert found & {"hopper_prefill", "_paged_prefill"}


def test_a_rehearsal_does_without_the_compiler_of_torch(checkpoint: Path, absent_gpu, monkeypatch: pytest.MonkeyPatch):
    """Some operations on the meta device import it, 800 modules: more than a second in which nobody else has Python."""
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)
    rehearsed(worker_config(checkpoint, dtype="float16", max_num_seqs=20), monkeypatch)


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_every_family_can_be_outlined(
    tmp_path: Path, absent_gpu, monkeypatch: pytest.MonkeyPatch, family: str, invariant: bool
):
    model = checkpoints.tiny(tmp_path, family)
    config = worker_config(
        model, dtype="bfloat16", max_num_seqs=3, max_num_batched_tokens=64, batch_invariant=invariant
    )
    assert "_sample" in rehearsed(config, monkeypatch)


def test_an_outline_asks_for_the_tunings_of_its_shapes(checkpoint: Path, absent_gpu, monkeypatch: pytest.MonkeyPatch):
    tunables = tuning.tunables()
    for tunable in tunables.values():
        monkeypatch.setattr(tunable, "_chosen", {})
    rehearsed(worker_config(checkpoint, dtype="float16", kv_cache_dtype="int8", max_num_seqs=20), monkeypatch)
    asked = {name: set(tunable.asked) for name, tunable in tunables.items()}
    assert asked["gemv"] >= {(128, 64, False, 2), (64, 64, False, 2), (96, 64, True, 2), (64, 96, False, 2)}
    assert not asked["linear"]  # Hopper has a kernel that needs none
    assert asked["paged_decode"] == {(4, 2, 16, 2, 1, 16), (4, 2, 16, 2, 1, 96)}
    assert asked["paged_prefill"] == {(4, 2, 16, 2, 1)}


def test_a_gguf_file_can_be_outlined(absent_gpu, monkeypatch: pytest.MonkeyPatch):
    config = worker_config(modelfiles.locate("smollm2-135m").path, dtype="float16", max_num_seqs=2)
    assert "_sample" in rehearsed(config, monkeypatch)


@pytest.mark.parametrize("max_num_seqs", [1, 3, 64])
def test_the_warm_up_leaves_no_way_of_drawing_out(max_num_seqs: int):
    entered = [new.sampling for plan in plans(max_num_seqs, ["paged"]) for new in plan.new]
    assert set(map(repr, SAMPLINGS[:max_num_seqs])) <= set(map(repr, entered))
    plain = Sampling()
    fields = {name for name in Sampling.__struct_fields__ if any(
        getattr(sampling, name) != getattr(plain, name) for sampling in (*SAMPLINGS, Sampling(prompt_logprobs=1))
    )}  # fmt: skip
    assert fields == set(Sampling.__struct_fields__) - {"max_tokens", "stop_token_ids"}
