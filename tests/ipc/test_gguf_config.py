"""What a GGUF file's metadata says of a model; and every way in which it says nothing sound is one clear ModelError."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from cableway.ipc.gguf import ModelError, read_floats, read_header
from cableway.ipc.modelfiles import locate
from tests.models.converter.writing import finish, put

SIZES: dict[str, Any] = {"block_count": 4, "embedding_length": 64, "attention.head_count": 4}


def written(path: Path, architecture: str, fields: dict[str, Any], tensors: dict[str, np.ndarray] | None = None) -> str:
    writer = gguf.GGUFWriter(path / "m.gguf", architecture)
    for key, value in {**SIZES, **fields}.items():
        put(writer, f"{architecture}.{key}", value)
    for name, values in (tensors or {"token_embd.weight": np.zeros((8, 64), np.float32)}).items():
        writer.add_tensor(name, values)
    finish(writer)
    return str(path / "m.gguf")


def vectors(*names: str) -> dict[str, np.ndarray]:
    return dict.fromkeys(names, np.ones(8, np.float32))


@pytest.mark.parametrize(
    ("architecture", "fields", "expected"),
    [
        ("llama", {}, {"architectures": ["LlamaForCausalLM"], "num_key_value_heads": 4, "head_dim": 16}),
        ("llama", {"expert_count": 8}, {"architectures": ["MixtralForCausalLM"], "num_experts": 8}),
        ("llama", {"rope.dimension_count": 8}, {"partial_rotary_factor": 0.5}),
        ("gemma2", {"block_count": 26, "attention.key_length": 24}, {"query_pre_attn_scalar": 24}),
        ("gemma2", {"block_count": 46, "attention.key_length": 24}, {"query_pre_attn_scalar": 16}),
        ("gemma3", {"block_count": 62, "attention.key_length": 24}, {"query_pre_attn_scalar": 16}),
        ("deepseek2", {"rope.dimension_count": 8, "attention.key_length": 20, "attention.value_length": 12},
         {"architectures": ["DeepseekV2ForCausalLM"], "qk_nope_head_dim": 12, "v_head_dim": 12}),
        ("deepseek2", {"rope.dimension_count": 8, "attention.key_length": 32, "attention.value_length": 24,
                       "attention.key_length_mla": 20, "attention.value_length_mla": 12, "expert_gating_func": 2},
         {"architectures": ["DeepseekV3ForCausalLM"], "qk_nope_head_dim": 12, "v_head_dim": 12}),
        ("glm4moe", {"block_count": 5, "nextn_predict_layers": 1}, {"num_hidden_layers": 4}),
        ("olmo2", {"attention.sliding_window": 7, "attention.sliding_window_pattern": [True, True, True, False]},
         {"architectures": ["Olmo3ForCausalLM"], "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}),
        ("baichuan", {"block_count": 40}, {"has_rope": False}),
        ("baichuan", {"block_count": 32}, {"has_rope": True}),
    ],
)  # fmt: skip
def test_config(tmp_path: Path, architecture: str, fields: dict[str, Any], expected: dict[str, Any]) -> None:
    config = locate(written(tmp_path, architecture, fields)).config
    assert {key: config.get(key) for key in expected} == expected


def test_scaling_by_tensors(tmp_path: Path) -> None:
    factors = {f"rope_factors_{length}.weight": np.arange(1, 9, dtype=np.float32) for length in ("long", "short")}
    path = written(tmp_path, "phi3", {"rope.scaling.original_context_length": 32}, factors)
    scaling = locate(path).config["rope_scaling"]
    assert scaling["rope_type"] == "longrope"
    assert scaling["long_factor"] == list(range(1, 9))
    assert read_floats(read_header(path), "rope_factors_short.weight") == list(range(1, 9))


def test_layers_of_attention_come_round(tmp_path: Path) -> None:
    fields = {"attention.head_count_kv": [0, 2, 0, 2], "ssm.inner_size": 128}
    path = written(tmp_path, "jamba", fields, vectors("blk.1.attn_q.weight", "blk.3.attn_q.weight"))
    config = locate(path).config
    assert (config["attn_layer_period"], config["attn_layer_offset"], config["num_key_value_heads"]) == (2, 1, 2)


@pytest.mark.parametrize(
    ("architecture", "fields", "said"),
    [
        ("perceiver", {}, "architecture 'perceiver' is not supported"),
        ("qwen9", {}, "near it: qwen"),
        ("llama", {"block_count": "many"}, "no usable num_hidden_layers"),
        ("llama", {"block_count": 0}, "no usable num_hidden_layers"),
        ("lfm2", {"block_count": 2**32 - 1}, "no usable num_hidden_layers"),
        ("glm4moe", {"block_count": 1, "nextn_predict_layers": 1}, "no usable num_hidden_layers"),
        ("llama", {"embedding_length": [64]}, "no usable"),
        ("llama", {"attention.head_count": [4, 2]}, "no usable"),
        ("llama", {"rope.dimension_count": "x"}, "no usable partial_rotary_factor"),
        ("gemma3", {"attention.key_length": 0, "attention.head_count": 0}, "no usable"),
        ("mamba2", {"ssm.inner_size": 64, "ssm.time_step_rank": 0}, "no usable head_dim"),
        ("minicpm", {"residual_scale": 1.0, "logit_scale": 0.0}, "no usable dim_model_base"),
        ("jamba", {"attention.head_count_kv": [0, 2, 0, 4]}, "no usable num_key_value_heads"),
    ],
)
def test_metadata_that_is_not_sound(tmp_path: Path, architecture: str, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError) as caught:
        locate(written(tmp_path, architecture, fields))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_layers_that_come_round_at_no_distance(tmp_path: Path) -> None:
    names = ("blk.0.attn_q.weight", "blk.1.attn_q.weight", "blk.3.attn_q.weight")
    with pytest.raises(ModelError, match="no usable attn_layer_period"):
        locate(written(tmp_path, "jamba", {"ssm.inner_size": 128}, vectors(*names)))


def test_factors_that_are_none(tmp_path: Path) -> None:
    path = written(tmp_path, "phi3", {}, {"rope_factors_long.weight": np.ones(8, np.float16)})
    with pytest.raises(ModelError, match=r"no short tensor 'rope_factors_long\.weight'"):
        locate(path)
