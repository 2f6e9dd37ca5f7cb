"""`cableway bench kernels`: every kernel of the registry on its large cases, beside what the machine can copy.

A kernel that is added is timed without another word here. Bytes are those its contract says it must move; on a CPU they
may come from its caches, so a share above 1 is no mistake there. On a GPU every run finds them in memory alone.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import click
import msgspec
import torch
from rich.console import Console
from rich.table import Table

from cableway.kernels.registry import Call, Case, Kernel, kernels

_FLUSH_BYTES = 512 << 20
"""Written between runs on a GPU: several times its cache, and for longer than a launch takes on the host."""
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 128 << 20}
_FEWEST_RUNS = 10


class Timing(msgspec.Struct, kw_only=True):
    """Median of one case, and what follows from it. `copy_frac`: bytes/s over those of a copy in the same process."""

    kernel: str
    case: str
    device: str
    us: float
    gb_s: float
    copy_gb_s: float
    copy_frac: float
    tflop_s: float | None


@click.command("kernels")
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--kernel", "names", multiple=True, help="Only this one; may be given again.  [all]")
@click.option("--num-threads", default=0, type=click.IntRange(0), help="Of a CPU; 0: torch's choice.")
@click.option("--case-ms", default=100, show_default=True, type=click.IntRange(1), help="Spent on each case, at least.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON line a case.")
def command(device: str, names: tuple[str, ...], num_threads: int, case_ms: int, as_json: bool) -> None:
    """Time every kernel, in microseconds and as a share of the machine's copy bandwidth."""
    chosen = _chosen(names)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if num_threads:
        torch.set_num_threads(num_threads)
    timings = []
    for timing in measure(chosen, device, case_ms / 1000):
        timings.append(timing)
        if as_json:
            print(json.dumps(msgspec.to_builtins(timing)), flush=True)
    if not as_json:
        Console().print(_table(timings))


def _chosen(names: tuple[str, ...]) -> list[Kernel]:
    found = {kernel.name: kernel for kernel in kernels()}
    unknown = [name for name in names if name not in found]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(sorted(found))}", param_hint="--kernel")
    return [found[name] for name in names or sorted(found)]


def measure(chosen: list[Kernel], device: str, case_s: float) -> Iterator[Timing]:
    """Each bench case of the kernels, timed for at least `case_s` seconds."""
    median_us = {"cuda": _median_us_of_gpu, "cpu": _median_us_of_cpu}[device]
    copy_bytes_us = _copy_bytes_us(median_us, device, case_s)
    for kernel in chosen:
        for case in kernel.bench_cases:
            torch.manual_seed(0)
            made = kernel.make(**case, device=device)
            us = median_us(_runs(kernel, made), case_s)
            bytes_us = kernel.num_bytes(made) / us
            yield Timing(
                kernel=kernel.name,
                case=_label(case),
                device=device,
                us=us,
                gb_s=bytes_us / 1e3,
                copy_gb_s=copy_bytes_us / 1e3,
                copy_frac=bytes_us / copy_bytes_us,
                tflop_s=kernel.num_flops(made) / us / 1e6 if kernel.num_flops else None,
            )


Runs = Iterator[Callable[[], Any]]


def _runs(kernel: Kernel, made: Call) -> Runs:
    """The same call for ever; on tensors of its own each time where it writes in place, lest values run away."""
    while True:
        run = made.clone() if kernel.updates else made
        yield lambda run=run: kernel.function(*run.args, **run.kwargs)


def _copy_bytes_us(median_us: Callable[[Runs, float], float], device: str, case_s: float) -> float:
    """Bytes read and written in a microsecond by a large copy."""
    source = torch.ones(_COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_us(iter(lambda: lambda: target.copy_(source), None), case_s)


def _median_us_of_cpu(runs: Runs, case_s: float) -> float:
    next(runs)()
    times_us: list[float] = []
    end_s = time.perf_counter() + case_s
    while len(times_us) < _FEWEST_RUNS or time.perf_counter() < end_s:
        run = next(runs)
        began_ns = time.perf_counter_ns()
        run()
        times_us.append((time.perf_counter_ns() - began_ns) / 1e3)
    return statistics.median(times_us)


def _median_us_of_gpu(runs: Runs, case_s: float) -> float:
    """Between events on the device. The host is ahead by a flush of the cache, so no launch is waited for."""
    for _ in range(3):  # compiles, and wakes the clocks
        next(runs)()
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    times_us: list[float] = []
    end_s = time.perf_counter() + case_s
    while len(times_us) < _FEWEST_RUNS or time.perf_counter() < end_s:
        run = next(runs)
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        began.record()
        run()
        ended.record()
        ended.synchronize()
        times_us.append(1e3 * began.elapsed_time(ended))
    return statistics.median(times_us)


def _label(case: Case) -> str:
    return " ".join(f"{name}={_value(value)}" for name, value in case.items())


def _value(value: Any) -> str:
    """Dtypes without their prefix, and equals that follow each other as `16*(1, 512)`."""
    if isinstance(value, tuple):
        parts = [(item, len(list(same))) for item, same in groupby(value)]
        if all(isinstance(item, tuple) for item in value):
            return " ".join(f"{num}*{item}" if num > 1 else str(item) for item, num in parts).replace(", ", ",")
    return str(value).removeprefix("torch.").replace(", ", ",") or "-"


def _table(timings: list[Timing]) -> Table:
    caption = f"copy: {timings[0].copy_gb_s:.0f} GB/s read and written, on {timings[0].device}" if timings else None
    table = Table("kernel", "case", caption=caption)
    for column in ("µs", "GB/s", "of copy", "TFLOP/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for kernel, of_kernel in groupby(timings, key=lambda timing: timing.kernel):
        for timing in of_kernel:
            tflop_s = "" if timing.tflop_s is None else f"{timing.tflop_s:.2f}"
            numbers = f"{timing.us:.1f}", f"{timing.gb_s:.1f}", f"{timing.copy_frac:.1%}", tflop_s
            table.add_row(kernel, timing.case, *numbers)
        table.add_section()
    return table


if __name__ == "__main__":
    command()
