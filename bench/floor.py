"""The least time a workload can take: FLOPs of its prompts at the matrix rate, then bytes of its decode steps.

Both rates are measured on the machine at hand, in the same run. The weights are counted as the format stores them, the
KV cache as the cache does; of experts those that one token chooses.
"""

import subprocess
import sys
from math import prod
from typing import Any, NamedTuple

import msgspec

from cableway.bench.workloads import BenchRequest
from cableway.ipc.modelfiles import ModelFiles
from cableway.workers import models
from cableway.workers.blocks.block import Slot
from cableway.workers.blocks.moe import Experts
from cableway.workers.parallel import Mesh

_STATE_BYTES = 8
"""Of each number of a state, which a step reads and writes."""


class Rates(msgspec.Struct, frozen=True):
    """What the machine can do."""

    copy_bytes_s: float  # read and written
    matmul_flop_s: float  # in the compute dtype


class Shape(NamedTuple):
    """What the floor needs of a model."""

    body_params: int  # of matrices that a token goes through
    head_params: int
    query_len: int  # numbers of a token's queries in all layers that attend
    kept_len: int  # numbers that these layers keep of a token
    state_len: int = 0  # float32 numbers of a sequence's recurrent states

    @classmethod
    def of(cls, files: ModelFiles) -> "Shape":
        config, decoder = files.config, models.find(files.config).build(files.config)
        states = [mixer.state(Mesh()) for mixer in decoder.mixers()]
        heads, attending = config.get("num_attention_heads") or 0, [state for state in states if not state.state_len]
        head_dim = config.get("head_dim") or config["hidden_size"] // max(heads, 1)
        of_tokens = ("embed", "positions.table", "head")
        return cls(
            body_params=sum(_params(slot, config) for path, slot in decoder.slots() if path not in of_tokens),
            head_params=config["hidden_size"] * config["vocab_size"],
            query_len=len(attending) * heads * head_dim,
            kept_len=sum(state.num_planes * state.num_kv_heads * state.head_dim for state in attending),
            state_len=sum(state.state_len for state in states),
        )


def _params(slot: Slot, config: dict[str, Any]) -> int:
    """Of a slot's matrices; of an expert's as many as one token chooses."""
    rows = sum(axis.size for axis in slot.parts.values())
    params = sum(rows * prod(dims) for dims in slot.leaves.values() if dims)
    if isinstance(slot, Experts):
        return params * config["num_experts_per_tok"] // len({part.partition(".")[0] for part in slot.parts})
    return params


def floor_s(
    requests: list[BenchRequest], shape: Shape, rates: Rates, *, weight_bytes: float, kv_bytes: int, max_num_seqs: int
) -> float:
    """Seconds below which no engine can run `requests`.

    `weight_bytes` is the mean size of one weight, `kv_bytes` that of one cached value. Requests run in waves of
    `max_num_seqs`, longest outputs together, which is the fewest weight reads that any schedule can do.
    """
    flops = 0.0
    for prompt, _ in requests:
        attention = 2 * shape.query_len * len(prompt)
        flops += len(prompt) * (2 * shape.body_params + attention) + 2 * shape.head_params
    outputs = sorted((output_len for _, output_len in requests), reverse=True)
    steps = sum(max(0, outputs[first] - 1) for first in range(0, len(outputs), max_num_seqs))
    context = sum((out - 1) * (len(prompt) + out / 2) for prompt, out in requests)
    kv = context * shape.kept_len * kv_bytes
    states = sum(out - 1 for out in outputs) * _STATE_BYTES * shape.state_len
    read = steps * (shape.body_params + shape.head_params) * weight_bytes
    return flops / rates.matmul_flop_s + (read + kv + states) / rates.copy_bytes_s


def step_floor_s(shape: Shape, rates: Rates, rows: int, length: int, item_bytes: int, kv_item_bytes: int) -> float:
    """Seconds below which no engine can do one step: `rows` tokens after `length` others each, or, where there are no
    rows, one prompt of `length`."""
    if not rows:
        flops = length * (2 * shape.body_params + 2 * shape.query_len * length) + 2 * shape.head_params
        return flops / rates.matmul_flop_s
    kept_bytes = rows * (length * shape.kept_len * kv_item_bytes + _STATE_BYTES * shape.state_len)
    num_bytes = (shape.body_params + shape.head_params) * item_bytes + kept_bytes
    flops = 2 * rows * (shape.body_params + shape.head_params)
    return max(num_bytes / rates.copy_bytes_s, flops / rates.matmul_flop_s)


_MEASURE = """
import json, sys, time, torch
device, dtype = sys.argv[1], getattr(torch, sys.argv[2])
sync = torch.cuda.synchronize if device == "cuda" else lambda: None

def best(action, repeats):
    times = []
    for _ in range(repeats):
        sync(); begin = time.perf_counter(); action(); sync()
        times.append(time.perf_counter() - begin)
    return min(times)

size = 1 << (30 if device == "cuda" else 27)
source = torch.ones(size, dtype=torch.uint8, device=device)
target = torch.empty_like(source)
side = 8192 if device == "cuda" else 1536
a = torch.randn(side, side, device=device).to(dtype)
b = torch.randn(side, side, device=device).to(dtype)
copy_s, matmul_s = best(lambda: target.copy_(source), 6), best(lambda: a @ b, 6)
print(json.dumps({"copy_bytes_s": 2 * size / copy_s, "matmul_flop_s": 2 * side**3 / matmul_s}))
"""


def measure_rates(device: str, dtype: str) -> Rates:
    """Copy bandwidth and matrix rate of this machine, measured in a process of its own, which ends with its memory."""
    done = subprocess.run([sys.executable, "-c", _MEASURE, device, dtype], capture_output=True, text=True, check=True)
    return msgspec.json.decode(done.stdout, type=Rates)
