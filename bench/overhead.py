"""`cableway bench overhead`: what a token of one sequence costs beyond the step that makes it.

Three ways to the same number of tokens, in turn, round after round: a worker's steps alone, in this process;
`LLM.generate`, which adds the engine core and the messages; a streamed completion over HTTP, which adds a frontend, and
a client that reads on the same machine. The first token is left out of all three. What is compared are lower quartiles:
a machine that others use, too, has better and worse moments, which last for longer than a round.
"""

import asyncio
import json
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.table import Table

import cableway
from cableway.bench import serve
from cableway.bench.driver import Driver
from cableway.ipc import garbage
from cableway.ipc.child import python_module
from cableway.ipc.config import Options
from cableway.ipc.messages import Sampling
from cableway.ipc.resolve import resolve
from cableway.workers import runner as runners

_PROMPT = list(range(100, 164))
_GPU_SHARE = 0.28  # three engines are on it
WAYS = "step", "offline", "http"


def measure(model: str, num_tokens: int, rounds: int, **options: Any) -> list[dict[str, float]]:
    """Milliseconds a token by each of the `WAYS`, one dictionary a round."""
    options |= {"max_num_seqs": 8, "gpu_memory_utilization": _GPU_SHARE, "standby": False}
    step = _step(model, options)
    with _offline(model, options) as offline, _http(model, options) as http:
        ways = dict(zip(WAYS, (step, offline, http), strict=True))
        for way in ways.values():
            way(8)
        garbage.settle()  # as a worker has done
        return [{name: way(num_tokens) for name, way in ways.items()} for _ in range(rounds)]


def costs(rounds: list[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Of each way: quartiles, and by how many per cent its lower one is more than that of the step."""
    quartiles = {name: statistics.quantiles((each[name] for each in rounds), method="inclusive") for name in WAYS}
    return {
        name: {
            "ms": [round(value, 3) for value in values],
            "cost_percent": round(100 * (values[0] / quartiles["step"][0] - 1), 1),
        }
        for name, values in quartiles.items()
    }


def _step(model: str, options: dict[str, Any]) -> Callable[[int], float]:
    runner = runners.build(resolve(Options(model=model, **options)).worker)
    driver = Driver(runner, runner.block_size, 1)

    def run(num_tokens: int) -> float:
        request = driver.add(_PROMPT, Sampling(temperature=0.0, max_tokens=num_tokens))
        driver.step()
        elapsed_us = sum(driver.step().elapsed_us for _ in range(num_tokens - 1))
        driver.remove(request)
        return elapsed_us / (num_tokens - 1) / 1e3

    return run


@contextmanager
def _offline(model: str, options: dict[str, Any]) -> Iterator[Callable[[int], float]]:
    with cableway.LLM(model, **options) as llm:

        def seconds(num_tokens: int) -> float:
            params = cableway.SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=num_tokens)
            began_s = time.perf_counter()
            llm.generate([{"prompt_token_ids": _PROMPT}], params, use_tqdm=False)
            return time.perf_counter() - began_s

        yield lambda num_tokens: 1e3 * (seconds(num_tokens) - seconds(1)) / (num_tokens - 1)


@contextmanager
def _http(model: str, options: dict[str, Any]) -> Iterator[Callable[[int], float]]:
    values = {name.replace("_", "-"): value for name, value in options.items()}
    flags = [f"--no-{name}" if value is False else f"--{name}={value}" for name, value in values.items()]
    command = [*python_module("cableway"), "serve", model, "--port", "0", "--log-level", "warning", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = (re.match(r"Cableway serves (\S+) at (\S+)", line) for line in server.stdout)
            if (address := next(filter(None, found), None)) is None:
                raise SystemExit(f"the server ended with {server.wait()}")
            name, base_url = address.groups()
            yield lambda num_tokens: _over_http(name, base_url, num_tokens)
        finally:
            server.terminate()


def _over_http(name: str, base_url: str, num_tokens: int) -> float:
    load = serve.Load(
        base_url=base_url, model=name, api_key="", requests=1, input_len=len(_PROMPT), output_len=num_tokens,
        concurrency=1, rate=0.0, vocab=256, seed=1,
    )  # fmt: skip
    (sample,), _ = asyncio.run(serve.run(load, lambda: None))
    if sample.error:
        raise SystemExit(sample.error)
    return 1e3 * sample.tpot_s


@click.command("overhead")
@click.option("--model", default="smollm2-135m", show_default=True, help="Alias, .gguf file, folder or hub id.")
@click.option("--tokens", default=64, show_default=True, type=click.IntRange(2), help="In a round, each way.")
@click.option("--rounds", default=24, show_default=True, type=click.IntRange(2))
@click.option("--max-model-len", default=1024, show_default=True, type=click.IntRange(len(_PROMPT) + 8))
@click.option("--num-threads", default=0, type=click.IntRange(0), help="0: automatic.")
@click.option("--stream-interval-s", default=-1.0, show_default=True, help="As `cableway serve` has it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line.")
def command(model: str, tokens: int, rounds: int, as_json: bool, **options: Any) -> None:
    """Compare a token over HTTP and through `LLM` with the step that makes it."""
    figures = costs(measure(model, tokens, rounds, **options))
    if as_json:
        click.echo(json.dumps(figures))
        return
    table = Table("a token of one sequence", "ms p25", "p50", "p75", "more than a step")
    for name, figure in figures.items():
        times = (f"{value:.2f}" for value in figure["ms"])
        table.add_row(name, *times, f"{figure['cost_percent']:+.1f} %" if name != "step" else "")
    Console().print(table)


if __name__ == "__main__":
    command()
