"""The workloads are the very lists other engines were timed on; the floor is arithmetic that a hand can check."""

import array
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from cableway.bench.floor import Rates, Shape, Widths, floor_s
from cableway.bench.workloads import WORKLOADS, BenchRequest, workload
from cableway.ipc.modelfiles import locate
from tests import checkpoints

DIGESTS = {
    "decode1": "e224d18e90cfa0f4",
    "mixed256": "b1ebc1aa5bea4f90",
    "batch256": "6f76e096b5e37494",
    "prefill": "afad6e73cebeb503",
    "long": "885920bac1f02f46",
    "prefix": "aa51b870e5f3313d",
}


@pytest.mark.parametrize("name", DIGESTS)
def test_same_tokens_as_the_other_engines(name):
    digest = hashlib.sha256()
    for prompt, output_len in workload(name):
        digest.update(array.array("i", [len(prompt), output_len, *prompt]).tobytes())
    assert digest.hexdigest()[:16] == DIGESTS[name]


@pytest.mark.parametrize("name", [name for name in WORKLOADS if name not in ("long", "prefill")])
def test_repeats_keep_lengths_but_share_no_prefix(name):
    first, again = workload(name, 49152), workload(name, 49152, repeat=1)
    assert [(len(r.prompt), r.output_len) for r in first] == [(len(r.prompt), r.output_len) for r in again]
    assert all(a.prompt[0] != b.prompt[0] for a, b in zip(first, again, strict=True))
    assert all(0 <= token < 49152 for r in again for token in r.prompt)


def test_floor_of_a_shape_counted_by_hand(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 100}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    files = locate(str(checkpoints.tiny(tmp_path / "model", "llama", **sizes, **heads)))
    shape = Shape.of(files)
    assert shape[:5] == (2 * (8 * 4 * (2 * 2 + 2 * 1) + 3 * 8 * 16), 800, 2 * 2 * 4, 2 * 2 * 4, 0)
    requests = [BenchRequest([1] * 10, 3), BenchRequest([1] * 10, 1)]
    rates = Rates(copy_bytes_s=1.0, matmul_flop_s=1e30)
    seconds = floor_s(requests, shape, rates, Widths(2, 2), max_num_seqs=8)
    kv = 2 * (10 + 1.5) * 2 * 2 * 1 * 4 * 2
    assert seconds == pytest.approx(2 * (shape.body_params + 800) * 2 + kv)


def test_a_state_is_read_and_written_by_every_step_but_the_first():
    shape, rates = Shape(0, 0, 0, 0, state_len=5), Rates(copy_bytes_s=1.0, matmul_flop_s=1.0)
    requests = [BenchRequest([1] * 10, 3), BenchRequest([1] * 10, 1)]
    assert floor_s(requests, shape, rates, Widths(2, 2), max_num_seqs=8) == 2 * 2 * 4 * 5


def shape_of(folder: Path, **config: Any) -> Shape:
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8, "vocab_size": 10, **config}))
    return Shape.of(locate(str(folder), "dummy"))


def test_shape_of_a_recurrent_model(tmp_path):
    sizes = {"num_heads": 4, "head_dim": 4, "state_size": 6, "n_groups": 1, "conv_kernel": 4}
    found = shape_of(tmp_path, architectures=["Mamba2ForCausalLM"], num_hidden_layers=3, **sizes)
    channels = 16 + 2 * 6
    assert found.body_params == 3 * (8 * (16 + channels + 4) + 4 * channels + 8 * 16)
    assert found[2:5] == (0, 0, 3 * (3 * channels + 4 * 4 * 6))


def test_shape_of_a_hybrid(tmp_path):
    """Keys are kept by the layers that attend alone, states by the others."""
    attending = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "full_attention_interval": 2}
    heads = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
    dims = {"linear_value_head_dim": 6, "linear_key_head_dim": 5, "linear_conv_kernel_dim": 4}
    sizes = {"num_hidden_layers": 4, "intermediate_size": 16, **attending, **heads, **dims}
    found = shape_of(tmp_path, architectures=["Qwen3NextForCausalLM"], **sizes)
    channels = 2 * 2 * 5 + 4 * 6
    assert found[2:5] == (2 * 2 * 8, 2 * 2 * 8, 2 * (3 * channels + 4 * 6 * 5))


def test_of_experts_those_count_that_a_token_chooses(tmp_path):
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    experts = {"num_experts": 6, "moe_intermediate_size": 5, "intermediate_size": 5}
    found = [
        shape_of(tmp_path, architectures=["Qwen3MoeForCausalLM"], num_experts_per_tok=k, **sizes, **experts)
        for k in (1, 3)
    ]
    assert found[1].body_params - found[0].body_params == 2 * 3 * 8 * 5
    assert [shape.read_params(1) for shape in found] == pytest.approx([shape.body_params for shape in found])
    all_experts = found[1].body_params + 3 * 3 * 8 * 5
    assert found[1].read_params(2) == pytest.approx(all_experts - 6 / 4 * 3 * 8 * 5)
    assert found[0].read_params(math.inf) == found[1].read_params(math.inf) == all_experts


def test_steps_read_the_experts_that_their_rows_hit():
    shape, rates = Shape(10, 0, 0, 0, expert_params=20, chosen_frac=0.5), Rates(copy_bytes_s=1.0, matmul_flop_s=1e30)
    requests = [BenchRequest([1], 3), BenchRequest([1], 2)]
    floor = floor_s(requests, shape, rates, Widths(2, 2), max_num_seqs=8)
    assert floor == pytest.approx(2 * ((10 + 20 * (0.5 - 0.25)) + 10))
