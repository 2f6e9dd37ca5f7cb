"""Checkpoint folders written as GGUF files, as llama.cpp's converter does: its conventions, described family by family.

Nothing here comes of the engine's tables. Names of tensors are the gguf package's own map from transformers' names.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import Keys
from safetensors.torch import load_file
from torch import Tensor

Config = dict[str, Any]
Tensors = dict[str, Tensor]
LLM, ATTENTION, ROPE, SSM = Keys.LLM, Keys.Attention, Keys.Rope, Keys.SSM
BLOCK_LEN = 32
_NEVER_QUANTIZED = ("ffn_gate_inp", "ssm_", "norm", "position_embd")


def said(*keys: str) -> Callable[[Config], Any]:
    """The first of these keys of a config.json."""
    return lambda c: next((c[key] for key in keys if c.get(key) is not None), None)


def always(value: Any) -> Callable[[Config], Any]:
    return lambda c: value


hidden, layers, heads = (
    said("hidden_size", "n_embd", "d_model"),
    said("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    said("num_attention_heads", "n_head", "n_heads"),
)
kv_heads = said("num_key_value_heads", "num_kv_heads")


def rope(c: Config) -> Config:
    found = c.get("rope_parameters") or c.get("rope_scaling") or {}
    return {"rope_theta": c.get("rope_theta", 10_000.0), **found.get("full_attention", found)}


def head_dim(c: Config) -> int:
    return c.get("head_dim") or hidden(c) // heads(c)


def rotated(c: Config) -> int:
    return int(rope(c).get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0)) * head_dim(c))


def scaling(c: Config) -> Config:
    """What the converter says of RoPE that is scaled."""
    r = rope(c)
    if r.get("rope_type") == "linear":
        return {ROPE.SCALING_TYPE: "linear", ROPE.SCALING_FACTOR: r["factor"]}
    if r.get("rope_type") == "yarn":
        said = {ROPE.SCALING_TYPE: "yarn", ROPE.SCALING_FACTOR: r["factor"]}
        said[ROPE.SCALING_ORIG_CTX_LEN] = r["original_max_position_embeddings"]
        said[ROPE.SCALING_YARN_BETA_FAST], said[ROPE.SCALING_YARN_BETA_SLOW] = r["beta_fast"], r["beta_slow"]
        return said
    return {}


SIZES: dict[str, Callable[[Config], Any]] = {
    LLM.BLOCK_COUNT: layers,
    LLM.EMBEDDING_LENGTH: hidden,
    ATTENTION.HEAD_COUNT: heads,
}
BASE: dict[str, Callable[[Config], Any]] = {
    **SIZES,
    LLM.CONTEXT_LENGTH: said("max_position_embeddings", "n_ctx", "n_positions", "max_sequence_length"),
    LLM.FEED_FORWARD_LENGTH: said("intermediate_size", "n_inner"),
    ATTENTION.HEAD_COUNT_KV: said("num_key_value_heads"),
    ROPE.FREQ_BASE: lambda c: rope(c)["rope_theta"],
    ATTENTION.LAYERNORM_RMS_EPS: said("rms_norm_eps", "norm_eps"),
    ATTENTION.LAYERNORM_EPS: said("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
    LLM.EXPERT_COUNT: said("num_local_experts", "num_experts", "n_routed_experts"),
    LLM.EXPERT_USED_COUNT: said("num_experts_per_tok"),
    LLM.EXPERT_GROUP_COUNT: said("n_group"),
    LLM.EXPERT_GROUP_USED_COUNT: said("topk_group"),
    ATTENTION.KEY_LENGTH: said("head_dim"),
    ATTENTION.VALUE_LENGTH: said("head_dim"),
}
ROTATED = {ROPE.DIMENSION_COUNT: rotated}
MULTIPLIERS = {
    ATTENTION.SCALE: said("attention_multiplier"),
    LLM.EMBEDDING_SCALE: said("embedding_multiplier"),
    LLM.RESIDUAL_SCALE: said("residual_multiplier"),
    LLM.LOGIT_SCALE: said("logits_scaling"),
}
SOFT_CAPS = {
    LLM.ATTN_LOGIT_SOFTCAPPING: said("attn_logit_softcapping"),
    LLM.FINAL_LOGIT_SOFTCAPPING: said("final_logit_softcapping"),
}
NEAR = {ATTENTION.SLIDING_WINDOW: said("sliding_window")}
NEAR_LAYERS = {
    **NEAR,
    ATTENTION.SLIDING_WINDOW_PATTERN: lambda c: [kind == "sliding_attention" for kind in c["layer_types"]],
}
EXPERT_SIZES = {
    LLM.EXPERT_FEED_FORWARD_LENGTH: said("moe_intermediate_size"),
    LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH: said("shared_expert_intermediate_size"),
}
SHARED = {
    LLM.EXPERT_FEED_FORWARD_LENGTH: said("moe_intermediate_size"),
    LLM.EXPERT_SHARED_COUNT: said("n_shared_experts"),
    LLM.LEADING_DENSE_BLOCK_COUNT: said("first_k_dense_replace"),
    LLM.EXPERT_WEIGHTS_SCALE: said("routed_scaling_factor"),
    LLM.EXPERT_WEIGHTS_NORM: said("norm_topk_prob"),
}
LATENT = {
    ATTENTION.Q_LORA_RANK: said("q_lora_rank"),
    ATTENTION.KV_LORA_RANK: said("kv_lora_rank"),
    ROPE.DIMENSION_COUNT: said("qk_rope_head_dim"),
}


# ---------------------------------------------------------------------------------------------------------------------
# Tensors: each of these changes some of a checkpoint's in place.


def each(*endings: str) -> Callable[[Callable[[Tensor, Config], Tensor]], Callable[[Tensors, Config], None]]:
    """Make a change of one tensor that of all whose name ends so."""

    def make(change: Callable[[Tensor, Config], Tensor]) -> Callable[[Tensors, Config], None]:
        def apply(tensors: Tensors, c: Config) -> None:
            for name in tensors:
                if name.endswith(endings):
                    tensors[name] = change(tensors[name], c)

        return apply

    return make


def permute(weight: Tensor, num_heads: int) -> Tensor:
    """From halves of a head to neighbours."""
    return weight.unflatten(0, (num_heads, 2, -1)).swapaxes(1, 2).flatten(0, 2)


permuted_q = each("q_proj.weight", "q_proj.bias")(lambda t, c: permute(t, heads(c)))
permuted_k = each("k_proj.weight", "k_proj.bias")(lambda t, c: permute(t, kv_heads(c) or heads(c)))
PERMUTED = (permuted_q, permuted_k)
one_more = each("norm.weight")(lambda t, c: t + 1)
squeezed = each("conv1d.weight")(lambda t, c: t.squeeze())
negated = each(".A_log")(lambda t, c: -torch.exp(t))
gpt2_turned = each("c_attn.weight", "c_proj.weight", "c_fc.weight")(lambda t, c: t.t())


@each("query_key_value.weight", "query_key_value.bias")
def ungrouped(t: Tensor, c: Config) -> Tensor:
    """Falcon: from each group's q, k, v to all q, all k, all v."""
    groups = t.unflatten(0, (c["num_kv_heads"], -1, head_dim(c)))
    return torch.cat((groups[:, :-2].flatten(0, 2), groups[:, -2].flatten(0, 1), groups[:, -1].flatten(0, 1)))


@each("query_key_value.weight", "query_key_value.bias")
def unmixed(t: Tensor, c: Config) -> Tensor:
    """Bloom, NeoX: from each head's q, k, v to all q, all k, all v."""
    return t.unflatten(0, (heads(c), 3, -1)).swapaxes(0, 1).flatten(0, 2)


def experts_stacked(tensors: Tensors, c: Config) -> None:
    found: dict[tuple[str, str], dict[int, Tensor]] = {}
    for name in list(tensors):
        if match := re.fullmatch(r"(.*)\.experts\.(\d+)\.(\w+)\.weight", name):
            found.setdefault((match[1], match[3]), {})[int(match[2])] = tensors.pop(name)
    for (prefix, matrix), experts in found.items():
        layer = re.search(r"\.(\d+)\.", prefix)[1]
        name = f"layers.{layer}.feed_forward" if matrix.startswith("w") else f"model.layers.{layer}.mlp"
        tensors[f"{name}.experts.{matrix}.weight"] = torch.stack([experts[i] for i in range(len(experts))])


def heads_stacked(tensors: Tensors, c: Config) -> None:
    """StableLM: the norms of heads, one after another."""
    for which in ("q", "k"):
        for layer in range(layers(c)):
            prefix, found = f"model.layers.{layer}.self_attn.{which}_layernorm", []
            while (name := f"{prefix}.norms.{len(found)}.weight") in tensors:
                found.append(tensors.pop(name))
            if found:
                tensors[f"{prefix}.weight"] = torch.stack(found)


def split(name: str, parts: Mapping[str, Callable[[Tensor, Config], Tensor]]) -> Callable[[Tensors, Config], None]:
    """Take a tensor apart; the names of parts stand where its own stood."""

    def apply(tensors: Tensors, c: Config) -> None:
        for known in [known for known in tensors if name in known]:
            whole = tensors.pop(known)
            tensors.update({known.replace(name, part): cut(whole, c) for part, cut in parts.items()})

    return apply


def nth(index: int, dim: int, count: int) -> Callable[[Tensor, Config], Tensor]:
    return lambda t, c: t.chunk(count, dim)[index].contiguous()


def keys_of_latents(t: Tensor, c: Config) -> Tensor:
    by_head = t.unflatten(0, (heads(c), -1))
    return by_head[:, : c["qk_nope_head_dim"]].transpose(1, 2)


def values_of_latents(t: Tensor, c: Config) -> Tensor:
    return t.unflatten(0, (heads(c), -1))[:, c["qk_nope_head_dim"] :]


latents_split = split("kv_b_proj", {"k_b_proj": keys_of_latents, "v_b_proj": values_of_latents})
pack_split = split("self_attn.W_pack", {f"self_attn.{part}_proj": nth(i, 0, 3) for i, part in enumerate("qkv")})


def internlm2_part(part: str) -> Callable[[Tensor, Config], Tensor]:
    def cut(t: Tensor, c: Config) -> Tensor:
        groups = t.unflatten(0, (kv_heads(c), -1, head_dim(c)))
        rows = {"q": groups[:, :-2], "k": groups[:, -2:-1], "v": groups[:, -1:]}[part].flatten(0, 2)
        return rows if part == "v" else permute(rows, heads(c) if part == "q" else kv_heads(c))

    return cut


internlm2_split = split("attention.wqkv", {f"attention.w{part}": internlm2_part(part) for part in "qkv"})
granite_experts = split(
    "block_sparse_moe.input_linear",
    {f"mlp.experts.{name}_proj": nth(i, -2, 2) for i, name in enumerate(("gate", "up"))},
)
granite_shared = split(
    "shared_mlp.input_linear", {f"mlp.shared_expert.{name}_proj": nth(i, 0, 2) for i, name in enumerate(("gate", "up"))}
)


def gpt_oss(tensors: Tensors, c: Config) -> None:
    """Matrices [X, in, out] to [X, out, in], and gate and up, whose columns take turns, apart."""
    for name in [name for name in tensors if ".experts." in name]:
        stem, leaf = (name.removesuffix("_bias"), "bias") if name.endswith("_bias") else (name, "weight")
        t = tensors.pop(name)
        t = t.transpose(1, 2) if t.dim() == 3 else t
        if "gate_up" in stem:
            for i, part in enumerate(("gate", "up")):
                tensors[f"{stem.replace('gate_up', part)}.{leaf}"] = t[:, i::2]
        else:
            tensors[f"{stem}.{leaf}"] = t
    for layer in range(layers(c)):
        name = f"model.layers.{layer}.self_attn.sinks"
        tensors[f"{name}.weight"] = tensors.pop(name)


def renamed(*pairs: tuple[str, str]) -> Callable[[Tensors, Config], None]:
    def apply(tensors: Tensors, c: Config) -> None:
        for known in list(tensors):
            name = known
            for old, new in pairs:
                name = re.sub(old, new, name)
            tensors[name] = tensors.pop(known)

    return apply


def mamba2_shapes(tensors: Tensors, c: Config) -> None:
    for name, t in tensors.items():
        if name.endswith((".A_log", ".D")):
            tensors[name] = t.unsqueeze(-1)
        elif name.endswith("mixer.norm.weight"):
            tensors[name] = t.view(c["n_groups"], -1)


def rope_divisors(tensors: Tensors, c: Config) -> None:
    """Llama 3's slowed frequencies, as what plain ones are divided by."""
    r = rope(c)
    if r.get("rope_type") != "llama3":
        return
    waves = 2 * torch.pi * r["rope_theta"] ** (torch.arange(0, head_dim(c), 2) / head_dim(c))
    old, low, high = r["original_max_position_embeddings"], r["low_freq_factor"], r["high_freq_factor"]
    kept = (old / waves - low) / (high - low)
    between = 1 / ((1 - kept) / r["factor"] + kept)
    tensors["rope_freqs.weight"] = torch.where(
        waves < old / high, torch.ones_like(waves), torch.where(waves > old / low, r["factor"], between)
    )


def longrope_factors(tensors: Tensors, c: Config) -> None:
    for length in ("long", "short"):
        if factors := rope(c).get(f"{length}_factor"):
            tensors[f"rope_factors_{length}.weight"] = torch.tensor(factors)


# ---------------------------------------------------------------------------------------------------------------------
# Families


class Conversion(NamedTuple):
    architecture: str
    fields: Mapping[str, Callable[[Config], Any]]
    changes: Iterable[Callable[[Tensors, Config], None]] = ()


def latent(**more: Callable[[Config], Any]) -> dict[str, Callable[[Config], Any]]:
    fields = BASE | LATENT | SHARED
    fields |= {
        ATTENTION.HEAD_COUNT_KV: always(1),
        ATTENTION.KEY_LENGTH: lambda c: c["kv_lora_rank"] + c["qk_rope_head_dim"],
        ATTENTION.VALUE_LENGTH: said("kv_lora_rank"),
        ATTENTION.KEY_LENGTH_MLA: lambda c: c["qk_nope_head_dim"] + c["qk_rope_head_dim"],
        ATTENTION.VALUE_LENGTH_MLA: said("v_head_dim"),
        ROPE.SCALING_YARN_LOG_MUL: lambda c: rope(c).get("mscale_all_dim") and 0.1 * rope(c)["mscale_all_dim"],
    }
    return fields | more


LAYER_NORM_SIZES = {**SIZES, ATTENTION.LAYERNORM_EPS: said("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon")}
FOURFOLD = {LLM.FEED_FORWARD_LENGTH: lambda c: 4 * hidden(c)}
STATE_SPACE = {
    LLM.CONTEXT_LENGTH: always(1 << 20),
    LLM.EMBEDDING_LENGTH: hidden,
    LLM.FEED_FORWARD_LENGTH: always(0),
    ATTENTION.HEAD_COUNT: always(0),
    LLM.BLOCK_COUNT: layers,
    SSM.CONV_KERNEL: said("conv_kernel"),
    SSM.STATE_SIZE: said("state_size"),
    ATTENTION.LAYERNORM_RMS_EPS: said("layer_norm_epsilon"),
}
MAMBA = STATE_SPACE | {SSM.INNER_SIZE: said("intermediate_size"), SSM.TIME_STEP_RANK: said("time_step_rank")}
JAMBA = {
    **{key: BASE[key] for key in (LLM.CONTEXT_LENGTH, LLM.FEED_FORWARD_LENGTH, ATTENTION.LAYERNORM_RMS_EPS)},
    **SIZES,
    ATTENTION.HEAD_COUNT_KV: lambda c: [
        c["num_key_value_heads"] if i % c["attn_layer_period"] == c["attn_layer_offset"] else 0
        for i in range(layers(c))
    ],
    SSM.CONV_KERNEL: said("mamba_d_conv"),
    SSM.INNER_SIZE: lambda c: c["mamba_expand"] * hidden(c),
    SSM.STATE_SIZE: said("mamba_d_state"),
    SSM.TIME_STEP_RANK: said("mamba_dt_rank"),
    LLM.EXPERT_COUNT: said("num_local_experts", "num_experts"),
    LLM.EXPERT_USED_COUNT: said("num_experts_per_tok"),
}
LLAMA = BASE | ROTATED | {LLM.VOCAB_SIZE: said("vocab_size")}
without_transformer = renamed((r"^transformer\.", ""))

CONVERSIONS = {
    "LlamaForCausalLM": Conversion("llama", LLAMA, (*PERMUTED, rope_divisors)),
    "MistralForCausalLM": Conversion("llama", LLAMA, PERMUTED),
    "MixtralForCausalLM": Conversion("llama", LLAMA, (*PERMUTED, experts_stacked)),
    "Qwen2ForCausalLM": Conversion("qwen2", BASE),
    "Qwen3ForCausalLM": Conversion("qwen3", BASE),
    "Qwen2MoeForCausalLM": Conversion("qwen2moe", BASE | EXPERT_SIZES, (experts_stacked,)),
    "Qwen3MoeForCausalLM": Conversion("qwen3moe", BASE | EXPERT_SIZES, (experts_stacked,)),
    "GemmaForCausalLM": Conversion("gemma", BASE, (one_more,)),
    "Gemma2ForCausalLM": Conversion("gemma2", BASE | SOFT_CAPS | NEAR, (one_more,)),
    "Gemma3ForCausalLM": Conversion("gemma3", BASE | SOFT_CAPS | NEAR, (one_more,)),
    "PhiForCausalLM": Conversion(
        "phi2",
        LAYER_NORM_SIZES | ROTATED | FOURFOLD | {LLM.CONTEXT_LENGTH: BASE[LLM.CONTEXT_LENGTH]},
    ),
    "Phi3ForCausalLM": Conversion(
        "phi3",
        {key: value for key, value in BASE.items() if key not in (ATTENTION.KEY_LENGTH, ATTENTION.VALUE_LENGTH)}
        | ROTATED
        | {
            ATTENTION.SLIDING_WINDOW: lambda c: c.get("sliding_window") or 0,
            ROPE.SCALING_ORIG_CTX_LEN: lambda c: (
                rope(c).get("original_max_position_embeddings") or c["original_max_position_embeddings"]
            ),
            ROPE.SCALING_ATTN_FACTOR: lambda c: (
                np.sqrt(1 + np.log(c["max_position_embeddings"] / 32) / np.log(32)).item()
                if rope(c).get("long_factor")
                else None
            ),
        },
        (longrope_factors,),
    ),
    "Starcoder2ForCausalLM": Conversion("starcoder2", BASE),
    "GPTBigCodeForCausalLM": Conversion(
        "starcoder",
        LAYER_NORM_SIZES | FOURFOLD | {LLM.CONTEXT_LENGTH: said("n_positions"), ATTENTION.HEAD_COUNT_KV: always(1)},
    ),
    "GPT2LMHeadModel": Conversion(
        "gpt2", LAYER_NORM_SIZES | FOURFOLD | {LLM.CONTEXT_LENGTH: said("n_positions")}, (gpt2_turned,)
    ),
    "GPTNeoXForCausalLM": Conversion(
        "gptneox",
        LAYER_NORM_SIZES
        | ROTATED
        | {
            LLM.CONTEXT_LENGTH: said("max_position_embeddings"),
            LLM.FEED_FORWARD_LENGTH: said("intermediate_size"),
            LLM.USE_PARALLEL_RESIDUAL: said("use_parallel_residual"),
        },
        (unmixed,),
    ),
    "FalconForCausalLM": Conversion(
        "falcon",
        LAYER_NORM_SIZES | FOURFOLD | {LLM.CONTEXT_LENGTH: always(2048), ATTENTION.HEAD_COUNT_KV: said("num_kv_heads")},
        (ungrouped,),
    ),
    "BloomForCausalLM": Conversion(
        "bloom",
        LAYER_NORM_SIZES
        | FOURFOLD
        | {LLM.CONTEXT_LENGTH: said("seq_length", "hidden_size"), ATTENTION.HEAD_COUNT_KV: heads},
        (unmixed, without_transformer),
    ),
    "MptForCausalLM": Conversion(
        "mpt",
        SIZES
        | FOURFOLD
        | {
            LLM.CONTEXT_LENGTH: said("max_seq_len"),
            ATTENTION.LAYERNORM_EPS: always(1e-5),
            ATTENTION.CLAMP_KQV: lambda c: c["attn_config"]["clip_qkv"],
            ATTENTION.MAX_ALIBI_BIAS: lambda c: float(c["attn_config"]["alibi_bias_max"]),
        },
    ),
    "StableLmForCausalLM": Conversion(
        "stablelm",
        LAYER_NORM_SIZES
        | ROTATED
        | {
            LLM.CONTEXT_LENGTH: said("max_position_embeddings"),
            LLM.FEED_FORWARD_LENGTH: said("intermediate_size"),
            ATTENTION.HEAD_COUNT_KV: kv_heads,
            LLM.USE_PARALLEL_RESIDUAL: said("use_parallel_residual"),
        },
        (heads_stacked,),
    ),
    "CohereForCausalLM": Conversion(
        "command-r", BASE | {LLM.LOGIT_SCALE: said("logit_scale"), ROPE.SCALING_TYPE: always("none")}
    ),
    "Cohere2ForCausalLM": Conversion("cohere2", BASE | ROTATED | NEAR | {LLM.LOGIT_SCALE: said("logit_scale")}),
    "OlmoForCausalLM": Conversion(
        "olmo", BASE | {ATTENTION.CLAMP_KQV: said("clip_qkv"), ATTENTION.LAYERNORM_EPS: always(1e-5)}, PERMUTED
    ),
    "Olmo2ForCausalLM": Conversion("olmo2", BASE),
    "Olmo3ForCausalLM": Conversion("olmo2", BASE | NEAR_LAYERS),
    "OlmoeForCausalLM": Conversion("olmoe", BASE, (experts_stacked,)),
    "DeepseekForCausalLM": Conversion(
        "deepseek",
        BASE | ROTATED | SHARED | {LLM.EXPERT_WEIGHTS_SCALE: always(1.0), LLM.EXPERT_WEIGHTS_NORM: always(None)},
        (*PERMUTED, experts_stacked),
    ),
    "DeepseekV2ForCausalLM": Conversion("deepseek2", latent(), (latents_split, experts_stacked)),
    "DeepseekV3ForCausalLM": Conversion(
        "deepseek2",
        latent(**{LLM.EXPERT_GATING_FUNC: always(2)}),
        (latents_split, experts_stacked, renamed(("e_score_correction_bias", "e_score_correction.bias"))),
    ),
    "GraniteForCausalLM": Conversion("granite", LLAMA | MULTIPLIERS, PERMUTED),
    "GraniteMoeForCausalLM": Conversion("granitemoe", LLAMA | MULTIPLIERS, (*PERMUTED, granite_experts)),
    "GraniteMoeSharedForCausalLM": Conversion(
        "granitemoe",
        LLAMA | MULTIPLIERS | {LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH: said("shared_intermediate_size")},
        (*PERMUTED, granite_experts, granite_shared),
    ),
    "MiniCPMForCausalLM": Conversion(
        "minicpm",
        BASE
        | {
            LLM.EMBEDDING_SCALE: lambda c: float(c["scale_emb"]),
            LLM.RESIDUAL_SCALE: lambda c: c["scale_depth"] / layers(c) ** 0.5,
            LLM.LOGIT_SCALE: lambda c: hidden(c) / c["dim_model_base"],
        },
        PERMUTED,
    ),
    "MiniCPM3ForCausalLM": Conversion(
        "minicpm3",
        BASE
        | LATENT
        | {
            ATTENTION.KEY_LENGTH: lambda c: c["qk_nope_head_dim"] + c["qk_rope_head_dim"],
            ATTENTION.VALUE_LENGTH: always(None),
        },
    ),
    "MambaForCausalLM": Conversion("mamba", MAMBA | {SSM.DT_B_C_RMS: always(False)}, (negated, squeezed)),
    "FalconMambaForCausalLM": Conversion("mamba", MAMBA | {SSM.DT_B_C_RMS: always(True)}, (negated, squeezed)),
    "Mamba2ForCausalLM": Conversion(
        "mamba2",
        STATE_SPACE
        | {
            SSM.INNER_SIZE: lambda c: 2 * hidden(c),
            SSM.TIME_STEP_RANK: lambda c: 2 * hidden(c) // c["head_dim"],
            SSM.GROUP_COUNT: said("n_groups"),
        },
        (negated, squeezed, mamba2_shapes, renamed((r"\.dt_bias", ".dt_proj.bias"))),
    ),
    "JambaForCausalLM": Conversion("jamba", JAMBA, (negated, squeezed, experts_stacked)),
    "Glm4ForCausalLM": Conversion("glm4", BASE | ROTATED),
    "GlmForCausalLM": Conversion(
        "chatglm",
        {key: value for key, value in BASE.items() if key not in (ATTENTION.KEY_LENGTH, ATTENTION.VALUE_LENGTH)}
        | ROTATED,
    ),
    "ExaoneForCausalLM": Conversion("exaone", BASE | ROTATED, (rope_divisors,)),
    "Exaone4ForCausalLM": Conversion("exaone4", BASE | NEAR_LAYERS, (rope_divisors,)),
    "NemotronForCausalLM": Conversion("nemotron", BASE | ROTATED | {ROPE.SCALING_TYPE: always("none")}, (one_more,)),
    "InternLM2ForCausalLM": Conversion("internlm2", BASE, (internlm2_split,)),
    "OrionForCausalLM": Conversion(
        "orion",
        {
            key: value
            for key, value in BASE.items()
            if key in (*SIZES, LLM.CONTEXT_LENGTH, LLM.FEED_FORWARD_LENGTH, ATTENTION.HEAD_COUNT_KV)
        }
        | {ATTENTION.LAYERNORM_EPS: said("rms_norm_eps")},
    ),
    "XverseForCausalLM": Conversion("xverse", BASE | ROTATED, PERMUTED),
    "QWenLMHeadModel": Conversion("qwen", BASE | ROTATED),
    "BaiChuanForCausalLM": Conversion("baichuan", BASE | ROTATED, (pack_split, *PERMUTED)),
    "ArceeForCausalLM": Conversion("arcee", LLAMA, PERMUTED),
    "SmolLM3ForCausalLM": Conversion("smollm3", LLAMA, PERMUTED),
    "SeedOssForCausalLM": Conversion("seed_oss", BASE),
    "Ernie4_5ForCausalLM": Conversion("ernie4_5", BASE),
    "HunYuanDenseV1ForCausalLM": Conversion("hunyuan-dense", BASE),
    "Glm4MoeForCausalLM": Conversion(
        "glm4moe",
        BASE | ROTATED | SHARED | {LLM.EXPERT_GATING_FUNC: always(2)},
        (experts_stacked, renamed(("e_score_correction_bias", "e_score_correction.bias"))),
    ),
    "Dots1ForCausalLM": Conversion(
        "dots1",
        BASE | SHARED | {LLM.EXPERT_GATING_FUNC: always(2)},
        (experts_stacked, renamed(("e_score_correction_bias", "e_score_correction.bias"))),
    ),
    "MiniMaxM2ForCausalLM": Conversion(
        "minimax-m2",
        BASE | ROTATED | {LLM.EXPERT_GATING_FUNC: always(2)},
        (experts_stacked, renamed(("e_score_correction_bias", "e_score_correction.bias"))),
    ),
    "GptOssForCausalLM": Conversion(
        "gpt-oss",
        BASE | NEAR | {LLM.EXPERT_FEED_FORWARD_LENGTH: said("intermediate_size")},
        (gpt_oss,),
    ),
}
"""transformers' class -> how its checkpoints are written"""


def put(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    name = key.format(arch=writer.arch)
    match value:
        case None:
            return
        case bool():
            writer.add_bool(name, value)
        case int():
            writer.add_uint32(name, value)
        case float():
            writer.add_float32(name, value)
        case str():
            writer.add_string(name, value)
        case _:
            writer.add_array(name, value)


def convert(folder: Path, path: Path, kind: Kind = Kind.F32) -> None:
    """Write the checkpoint in `folder` as a GGUF file, in blocks of `kind` those matrices whose rows are whole blocks."""
    config = json.loads((folder / "config.json").read_text())
    conversion = CONVERSIONS[config["architectures"][0]]
    tensors = {name: t.float() for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    for change in conversion.changes:
        change(tensors, config)
    writer = gguf.GGUFWriter(str(path), conversion.architecture)
    for key, value in conversion.fields.items():
        put(writer, key, value(config))
    for key, value in scaling(config).items():
        if key not in conversion.fields:
            put(writer, key, value)
    writer.add_token_list([f"token {i}" for i in range(config["vocab_size"])])
    architecture = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == conversion.architecture)
    names = gguf.get_tensor_name_map(architecture, layers(config))
    for name, tensor in tensors.items():
        known = name if name.startswith("rope_f") else names.get_name(name, (".weight", ".bias"))
        assert known is not None, name
        values = tensor.contiguous().numpy()
        is_plain = tensor.dim() < 2 or any(part in known for part in _NEVER_QUANTIZED) or values.shape[-1] % BLOCK_LEN
        used = Kind.F32 if is_plain else kind
        writer.add_tensor(known, gguf.quants.quantize(values, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rounded(model: Any, kind: Kind) -> None:
    """Give a model the values that blocks of `kind` hold."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1 and weight.shape[-1] % BLOCK_LEN == 0:
                blocks = gguf.quants.quantize(weight.numpy(), kind)
                weight.copy_(torch.from_numpy(np.array(gguf.quants.dequantize(blocks, kind))))
