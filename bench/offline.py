"""`cableway bench offline`: time the engine on the shared workloads, beside the floor of the machine it runs on.

With --beside what another engine printed in the same run stands beside it: JSON lines with `engine`, `version` and
`start_s`, then for each workload `workload`, `seconds`, `output_tok_s` and `input_tok_s`.
"""

import json
import math
import platform
import statistics
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.table import Table

import cableway
from cableway.bench.floor import Rates, Shape, Widths, floor_s, measure_rates
from cableway.bench.workloads import WORKLOADS, workload
from cableway.ipc.modelfiles import ModelFiles, locate

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class Record(msgspec.Struct, kw_only=True):
    """One timed workload: a line of bench/results/*.jsonl. `seconds` is the median of `runs_s`."""

    run_id: str
    engine: str
    version: str
    commit: str
    device: str
    model: str
    workload: str
    seconds: float
    runs_s: list[float]
    output_tok_s: float
    input_tok_s: float
    floor_s: float
    floor_fraction: float
    start_s: float
    config: dict[str, Any]


class Peer(msgspec.Struct):
    """Another engine."""

    engine: str
    version: str
    start_s: float


class PeerTiming(msgspec.Struct):
    """What it did of one workload."""

    workload: str
    seconds: float
    output_tok_s: float
    input_tok_s: float


@click.command("offline")
@click.option("--model", default="smollm2-135m", show_default=True, help="Alias, .gguf file, folder or hub id.")
@click.option("--workload", "names", default="decode1", show_default=True, help="Comma-separated names.")
@click.option("--load-format", default="auto", type=click.Choice(["auto", "dummy"]))
@click.option("--dtype", default="auto", type=click.Choice(["auto", "float32", "float16", "bfloat16"]))
@click.option("--state-dtype", default="auto", type=click.Choice(["auto", "float32", "bfloat16"]))
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--max-num-seqs", default=256, show_default=True, type=click.IntRange(1))
@click.option("--max-num-batched-tokens", default=0, type=click.IntRange(0), help="0: automatic.")
@click.option("--batch-invariant", is_flag=True)
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1), help="Timed runs; one more warms up.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON line a workload.")
@click.option("--beside", type=click.Path(path_type=Path, exists=True), help="JSON lines of another engine.")
@click.option("--record", type=click.Path(path_type=Path), help="Append the JSON lines to this file.")
def command(
    model: str, names: str, repeats: int, as_json: bool, beside: Path | None, record: Path | None, **options: Any
) -> None:
    """Time workloads: token ids in, tokens out, no HTTP."""
    chosen = names.split(",")
    if unknown := [name for name in chosen if name not in WORKLOADS]:
        raise click.BadParameter(f"{', '.join(unknown)}; known: {', '.join(WORKLOADS)}", param_hint="--workload")
    peer, timings = _read_peer(beside) if beside else (None, {})
    files = locate(model, options["load_format"])
    console = Console(stderr=as_json)
    records = _time_all(files, model, chosen, repeats, options, console)
    peers = [_beside(entry, peer, timings[entry.workload]) for entry in records if peer and entry.workload in timings]
    lines = [json.dumps(msgspec.to_builtins(entry)) for entry in (*records, *peers)]
    if as_json:
        click.echo("\n".join(lines))
    else:
        console.print(_table(records, peers))
    if record:
        with record.open("a") as file:
            file.writelines(line + "\n" for line in lines)


def _time_all(
    files: ModelFiles, model: str, names: list[str], repeats: int, options: dict[str, Any], console: Console
) -> list[Record]:
    vocab = files.config["vocab_size"]
    longest = max(len(prompt) + output_len for name in names for prompt, output_len in workload(name, vocab))
    begin = time.perf_counter()
    with cableway.LLM(model, max_model_len=longest + 16, skip_tokenizer_init=True, **options) as llm:
        start_s = time.perf_counter() - begin
        worker = llm.config.worker
        timed = {name: _time_one(llm, name, vocab, repeats, console) for name in names}
    rates = measure_rates(worker.device, worker.dtype)
    shared = {
        "run_id": uuid.uuid4().hex[:12],
        "engine": "cableway",
        "version": cableway.__version__,
        "commit": _commit(),
        "device": _device_name(worker.device),
        "model": files.name,
        "start_s": round(start_s, 2),
        "config": {**options, "dtype": worker.dtype, "state_dtype": worker.state_dtype},
    }
    return [_record(name, runs_s, files, rates, shared) for name, runs_s in timed.items()]


def _time_one(llm: "cableway.LLM", name: str, vocab: int, repeats: int, console: Console) -> list[float]:
    runs_s = []
    for repeat in range(repeats + 1):
        requests = workload(name, vocab, repeat)
        prompts = [{"prompt_token_ids": request.prompt} for request in requests]
        params = [
            cableway.SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=request.output_len, detokenize=False)
            for request in requests
        ]
        begin = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        elapsed = time.perf_counter() - begin
        made, asked = sum(len(o.outputs[0].token_ids) for o in outputs), sum(r.output_len for r in requests)
        if made != asked:
            raise RuntimeError(f"{name}: made {made} tokens, not {asked}")
        if repeat:  # the first run warms up
            runs_s.append(elapsed)
            console.print(f"{name}: run {repeat} of {repeats}: {elapsed:.3f} s", style="dim")
    return runs_s


def _record(name: str, runs_s: list[float], files: ModelFiles, rates: Rates, shared: dict[str, Any]) -> Record:
    requests = workload(name, files.config["vocab_size"])
    shape, (item_bytes, state_bytes) = (
        Shape.of(files),
        [_ITEM_BYTES[shared["config"][key]] for key in ("dtype", "state_dtype")],
    )
    params = shape.read_params(math.inf) + shape.head_params
    on_disk = sum(Path(path).stat().st_size for path in files.weights)
    weight_bytes = min(item_bytes, on_disk / params) if on_disk else item_bytes
    widths = Widths(weight_bytes, item_bytes, state_bytes)
    least_s = floor_s(requests, shape, rates, widths, max_num_seqs=shared["config"]["max_num_seqs"])
    seconds = statistics.median(runs_s)
    return Record(
        workload=name,
        seconds=round(seconds, 4),
        runs_s=[round(run, 4) for run in runs_s],
        output_tok_s=round(sum(r.output_len for r in requests) / seconds, 1),
        input_tok_s=round(sum(len(r.prompt) for r in requests) / seconds, 1),
        floor_s=round(least_s, 4),
        floor_fraction=round(least_s / seconds, 3),
        **shared,
    )


def _read_peer(path: Path) -> tuple[Peer, dict[str, PeerTiming]]:
    """What another engine printed: itself, and its timings by workload."""
    try:
        first, *rest = path.read_bytes().splitlines()
        timings = [msgspec.json.decode(line, type=PeerTiming) for line in rest]
        return msgspec.json.decode(first, type=Peer), {timing.workload: timing for timing in timings}
    except (ValueError, msgspec.MsgspecError) as error:
        raise click.BadParameter(f"{path}: {error}", param_hint="--beside") from None


def _beside(ours: Record, peer: Peer, timing: PeerTiming) -> Record:
    """The other engine's record of the same workload on the same machine."""
    return Record(
        **msgspec.structs.asdict(peer),
        **msgspec.structs.asdict(timing),
        run_id=ours.run_id,
        commit="",
        device=ours.device,
        model=ours.model,
        runs_s=[timing.seconds],
        floor_s=ours.floor_s,
        floor_fraction=round(ours.floor_s / timing.seconds, 3),
        config={},
    )


def _commit() -> str:
    """Short hash of the checkout this runs from; empty when installed from a wheel."""
    folder = Path(__file__).resolve().parent
    done = subprocess.run(["git", "-C", folder, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip()


def _device_name(device: str) -> str:
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{models[0].partition(':')[2].strip() if models else platform.machine()} x{len(models) or 1}"


def _table(records: list[Record], peers: list[Record]) -> Table:
    first = records[0]
    title = f"{first.model} on {first.device}, {first.config['dtype']}, started in {first.start_s} s"
    columns = ["workload", "seconds", "out tok/s", "in tok/s", "floor s", "of floor"]
    if peers:
        title += f"; {peers[0].engine} {peers[0].version} in {peers[0].start_s} s"
        columns += ["its seconds", "its of floor", "ratio"]
    table = Table(*columns, title=title)
    theirs = {entry.workload: entry for entry in peers}
    for entry in records:
        figures = (entry.seconds, entry.output_tok_s, entry.input_tok_s, entry.floor_s)
        row = [entry.workload, *(f"{figure:,}" for figure in figures), f"{entry.floor_fraction:.0%}"]
        if its := theirs.get(entry.workload):
            row += [f"{its.seconds:,}", f"{its.floor_fraction:.0%}", f"{its.seconds / entry.seconds:.2f}"]
        table.add_row(*row)
    return table
