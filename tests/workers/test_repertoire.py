"""A start that finds the list of an earlier one loads what is on it. Kernels are those of a GPU that is absent."""

import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from cableway.ipc.config import WorkerConfig
from cableway.kernels import block_copy, compilation
from cableway.kernels.compilation import Kernel
from cableway.kernels.cuda import CudaKernel
from cableway.workers import rehearsal
from tests.workers.running import worker_config
from tests.workers.test_rehearsal import AbsentGpu

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
IN_CUDA = Kernel("hopper_linear", (("T_NAME", '"bf16"'), ("ROWS", 64)))


class Starts:
    """Starts of workers one after another, each as if in a process of its own; what steps need is two kernels in Triton
    and one in CUDA C++."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.gpu = folder, AbsentGpu()
        self.num_rehearsals = 0
        self.loaded_cuda: list[Kernel] = []
        self._patch = monkeypatch
        monkeypatch.setattr(triton.knobs.cache, "dir", str(folder))
        monkeypatch.setattr(triton.runtime.driver, "_active", self.gpu)
        monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", None)
        monkeypatch.setattr(rehearsal, "rehearse", self._rehearse)
        monkeypatch.setattr(CudaKernel, "load", lambda *args: self._load_cuda(*args))

    def __call__(self, config: WorkerConfig) -> None:
        self.gpu.loaded.clear()
        self.loaded_cuda.clear()
        kernel = block_copy._block_copy
        self._patch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
        start = rehearsal.Rehearsal(config)
        start.start()
        start.wait()

    @property
    def list_path(self) -> Path:
        (path,) = self.folder.glob("*/repertoire.json")
        return path

    def _rehearse(self, config: WorkerConfig, account: Any) -> None:
        self.num_rehearsals += 1
        step()
        compilation.in_background(CudaKernel(IN_CUDA.name).load, IN_CUDA.made_for)

    def _load_cuda(self, kernel: CudaKernel, constants: Any) -> None:
        self.loaded_cuda.append(Kernel(kernel.name, constants))
        compilation.count(self.loaded_cuda[-1])


def step() -> None:
    pairs = torch.empty(1, 2, dtype=torch.int64, device="meta")
    for num_blocks in (4, 6):  # the same kernels, asked for again until they are compiled
        cache = torch.empty(2, num_blocks, 8, 2, 16, device="meta")
        block_copy.block_copy(cache, pairs)
        block_copy.block_copy(cache.half(), pairs)


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Starts:
    return Starts(tmp_path / "cache", monkeypatch)


def assert_ready(start: Starts) -> None:
    """All is loaded, so that steps ask Triton for nothing new."""
    assert start.gpu.loaded == ["_block_copy"] * 2
    assert start.loaded_cuda == [IN_CUDA]
    counter = compilation.watch()
    with compilation.ahead():
        step()
    assert counter.kernels == []


def test_what_is_on_the_list_is_loaded_and_nothing_is_rehearsed(checkpoint: Path, start: Starts):
    config = worker_config(checkpoint)
    start(config)
    assert_ready(start)
    assert len(msgspec.json.decode(start.list_path.read_bytes())) == 3
    compiled = sorted(start.folder.rglob("*.cubin"))
    start(msgspec.structs.replace(config, runtime_dir="/another", engine="9"))
    assert_ready(start)
    assert start.num_rehearsals == 1
    assert sorted(start.folder.rglob("*.cubin")) == compiled


def test_what_is_on_the_list_and_not_on_disk_is_compiled_before_ready(checkpoint: Path, start: Starts):
    config = worker_config(checkpoint)
    start(config)
    for path in start.folder.iterdir():
        if path != start.list_path.parent:
            shutil.rmtree(path)
    start(config)
    assert_ready(start)
    assert start.num_rehearsals == 1
    assert list(start.folder.rglob("*.cubin"))


@pytest.mark.parametrize("broken", [b"", b"nonsense", -1])
def test_a_broken_list_is_made_anew(checkpoint: Path, start: Starts, broken: bytes | int):
    config = worker_config(checkpoint)
    start(config)
    whole = start.list_path.read_bytes()
    start.list_path.write_bytes(whole[:broken] if isinstance(broken, int) else broken)
    start(config)
    assert_ready(start)
    assert start.num_rehearsals == 2
    assert start.list_path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_to_does_without_a_list(
    checkpoint: Path, start: Starts, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*made_of: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(compilation, "kept", refuse)
    for num in (1, 2):
        start(worker_config(checkpoint))
        assert_ready(start)
        assert start.num_rehearsals == num


def test_another_configuration_model_gpu_or_code_has_no_list(
    checkpoint: Path, start: Starts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = worker_config(checkpoint)
    start(config)
    start(msgspec.structs.replace(config, max_num_seqs=config.max_num_seqs + 1))
    assert start.num_rehearsals == 2
    model = shutil.copytree(checkpoint, tmp_path / "model")
    start(worker_config(model))
    assert start.num_rehearsals == 3
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    start(worker_config(model))
    assert start.num_rehearsals == 4
    monkeypatch.setattr("cableway.workers.repertoire.device_name", lambda: "another GPU")
    start(config)
    assert start.num_rehearsals == 5
    monkeypatch.setattr("cableway.workers.repertoire._CODE", [tmp_path / "model"])
    start(config)
    assert start.num_rehearsals == 6
    start(config)
    assert start.num_rehearsals == 6
