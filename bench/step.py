"""`cableway bench step`: where the time of a step goes, in this process: no HTTP, no core, no messages.

A shape is `decode:ROWS@CONTEXT` (each row computes one token after CONTEXT others) or `prefill:LENGTH`. How to read
what it prints: docs/profiling.md.
"""

import json
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cableway.bench.driver import Driver
from cableway.bench.floor import Shape as ModelShape
from cableway.bench.floor import measure_rates
from cableway.bench.gpu_step import GpuStep, GpuTiming
from cableway.ipc import modelfiles
from cableway.ipc.config import Options, WorkerConfig
from cableway.ipc.messages import Sampling
from cableway.ipc.resolve import resolve
from cableway.workers import runner as runners
from cableway.workers.batch import Batch, Decoder, StateSpec
from cableway.workers.runner import Runner

_SHAPE = re.compile(r"decode:(\d+)@(\d+)|prefill:(\d+)")
_VOCAB = 10_000  # token ids that every large model has
_MORE_STEPS = 64  # than the timed ones, at most: to warm up, and for the profiler


class Timing(msgspec.Struct, kw_only=True):
    """Medians over the steps of one shape. `runner_ms` is what is neither the model's body nor its head."""

    shape: str
    step_ms: float
    body_ms: float
    head_ms: float
    runner_ms: float
    tok_s: float


class TimedDecoder:
    """A decoder that books the time spent in it."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.vocab_size = decoder.vocab_size
        self.body_s = self.head_s = 0.0

    def state_groups(self) -> list[StateSpec]:
        return self._decoder.state_groups()

    def forward(self, batch: Batch, caches: list[Tensor]) -> Tensor:
        began_s = time.perf_counter()
        hidden = self._decoder.forward(batch, caches)
        self.body_s += time.perf_counter() - began_s
        return hidden

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        began_s = time.perf_counter()
        logits = self._decoder.logits(hidden, out)
        self.head_s += time.perf_counter() - began_s
        return logits


@click.command("step")
@click.option("--model", default="smollm2-135m", show_default=True, help="Alias, .gguf file, folder or hub id.")
@click.option("--load-format", default="auto", type=click.Choice(["auto", "dummy"]))
@click.option("--dtype", default="auto", type=click.Choice(["auto", "float32", "float16", "bfloat16"]))
@click.option("--kv-cache-dtype", default="auto", type=click.Choice(["auto", "fp8", "fp8_e5m2", "int8"]))
@click.option("--state-dtype", default="auto", type=click.Choice(["auto", "float32", "bfloat16"]))
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--max-model-len", default=0, type=click.IntRange(0), help="0: what shapes need.")
@click.option("--num-threads", default=0, type=click.IntRange(0), help="0: automatic.")
@click.option("--batch-invariant", is_flag=True)
@click.option(
    "--shapes",
    default="decode:1@64,decode:16@64,prefill:512",
    show_default=True,
    help="decode:ROWS@CONTEXT (a token a row, after CONTEXT others) or prefill:LENGTH, with commas between.",
)
@click.option("--steps", default=48, show_default=True, type=click.IntRange(1), help="Timed steps of a decode.")
@click.option("--temperature", default=0.0, show_default=True)
@click.option("--enforce-eager", is_flag=True, help="No CUDA graphs.")
@click.option("--profile", type=click.Path(dir_okay=False, path_type=Path), help="Write a torch-profiler trace here.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON line a shape.")
def command(
    model: str, shapes: str, steps: int, temperature: float, profile: Path | None, as_json: bool, max_model_len: int,
    **options: Any,
) -> None:  # fmt: skip
    """Show where the time of a worker's step goes."""
    chosen = {shape: _parsed(shape) for shape in shapes.split(",")}
    longest = max_model_len or max(length + steps + _MORE_STEPS for _, length in chosen.values())
    config = resolve(Options(model=model, max_num_seqs=256, max_model_len=longest, **options)).worker
    sampling = Sampling(temperature=temperature, max_tokens=1 << 20, seed=1)
    if profile and len(chosen) > 1:
        raise click.BadParameter("a trace is of one shape", param_hint="--profile")
    on_device = _on_gpu if config.device == "cuda" else _on_cpu
    for timing, table in on_device(config, chosen, sampling, steps, profile):
        if as_json:
            print(json.dumps(msgspec.to_builtins(timing)), flush=True)
        else:
            Console().print(table)


def _parsed(shape: str) -> tuple[int, int]:
    """(rows, context), or (0, length) of a prompt."""
    parsed = _SHAPE.fullmatch(shape)
    if parsed is None:
        raise click.BadParameter(f"{shape!r} is neither decode:ROWS@CONTEXT nor prefill:LENGTH", param_hint="--shapes")
    rows, context, length = (int(number or 0) for number in parsed.groups())
    return rows, context or length


Shapes = dict[str, tuple[int, int]]


def _on_gpu(
    config: WorkerConfig, shapes: Shapes, sampling: Sampling, steps: int, profile: Path | None
) -> Iterator[tuple[GpuTiming, Table]]:
    for shape, (rows, length) in shapes.items():
        if not rows and length > config.max_num_batched_tokens:
            raise click.BadParameter(
                f"{shape} is more than the {config.max_num_batched_tokens} tokens of one step", param_hint="--shapes"
            )
    rates = measure_rates(config.device, config.dtype)
    model = ModelShape.of(modelfiles.locate(config.model, config.load_format))
    runner = runners.build(config)
    for shape, (rows, length) in shapes.items():
        step = GpuStep(runner, config, sampling, rows, length)
        timing = step.measure(shape, steps, model, rates, profile)
        yield timing, _gpu_table(timing)


def _on_cpu(
    config: WorkerConfig, shapes: Shapes, sampling: Sampling, steps: int, profile: Path | None
) -> Iterator[tuple[Timing, Table]]:
    decoder = TimedDecoder(runners.load(config))
    for shape, (rows, length) in shapes.items():
        measure = _decode if rows else _prefill
        timed = measure(decoder, config, sampling, rows, length, steps)
        step_s, body_s, head_s = (statistics.median(column) for column in zip(*timed, strict=True))
        timing = Timing(
            shape=shape,
            step_ms=1000 * step_s,
            body_ms=1000 * body_s,
            head_ms=1000 * head_s,
            runner_ms=1000 * statistics.median(step - body - head for step, body, head in timed),
            tok_s=(rows or length) / step_s,
        )
        yield timing, _cpu_table(timing)
        if profile:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
                measure(decoder, config, sampling, rows, length, steps)
            trace.export_chrome_trace(str(profile))


def _decode(
    decoder: TimedDecoder, config: WorkerConfig, sampling: Sampling, rows: int, context: int, steps: int
) -> Sequence[tuple[float, float, float]]:
    runner = Runner(decoder, config)
    driver = Driver(runner, runner.block_size, config.max_num_seqs)
    for row in range(rows):
        driver.add(_prompt(context, row, decoder.vocab_size), sampling)
        driver.step({row: context})
    for _ in range(4):
        driver.step()
    return [_timed_step(decoder, driver) for _ in range(steps)]


def _prefill(
    decoder: TimedDecoder, config: WorkerConfig, sampling: Sampling, _rows: int, length: int, _steps: int
) -> Sequence[tuple[float, float, float]]:
    runner = Runner(decoder, config)
    driver = Driver(runner, runner.block_size, config.max_num_seqs)
    timed = []
    for seed in range(6):
        request = driver.add(_prompt(length, seed, decoder.vocab_size), sampling)
        timed.append(_timed_step(decoder, driver))
        driver.remove(request)
    return timed[1:]


def _timed_step(decoder: TimedDecoder, driver: Driver) -> tuple[float, float, float]:
    """Seconds of one step, and of the model's body and head in it."""
    decoder.body_s = decoder.head_s = 0.0
    step_s = driver.step().elapsed_us / 1e6
    return step_s, decoder.body_s, decoder.head_s


def _prompt(length: int, seed: int, vocab_size: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, min(_VOCAB, vocab_size), (length,), generator=generator).tolist()


def _cpu_table(timing: Timing) -> Table:
    table = Table("shape", "step ms", "body ms", "head ms", "runner ms", "tok/s")
    times = (timing.step_ms, timing.body_ms, timing.head_ms, timing.runner_ms)
    table.add_row(timing.shape, *(f"{value:.2f}" for value in times), f"{timing.tok_s:.0f}")
    return table


def _gpu_table(timing: GpuTiming) -> Table:
    title = (
        f"{timing.shape}: {timing.step_ms:.3f} ms a step, {timing.tok_s:,.0f} tokens/s; host {timing.host_ms:.3f} ms; "
        f"kernels {timing.kernels_ms:.3f} ms; floor {timing.floor_ms:.3f} ms, fraction_of_floor "
        f"{timing.floor_fraction:.2f}"
    )
    table = Table("kernel", "calls", "device us", "MB", "of copy", title=title, title_justify="left")
    for kernel in timing.kernels:
        megabytes, fraction = (f"{kernel.num_bytes / 1e6:,.2f}", f"{kernel.copy_fraction:.2f}")
        known = (megabytes, fraction) if kernel.num_bytes else ("", "")
        table.add_row(kernel.name, f"{kernel.calls:g}", f"{kernel.device_us:,.1f}", *known)
    return table


if __name__ == "__main__":
    command()
