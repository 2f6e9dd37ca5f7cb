"""`python -m cableway.bench.core_step`: host time of the engine core for one decode step, without sockets or a model.

A step is: decode the worker's result, commit it, encode each frontend's tokens, plan the next step, encode the plan —
everything the core does for it but system calls. The aim is at most 1,000 µs at 256 rows.
"""

import statistics
import time

import click
import msgspec

from cableway.enginecore.kv.groups import Paged
from cableway.enginecore.limits import Limits
from cableway.enginecore.scheduler import Memory, Scheduler
from cableway.ipc.messages import Choice, FromWorker, Generate, Sampling, StepPlan, StepResult, StepResults, ints

AIM_US = 1000.0
_PROMPT_LEN = 100
_BLOCK_SIZE = 16


class Timing(msgspec.Struct, frozen=True):
    """Medians over the timed steps."""

    rows: int
    frontends: int
    plan_us: float
    commit_us: float

    @property
    def step_us(self) -> float:
        return self.plan_us + self.commit_us


def measure(rows: int, frontends: int, steps: int, depth: int) -> Timing:
    """Decode `rows` sequences of `frontends` frontends, `steps` times, with `depth` steps planned ahead."""
    num_tokens = _PROMPT_LEN + steps + 50
    scheduler = Scheduler(Limits(rows, max(2048, rows), num_tokens + 1, 1 << 20, 1 << 40), epoch=1)
    scheduler.start(Memory([Paged()], rows * (num_tokens // _BLOCK_SIZE + 2), _BLOCK_SIZE, rows), 1)
    for key in range(rows):
        prompt = ints((key * 131 + position * 7) % 50_000 for position in range(_PROMPT_LEN))
        sampling = Sampling(max_tokens=num_tokens, eos_token_ids=ints([50_001]))
        scheduler.submit(b"f%d" % (key % frontends), Generate(f"r{key}", prompt, [Choice(key, 0)], sampling), 0.0)
    encode, decode = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder(FromWorker).decode
    results: list[bytes] = []

    def plan() -> None:
        while scheduler.has_room(depth) and (message := scheduler.plan(0.0)):
            encode(message)
            results.append(encode(_result(message)))

    def commit() -> None:
        for result in decode(results.pop(0)).results:
            scheduler.commit(result)
        for _, message in scheduler.take_messages():
            encode(message)

    plan()
    plan_us, commit_us = [], []
    for step in range(steps):
        began_s = time.perf_counter()
        commit()
        committed_s = time.perf_counter()
        plan()
        if step > steps // 4 and len(scheduler.running) == rows:  # the prompts are computed by then
            commit_us.append((committed_s - began_s) * 1e6)
            plan_us.append((time.perf_counter() - committed_s) * 1e6)
    return Timing(rows, frontends, statistics.median(plan_us), statistics.median(commit_us))


def _result(plan: StepPlan) -> StepResults:
    drawn = sum(memoryview(plan.samples).cast("i"))
    return StepResults([StepResult(plan.epoch, plan.step, ints(range(1, drawn + 1)), elapsed_us=1)])


@click.command()
@click.option("--rows", default=256, help="sequences in a step")
@click.option("--frontends", default=1, help="frontend processes they belong to")
@click.option("--steps", default=1000, help="steps to run")
@click.option("--depth", default=1, help="steps planned ahead")
@click.option("--json", "as_json", is_flag=True, help="one JSON line")
def main(rows: int, frontends: int, steps: int, depth: int, as_json: bool) -> None:
    """Time the engine core's part of a step."""
    timing = measure(rows, frontends, steps, depth)
    if as_json:
        click.echo(msgspec.json.encode(timing).decode())
        return
    click.echo(
        f"{rows} rows, {frontends} frontends: plan {timing.plan_us:.0f} µs, commit {timing.commit_us:.0f} µs, "
        f"step {timing.step_us:.0f} µs (aim {AIM_US:.0f})"
    )


if __name__ == "__main__":
    main()
