"""Forms for GPUs without one: Triton's run by its interpreter, all compiled to machine code for three generations."""

import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cableway.kernels import hopper_decode, hopper_gated, hopper_linear
from cableway.kernels.cuda import CudaKernel
from cableway.kernels.registry import Case, Kernel, kernels
from tests.kernels import laws, machine_code

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(laws.INTERPRETED, reason="the interpreter's own session does not start another")

AMPERE, HOPPER, BLACKWELL = CAPABILITIES = 80, 90, 100
MOST_SHARED_BYTES = {AMPERE: 99 << 10, HOPPER: 227 << 10, BLACKWELL: 99 << 10}
"""Of a block, on the smallest of GPUs that run what is compiled for each: sm_86, sm_90 and sm_120."""
FOLDER = Path(__file__).parent


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_triton_forms_in_the_interpreter(marked: str):
    """Triton looks at the environment while it is imported: the interpreter has a process of its own."""
    command = [sys.executable, "-P", "-m", "pytest", str(FOLDER), "-m", marked, "-p", "no:cacheprovider"]
    command += ["-W", "ignore:divide by zero:RuntimeWarning"]  # log(0) is -inf, as on a GPU
    ran = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
        timeout=1180,  # what hangs ends by its own limit
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr


class AbsentGpu:
    """A Triton driver that compiles for a GPU that is not here."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_device(self) -> int:
        return self._capability  # Triton keeps what it compiled by device: a capability is one

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, warp_size=32)


def without_numbers(tensor: Tensor) -> Tensor:
    """Zeros laid out like a tensor of the meta device, in memory that nothing has touched: they take no time."""
    memory = torch.from_numpy(np.zeros(tensor.untyped_storage().nbytes(), np.uint8)).view(tensor.dtype)
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def compiled(
    kernel: Kernel, case: Case, capability: int, monkeypatch: pytest.MonkeyPatch, known: Collection[str] = ()
) -> list[tuple[str, bytes, int]]:
    """What the kernel's own `launch` starts for a case, compiled as it would be there, and not started.

    Name, machine code, and bytes of shared memory, of all but those of Triton's that are known.
    """
    run, found = triton.runtime.JITFunction.run, []

    def only_compile(function, *args, grid, warmup, **kwargs):
        assert all(0 < size < limit for size, limit in zip(grid, (1 << 31, 1 << 16, 1 << 16), strict=False))
        if function.__name__ in known:
            return
        binary = run(function, *args, grid=grid, warmup=True, **kwargs)
        assert binary.metadata.target.arch == capability
        if capability == HOPPER and "wgmma" in binary.asm["ptx"]:
            assert not machine_code.unwritten(binary.asm["cubin"])
        found.append((function.__name__, binary.asm["cubin"], binary.metadata.shared))

    def only_compile_cuda(function, constants, arguments, *, shared_bytes=0, **sizes):
        found.append((function.name, function.cubin(constants), shared_bytes))

    with monkeypatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", AbsentGpu(capability))
        patch.setattr(triton.runtime.JITFunction, "run", only_compile)
        patch.setattr(CudaKernel, "__call__", only_compile_cuda)
        for module in (hopper_decode, hopper_linear, hopper_gated):
            patch.setattr(module, "tensor_map", lambda *_: bytes(128))  # made by the driver
        made = laws.make(kernel, case, "meta")
        found.clear()  # what prepares arguments
        patch.setattr(torch, "empty", torch.zeros)  # lists of work, which nothing fills here, and some are put in order
        kernel.launch(*laws.mapped(without_numbers, made.args), **laws.mapped(without_numbers, made.kwargs))
    return found


def can_be(case: Case, capability: int) -> bool:
    """Whether GPUs of that generation have the dtypes of a case."""
    return capability > AMPERE or case.get("kept_as") != torch.float8_e4m3fn


def assert_compiles(
    kernel: Kernel, cases: list[Case], monkeypatch: pytest.MonkeyPatch, *, for_all: bool = True
) -> None:
    """For every generation; or for Hopper, and for the others what is new, and all else for one of them in turn."""
    assert any(can_be(case, AMPERE) for case in cases)
    for capability in CAPABILITIES:
        known: set[str] = set()
        for number, case in enumerate(cases):
            if can_be(case, capability):
                in_turn = capability == (AMPERE, BLACKWELL)[number.bit_count() % 2]  # in step with no axis of a grid
                is_whole = for_all or in_turn or capability == HOPPER
                found = compiled(kernel, case, capability, monkeypatch, () if is_whole else known)
                known.update(name for name, *_ in found)
                assert known, (case, capability)
                for _, cubin, shared_bytes in found:
                    assert cubin.startswith(b"\x7fELF"), (case, capability)
                    assert shared_bytes <= MOST_SHARED_BYTES[capability], (case, capability)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
@pytest.mark.parametrize(("kept_as", "num_loads"), [(torch.float32, 8), (torch.bfloat16, 4)])
def test_states_are_read_16_bytes_at_a_time(kept_as: torch.dtype, num_loads: int, monkeypatch: pytest.MonkeyPatch):
    """A thread's 32 numbers of a head, where rows lie as an engine lays them."""
    case = {"spans": ((1, 100),), "heads": (4, 1, 64), "state": 128, "decays": 1, "dtype": torch.bfloat16}
    scan = next(kernel for kernel in kernels() if kernel.name == "state_scan")
    found = compiled(scan, case | {"kept_as": kept_as, "padding": 0}, HOPPER, monkeypatch)
    assert machine_code.disassembled(found[0][1]).count("LDG.E.128") == num_loads


def test_a_register_that_nothing_wrote_is_seen():
    lines = [
        "UMOV UR4, 0x400",
        "@P0 LDG.E R2, desc[UR4][R6.64]",
        "UIADD3 UR6, UP0, UR13, 0x20, URZ",
        "STS [R5+UR6], R2",
        "HGMMA.64x64x16.F32.BF16 R24, R100, gdesc[UR4].tnspB, R24, gsb0",
    ]
    code = "\n".join(f"        /*00{i}0*/                   {line} ;" for i, line in enumerate(lines))
    assert machine_code.unwritten_in(code) == {13: "UIADD3 UR6, UP0, UR13, 0x20, URZ"}


@pytest.mark.timeout(400)  # for all generations, with nothing on disk, beside others
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
@pytest.mark.parametrize("kernel", kernels(), ids=laws.label)
def test_bench_cases_compile(kernel: Kernel, monkeypatch: pytest.MonkeyPatch):
    assert_compiles(kernel, kernel.bench_cases, monkeypatch, for_all=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
@pytest.mark.parametrize("kernel", kernels(), ids=laws.label)
def test_cases_compile(kernel: Kernel, monkeypatch: pytest.MonkeyPatch):
    assert_compiles(kernel, kernel.cases + kernel.bench_cases, monkeypatch)
