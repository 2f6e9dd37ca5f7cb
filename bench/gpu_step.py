"""Steps on a GPU: what they take on the host and the device, and how near each kernel is to the memory's speed.

Steps are begun while the one before runs, as the worker does. Kernels are timed by torch's profiler in steps as they
are served, by graphs; what they move is booked in one step without (see ledger.py).
"""

import re
import time
from pathlib import Path
from typing import Any

import msgspec
import torch

from cableway.bench.driver import Driver
from cableway.bench.floor import Rates, Shape, Widths, step_floor_s
from cableway.bench.ledger import PRODUCTS, Entry, Ledger
from cableway.ipc.config import WorkerConfig
from cableway.ipc.messages import Sampling
from cableway.workers.memory import kept_as
from cableway.workers.runner import Runner

_PROFILED_STEPS = 5
_LIBRARY_PRODUCT = re.compile(r"gemm|nvjet|cutlass|splitK|cublas|gemv", re.IGNORECASE)
_OTHERS = "other kernels"


class KernelTime(msgspec.Struct, kw_only=True):
    """One kernel in one step. Where kernels overlap their times do too: one that waits counts as running."""

    name: str
    calls: float
    device_us: float
    num_bytes: int  # that its contract says it has to move; 0 = not known
    copy_fraction: float  # of the bandwidth that a copy has


class GpuTiming(msgspec.Struct, kw_only=True):
    """Means over the steps of one shape."""

    shape: str
    step_ms: float
    host_ms: float  # of `Runner.begin`
    kernels_ms: float
    floor_ms: float
    floor_fraction: float
    tok_s: float
    kernels: list[KernelTime]


class GpuStep:
    """Steps of one shape: `rows` sequences of one token each after `length` others, or one prompt of `length`."""

    def __init__(self, runner: Runner, config: WorkerConfig, sampling: Sampling, rows: int, length: int) -> None:
        runner.forget()
        self._runner, self._rows, self._length = runner, rows, length
        self._config, self._sampling = config, sampling
        self._driver = Driver(runner, runner.block_size, config.max_num_seqs)
        for row in range(rows):
            self._add(row)

    def measure(self, shape: str, num_steps: int, model: Shape, rates: Rates, trace: Path | None) -> GpuTiming:
        """Time it; also write a trace of a few steps to the file `trace`."""
        self._run(4)
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        host_s = self._run(num_steps)
        step_s = (time.perf_counter() - began_s) / num_steps
        times = self._profiled(trace)
        dtypes = (getattr(torch, self._config.dtype), kept_as(self._config), getattr(torch, self._config.state_dtype))
        widths = Widths(*(dtype.itemsize for dtype in dtypes))
        floor_s = step_floor_s(model, rates, widths, self._rows, self._length)
        kernels = joined(times, self._booked(), rates.copy_bytes_s)
        return GpuTiming(
            shape=shape,
            step_ms=1e3 * step_s,
            host_ms=1e3 * host_s / num_steps,
            kernels_ms=sum(kernel.device_us for kernel in kernels) / 1e3,
            floor_ms=1e3 * floor_s,
            floor_fraction=floor_s / step_s,
            tok_s=(self._rows or self._length) / step_s,
            kernels=kernels,
        )

    def _add(self, seed: int) -> int:
        """A row whose prompt is computed; its number."""
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randint(10, 10_000, (self._length,), generator=generator).tolist()
        request = self._driver.add(prompt, self._sampling)
        while left := len(prompt) - request.num_computed:
            self._driver.step({request.row: min(left, self._config.max_num_batched_tokens)})
        return request.row

    def _run(self, num_steps: int) -> float:
        """Seconds that the host spent on beginning so many steps."""
        host_s, begun = 0.0, []
        for step in range(num_steps):
            plan = self._driver.plan_ahead() if self._rows else self._plan_prompt(step)
            began_s = time.perf_counter()
            begun.append(self._runner.begin(plan))
            host_s += time.perf_counter() - began_s
            if len(begun) > 1:
                self._runner.finish(begun.pop(0))
        for last in begun:
            self._runner.finish(last)
        return host_s

    def _plan_prompt(self, seed: int) -> Any:
        for request in list(self._driver.running.values()):
            self._driver.remove(request)
        self._driver.add([(seed * 31 + i * 7) % 9000 + 10 for i in range(self._length)], self._sampling)
        return self._driver.plan_ahead()

    def _profiled(self, trace: Path | None) -> dict[str, tuple[float, float]]:
        """Calls and microseconds of every kernel of a step, by the name that the profiler knows."""
        activities = [torch.profiler.ProfilerActivity.CUDA]
        if trace:
            activities.append(torch.profiler.ProfilerActivity.CPU)
        with torch.profiler.profile(activities=activities) as profile:
            self._run(_PROFILED_STEPS)
            torch.cuda.synchronize()
        if trace:
            profile.export_chrome_trace(str(trace))
        on_device = torch.autograd.DeviceType.CUDA
        return {
            event.key: (event.count / _PROFILED_STEPS, event.self_device_time_total / _PROFILED_STEPS)
            for event in profile.key_averages()
            if event.device_type == on_device and event.self_device_time_total > 0
        }

    def _booked(self) -> Ledger:
        plan = self._driver.plan_ahead() if self._rows else self._plan_prompt(0)
        with self._runner.without_graphs(), Ledger() as ledger:
            self._runner.finish(self._runner.begin(plan))
        return ledger


def joined(times: dict[str, tuple[float, float]], ledger: Ledger, copy_bytes_s: float) -> list[KernelTime]:
    """Times of kernels under the names of what launched them, slowest first."""
    totals: dict[str, tuple[float, float]] = {}
    for kernel, (kernel_calls, kernel_us) in times.items():
        owner = ledger.owners.get(kernel) or (PRODUCTS if _LIBRARY_PRODUCT.search(kernel) else _OTHERS)
        calls, us = totals.get(owner, (0.0, 0.0))
        totals[owner] = calls + kernel_calls, us + kernel_us
    found = []
    for name, (calls, us) in sorted(totals.items(), key=lambda item: -item[1][1]):
        booked = ledger.entries.get(name, Entry())
        fraction = booked.num_bytes / (us / 1e6) / copy_bytes_s
        found.append(
            KernelTime(name=name, calls=calls, device_us=us, num_bytes=booked.num_bytes, copy_fraction=fraction)
        )
    return found
