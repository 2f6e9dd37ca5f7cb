"""The benchmark of steps: what it books and joins, without a GPU; and the command on a CPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from cableway.bench.floor import Rates, Shape, Widths, step_floor_s
from cableway.bench.gpu_step import joined
from cableway.bench.ledger import PRODUCTS, Entry, Ledger
from cableway.bench.step import command
from cableway.kernels.block_copy import block_copy
from cableway.kernels.cuda import CudaKernel
from tests import checkpoints

triton = pytest.importorskip("triton")
SHAPE = Shape(body_params=1000, head_params=500, query_len=2 * 4 * 8, kept_len=2 * 2 * 8)


def test_a_step_of_few_rows_is_bound_by_bytes_and_a_prompt_by_products():
    rates = Rates(copy_bytes_s=100.0, matmul_flop_s=1e6)
    widths = Widths(2, 2)
    one = step_floor_s(SHAPE, rates, widths, rows=1, length=10)
    assert one == (1500 + 10 * 2 * 2 * 8) * 2 / 100
    assert step_floor_s(SHAPE, rates, widths, rows=2, length=10) == one + 10 * 2 * 2 * 8 * 2 / 100
    with_states = SHAPE._replace(state_len=25)
    assert step_floor_s(with_states, rates, widths, rows=1, length=10) == one + 25 * 8 / 100
    assert step_floor_s(with_states, rates, Widths(2, 2, 2), rows=1, length=10) == one + 25 * 4 / 100
    in_8_bits = step_floor_s(SHAPE, rates, Widths(2, 1), rows=2, length=10)
    assert in_8_bits == one
    prompt = step_floor_s(SHAPE, rates, widths, rows=0, length=10)
    assert prompt == pytest.approx((10 * 2 * 1000 + 2 * 10 * 10 * 2 * 4 * 8 + 2 * 500) / 1e6)


def test_kernels_and_products_are_booked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton.runtime.JITFunction, "run", lambda *_, **__: None)
    cache, pairs = torch.empty(2, 4, 8, 2, 16, device="meta"), torch.empty(3, 2, dtype=torch.int64, device="meta")
    x, weight = torch.empty(4, 8), torch.empty(16, 8)
    with Ledger() as ledger:
        block_copy(cache, pairs)
        block_copy(cache, pairs)
        torch.nn.functional.linear(x, weight)
    block_bytes = 2 * 8 * 2 * 16 * 4
    assert ledger.entries["block_copy"] == Entry(2, 2 * 3 * 2 * block_bytes)
    assert ledger.entries[PRODUCTS] == Entry(1, 4 * (4 * 8 + 16 * 8 + 4 * 16))
    assert ledger.owners == {"_block_copy": "block_copy"}
    block_copy(cache, pairs)
    assert ledger.entries["block_copy"].calls == 2


def test_a_kernel_in_cuda_belongs_to_what_launches_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(CudaKernel, "__call__", lambda *_: None)
    monkeypatch.setattr(triton.runtime.JITFunction, "run", lambda *_, **__: CudaKernel("inner")())
    with Ledger() as ledger:
        block_copy(torch.empty(2, 4, 8, 2, 16, device="meta"), torch.empty(3, 2, dtype=torch.int64, device="meta"))
        CudaKernel("outer")()
    assert ledger.owners == {"_block_copy": "block_copy", "inner": "block_copy", "outer": ""}


def test_times_are_joined_with_what_is_booked():
    ledger = Ledger()
    ledger.owners = {"_likeliest": "sample", "_sample": "sample"}
    ledger.entries = {"sample": Entry(1, 4000), PRODUCTS: Entry(2, 10_000)}
    times = {"_likeliest": (1, 3.0), "_sample": (1, 1.0), "nvjet_tst_64x8": (2, 20.0), "elementwise_kernel": (3, 2.0)}
    found = {kernel.name: kernel for kernel in joined(times, ledger, copy_bytes_s=1e9)}
    assert list(found) == [PRODUCTS, "sample", "other kernels"]
    assert (found["sample"].calls, found["sample"].device_us) == (2, 4.0)
    assert (found["sample"].copy_fraction, found[PRODUCTS].copy_fraction) == pytest.approx((1.0, 0.5))
    assert found["other kernels"].num_bytes == 0


def run(*arguments: str) -> Any:
    return CliRunner().invoke(command, arguments)


def test_the_command_on_a_cpu(tmp_path: Path):
    model, trace = str(checkpoints.tiny(tmp_path / "model", "llama")), tmp_path / "trace.json"
    common = ("--model", model, "--steps", "2", "--num-threads", "1", "--max-model-len", "128", "--json")
    ran = run(*common, "--shapes", "decode:2@8,prefill:16")
    assert ran.exit_code == 0, ran.output
    timings = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [timing["shape"] for timing in timings] == ["decode:2@8", "prefill:16"]
    assert all(timing["step_ms"] > timing["body_ms"] > 0 for timing in timings)
    assert run(*common, "--shapes", "decode:1@8", "--profile", str(trace)).exit_code == 0
    assert json.loads(trace.read_text())["traceEvents"]


@pytest.mark.parametrize("arguments", [("--shapes", "decode:3"), ("--shapes", "prefill:1,prefill:2", "--profile", "x")])
def test_what_cannot_be_is_said(arguments: tuple[str, ...]):
    ran = run(*arguments)
    assert ran.exit_code == 2
