"""`cableway bench serve`: load on any OpenAI-compatible server, streamed; throughput and latency percentiles.

Closed loop (`--concurrency`), or open loop at `--rate` requests a second with Poisson arrivals. Prompts are random
token ids over /v1/completions, so that every server gets the same work whatever its tokenizer.
"""

import asyncio
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import click
import msgspec
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of the server."""

    base_url: str
    model: str
    api_key: str
    requests: int
    input_len: int
    output_len: int
    concurrency: int
    rate: float  # requests a second; 0 = closed loop
    vocab: int
    seed: int


class Sample(msgspec.Struct):
    """One request's times. Empty `error` means that it was answered in full."""

    ttft_s: float = 0.0
    total_s: float = 0.0
    gaps_s: list[float] = []
    num_tokens: int = 0
    error: str = ""

    @property
    def tpot_s(self) -> float:
        """Mean time a token after the first."""
        return (self.total_s - self.ttft_s) / max(1, self.num_tokens - 1)


async def run(load: Load, done: Callable[[], None]) -> tuple[list[Sample], float]:
    """Send the load; samples and wall seconds. `done` is called after each request."""
    rng = random.Random(load.seed)
    prompts = [[rng.randint(10, load.vocab - 10) for _ in range(load.input_len)] for _ in range(load.requests)]
    headers = {"Authorization": f"Bearer {load.api_key}"} if load.api_key else {}
    gate = asyncio.Semaphore(load.concurrency if not load.rate else load.requests)
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)

    async with aiohttp.ClientSession(headers=headers, connector=connector, timeout=timeout) as session:

        async def one(prompt: list[int]) -> Sample:
            async with gate:
                sample = await _request(session, load, prompt)
            done()
            return sample

        begin = time.perf_counter()
        tasks = []
        async for prompt in _arrivals(prompts, load.rate, rng):
            tasks.append(asyncio.create_task(one(prompt)))
        samples = await asyncio.gather(*tasks)
        return list(samples), time.perf_counter() - begin


async def _arrivals(prompts: list[list[int]], rate: float, rng: random.Random) -> AsyncIterator[list[int]]:
    for prompt in prompts:
        yield prompt
        if rate:
            await asyncio.sleep(rng.expovariate(rate))


async def _request(session: aiohttp.ClientSession, load: Load, prompt: list[int]) -> Sample:
    body = {
        "model": load.model,
        "prompt": prompt,
        "max_tokens": load.output_len,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sample, begin = Sample(gaps_s=[]), time.perf_counter()
    last = begin
    try:
        async with session.post(load.base_url.rstrip("/") + "/v1/completions", json=body) as response:
            if response.status != 200:
                sample.error = f"{response.status} {(await response.text())[:200]}"
                return sample
            finished = False
            async for line in response.content:
                if not line.startswith(b"data: "):
                    continue
                if line.startswith(b"data: [DONE]"):
                    finished = True
                    continue
                event = msgspec.json.decode(line[6:])
                if usage := event.get("usage"):
                    sample.num_tokens = usage["completion_tokens"]
                if event.get("choices"):
                    now = time.perf_counter()
                    if sample.ttft_s:
                        sample.gaps_s.append(now - last)
                    else:
                        sample.ttft_s = now - begin
                    last = now
            sample.total_s = last - begin
            if not finished:
                sample.error = "the stream ended without [DONE]"
    except aiohttp.ClientError as error:
        sample.error = f"{type(error).__name__}: {error}"
    return sample


def summarize(samples: list[Sample], seconds: float, load: Load) -> dict[str, Any]:
    """The figures of one run; times in milliseconds as [p50, p90, p99]."""
    good = [sample for sample in samples if not sample.error]
    return {
        "requests": len(samples),
        "failed": len(samples) - len(good),
        "error": next((sample.error for sample in samples if sample.error), ""),
        "input_len": load.input_len,
        "output_len": load.output_len,
        "concurrency": load.concurrency if not load.rate else None,
        "rate": load.rate or None,
        "seconds": round(seconds, 3),
        "requests_s": round(len(good) / seconds, 3),
        "output_tok_s": round(sum(sample.num_tokens for sample in good) / seconds, 1),
        "input_tok_s": round(load.input_len * len(good) / seconds, 1),
        "ttft_ms": _percentiles([sample.ttft_s for sample in good]),
        "tpot_ms": _percentiles([sample.tpot_s for sample in good if sample.num_tokens > 1]),
        "itl_ms": _percentiles([gap for sample in good for gap in sample.gaps_s]),
    }


def _percentiles(values_s: list[float]) -> list[float]:
    if len(values_s) < 2:
        return [round(1e3 * value, 2) for value in values_s] * 3
    cuts = statistics.quantiles(values_s, n=100, method="inclusive")
    return [round(1e3 * cuts[q - 1], 2) for q in (50, 90, 99)]


def _show(figures: dict[str, Any], console: Console) -> None:
    table = Table("figure", "value", "p50", "p90", "p99")
    for name in ("requests", "failed", "seconds", "requests_s", "output_tok_s", "input_tok_s"):
        table.add_row(name, str(figures[name]))
    for name in ("ttft_ms", "tpot_ms", "itl_ms"):
        table.add_row(name, "", *(str(value) for value in figures[name]))
    console.print(table)
    if figures["error"]:
        console.print(f"first error: {figures['error']}", style="red")


@click.command("serve")
@click.option("--base-url", default="http://127.0.0.1:8000", show_default=True)
@click.option("--model", default="smollm2-135m", show_default=True, help="Name the server knows the model by.")
@click.option("--api-key", default="", help="Sent as a bearer token.")
@click.option("--requests", default=64, show_default=True, type=click.IntRange(1))
@click.option("--input-len", default=128, show_default=True, type=click.IntRange(1))
@click.option("--output-len", default=128, show_default=True, type=click.IntRange(1))
@click.option("--concurrency", default=16, show_default=True, type=click.IntRange(1), help="Requests at a time.")
@click.option("--rate", default=0.0, type=click.FloatRange(0), help="Requests a second, Poisson; 0: closed loop.")
@click.option("--vocab", default=32_000, show_default=True, type=click.IntRange(32), help="Prompt ids lie below.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line.")
def command(as_json: bool, **options: Any) -> None:
    """Load any OpenAI-compatible server with streamed completions."""
    load = Load(**options)
    console = Console(stderr=as_json)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("requests", total=load.requests)
        samples, seconds = asyncio.run(run(load, lambda: progress.advance(task)))
    figures = summarize(samples, seconds, load)
    if as_json:
        click.echo(json.dumps(figures))
    else:
        _show(figures, console)
    if figures["failed"]:
        raise SystemExit(1)
