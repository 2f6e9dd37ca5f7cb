"""`cableway tune`: measures configurations of kernels for the shapes of a model on this machine's GPU.

Which shapes those are the launchers say themselves, as an outline of the model goes through its steps. A configuration
is timed in a chain of launches, one graph, each on tensors of its own: as in a step nothing lies in the GPU's cache,
and a kernel that starts while the one before still runs does so. What is found goes to kernels/tunings/ after each
shape, so that a run that was stopped goes on where it was.
"""

import os
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as Sheet

from cableway.ipc.config import Options
from cableway.ipc.errors import UserError
from cableway.ipc.resolve import resolve
from cableway.kernels import compilation
from cableway.kernels.lang import OutOfResources, gpu_capability
from cableway.kernels.tuning import FOLDER, Entry, Table, Tunable, device_name, tunables
from cableway.workers.rehearsal import rehearse

_CHAIN_BYTES = 256 << 20
"""Several times what a GPU's cache holds."""
_NUM_RUNS = 7
_WORTH = 0.98
"""Below this share of the rule's time another tuning is taken: a smaller gain may be noise."""


Launches = list[Callable[[], Any]]


class Finding(NamedTuple):
    """Of one kernel and key."""

    kernel: str
    entry: Entry
    rule: Any
    rule_us: float


@click.command("tune")
@click.argument("model", default="smollm2-135m")
@click.option("--load-format", default="auto", type=click.Choice(["auto", "dummy"]))
@click.option("--kv-cache-dtype", default="auto", type=click.Choice(["auto", "fp8", "fp8_e5m2", "int8"]))
@click.option("--max-num-seqs", default=256, show_default=True, type=click.IntRange(1))
@click.option("--kernel", "names", multiple=True, help="Only this one; may be given again.  [all]")
@click.option("--again", is_flag=True, help="Measure what has been measured, too.")
def command(model: str, names: tuple[str, ...], again: bool, **options: Any) -> None:
    """Measure configurations of kernels for MODEL on this GPU, and keep the fastest."""
    config = resolve(Options(model=model, **options)).worker
    if config.device != "cuda":
        raise UserError("kernels are tuned on a GPU, and there is none here")
    if not os.access(FOLDER, os.W_OK):
        raise UserError(f"{FOLDER} cannot be written to: install Cableway where it can")
    console, known = Console(), tunables()
    if unknown := [name for name in names if name not in known]:
        raise click.BadParameter(f"{unknown[0]!r} is none of {', '.join(known)}", param_hint="--kernel")
    with console.status(f"which shapes {model} has"), torch.inference_mode(), compilation.ahead():
        rehearse(config)
    chosen = [tunable for name, tunable in known.items() if not names or name in names]
    table = Table.of(device_name(), gpu_capability())
    findings = tune(table, chosen, us_on_gpu, console, device="cuda", again=again)
    console.print(sheet(list(findings)))
    console.print(f"kept in {table.path}")


def tune(
    table: Table, chosen: list[Tunable], us_of: Callable[[Launches], float], console: Console, *,
    device: str, again: bool = False, most_launches: int = 32,
) -> Iterator[Finding]:  # fmt: skip
    """Measure the keys that were asked for, and write each finding to the table.

    Args:
        us_of: microseconds that one of these launches takes.
        again: what is in the table is measured, too.
        most_launches: in a chain.
    """
    work = []
    for tunable in chosen:
        done = set() if again else {entry.key for entry in table.entries(tunable)}
        work += [(tunable, key, tunable.candidates(key)) for key in sorted(tunable.asked) if key not in done]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=sum(len(candidates) for _, _, candidates in work))
        for tunable, key, candidates in work:
            progress.update(task, description=f"{tunable.kernel} {_shown(key)}")
            launches, times_us = _launches(tunable, key, device, most_launches), {}
            for candidate in candidates:
                times_us[candidate] = _us(launches(candidate), us_of)
                progress.advance(task)
            best = min(candidates, key=times_us.__getitem__)
            if times_us[best] > _WORTH * times_us[candidates[0]]:
                best = candidates[0]
            found = Entry(key, best, times_us[best])
            table.put(tunable, found)
            yield Finding(tunable.kernel, found, candidates[0], times_us[candidates[0]])


def _launches(tunable: Tunable, key: Any, device: str, most: int) -> Callable[[Any], Launches]:
    """Launches of one tuning on as many calls as do not fit the GPU's cache together."""
    torch.manual_seed(0)
    made = tunable.make(key, device)
    num_bytes = sum(argument.nbytes for argument in made.args if isinstance(argument, torch.Tensor))
    num = min(max(_CHAIN_BYTES // num_bytes, 2), most)
    calls = [made, *(made.clone() for _ in range(num - 1))]
    return lambda tuned: [lambda c=c: tunable.launch(*c.args, **c.kwargs, tuned=tuned) for c in calls]


def _us(launches: Launches, us_of: Callable[[Launches], float]) -> float:
    """Infinite where the GPU has not what a tuning takes."""
    try:
        return us_of(launches)
    except OutOfResources:
        return float("inf")


def us_on_gpu(launches: Launches) -> float:
    """Of a graph of them, by the GPU's own clock."""
    launches[0]()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    times_ms = []
    for _ in range(_NUM_RUNS):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times_ms.append(began.elapsed_time(ended))
    return 1e3 * statistics.median(times_ms) / len(launches)


def sheet(findings: list[Finding]) -> Sheet:
    """What was found, beside what the rule says."""
    shown = Sheet("kernel", "shape", "rule", "us", "fastest", "us", "gain")
    for kernel, (key, tuning, us), rule, rule_us in findings:
        gain = f"{rule_us / us - 1:+.0%}" if tuning != rule else ""
        best = _shown(tuning) if tuning != rule else "the same"
        shown.add_row(kernel, _shown(key), _shown(rule), f"{rule_us:.1f}", best, f"{us:.1f}", gain)
    return shown


def _shown(numbers: Any) -> str:
    return " ".join(f"{name}={value}" for name, value in numbers._asdict().items())
