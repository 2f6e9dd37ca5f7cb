"""A GGUF file's metadata as the config.json that its family has in a Hugging Face folder. One table.

For each architecture that llama.cpp's converter writes: the class of transformers it came from, and where the config's
keys are found: under another name, made of several, told by which tensors there are, or nowhere, since the format
leaves unsaid what is the same in every published model.
"""

import difflib
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from cableway.ipc.gguf import Header, ModelError, read_floats

_DTYPES = {0: "float32", 1: "float16", 30: "bfloat16"}
"""ggml_type -> dtype, for those that are plain numbers"""
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_SIGMOID = 2  # of expert_gating_func


class _File:
    """What a header says of its architecture: `file["block_count"]`, None where it says nothing."""

    def __init__(self, header: Header):
        self.header = header
        self.architecture = header.metadata.get("general.architecture")
        self._layers: dict[str, set[int]] = {}
        for name in header.tensor_names:
            if found := _BLOCK.fullmatch(name):
                self._layers.setdefault(found[2], set()).add(int(found[1]))

    def __getitem__(self, key: str) -> Any:
        return self.header.metadata.get(f"{self.architecture}.{key}")

    def has(self, tensor: str) -> bool:
        """Whether there is a tensor of this name, in the file or in a block."""
        return tensor in self.header.tensor_names or tensor in self._layers

    def layers_with(self, tensor: str) -> set[int]:
        return self._layers.get(tensor, set())


_Value = str | Callable[[_File], Any]
"""A key of the metadata, without the architecture's name, or what makes the value; None = the config has no such key"""


class _Family(NamedTuple):
    transformers: str | Callable[[_File], str]
    fields: Mapping[str, _Value] = {}


def _has(tensor: str) -> _Value:
    return lambda file: file.has(tensor)


def _always(value: Any) -> _Value:
    return lambda file: value


def _either(key: str, yes: str, no: str) -> Callable[[_File], str]:
    """By a key that is absent, zero or false in files of one family and not in those of the other."""
    return lambda file: yes if file[key] else no


def _head_dim(file: _File) -> Any:
    return file["attention.key_length"] or file["embedding_length"] // file["attention.head_count"]


def _rotated_frac(file: _File) -> Any:
    return file["rope.dimension_count"] and file["rope.dimension_count"] / _head_dim(file)


def _one(key: str) -> _Value:
    """A number, or the one that layers have which have any, where each layer's is given."""

    def find(file: _File) -> Any:
        value = file[key]
        numbers = {number for number in value if number} if isinstance(value, list) else {value}
        if len(numbers) > 1:
            raise ValueError("layers differ")
        return next(iter(numbers), None)

    return find


def _rope_scaling(file: _File) -> dict[str, Any] | None:
    scaling = {
        "rope_type": file["rope.scaling.type"],
        "factor": file["rope.scaling.factor"],
        "original_max_position_embeddings": file["rope.scaling.original_context_length"],
        "beta_fast": file["rope.scaling.yarn_beta_fast"],
        "beta_slow": file["rope.scaling.yarn_beta_slow"],
    }
    if file.has("rope_factors_long.weight"):
        scaling["rope_type"] = "longrope"
        scaling["attention_factor"] = file["rope.scaling.attn_factor"]
        for length in ("long", "short"):
            scaling[f"{length}_factor"] = read_floats(file.header, f"rope_factors_{length}.weight")
    elif scaling["rope_type"] in (None, "none"):
        return None
    if (per_log := file["rope.scaling.yarn_log_multiplier"]) is not None:
        scaling["mscale"] = scaling["mscale_all_dim"] = 10 * per_log
    return {key: value for key, value in scaling.items() if value is not None}


def _layer_types(file: _File) -> list[str] | None:
    """Where each layer's is given; other files repeat the pattern of their family."""
    pattern = file["attention.sliding_window_pattern"]
    return (
        ["sliding_attention" if near else "full_attention" for near in pattern] if isinstance(pattern, list) else None
    )


def _turns(layers: Collection[int], num_layers: int) -> tuple[int, int]:
    """period, offset of layers that come round regularly; ValueError when they do not."""
    first, second = [*sorted(layers), num_layers, 2 * num_layers][:2]
    period = second - first if len(layers) > 1 else num_layers
    if set(layers) != {i for i in range(num_layers) if i % period == first}:
        raise ValueError("layers come round at no regular distance")
    return period, first


def _attention_turns(file: _File) -> tuple[int, int]:
    return _turns(file.layers_with("attn_q.weight"), file["block_count"])


def _expert_turns(file: _File) -> tuple[int, int]:
    return _turns(file.layers_with("ffn_gate_inp.weight"), file["block_count"])


def _far_is_scaled(file: _File) -> dict[str, Any]:
    """RoPE scaling of those layers that see everything."""
    plain = {"rope_theta": file["rope.freq_base"], "rope_type": "default"}
    return {"sliding_attention": plain, "full_attention": plain | (_rope_scaling(file) or {})}


def _query_scalar(num_layers_of_largest: int) -> _Value:
    """Of Gemma: the size of a head, but in the largest model of a generation that of an even share of hidden_size."""

    def find(file: _File) -> Any:
        if file["block_count"] == num_layers_of_largest:
            return file["embedding_length"] // file["attention.head_count"]
        return _head_dim(file)

    return find


_COMMON: dict[str, _Value] = {
    "num_hidden_layers": lambda file: file["block_count"] - (file["nextn_predict_layers"] or 0),
    "num_nextn_predict_layers": "nextn_predict_layers",
    "hidden_size": "embedding_length",
    "intermediate_size": _one("feed_forward_length"),
    "num_attention_heads": _one("attention.head_count"),
    "num_key_value_heads": lambda file: file["attention.head_count_kv"] or file["attention.head_count"] or None,
    "head_dim": lambda file: _head_dim(file) if file["attention.head_count"] else None,
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "layer_norm_eps": "attention.layer_norm_epsilon",
    "sliding_window": lambda file: file["attention.sliding_window"] or None,
    "layer_types": _layer_types,
    "max_position_embeddings": "context_length",
    "vocab_size": "vocab_size",
    "rope_theta": "rope.freq_base",
    "rope_scaling": _rope_scaling,
    "partial_rotary_factor": _rotated_frac,
    "num_experts": lambda file: file["expert_count"] or None,
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "n_shared_experts": "expert_shared_count",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "first_k_dense_replace": "leading_dense_block_count",
    "routed_scaling_factor": "expert_weights_scale",
    "norm_topk_prob": "expert_weights_norm",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
    "attention_bias": _has("attn_q.bias"),
    "mlp_bias": _has("ffn_up.bias"),
    "tie_word_embeddings": lambda file: not file.has("output.weight"),
}
_MULTIPLIERS: dict[str, _Value] = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
}
_SOFT_CAPS: dict[str, _Value] = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_STATE_SPACE: dict[str, _Value] = {
    "state_size": "ssm.state_size",
    "conv_kernel": "ssm.conv_kernel",
    "use_bias": _has("ssm_in.bias"),
    "use_conv_bias": _has("ssm_conv1d.bias"),
}
_LATENT: dict[str, _Value] = {
    "q_lora_rank": "attention.q_lora_rank",
    "kv_lora_rank": "attention.kv_lora_rank",
    "qk_rope_head_dim": "rope.dimension_count",
    "partial_rotary_factor": _always(None),
    "num_key_value_heads": "attention.head_count",  # the file's own is that of the latents
    "attention_bias": _has("attn_kv_a_mqa.bias"),
}
_FAMILIES = {
    "llama": _Family(
        _either("expert_count", "MixtralForCausalLM", "LlamaForCausalLM"), {"sliding_window": _always(None)}
    ),
    "qwen2": _Family("Qwen2ForCausalLM"),
    "qwen3": _Family("Qwen3ForCausalLM"),
    "qwen2moe": _Family("Qwen2MoeForCausalLM", {"norm_topk_prob": _always(False), "qkv_bias": _has("attn_q.bias")}),
    "qwen3moe": _Family("Qwen3MoeForCausalLM", {"norm_topk_prob": _always(True)}),
    "gemma": _Family("GemmaForCausalLM"),
    "gemma2": _Family("Gemma2ForCausalLM", {**_SOFT_CAPS, "query_pre_attn_scalar": _query_scalar(46)}),
    "gemma3": _Family(
        "Gemma3ForCausalLM",
        {
            **_SOFT_CAPS,
            "query_pre_attn_scalar": _query_scalar(62),
            "rope_local_base_freq": "rope.freq_base_swa",
        },
    ),
    "phi2": _Family("PhiForCausalLM"),
    "phi3": _Family("Phi3ForCausalLM"),
    "starcoder2": _Family("Starcoder2ForCausalLM", {"use_bias": _has("attn_q.bias")}),
    "starcoder": _Family("GPTBigCodeForCausalLM"),
    "gpt2": _Family("GPT2LMHeadModel"),
    "gptneox": _Family(
        "GPTNeoXForCausalLM",
        {"use_parallel_residual": "use_parallel_residual", "attention_bias": _has("attn_qkv.bias")},
    ),
    "falcon": _Family(
        "FalconForCausalLM",
        {
            "bias": _has("attn_qkv.bias"),
            "new_decoder_architecture": _always(True),  # which can be all that the older ones were, too
            "num_ln_in_parallel_attn": lambda file: 2 if file.has("attn_norm_2.weight") else 1,
        },
    ),
    "bloom": _Family("BloomForCausalLM"),
    "mpt": _Family(
        "MptForCausalLM",
        {
            "alibi": lambda file: bool(file["attention.max_alibi_bias"]),
            "alibi_bias_max": "attention.max_alibi_bias",
            "clip_qkv": "attention.clamp_kqv",
            "expansion_ratio": lambda file: file["feed_forward_length"] / file["embedding_length"],
        },
    ),
    "stablelm": _Family(
        "StableLmForCausalLM",
        {
            "use_parallel_residual": "use_parallel_residual",
            "use_qkv_bias": _has("attn_q.bias"),
            "qk_layernorm": _has("attn_q_norm.weight"),
        },
    ),
    "command-r": _Family(
        "CohereForCausalLM", {"logit_scale": "logit_scale", "use_qk_norm": _has("attn_q_norm.weight")}
    ),
    "cohere2": _Family("Cohere2ForCausalLM", {"logit_scale": "logit_scale"}),
    "olmo": _Family("OlmoForCausalLM", {"clip_qkv": "attention.clamp_kqv"}),
    "olmo2": _Family(
        _either("attention.sliding_window", "Olmo3ForCausalLM", "Olmo2ForCausalLM"),
        {"rope_parameters": lambda file: _far_is_scaled(file) if file["attention.sliding_window"] else None},
    ),
    "olmoe": _Family("OlmoeForCausalLM", {"norm_topk_prob": _always(False)}),
    "deepseek": _Family("DeepseekForCausalLM", {"norm_topk_prob": _always(False)}),
    "deepseek2": _Family(
        lambda file: f"DeepseekV{3 if file['expert_gating_func'] == _SIGMOID else 2}ForCausalLM",
        {
            **_LATENT,
            "qk_nope_head_dim": lambda file: (
                (file["attention.key_length_mla"] or file["attention.key_length"]) - file["rope.dimension_count"]
            ),
            "v_head_dim": lambda file: file["attention.value_length_mla"] or file["attention.value_length"],
            "topk_method": lambda file: "group_limited_greedy" if (file["expert_group_count"] or 1) > 1 else "greedy",
        },
    ),
    "granite": _Family("GraniteForCausalLM", _MULTIPLIERS),
    "granitemoe": _Family(
        "GraniteMoeForCausalLM", {**_MULTIPLIERS, "shared_intermediate_size": "expert_shared_feed_forward_length"}
    ),
    "minicpm": _Family(
        "MiniCPMForCausalLM",
        {
            "scale_emb": "embedding_scale",
            "scale_depth": lambda file: file["residual_scale"] * file["block_count"] ** 0.5,
            "dim_model_base": lambda file: file["embedding_length"] / file["logit_scale"],
        },
    ),
    "minicpm3": _Family(
        "MiniCPM3ForCausalLM",
        {
            **_LATENT,
            "qk_nope_head_dim": lambda file: file["attention.key_length"] - file["rope.dimension_count"],
            "scale_emb": _always(12.0),
            "scale_depth": _always(1.4),
            "dim_model_base": _always(256),
        },
    ),
    "mamba": _Family(
        _either("ssm.dt_b_c_rms", "FalconMambaForCausalLM", "MambaForCausalLM"),
        {**_STATE_SPACE, "intermediate_size": "ssm.inner_size", "time_step_rank": "ssm.time_step_rank"},
    ),
    "mamba2": _Family(
        "Mamba2ForCausalLM",
        {
            **_STATE_SPACE,
            "num_heads": "ssm.time_step_rank",
            "head_dim": lambda file: file["ssm.inner_size"] // file["ssm.time_step_rank"],
            "n_groups": "ssm.group_count",
            "expand": lambda file: file["ssm.inner_size"] / file["embedding_length"],
        },
    ),
    "jamba": _Family(
        "JambaForCausalLM",
        {
            "num_key_value_heads": _one("attention.head_count_kv"),
            "attn_layer_period": lambda file: _attention_turns(file)[0],
            "attn_layer_offset": lambda file: _attention_turns(file)[1],
            "expert_layer_period": lambda file: _expert_turns(file)[0],
            "expert_layer_offset": lambda file: _expert_turns(file)[1],
            "mamba_d_state": "ssm.state_size",
            "mamba_d_conv": "ssm.conv_kernel",
            "mamba_expand": lambda file: file["ssm.inner_size"] // file["embedding_length"],
            "mamba_dt_rank": "ssm.time_step_rank",
            "mamba_conv_bias": _has("ssm_conv1d.bias"),
            "mamba_proj_bias": _has("ssm_in.bias"),
            "norm_topk_prob": _always(False),
        },
    ),
    "glm4": _Family(
        "Glm4ForCausalLM", {"attention_bias": lambda file: file.has("attn_q.bias") or file.has("attn_qkv.bias")}
    ),
    "chatglm": _Family(
        "GlmForCausalLM", {"attention_bias": lambda file: file.has("attn_q.bias") or file.has("attn_qkv.bias")}
    ),
    "exaone": _Family("ExaoneForCausalLM"),
    "exaone4": _Family("Exaone4ForCausalLM"),
    "nemotron": _Family("NemotronForCausalLM"),
    "internlm2": _Family("InternLM2ForCausalLM"),
    "orion": _Family("OrionForCausalLM"),
    "xverse": _Family("XverseForCausalLM"),
    "qwen": _Family("QWenLMHeadModel"),
    "baichuan": _Family("BaichuanForCausalLM", {"has_rope": lambda file: file["block_count"] != 40}),
    "arcee": _Family("ArceeForCausalLM"),
    "smollm3": _Family("SmolLM3ForCausalLM"),
    "seed_oss": _Family("SeedOssForCausalLM", {"attention_out_bias": _has("attn_output.bias")}),
    "ernie4_5": _Family("Ernie4_5ForCausalLM"),
    "hunyuan-dense": _Family("HunYuanDenseV1ForCausalLM"),
    "glm4moe": _Family("Glm4MoeForCausalLM", {"use_qk_norm": _has("attn_q_norm.weight")}),
    "dots1": _Family("Dots1ForCausalLM"),
    "minimax-m2": _Family("MiniMaxM2ForCausalLM"),
    "gpt-oss": _Family(
        "GptOssForCausalLM", {"rope_scaling": lambda file: {**(_rope_scaling(file) or {}), "truncate": False}}
    ),
}
"""GGUF architecture -> its family; fields come on top of those that all have."""


def derive(header: Header) -> dict[str, Any]:
    """The config of the model in a GGUF file, without its token ids; ModelError when its metadata gives none."""
    file = _File(header)
    family = _FAMILIES.get(file.architecture) if isinstance(file.architecture, str) else None
    if family is None:
        near = difflib.get_close_matches(str(file.architecture), _FAMILIES, 3, 0.3) or sorted(_FAMILIES)
        known = ", ".join(near)
        raise ModelError(f"{header.path}: architecture {file.architecture!r} is not supported (near it: {known})")
    name = family.transformers
    config: dict[str, Any] = {
        "architectures": [name if isinstance(name, str) else name(file)],
        "model_type": file.architecture,
    }
    for name, value in {**_COMMON, **family.fields}.items():
        try:
            found = file[value] if isinstance(value, str) else value(file)
        except (TypeError, ValueError, ArithmeticError):
            raise ModelError(f"{header.path}: metadata gives no usable {name}") from None
        if found is not None:
            config[name] = found
    for name in ("num_hidden_layers", "hidden_size"):
        if not isinstance(config.get(name), int) or config[name] < 1:
            raise ModelError(f"{header.path}: metadata gives no usable {name}")
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):
        config["vocab_size"] = len(tokens)  # some writers round the key of that name, or leave it out
    if dtype := _dtype(header):
        config["dtype"] = dtype
    return config


def _dtype(header: Header) -> str | None:
    """The dtype of most of the matrices' numbers; None where they are quantized."""
    counts: Counter[int] = Counter()
    for tensor in header.raw_tensors.values():
        if len(tensor.shape) > 1:
            counts[tensor.ggml_type] += math.prod(tensor.shape)
    return _DTYPES.get(counts.most_common(1)[0][0]) if counts else None
