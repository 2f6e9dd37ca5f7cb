"""What llama.cpp's converter writes of a config.json: keys of the metadata, and how each is found."""

from collections.abc import Callable
from typing import Any

from gguf import Keys

Config = dict[str, Any]
Fields = dict[str, Callable[[Config], Any]]
LLM, ATTENTION, ROPE, SSM = Keys.LLM, Keys.Attention, Keys.Rope, Keys.SSM


def said(*keys: str) -> Callable[[Config], Any]:
    """The first of these keys of a config.json."""
    return lambda c: next((c[key] for key in keys if c.get(key) is not None), None)


def always(value: Any) -> Callable[[Config], Any]:
    return lambda c: value


hidden = said("hidden_size", "n_embd", "d_model")
heads = said("num_attention_heads", "n_head", "n_heads")
kv_heads = said("num_key_value_heads", "num_kv_heads")


def layers(c: Config) -> int:
    count = said("num_hidden_layers", "n_layer", "n_layers", "num_layers")(c)
    return len(c["layers_block_type"]) if count is None else count


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


SIZES: Fields = {
    LLM.BLOCK_COUNT: layers,
    LLM.EMBEDDING_LENGTH: hidden,
    ATTENTION.HEAD_COUNT: heads,
}
BASE: Fields = {
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
HYBRID = {
    SSM.CONV_KERNEL: said("mamba_d_conv"),
    SSM.STATE_SIZE: said("mamba_d_state"),
    SSM.GROUP_COUNT: said("mamba_n_groups"),
    SSM.INNER_SIZE: lambda c: c["mamba_n_heads"] * c["mamba_d_head"],
    SSM.TIME_STEP_RANK: said("mamba_n_heads"),
}
DELTA_NETS = {
    SSM.CONV_KERNEL: said("linear_conv_kernel_dim"),
    SSM.STATE_SIZE: said("linear_key_head_dim"),
    SSM.GROUP_COUNT: said("linear_num_key_heads"),
    SSM.TIME_STEP_RANK: said("linear_num_value_heads"),
    SSM.INNER_SIZE: lambda c: c["linear_value_head_dim"] * c["linear_num_value_heads"],
    LLM.FULL_ATTENTION_INTERVAL: lambda c: c.get("full_attention_interval", 4),
}
block_types = said("layers_block_type", "layer_types")
LFM2 = BASE | {
    ATTENTION.HEAD_COUNT_KV: lambda c: [0 if kind == "conv" else c["num_key_value_heads"] for kind in c["layer_types"]],
    Keys.ShortConv.L_CACHE: said("conv_L_cache"),
    ATTENTION.LAYERNORM_RMS_EPS: said("norm_eps"),
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


def latent(**more: Callable[[Config], Any]) -> Fields:
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


INDEX = {
    ATTENTION.Indexer.HEAD_COUNT: said("index_n_heads"),
    ATTENTION.Indexer.KEY_LENGTH: said("index_head_dim"),
    ATTENTION.Indexer.TOP_K: said("index_topk"),
    LLM.EXPERT_WEIGHTS_NORM: lambda c: c["norm_topk_prob"] or None,
}
INDEXER_TYPES = "{arch}.attention.indexer.types"  # newer than the package
GROK = {
    ATTENTION.OUTPUT_SCALE: said("attn_output_multiplier"),
    LLM.ATTN_LOGIT_SOFTCAPPING: said("max_attn_value"),
    LLM.ROUTER_LOGIT_SOFTCAPPING: always(30.0),  # which llama.cpp reads and does not use
    LLM.EMBEDDING_SCALE: said("embedding_multiplier_scale"),
    LLM.LOGIT_SCALE: said("output_multiplier_scale"),
}
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


def of_attention(*keys: str) -> Callable[[Config], Any]:
    """PLaMo 2: a number of each layer, 0 where it has no attention."""
    return lambda c: [said(*keys)(c) * (i % c["mamba_step"] == c["mamba_step"] // 2) for i in range(layers(c))]


PLAMO2 = {
    **{key: BASE[key] for key in (LLM.CONTEXT_LENGTH, LLM.FEED_FORWARD_LENGTH, ROPE.FREQ_BASE)},
    LLM.VOCAB_SIZE: said("vocab_size"),
    LLM.BLOCK_COUNT: layers,
    LLM.EMBEDDING_LENGTH: hidden,
    ATTENTION.HEAD_COUNT: of_attention("num_attention_heads"),
    ATTENTION.HEAD_COUNT_KV: of_attention("num_key_value_heads"),
    ATTENTION.KEY_LENGTH: said("hidden_size_per_head"),
    ATTENTION.VALUE_LENGTH: said("hidden_size_per_head"),
    ATTENTION.LAYERNORM_RMS_EPS: said("rms_norm_eps"),
    SSM.STATE_SIZE: said("mamba_d_state"),
    SSM.CONV_KERNEL: said("mamba_d_conv"),
    SSM.TIME_STEP_RANK: said("mamba_num_heads"),
    SSM.INNER_SIZE: lambda c: c["mamba_num_heads"] * c["hidden_size_per_head"],
    SSM.GROUP_COUNT: always(0),
}
T5 = {
    LLM.CONTEXT_LENGTH: lambda c: c.get("n_positions", 512),
    LLM.EMBEDDING_LENGTH: hidden,
    LLM.FEED_FORWARD_LENGTH: said("d_ff"),
    LLM.BLOCK_COUNT: layers,
    LLM.DECODER_BLOCK_COUNT: said("num_decoder_layers"),
    ATTENTION.HEAD_COUNT: said("num_heads"),
    ATTENTION.KEY_LENGTH: said("d_kv"),
    ATTENTION.VALUE_LENGTH: said("d_kv"),
    ATTENTION.LAYERNORM_EPS: said("layer_norm_epsilon"),
    ATTENTION.LAYERNORM_RMS_EPS: said("layer_norm_epsilon"),
    ATTENTION.REL_BUCKETS_COUNT: said("relative_attention_num_buckets"),
    LLM.DECODER_START_TOKEN_ID: said("decoder_start_token_id"),
}
