"""The least time a workload can take: FLOPs of its prompts at the matrix rate, then bytes of its decode steps.

Both rates are measured on the machine at hand, in the same run. The weights are counted as the format stores them, the
KV cache as the cache does; of experts those that tokens hit who choose independently of each other.
"""

import subprocess
import sys
from math import prod
from typing import NamedTuple

import msgspec

from cableway.bench.workloads import BenchRequest
from cableway.ipc.modelfiles import ModelFiles
from cableway.workers import models
from cableway.workers.blocks.block import Slot
from cableway.workers.blocks.moe import Experts
from cableway.workers.models.config import read
from cableway.workers.parallel import Mesh


class Rates(msgspec.Struct, frozen=True):
    """What the machine can do."""

    copy_bytes_s: float  # read and written
    matmul_flop_s: float  # in the compute dtype


class Widths(NamedTuple):
    """Bytes of one weight, on average, of one cached key's or value's number, and of one of a state."""

    weight: float
    kv: int
    state: int = 4


class Shape(NamedTuple):
    """What the floor needs of a model."""

    body_params: int  # of matrices that a token goes through
    head_params: int
    query_len: int  # numbers of a token's queries in all layers that attend
    kept_len: int  # numbers that these layers keep of a token
    state_len: int = 0  # numbers of a sequence's recurrent states, which a step reads and writes
    expert_params: int = 0  # of all experts together
    chosen_frac: float = 1.0  # of experts, by a token

    @classmethod
    def of(cls, files: ModelFiles) -> "Shape":
        config, architecture = files.config, models.find(files.config)
        c = read(config, architecture.config)
        decoder = architecture.spec(c)
        states = [mixer.state(Mesh()) for mixer in decoder.mixers()]
        heads, attending = config.get("num_attention_heads") or 0, [state for state in states if not state.state_len]
        head_dim = config.get("head_dim") or config["hidden_size"] // max(heads, 1)
        slots = [slot for path, slot in decoder.slots() if path not in ("embed", "positions.table", "head")]
        top_k = getattr(c, "num_experts_per_tok", 0)
        chosen_frac = top_k / c.num_experts if top_k else 1.0
        expert_params = sum(_params(slot) for slot in slots if isinstance(slot, Experts))
        others = sum(_params(slot) for slot in slots if not isinstance(slot, Experts))
        return cls(
            body_params=others + round(expert_params * chosen_frac),
            head_params=config["hidden_size"] * config["vocab_size"],
            query_len=len(attending) * heads * head_dim,
            kept_len=sum(state.num_planes * state.num_kv_heads * state.head_dim for state in attending),
            state_len=sum(state.state_len for state in states),
            expert_params=expert_params,
            chosen_frac=chosen_frac,
        )

    def read_params(self, rows: float) -> float:
        """Of the body, by a step of so many tokens."""
        left_by_one = 1 - self.chosen_frac
        return self.body_params + self.expert_params * (left_by_one - left_by_one**rows)


def _params(slot: Slot) -> int:
    """Of a slot's matrices."""
    return sum(axis.size for axis in slot.parts.values()) * sum(prod(dims) for dims in slot.leaves.values() if dims)


def floor_s(requests: list[BenchRequest], shape: Shape, rates: Rates, widths: Widths, *, max_num_seqs: int) -> float:
    """Seconds below which no engine can run `requests`.

    Requests run in waves of `max_num_seqs`, longest outputs together, which is the fewest weight reads that any
    schedule can do.
    """
    flops = 0.0
    for prompt, _ in requests:
        attention = 2 * shape.query_len * len(prompt)
        flops += len(prompt) * (2 * shape.body_params + attention) + 2 * shape.head_params
    outputs = sorted((output_len for _, output_len in requests), reverse=True)
    read_params = 0.0
    for first in range(0, len(outputs), max_num_seqs):
        steps = [max(0, output - 1) for output in outputs[first : first + max_num_seqs]]
        for rows, (most, fewer) in enumerate(zip(steps, [*steps[1:], 0], strict=True), 1):
            read_params += (most - fewer) * (shape.read_params(rows) + shape.head_params)
    context = sum((out - 1) * (len(prompt) + out / 2) for prompt, out in requests)
    kv = context * shape.kept_len * widths.kv
    states = sum(out - 1 for out in outputs) * 2 * widths.state * shape.state_len
    return flops / rates.matmul_flop_s + (read_params * widths.weight + kv + states) / rates.copy_bytes_s


def step_floor_s(shape: Shape, rates: Rates, widths: Widths, rows: int, length: int) -> float:
    """Seconds below which no engine can do one step: `rows` tokens after `length` others each, or, where there are no
    rows, one prompt of `length`."""
    if not rows:
        flops = length * (2 * shape.body_params + 2 * shape.query_len * length) + 2 * shape.head_params
        return flops / rates.matmul_flop_s
    kept_bytes = rows * (length * shape.kept_len * widths.kv + 2 * widths.state * shape.state_len)
    num_bytes = (shape.read_params(rows) + shape.head_params) * widths.weight + kept_bytes
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
