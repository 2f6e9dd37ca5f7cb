"""Kernels in CUDA C++ without a GPU: every way in which they can be compiled."""

import math
from itertools import product
from typing import Any

import pytest
import torch

from cableway.kernels import (
    cluster_decode,
    hopper_decode,
    hopper_gated,
    hopper_latent,
    hopper_linear,
    hopper_prefill,
    latent_attention,
    level_work,
    prefill_work,
)
from cableway.kernels.attention_plan import make
from cableway.kernels.cuda import CudaKernel
from tests.kernels import laws, machine_code

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(laws.INTERPRETED, reason="nothing here is interpreted: the other session compiles it")
OPTIONS = [
    {},
    {"window": 100},
    {"soft_cap": 2.0, "slopes": True},
    {"window": 9, "sinks": True, "block_size": 24},
]


def kinds(all_heads: list[tuple[int, int, int]], all_options: list[dict[str, Any]]) -> list[Any]:
    """Heads, dtype and options: all heads with two options each in bfloat16, and once float16, which is another type of
    the same code. All others are in test-slow."""
    listed = []
    for (row, heads), (column, options) in product(enumerate(all_heads), enumerate(all_options)):
        distance = (row - column) % len(all_options)
        for dtype, is_slow in ((torch.bfloat16, distance > 1), (torch.float16, row > 0 or distance != 2)):
            listed.append(pytest.param(heads, dtype, options, marks=[pytest.mark.slow] if is_slow else []))
    return listed


@pytest.mark.parametrize(
    ("heads", "dtype", "options"), kinds([(16, 8, 64), (32, 8, 128), (6, 2, 80), (20, 1, 192), (4, 4, 256)], OPTIONS)
)
def test_prefill_compiles(heads, dtype, options, monkeypatch: pytest.MonkeyPatch):
    found = []

    def only_compile(kernel, constants, arguments, *, shared_bytes, **sizes):
        found.append((kernel.cubin(constants), shared_bytes, len(arguments)))

    monkeypatch.setattr(CudaKernel, "__call__", only_compile)
    monkeypatch.setattr("cableway.kernels.cuda.gpu_capability", lambda: 90)
    made = make(((100, 300), (7, 7)), heads, dtype, **options)
    q, cache, plan, *_ = made.args
    monkeypatch.setattr(type(plan), "prefill_work", lambda plan, **_: torch.zeros(4, 2, dtype=torch.int32))
    hopper_prefill.launch(q, cache, plan, torch.empty_like(q), made.kwargs["scores"])
    ((cubin, shared_bytes, num_argument_bytes),) = found
    assert cubin.startswith(b"\x7fELF")
    assert shared_bytes <= (227 << 10) - 512  # and what the file declares
    assert num_argument_bytes == 10 * 8 + 3 * 8 + 2 * 4 + 2 * 4


@pytest.mark.parametrize(
    ("heads", "dtype", "options"),
    [
        *kinds([(16, 8, 64), (32, 8, 128), (6, 2, 80), (2, 1, 192), (4, 4, 256)], OPTIONS),
        ((16, 8, 128), torch.bfloat16, {"kept_as": torch.float8_e4m3fn, "soft_cap": 2.0}),
        ((32, 8, 128), torch.bfloat16, {"kept_as": torch.float8_e5m2, "window": 100}),
        ((6, 2, 80), torch.float16, {"kept_as": torch.int8, "sinks": True}),
    ],
)
def test_decode_compiles(heads, dtype, options, monkeypatch: pytest.MonkeyPatch):
    found = []

    def only_compile(kernel, constants, arguments, *, num_programs, cluster, **rest):
        found.append((kernel.cubin(constants), num_programs % cluster, len(arguments)))

    monkeypatch.setattr(CudaKernel, "__call__", only_compile)
    monkeypatch.setattr("cableway.kernels.cuda.gpu_capability", lambda: 90)
    made = make(((1, 300), (1, 7)), heads, dtype, **options)
    cluster_decode.launch(*made.args[:3], made.kwargs["scores"])
    ((cubin, rest, num_argument_bytes),) = found
    assert cubin.startswith(b"\x7fELF")
    assert (rest, num_argument_bytes) == (0, 7 * 8 + 3 * 8 + 4 * 4)


@pytest.mark.parametrize(
    ("heads", "dtype", "options"),
    kinds(
        [(16, 8, 64), (32, 8, 128), (32, 4, 128), (16, 1, 192), (12, 12, 128)],
        [*OPTIONS[:3], {"window": 9, "block_size": 64}],
    ),
)
def test_decode_of_many_compiles(heads, dtype, options, monkeypatch: pytest.MonkeyPatch):
    found = []

    def only_compile(kernel, constants, arguments, *, num_programs, num_threads, shared_bytes, overlaps):
        found.append((kernel.cubin(constants), len(arguments)))
        assert num_programs * num_threads > 0
        assert shared_bytes <= (227 << 10) - 1024  # and what the file declares

    monkeypatch.setattr(CudaKernel, "__call__", only_compile)
    monkeypatch.setattr("cableway.kernels.cuda.gpu_capability", lambda: 90)
    monkeypatch.setattr(hopper_decode, "tensor_map", lambda *_: bytes(128))  # made by the driver
    monkeypatch.setattr(level_work, "launch", level_work.ref)
    made = make(((1, 300), (1, 7), (30, 50)), heads, dtype, **options)
    assert hopper_decode.launch(*made.args[:3], made.kwargs["scores"]).shape == made.args[0].shape
    ((cubin, num_argument_bytes),) = found
    assert not machine_code.spills(cubin)
    assert num_argument_bytes == 320  # a multiple of the 64 bytes that tensor maps are aligned to


@pytest.mark.parametrize("num_tokens", [3, 17, 64, 128])
@pytest.mark.parametrize(("num_out", "num_in"), [(4096, 1024), (1024, 3072), (48, 72), (208, 4096)])
@pytest.mark.parametrize(
    ("dtype", "gated", "biased"),
    [(torch.bfloat16, False, False), (torch.bfloat16, True, True), (torch.float16, False, True)],
)
def test_linear_compiles(num_tokens, num_out, num_in, dtype, gated, biased, monkeypatch: pytest.MonkeyPatch):
    found = []

    def only_compile(kernel, constants, arguments, *, num_programs, cluster, shared_bytes, **rest):
        found.append((kernel.cubin(constants), num_programs % cluster, shared_bytes, len(arguments)))

    monkeypatch.setattr(CudaKernel, "__call__", only_compile)
    for name in ("cuda", "hopper_linear"):
        monkeypatch.setattr(f"cableway.kernels.{name}.gpu_capability", lambda: 90)
    monkeypatch.setattr(hopper_linear, "num_processors", lambda: 132)
    monkeypatch.setattr(hopper_linear, "tensor_map", lambda *_: bytes(128))
    x, weight = torch.empty(num_tokens, num_in, dtype=dtype), torch.empty(num_out * (1 + gated), num_in, dtype=dtype)
    assert hopper_linear.fits(x, weight, gated=gated)
    hopper_linear.launch(x, weight, weight[:, 0].contiguous() if biased else None, gated=gated)
    ((cubin, rest, shared_bytes, num_argument_bytes),) = found
    assert cubin.startswith(b"\x7fELF")
    assert shared_bytes <= (227 << 10) - 512  # and what the file declares
    assert (rest, num_argument_bytes) == (0, 320)  # a multiple of the 64 bytes that tensor maps are aligned to


@laws.needs_hopper
@pytest.mark.parametrize("num_tokens", [65, 129, 200, 256])
@pytest.mark.parametrize(("num_out", "num_in"), [(4096, 1024), (1024, 3072)])
def test_linear_takes_several_tiles_of_tokens(num_tokens, num_out, num_in):
    torch.manual_seed(0)
    x = torch.randn(num_tokens, num_in, device="cuda", dtype=torch.bfloat16)
    weight = (torch.randn(num_out, num_in, device="cuda") / num_in**0.5).bfloat16()
    assert hopper_linear.fits(x, weight, gated=False)
    y = hopper_linear.launch(x, weight, None, gated=False)
    torch.testing.assert_close(y.float(), x.float() @ weight.float().T, atol=2e-2, rtol=1.6e-2)


@pytest.mark.parametrize("num_tokens", [129, 256, 1000, 8192])
@pytest.mark.parametrize(("num_out", "num_in"), [(28672, 4096), (4096, 14336), (1024, 1024), (1032, 1096)])
@pytest.mark.parametrize(("dtype", "biased"), [(torch.bfloat16, True), (torch.float16, False)])
def test_gated_linear_compiles(num_tokens, num_out, num_in, dtype, biased, monkeypatch: pytest.MonkeyPatch):
    found, boxes = [], []

    def only_compile(kernel, constants, arguments, *, num_programs, cluster, shared_bytes, **rest):
        found.append((kernel.cubin(constants), num_programs % cluster, shared_bytes, len(arguments)))

    def only_note(tensor, box):
        assert all(stride % 8 == 0 for stride in tensor.stride()[:-1])
        assert tensor.stride(-1) == 1
        boxes.append((tensor.numel(), math.prod(box)))
        return bytes(128)

    monkeypatch.setattr(CudaKernel, "__call__", only_compile)
    for name in ("cuda", "hopper_gated"):
        monkeypatch.setattr(f"cableway.kernels.{name}.gpu_capability", lambda: 90)
    monkeypatch.setattr(hopper_gated, "num_processors", lambda: 132)
    monkeypatch.setattr(hopper_gated, "tensor_map", only_note)
    x, weight = torch.empty(num_tokens, num_in, dtype=dtype), torch.empty(2 * num_out, num_in, dtype=dtype)
    hopper_gated.launch(x, weight, torch.empty(len(weight), dtype=dtype) if biased else None)
    ((cubin, rest, shared_bytes, num_argument_bytes),) = found
    assert cubin.startswith(b"\x7fELF")
    assert shared_bytes <= (227 << 10) - 512  # and what the file declares
    assert (rest, num_argument_bytes) == (0, 448)  # a multiple of the 64 bytes that tensor maps are aligned to
    sizes, box_sizes = zip(*boxes, strict=True)
    assert sizes == (weight.numel(), x.numel(), num_tokens * num_out)
    assert box_sizes[0] == 128 * 64


@pytest.mark.parametrize(("num_heads", "rank", "width"), [(16, 512, 576), (128, 512, 576), (40, 256, 288)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_latent_compiles(num_heads, rank, width, dtype, monkeypatch: pytest.MonkeyPatch):
    found = []

    def only_compile(kernel, constants, arguments, *, num_programs, shared_bytes, **rest):
        found.append((kernel.cubin(constants)[:4], num_programs, len(arguments)))
        assert shared_bytes <= (227 << 10) - 1024  # and what the file declares

    monkeypatch.setattr(CudaKernel, "__call__", only_compile)
    monkeypatch.setattr("cableway.kernels.cuda.gpu_capability", lambda: 90)
    monkeypatch.setattr(hopper_latent, "num_processors", lambda: 8)
    monkeypatch.setattr(hopper_latent, "_put_together", lambda out, *parts: None)
    monkeypatch.setattr(level_work, "launch", level_work.ref)
    monkeypatch.setattr(prefill_work, "launch", prefill_work.ref)
    made = latent_attention.make(((1, 300), (1, 7), (30, 50), (9, 9)), num_heads, rank, width, dtype)
    out = hopper_latent.decode(*made.args, **made.kwargs)
    assert out.shape == (41, num_heads, rank)
    hopper_latent.prefill(*made.args, out, scale=made.kwargs["scale"], skips_singles=True)
    assert found == [(b"\x7fELF", 8, 11 * 8), (b"\x7fELF", 8, 13 * 8)]


def test_what_does_not_compile_is_told(tmp_path, monkeypatch: pytest.MonkeyPatch):
    kernel = CudaKernel("broken", tmp_path)
    (tmp_path / "broken.cu").write_text("no such thing")
    monkeypatch.setattr("cableway.kernels.cuda.gpu_capability", lambda: 90)
    with pytest.raises(RuntimeError, match=r"broken\.cu does not compile: .*error"):
        kernel.cubin(())
