"""The least time a workload can take: FLOPs of its prompts at the matrix rate, then bytes of its decode steps.

Both rates are measured on the machine at hand, in the same run. The weights are counted as the format stores them, the
KV cache as the cache does.
"""

import subprocess
import sys
from typing import Any, NamedTuple

import msgspec

from cableway.bench.workloads import BenchRequest


class Rates(msgspec.Struct, frozen=True):
    """What the machine can do."""

    copy_bytes_s: float  # read and written
    matmul_flop_s: float  # in the compute dtype


class Shape(NamedTuple):
    """A dense decoder's dimensions, as the floor needs them."""

    body_params: int
    head_params: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Shape":
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        head_dim = config.get("head_dim") or hidden // heads
        attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
        mlp = 3 * hidden * config["intermediate_size"]
        layers = config["num_hidden_layers"]
        return cls(layers * (attention + mlp), hidden * config["vocab_size"], layers, heads, kv_heads, head_dim)


def floor_s(
    requests: list[BenchRequest], shape: Shape, rates: Rates, *, weight_bytes: float, kv_bytes: int, max_num_seqs: int
) -> float:
    """Seconds below which no engine can run `requests`.

    `weight_bytes` is the mean size of one weight, `kv_bytes` that of one cached value. Requests run in waves of
    `max_num_seqs`, longest outputs together, which is the fewest weight reads that any schedule can do.
    """
    flops = 0.0
    for prompt, _ in requests:
        attention = 2 * shape.num_layers * shape.num_heads * shape.head_dim * len(prompt)
        flops += len(prompt) * (2 * shape.body_params + attention) + 2 * shape.head_params
    outputs = sorted((output_len for _, output_len in requests), reverse=True)
    steps = sum(max(0, outputs[first] - 1) for first in range(0, len(outputs), max_num_seqs))
    context = sum((out - 1) * (len(prompt) + out / 2) for prompt, out in requests)
    kv = context * 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * kv_bytes
    weights = steps * (shape.body_params + shape.head_params) * weight_bytes
    return flops / rates.matmul_flop_s + (weights + kv) / rates.copy_bytes_s


def step_floor_s(shape: Shape, rates: Rates, rows: int, length: int, item_bytes: int, kv_item_bytes: int) -> float:
    """Seconds below which no engine can do one step: `rows` tokens after `length` others each, or, where there are no
    rows, one prompt of `length`."""
    width = shape.num_layers * shape.head_dim
    if not rows:
        flops = length * (2 * shape.body_params + 2 * width * shape.num_heads * length) + 2 * shape.head_params
        return flops / rates.matmul_flop_s
    kv_bytes = rows * length * 2 * width * shape.num_kv_heads * kv_item_bytes
    num_bytes = (shape.body_params + shape.head_params) * item_bytes + kv_bytes
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
