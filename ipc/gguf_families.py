"""What each architecture of llama.cpp's converter is in transformers, and where keys of its config are found: under
another name, made of several, told by which tensors there are, or nowhere, since the format leaves unsaid what is the
same in every published model."""

from collections.abc import Mapping
from statistics import NormalDist

from cableway.ipc.gguf_values import (
    Family,
    Value,
    always,
    attention_turns,
    by_layer,
    either,
    expert_turns,
    far_is_scaled,
    has,
    head_dim,
    kinds,
    num_layers,
    query_scalar,
    rope_scaling,
)

_SIGMOID = 2  # of expert_gating_func

_MULTIPLIERS: dict[str, Value] = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
}
_SOFT_CAPS: dict[str, Value] = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_STATE_SPACE: dict[str, Value] = {
    "state_size": "ssm.state_size",
    "conv_kernel": "ssm.conv_kernel",
    "use_bias": has("ssm_in.bias"),
    "use_conv_bias": has("ssm_conv1d.bias"),
}
_HYBRID_LAYERS = {"attn_q.weight": "attention", "ssm_in.weight": "mamba", "ffn_up.weight": "mlp"}
_MAMBA2: dict[str, Value] = {
    "mamba_n_heads": "ssm.time_step_rank",
    "mamba_d_head": lambda file: file["ssm.inner_size"] // file["ssm.time_step_rank"],
    "mamba_d_ssm": "ssm.inner_size",
    "mamba_expand": lambda file: file["ssm.inner_size"] / file["embedding_length"],
    "mamba_n_groups": "ssm.group_count",
    "mamba_d_state": "ssm.state_size",
    "mamba_d_conv": "ssm.conv_kernel",
    "mamba_conv_bias": has("ssm_conv1d.bias"),
    "mamba_proj_bias": has("ssm_in.bias"),
}
_SHORT_CONVOLUTIONS: dict[str, Value] = {
    "layer_types": kinds({"attn_q.weight": "full_attention", "shortconv.conv.weight": "conv"}),
    "conv_L_cache": "shortconv.l_cache",
    "conv_bias": has("shortconv.conv.bias"),
    "block_auto_adjust_ff_dim": always(False),
    "num_dense_layers": "leading_dense_block_count",
    "use_expert_bias": has("exp_probs_b.bias"),
    "norm_topk_prob": always(True),
}
_DELTA_NETS: dict[str, Value] = {
    "layer_types": kinds({"attn_q.weight": "full_attention", "ssm_out.weight": "linear_attention"}),
    "linear_conv_kernel_dim": "ssm.conv_kernel",
    "linear_key_head_dim": "ssm.state_size",
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
    "linear_value_head_dim": lambda file: file["ssm.inner_size"] // file["ssm.time_step_rank"],
    "norm_topk_prob": always(True),
}
_LATENT: dict[str, Value] = {
    "q_lora_rank": "attention.q_lora_rank",
    "kv_lora_rank": "attention.kv_lora_rank",
    "qk_rope_head_dim": "rope.dimension_count",
    "partial_rotary_factor": always(None),
    "num_key_value_heads": "attention.head_count",  # the file's own is that of the latents
    "attention_bias": has("attn_kv_a_mqa.bias"),
}
_DEEPSEEK: dict[str, Value] = {
    **_LATENT,
    "qk_nope_head_dim": lambda file: (
        (file["attention.key_length_mla"] or file["attention.key_length"]) - file["rope.dimension_count"]
    ),
    "v_head_dim": lambda file: file["attention.value_length_mla"] or file["attention.value_length"],
}
_INDEX: dict[str, Value] = {
    "index_n_heads": "attention.indexer.head_count",
    "index_head_dim": "attention.indexer.key_length",
    "index_topk": "attention.indexer.top_k",
    "norm_topk_prob": lambda file: bool(file["expert_weights_norm"]),
}
_BIASED: dict[str, Value] = {"attention_bias": lambda file: file.has("attn_q.bias") or file.has("attn_qkv.bias")}
FAMILIES: Mapping[str, Family] = {
    "llama": Family(either("expert_count", "MixtralForCausalLM", "LlamaForCausalLM"), {"sliding_window": always(None)}),
    "qwen2": Family("Qwen2ForCausalLM"),
    "qwen3": Family("Qwen3ForCausalLM"),
    "qwen2moe": Family("Qwen2MoeForCausalLM", {"norm_topk_prob": always(False), "qkv_bias": has("attn_q.bias")}),
    "qwen3moe": Family("Qwen3MoeForCausalLM", {"norm_topk_prob": always(True)}),
    "qwen3next": Family("Qwen3NextForCausalLM", _DELTA_NETS),
    "qwen35": Family("Qwen3_5ForCausalLM", _DELTA_NETS),
    "qwen35moe": Family("Qwen3_5MoeForCausalLM", _DELTA_NETS),
    "gemma": Family("GemmaForCausalLM"),
    "gemma2": Family("Gemma2ForCausalLM", {**_SOFT_CAPS, "query_pre_attn_scalar": query_scalar(46)}),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        {
            **_SOFT_CAPS,
            "query_pre_attn_scalar": query_scalar(62),
            "rope_local_base_freq": "rope.freq_base_swa",
        },
    ),
    "gemma3n": Family(
        "Gemma3nForCausalLM",
        {
            **_SOFT_CAPS,
            "intermediate_size": by_layer("feed_forward_length"),
            "activation_sparsity_pattern": by_layer("activation_sparsity_scale", NormalDist().cdf),
            "altup_num_inputs": "altup.num_inputs",
            "altup_active_idx": "altup.active_idx",
            "num_kv_shared_layers": "attention.shared_kv_layers",
            "hidden_size_per_layer_input": "embedding_length_per_layer_input",
            "vocab_size_per_layer_input": lambda file: file.num_rows("per_layer_token_embd.weight"),
            "laurel_rank": lambda file: file.num_rows("blk.0.laurel_l.weight"),
            "rope_local_base_freq": "rope.freq_base_swa",
        },
    ),
    "llama4": Family(
        "Llama4ForCausalLM",
        {
            "intermediate_size": "expert_feed_forward_length",
            "intermediate_size_mlp": "feed_forward_length",
            "interleave_moe_layer_step": "interleave_moe_layer_step",
            "attention_chunk_size": lambda file: None if file["attention.sliding_window"] == 0 else 8192,
            "use_qk_norm": lambda file: file["expert_count"] != 128,  # as Maverick, alone, has them
        },
    ),
    "mistral3": Family(
        "Ministral3ForCausalLM",
        {
            "rope_scaling": lambda file: {
                **(rope_scaling(file) or {}),
                "llama_4_scaling_beta": file["attention.temperature_scale"],
            }
        },
    ),
    "arctic": Family("ArcticForCausalLM", {"moe_layer_frequency": always(1), "parallel_attn_mlp_res": always(True)}),
    "grok": Family(
        "Grok1ModelForCausalLM",
        {
            "attn_output_multiplier": "attention.output_scale",
            "max_attn_value": "attn_logit_softcapping",
            "embedding_multiplier_scale": "embedding_scale",
            "output_multiplier_scale": "logit_scale",
        },
    ),
    "plamo2": Family(
        "Plamo2ForCausalLM",
        {
            "layer_types": kinds({"attn_qkv.weight": "sliding_attention", "ssm_in.weight": "mamba"}),
            "hidden_size_per_head": "attention.key_length",
            "mamba_num_heads": "ssm.time_step_rank",
            "mamba_d_state": "ssm.state_size",
            "mamba_d_conv": "ssm.conv_kernel",
        },
    ),
    "plamo3": Family(
        "Plamo3ForCausalLM",
        {
            "rope_scaling_factor": "rope.scaling.factor",
            "initial_context_length": "rope.scaling.original_context_length",
            "rope_local_theta": "rope.freq_base_swa",
            "sliding_window_pattern": "attention.sliding_window_pattern",
        },
    ),
    "phi2": Family("PhiForCausalLM"),
    "phi3": Family("Phi3ForCausalLM"),
    "starcoder2": Family("Starcoder2ForCausalLM", {"use_bias": has("attn_q.bias")}),
    "starcoder": Family(
        "GPTBigCodeForCausalLM", {"multi_query": lambda file: file["attention.head_count_kv"] in (None, 1)}
    ),
    "gpt2": Family("GPT2LMHeadModel"),
    "gptneox": Family(
        "GPTNeoXForCausalLM",
        {"use_parallel_residual": "use_parallel_residual", "attention_bias": has("attn_qkv.bias")},
    ),
    "falcon": Family(
        "FalconForCausalLM",
        {
            "bias": has("attn_qkv.bias"),
            "new_decoder_architecture": always(True),  # which can be all that the older ones were, too
            "num_ln_in_parallel_attn": lambda file: 2 if file.has("attn_norm_2.weight") else 1,
        },
    ),
    "bloom": Family("BloomForCausalLM"),
    "mpt": Family(
        "MptForCausalLM",
        {
            "alibi": lambda file: bool(file["attention.max_alibi_bias"]),
            "alibi_bias_max": "attention.max_alibi_bias",
            "clip_qkv": "attention.clamp_kqv",
            "expansion_ratio": lambda file: file["feed_forward_length"] / file["embedding_length"],
        },
    ),
    "stablelm": Family(
        "StableLmForCausalLM",
        {
            "use_parallel_residual": "use_parallel_residual",
            "use_qkv_bias": has("attn_q.bias"),
            "qk_layernorm": has("attn_q_norm.weight"),
        },
    ),
    "command-r": Family("CohereForCausalLM", {"logit_scale": "logit_scale", "use_qk_norm": has("attn_q_norm.weight")}),
    "cohere2": Family("Cohere2ForCausalLM", {"logit_scale": "logit_scale"}),
    "olmo": Family("OlmoForCausalLM", {"clip_qkv": "attention.clamp_kqv"}),
    "olmo2": Family(
        either("attention.sliding_window", "Olmo3ForCausalLM", "Olmo2ForCausalLM"),
        {"rope_parameters": lambda file: far_is_scaled(file) if file["attention.sliding_window"] else None},
    ),
    "olmoe": Family("OlmoeForCausalLM", {"norm_topk_prob": always(False)}),
    "deepseek": Family("DeepseekForCausalLM", {"norm_topk_prob": always(False)}),
    "deepseek2": Family(
        lambda file: f"DeepseekV{3 if file['expert_gating_func'] == _SIGMOID else 2}ForCausalLM",
        {
            **_DEEPSEEK,
            "topk_method": lambda file: "group_limited_greedy" if (file["expert_group_count"] or 1) > 1 else "greedy",
        },
    ),
    "deepseek32": Family("DeepseekV32ForCausalLM", {**_DEEPSEEK, **_INDEX}),
    "glm-dsa": Family(
        "GlmMoeDsaForCausalLM",
        {
            **_DEEPSEEK,
            **_INDEX,
            "indexer_types": by_layer("attention.indexer.types", lambda is_full: "full" if is_full else "shared"),
            # Of files before they said it: GLM 5.2, which is the first to see so far.
            "index_topk_freq": lambda file: 4 if file["context_length"] >= 1 << 20 else 1,
            "index_skip_topk_offset": always(3),
        },
    ),
    "granite": Family("GraniteForCausalLM", _MULTIPLIERS),
    "granitemoe": Family(
        "GraniteMoeForCausalLM", {**_MULTIPLIERS, "shared_intermediate_size": "expert_shared_feed_forward_length"}
    ),
    "minicpm": Family(
        "MiniCPMForCausalLM",
        {
            "scale_emb": "embedding_scale",
            "scale_depth": lambda file: file["residual_scale"] * file["block_count"] ** 0.5,
            "dim_model_base": lambda file: file["embedding_length"] / file["logit_scale"],
        },
    ),
    "minicpm3": Family(
        "MiniCPM3ForCausalLM",
        {
            **_LATENT,
            "qk_nope_head_dim": lambda file: file["attention.key_length"] - file["rope.dimension_count"],
            "scale_emb": always(12.0),
            "scale_depth": always(1.4),
            "dim_model_base": always(256),
        },
    ),
    "mamba": Family(
        either("ssm.dt_b_c_rms", "FalconMambaForCausalLM", "MambaForCausalLM"),
        {**_STATE_SPACE, "intermediate_size": "ssm.inner_size", "time_step_rank": "ssm.time_step_rank"},
    ),
    "mamba2": Family(
        "Mamba2ForCausalLM",
        {
            **_STATE_SPACE,
            "num_heads": "ssm.time_step_rank",
            "head_dim": lambda file: file["ssm.inner_size"] // file["ssm.time_step_rank"],
            "n_groups": "ssm.group_count",
            "expand": lambda file: file["ssm.inner_size"] / file["embedding_length"],
        },
    ),
    "granitehybrid": Family(
        "GraniteMoeHybridForCausalLM",
        {
            **_MULTIPLIERS,
            "layer_types": kinds(_HYBRID_LAYERS),
            "shared_intermediate_size": lambda file: (
                file["expert_shared_feed_forward_length"] or file["feed_forward_length"]
            ),
            "position_embedding_type": lambda file: "rope" if file["rope.scaling.finetuned"] else "nope",
            **_MAMBA2,
        },
    ),
    "nemotron_h": Family(
        "NemotronHForCausalLM",
        {
            "layers_block_type": kinds(_HYBRID_LAYERS),
            "mamba_num_heads": "ssm.time_step_rank",
            "mamba_head_dim": lambda file: file["ssm.inner_size"] // file["ssm.time_step_rank"],
            "n_groups": "ssm.group_count",
            "ssm_state_size": "ssm.state_size",
            "conv_kernel": "ssm.conv_kernel",
            "use_conv_bias": has("ssm_conv1d.bias"),
            "mamba_proj_bias": has("ssm_in.bias"),
        },
    ),
    "falcon-h1": Family("FalconH1ForCausalLM", _MAMBA2),
    "lfm2": Family("Lfm2ForCausalLM", _SHORT_CONVOLUTIONS),
    "lfm2moe": Family("Lfm2MoeForCausalLM", _SHORT_CONVOLUTIONS),
    "jamba": Family(
        "JambaForCausalLM",
        {
            "attn_layer_period": lambda file: attention_turns(file)[0],
            "attn_layer_offset": lambda file: attention_turns(file)[1],
            "expert_layer_period": lambda file: expert_turns(file)[0],
            "expert_layer_offset": lambda file: expert_turns(file)[1],
            "mamba_d_state": "ssm.state_size",
            "mamba_d_conv": "ssm.conv_kernel",
            "mamba_expand": lambda file: file["ssm.inner_size"] // file["embedding_length"],
            "mamba_dt_rank": "ssm.time_step_rank",
            "mamba_conv_bias": has("ssm_conv1d.bias"),
            "mamba_proj_bias": has("ssm_in.bias"),
            "norm_topk_prob": always(False),
        },
    ),
    "glm4": Family("Glm4ForCausalLM", _BIASED),
    "chatglm": Family("GlmForCausalLM", _BIASED),
    "exaone": Family("ExaoneForCausalLM"),
    "exaone4": Family("Exaone4ForCausalLM"),
    "nemotron": Family("NemotronForCausalLM"),
    "internlm2": Family("InternLM2ForCausalLM"),
    "orion": Family("OrionForCausalLM"),
    "xverse": Family("XverseForCausalLM"),
    "qwen": Family("QWenLMHeadModel"),
    "baichuan": Family("BaichuanForCausalLM", {"has_rope": lambda file: file["block_count"] != 40}),
    "arcee": Family("ArceeForCausalLM"),
    "smollm3": Family("SmolLM3ForCausalLM"),
    "seed_oss": Family("SeedOssForCausalLM", {"attention_out_bias": has("attn_output.bias")}),
    "ernie4_5": Family("Ernie4_5ForCausalLM"),
    "hunyuan-dense": Family("HunYuanDenseV1ForCausalLM"),
    "glm4moe": Family("Glm4MoeForCausalLM", {"use_qk_norm": has("attn_q_norm.weight")}),
    "dots1": Family("Dots1ForCausalLM"),
    "minimax-m2": Family("MiniMaxM2ForCausalLM"),
    "hunyuan-moe": Family("HunYuanMoEV1ForCausalLM", {"intermediate_size": "expert_shared_feed_forward_length"}),
    "ernie4_5-moe": Family(
        "Ernie4_5_MoeForCausalLM",
        {
            "moe_layer_interval": "interleave_moe_layer_step",
            "moe_layer_start_index": "leading_dense_block_count",
            "use_bias": has("attn_q.bias"),
        },
    ),
    "dbrx": Family(
        "DbrxForCausalLM",
        {
            "attn_config": lambda file: {
                "kv_n_heads": file["attention.head_count_kv"],
                "clip_qkv": file["attention.clamp_kqv"],
                "rope_theta": file["rope.freq_base"],
            },
            "ffn_config": lambda file: {
                "ffn_hidden_size": file["feed_forward_length"],
                "moe_num_experts": file["expert_count"],
                "moe_top_k": file["expert_used_count"],
                "moe_normalize_expert_weights": 1,
            },
        },
    ),
    "phimoe": Family("PhimoeForCausalLM", {"lm_head_bias": has("output.bias")}),
    "gpt-oss": Family(
        "GptOssForCausalLM", {"rope_scaling": lambda file: {**(rope_scaling(file) or {}), "truncate": False}}
    ),
    "t5": Family(
        lambda file: f"{'UMT5' if file.has('dec.blk.1.attn_rel_b.weight') else 'T5'}ForConditionalGeneration",
        {
            "is_encoder_decoder": always(True),
            "decoder_start_token_id": "decoder_start_token_id",
            "num_layers": num_layers,
            "num_decoder_layers": "decoder_block_count",
            "num_heads": "attention.head_count",
            "d_kv": head_dim,
            "d_ff": "feed_forward_length",
            "feed_forward_proj": lambda file: "gated-gelu" if file.has("enc.blk.0.ffn_gate.weight") else "relu",
            "relative_attention_num_buckets": "attention.relative_buckets_count",
        },
    ),
}
"""GGUF architecture -> its family; fields come on top of those that all have."""
