"""`cableway bench step`: where the time of a step goes, in this process: no HTTP, no core, no messages.

A shape is `decode:ROWS@CONTEXT` (each row computes one token after CONTEXT others) or `prefill:LENGTH`.
"""

import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import click
import msgspec
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cableway.bench.driver import Driver
from cableway.ipc.config import Options, WorkerConfig
from cableway.ipc.messages import Sampling
from cableway.ipc.resolve import resolve
from cableway.workers import runner as runners
from cableway.workers.batch import Batch, Decoder, StateSpec
from cableway.workers.runner import Runner

_SHAPE = re.compile(r"decode:(\d+)@(\d+)|prefill:(\d+)")
_VOCAB = 10_000  # token ids that every model has


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
@click.option("--max-model-len", default=4096, show_default=True, type=click.IntRange(16))
@click.option("--num-threads", default=0, type=click.IntRange(0), help="0: automatic.")
@click.option("--batch-invariant", is_flag=True)
@click.option(
    "--shapes", default="decode:1@64,decode:16@64,prefill:512", show_default=True, help="What to run; see above."
)
@click.option("--steps", default=48, show_default=True, type=click.IntRange(1), help="Timed steps of a decode.")
@click.option("--temperature", default=0.0, show_default=True)
@click.option("--profile", is_flag=True, help="Also print the time of every operation.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON line a shape.")
def command(shapes: str, steps: int, temperature: float, profile: bool, as_json: bool, **options: Any) -> None:
    """Show where the time of a worker's step goes."""
    config = resolve(Options(max_num_seqs=256, **options)).worker
    decoder = TimedDecoder(runners.load(config))
    measured = []
    for shape in shapes.split(","):
        measure = _measurement(shape, Sampling(temperature=temperature, max_tokens=1 << 20, seed=1))
        measured.append(measure(decoder, config, steps))
        if as_json:
            print(json.dumps(msgspec.to_builtins(measured[-1])), flush=True)
        if profile:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
                measure(decoder, config, steps)
            print(trace.key_averages().table(sort_by="self_cpu_time_total", row_limit=30))
    if not as_json:
        Console().print(_table(measured))


Measurement = Callable[[TimedDecoder, WorkerConfig, int], Timing]


def _measurement(shape: str, sampling: Sampling) -> Measurement:
    parsed = _SHAPE.fullmatch(shape)
    if parsed is None:
        raise click.BadParameter(f"{shape!r} is neither decode:ROWS@CONTEXT nor prefill:LENGTH", param_hint="--shapes")
    rows, context, length = (int(number or 0) for number in parsed.groups())

    def measure(decoder: TimedDecoder, config: WorkerConfig, steps: int) -> Timing:
        timed = (
            _decode(decoder, config, sampling, rows, context, steps)
            if rows
            else _prefill(decoder, config, sampling, length)
        )
        step_s, body_s, head_s = (statistics.median(column) for column in zip(*timed, strict=True))
        return Timing(
            shape=shape,
            step_ms=1000 * step_s,
            body_ms=1000 * body_s,
            head_ms=1000 * head_s,
            runner_ms=1000 * statistics.median(step - body - head for step, body, head in timed),
            tok_s=(rows or length) / step_s,
        )

    return measure


def _decode(
    decoder: TimedDecoder, config: WorkerConfig, sampling: Sampling, rows: int, context: int, steps: int
) -> Sequence[tuple[float, float, float]]:
    driver = Driver(Runner(decoder, config), config.block_size, config.max_num_seqs)
    for row in range(rows):
        driver.add(_prompt(context, row), sampling)
        driver.step({row: context})
    for _ in range(4):
        driver.step()
    return [_timed_step(decoder, driver) for _ in range(steps)]


def _prefill(
    decoder: TimedDecoder, config: WorkerConfig, sampling: Sampling, length: int
) -> Sequence[tuple[float, float, float]]:
    driver = Driver(Runner(decoder, config), config.block_size, config.max_num_seqs)
    timed = []
    for seed in range(6):
        request = driver.add(_prompt(length, seed), sampling)
        timed.append(_timed_step(decoder, driver))
        driver.remove(request)
    return timed[1:]


def _timed_step(decoder: TimedDecoder, driver: Driver) -> tuple[float, float, float]:
    """Seconds of one step, and of the model's body and head in it."""
    decoder.body_s = decoder.head_s = 0.0
    step_s = driver.step().elapsed_us / 1e6
    return step_s, decoder.body_s, decoder.head_s


def _prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, _VOCAB, (length,), generator=generator).tolist()


def _table(measured: Sequence[Timing]) -> Table:
    table = Table("shape", "step ms", "body ms", "head ms", "runner ms", "tok/s")
    for timing in measured:
        times = (timing.step_ms, timing.body_ms, timing.head_ms, timing.runner_ms)
        table.add_row(timing.shape, *(f"{value:.2f}" for value in times), f"{timing.tok_s:.0f}")
    return table


if __name__ == "__main__":
    command()
