"""Every architecture's tiny configs, for transformers' class of that name, beside `checkpoints.SIZES`.

The first of an architecture must be one in which each number counts: windows below the prompt, caps within reach.
"""

from typing import Any

Fields = dict[str, Any]

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 3.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0}
DEFAULT = {"rope_type": "default", "rope_theta": 10_000.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0],
    "long_factor": [2.0, 1.0, 3.0, 4.0, 2.5, 6.0, 7.0, 9.0],
    "original_max_position_embeddings": 32,
}
HALF = {**DEFAULT, "partial_rotary_factor": 0.5}
BY_TYPE = {"full_attention": {**DEFAULT, "rope_theta": 1000.0}, "sliding_attention": DEFAULT}
SOME_NEAR = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
FAR = {"max_position_embeddings": 32}

MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.4,
    "logits_scaling": 0.7,
}
EXPERTS = {"num_local_experts": 8, "num_experts": 8, "num_experts_per_tok": 2}
FEW = {"num_experts": 8, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
SPARSE = {"moe_intermediate_size": 40, "shared_expert_intermediate_size": 56}
MAMBA2 = {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 10, "expand": 2, "chunk_size": 16}
HYBRID = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 10, "mamba_chunk_size": 16}
NEMOTRON_MOE = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
    "head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 56,
    "routed_scaling_factor": 1.7,
}
ZAMBA2 = {
    "layers_block_type": ["linear_attention", "hybrid", "hybrid", "hybrid", "hybrid"],
    "num_hidden_layers": 5,
    "num_key_value_heads": 4,
    "head_dim": None,
    "adapter_rank": 10,
    "n_mamba_heads": 8,
    "mamba_ngroups": 2,
    "mamba_d_state": 10,
    "mamba_d_conv": 3,
    "chunk_size": 16,
    "time_step_min": 0.3,
}
DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_value_head_dim": 20,
    "linear_key_head_dim": 12,
    "linear_conv_kernel_dim": 3,
}
LATENT = {
    "q_lora_rank": 28,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "num_key_value_heads": 4,
    "head_dim": None,
}
KIMI = {
    **LATENT,
    "q_lora_rank": None,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "linear_head_dim": 20,
    "linear_num_heads": 4,
    "linear_conv_kernel_dim": 3,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "routed_scaling_factor": 1.7,
}
INDEX = {"index_topk": 7, "index_n_heads": 10, "index_head_dim": 18}
DEEPSEEK = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
    "norm_topk_prob": True,
}
MINIMAX = {
    **LOCAL,
    "sliding_window": 9,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "full_attn_alpha_factor": 1.3,
    "full_attn_beta_factor": 0.7,
    "linear_attn_alpha_factor": 0.8,
    "linear_attn_beta_factor": 1.4,
    "mlp_alpha_factor": 0.6,
    "mlp_beta_factor": 1.7,
    "block_size": 16,
}
QWEN35 = {**DELTA, "rope_parameters": HALF}
LLAMA4 = {
    **LOCAL,
    "intermediate_size_mlp": 80,
    "interleave_moe_layer_step": 2,
    "no_rope_layer_interval": 2,
    "attention_chunk_size": 16,
    "floor_scale": 8,
    "attn_scale": 0.7,
    "rope_parameters": LLAMA3,
}
GEMMA3N = {
    "num_hidden_layers": 5,
    "num_kv_shared_layers": 2,
    "sliding_window": 9,
    "layer_types": [*SOME_NEAR["layer_types"], "sliding_attention", "full_attention"],
    "rope_parameters": BY_TYPE,
    "intermediate_size": [96, 80, 96, 64, 96],
    "activation_sparsity_pattern": [0.9, 0.0, 0.6, 0.8, 0.0],
    "vocab_size_per_layer_input": 280,
    "hidden_size_per_layer_input": 12,
    "laurel_rank": 8,
    "altup_num_inputs": 3,
    "altup_active_idx": 1,
    "final_logit_softcapping": 2.0,
}

TWO_SIDES = {
    "encoder_layers": 2,
    "encoder_attention_heads": 8,
    "encoder_ffn_dim": 80,
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
    "d_model": 64,
}

T5 = {
    "d_model": 64,
    "d_kv": 20,
    "d_ff": 96,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "relative_attention_num_buckets": 10,
    "relative_attention_max_distance": 20,
    "head_dim": None,
    "layer_norm_epsilon": 0.02,
}

ZOO: dict[str, list[Fields]] = {
    "LlamaForCausalLM": [
        {"rope_parameters": LLAMA3},
        {"rope_parameters": YARN, **FAR},
        {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False}, **FAR},
        {"rope_parameters": DYNAMIC, **FAR},
        {"rope_parameters": LINEAR, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
        {"tie_word_embeddings": True},
        {"num_hidden_layers": 1, "num_key_value_heads": 1, "head_dim": 10, "vocab_size": 257, "intermediate_size": 37},
        {"num_key_value_heads": 4, "head_dim": 80},
    ],
    "MistralForCausalLM": [{"sliding_window": 11}, {"sliding_window": 200}, {"sliding_window": None, "head_dim": 24}],
    "MinistralForCausalLM": [SOME_NEAR],
    "Ministral3ForCausalLM": [
        {
            "sliding_window": 30,
            "rope_parameters": {**YARN, "original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.7},
        },
        {
            "rope_parameters": {
                **YARN,
                "truncate": False,
                "original_max_position_embeddings": 256,
                "llama_4_scaling_beta": 0.4,
            },
        },
    ],
    "CwmForCausalLM": [{**SOME_NEAR, "rope_parameters": LLAMA3}, {"sliding_window": 9, "num_hidden_layers": 5}],
    "Qwen2ForCausalLM": [
        {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1},
        {"head_dim": None, "tie_word_embeddings": True},
    ],
    "Qwen3ForCausalLM": [
        {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1},
        {"attention_bias": True, "use_sliding_window": True, **SOME_NEAR, "head_dim": 32},
    ],
    "GemmaForCausalLM": [{}],
    "Gemma2ForCausalLM": [
        {
            **SOME_NEAR,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.0,
        },
    ],
    "Gemma3ForCausalLM": [
        {**SOME_NEAR, "query_pre_attn_scalar": 24, "rope_parameters": BY_TYPE},
        {**SOME_NEAR, "rope_parameters": {**BY_TYPE, "full_attention": LINEAR}, "final_logit_softcapping": 2.0},
    ],
    "Gemma3nForCausalLM": [
        GEMMA3N,
        {
            "num_hidden_layers": 3,
            "num_kv_shared_layers": 0,
            "layer_types": ["full_attention"] * 3,
            "vocab_size_per_layer_input": 300,
            "hidden_size_per_layer_input": 16,
            "altup_correct_scale": False,
            "attention_bias": True,
        },
    ],
    "PhiForCausalLM": [{"rope_parameters": HALF}, {"rope_parameters": HALF, "qk_layernorm": True}],
    "Phi3ForCausalLM": [
        {"sliding_window": 11, "rope_parameters": {**HALF}},
        {"rope_parameters": LONG, "original_max_position_embeddings": 32, "max_position_embeddings": 128},
    ],
    "DiffLlamaForCausalLM": [{}, {"num_key_value_heads": 4, "attention_bias": True}],
    "DogeForCausalLM": [
        {"sliding_window": 9},
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
        {"is_moe": True, "num_experts": 70, "num_experts_per_tok": 5},
    ],
    "GlmForCausalLM": [{"rope_parameters": HALF}, {"rope_parameters": HALF, "attention_bias": False}],
    "Glm4ForCausalLM": [{"rope_parameters": HALF}],
    "CohereForCausalLM": [{"logit_scale": 0.3, "use_qk_norm": True}, {"attention_bias": True}],
    "Cohere2ForCausalLM": [{**SOME_NEAR, "logit_scale": 0.3}],
    "GPT2LMHeadModel": [{}, {"scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": False}],
    "GPTBigCodeForCausalLM": [{}, {"multi_query": False}],
    "GPTJForCausalLM": [{"rotary_dim": 8}],
    "GPTNeoXForCausalLM": [{"rope_parameters": HALF}, {"use_parallel_residual": False, "attention_bias": False}],
    "Starcoder2ForCausalLM": [{"sliding_window": 9}, {"use_bias": False, "tie_word_embeddings": False}],
    "FalconForCausalLM": [
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        {"multi_query": True},
        {"alibi": True, "parallel_attn": False, "multi_query": False, "bias": True, "num_kv_heads": 4},
    ],
    "BloomForCausalLM": [{}, {"num_attention_heads": 3, "hidden_size": 48}],
    "MptForCausalLM": [{}, {"n_heads": 6, "hidden_size": 48, "attn_config": {"clip_qkv": 0.7}}],
    "OPTForCausalLM": [
        {"word_embed_proj_dim": 64, "ffn_dim": 96},
        {"word_embed_proj_dim": 32, "ffn_dim": 96, "do_layer_norm_before": False},
    ],
    "GraniteForCausalLM": [
        {**MULTIPLIERS, "attention_bias": True, "mlp_bias": True},
    ],
    "OlmoForCausalLM": [{"clip_qkv": 0.8}, {}],
    "Olmo2ForCausalLM": [{}, {"attention_bias": True, "num_key_value_heads": 1}],
    "Olmo3ForCausalLM": [{**SOME_NEAR, "rope_parameters": BY_TYPE}],
    "Exaone4ForCausalLM": [
        {**SOME_NEAR, "sliding_window_pattern": 3},
        {"sliding_window": None, "layer_types": ["full_attention"] * 3},
    ],
    "SeedOssForCausalLM": [{"attention_bias": True}, {"attention_out_bias": True, "mlp_bias": True}],
    "HeliumForCausalLM": [{}, {"attention_bias": True, "mlp_bias": True}],
    "Ernie4_5ForCausalLM": [{}, {"use_bias": True, "tie_word_embeddings": False}],
    "ArceeForCausalLM": [{}, {"attention_bias": True, "mlp_bias": True}],
    "NemotronForCausalLM": [{"rope_parameters": HALF}, {"attention_bias": True, "mlp_bias": True}],
    "Jais2ForCausalLM": [{}, {"attention_bias": False, "mlp_bias": False}],
    "ApertusForCausalLM": [{"rope_parameters": LLAMA3}],
    "PersimmonForCausalLM": [{"rope_parameters": HALF}, {"qk_layernorm": False}],
    "StableLmForCausalLM": [
        {"rope_parameters": HALF, "qk_layernorm": True},
        {"use_parallel_residual": True, "use_qkv_bias": True},
    ],
    "HunYuanDenseV1ForCausalLM": [{"rope_parameters": {**DYNAMIC, "alpha": 50.0}}, {"attention_bias": True}],
    "BitNetForCausalLM": [{}],
    "SmolLM3ForCausalLM": [
        {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, **SOME_NEAR},
        {"no_rope_layer_interval": 2, "attention_bias": True, "mlp_bias": True},
    ],
    "MixtralForCausalLM": [{"sliding_window": 9, **EXPERTS}],
    "PhimoeForCausalLM": [
        {"num_local_experts": 4, "router_jitter_noise": 0.2, "sliding_window": 9},
        {"num_local_experts": 4, "router_jitter_noise": 0.4, "attention_bias": True, "lm_head_bias": True},
    ],
    "OlmoeForCausalLM": [{**EXPERTS, "clip_qkv": 0.7}, {**EXPERTS, "norm_topk_prob": True}],
    "Qwen2MoeForCausalLM": [
        {
            **FEW,
            "decoder_sparse_step": 2,
            **SPARSE,
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 2,
        },
        {**FEW, **SPARSE, "mlp_only_layers": [1], "norm_topk_prob": True, "qkv_bias": False},
    ],
    "Qwen3MoeForCausalLM": [
        {
            **EXPERTS,
            "moe_intermediate_size": 40,
            "decoder_sparse_step": 2,
            "use_sliding_window": True,
            "sliding_window": 9,
        },
        {**EXPERTS, "moe_intermediate_size": 40, "norm_topk_prob": True, "attention_bias": True},
    ],
    "Glm4MoeForCausalLM": [
        {**DEEPSEEK, "rope_parameters": HALF},
        {**DEEPSEEK, "rope_parameters": HALF, "use_qk_norm": True, "attention_bias": True, "norm_topk_prob": False},
    ],
    "SolarOpenForCausalLM": [{key: value for key, value in DEEPSEEK.items() if key != "first_k_dense_replace"}],
    "Dots1ForCausalLM": [
        {**DEEPSEEK, "sliding_window": 9, "max_window_layers": 1},
        {**DEEPSEEK, "norm_topk_prob": True, "attention_bias": True},
    ],
    "Ernie4_5_MoeForCausalLM": [
        {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 40, "moe_layer_end_index": 1},
        {
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_intermediate_size": 40,
            "moe_layer_interval": 2,
            "moe_layer_start_index": 0,
        },
    ],
    "HunYuanMoEV1ForCausalLM": [{"num_experts": 4, "moe_topk": 2}, {"num_experts": 4, "attention_bias": True}],
    "MiniMaxM2ForCausalLM": [{**EXPERTS, "rope_parameters": HALF}],
    "MiniMaxForCausalLM": [MINIMAX],
    "Llama4ForCausalLM": [
        LLAMA4,
        {
            **LOCAL,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 96,
            "no_rope_layers": [0, 1, 1],
            "use_qk_norm": False,
            "attn_temperature_tuning": False,
            "attention_bias": True,
        },
    ],
    "GraniteMoeForCausalLM": [{**LOCAL, **MULTIPLIERS}, {**LOCAL, "attention_bias": True}],
    "GraniteMoeSharedForCausalLM": [{**LOCAL, **MULTIPLIERS, "shared_intermediate_size": 56}],
    "DbrxForCausalLM": [
        {
            "d_model": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.5, "rope_theta": 10_000.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ],
    "GptOssForCausalLM": [
        {
            **EXPERTS,
            "swiglu_limit": 1.0,
            **SOME_NEAR,
            "rope_parameters": {**YARN, "truncate": False, "original_max_position_embeddings": 256},
        },
    ],
    "DeepseekV3ForCausalLM": [
        {**LATENT, **DEEPSEEK, "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}},
        {**LATENT, **DEEPSEEK, "q_lora_rank": None, "attention_bias": True, "rope_interleave": False},
    ],
    "Glm4MoeLiteForCausalLM": [{**LATENT, **DEEPSEEK, "mlp_layer_types": ["dense", "sparse", "sparse"]}],
    "DeepseekV32ForCausalLM": [
        {**LATENT, **DEEPSEEK, **INDEX, "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}},
        {**LATENT, **DEEPSEEK, **INDEX, "index_topk": 200, "attention_bias": True},
    ],
    "GlmMoeDsaForCausalLM": [
        {**LATENT, **DEEPSEEK, **INDEX},
        {**LATENT, **DEEPSEEK, **INDEX, "indexer_types": ["full", "shared", "shared"]},
    ],
    "DeepseekV2ForCausalLM": [
        {**LATENT, **DEEPSEEK, "topk_method": "group_limited_greedy", "norm_topk_prob": False},
        {**LATENT, **DEEPSEEK, "topk_method": "greedy", "q_lora_rank": None, "norm_topk_prob": False},
    ],
    "MiniCPM3ForCausalLM": [{**LATENT, "scale_emb": 3.0, "scale_depth": 0.8, "dim_model_base": 40}],
    "LongcatFlashForCausalLM": [
        {
            **LATENT,
            "head_dim": 8,
            "qk_head_dim": 20,
            "num_layers": 2,
            "ffn_hidden_size": 96,
            "expert_ffn_hidden_size": 40,
            "moe_topk": 3,
            "n_routed_experts": 6,
            "zero_expert_num": 3,
            "routed_scaling_factor": 1.7,
        },
    ],
    "MambaForCausalLM": [
        {"state_size": 6, "time_step_rank": 5, "conv_kernel": 3, "intermediate_size": 96},
        {"state_size": 4, "time_step_rank": 4, "use_bias": True, "use_conv_bias": False, "intermediate_size": 128},
    ],
    "FalconMambaForCausalLM": [
        {"state_size": 6, "time_step_rank": 5, "mixer_rms_eps": 0.1, "conv_kernel": 3, "intermediate_size": 96},
    ],
    "Mamba2ForCausalLM": [
        {**MAMBA2, "time_step_limit": [0.4, 0.9], "conv_kernel": 3},
        {**MAMBA2, "n_groups": 1, "use_bias": True, "use_conv_bias": False},
    ],
    "JambaForCausalLM": [
        {
            **LOCAL,
            "mamba_d_state": 6,
            "mamba_dt_rank": 5,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_hidden_layers": 4,
            "use_mamba_kernels": False,
        },
    ],
    "ZambaForCausalLM": [
        {
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "head_dim": None,
            "n_mamba_heads": 4,
            "mamba_d_state": 6,
            "mamba_dt_rank": 5,
            "mamba_d_conv": 3,
            "use_associative_scan": False,
        },
        {
            "layers_block_type": ["hybrid", "hybrid", "linear_attention"],
            "num_key_value_heads": 4,
            "head_dim": None,
            "mamba_d_state": 6,
            "mamba_conv_bias": False,
            "mamba_proj_bias": True,
            "use_associative_scan": False,
        },
    ],
    "Zamba2ForCausalLM": [
        {**ZAMBA2, "num_mem_blocks": 2, "use_shared_attention_adapter": True, "use_mem_rope": True},
        {**ZAMBA2, "add_bias_linear": True, "mamba_ngroups": 1},
    ],
    "BartForConditionalGeneration": [TWO_SIDES, {**TWO_SIDES, "scale_embedding": True, "activation_function": "relu"}],
    "MBartForConditionalGeneration": [{**TWO_SIDES, "scale_embedding": True}, TWO_SIDES],
    "T5ForConditionalGeneration": [
        {**T5, "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 12},
        {**T5, "tie_word_embeddings": False, "num_decoder_layers": None},
        {**T5, "relative_attention_max_distance": 12, "num_heads": 6},
    ],
    "MT5ForConditionalGeneration": [
        T5,
        {**T5, "feed_forward_proj": "relu", "num_decoder_layers": None, "num_heads": 6},
    ],
    "UMT5ForConditionalGeneration": [T5, {**T5, "feed_forward_proj": "relu", "num_layers": 1, "num_heads": 6}],
    "BambaForCausalLM": [
        {**HYBRID, "attn_layer_indices": [1], "rope_parameters": HALF},
        {**HYBRID, "attn_layer_indices": [0], "attention_bias": True, "mlp_bias": True, "mamba_proj_bias": True},
    ],
    "GraniteMoeHybridForCausalLM": [
        {
            **HYBRID,
            **LOCAL,
            **MULTIPLIERS,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "shared_intermediate_size": 56,
            "position_embedding_type": "rope",
        },
        {
            **HYBRID,
            "num_local_experts": 0,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "shared_intermediate_size": 56,
        },
    ],
    "NemotronHForCausalLM": [
        {
            "layers_block_type": ["linear_attention", "full_attention", "mlp"],
            "head_dim": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "ssm_state_size": 10,
            "time_step_min": 0.3,
        },
        {**NEMOTRON_MOE, "n_group": 4, "topk_group": 2, "norm_topk_prob": False},
        {**NEMOTRON_MOE, "moe_latent_size": 24, "mlp_bias": True},
    ],
    "RecurrentGemmaForCausalLM": [
        {"hidden_size": 48, "lru_width": 64, "conv1d_width": 3, "attention_window_size": 9, "logits_soft_cap": 2.0},
        {"num_hidden_layers": 4, "attention_bias": True, "num_key_value_heads": 4, "lru_width": 32},
    ],
    "Lfm2ForCausalLM": [
        {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 16, "intermediate_size": 100},
        {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False, "conv_bias": True},
    ],
    "Lfm2MoeForCausalLM": [
        {
            **FEW,
            "layer_types": ["conv", "full_attention", "conv"],
            "num_dense_layers": 1,
            "moe_intermediate_size": 40,
            "routed_scaling_factor": 1.7,
        },
    ],
    "Qwen3NextForCausalLM": [
        {**DELTA, **FEW, **SPARSE, "rope_parameters": HALF, "decoder_sparse_step": 2},
        {**DELTA, **FEW, **SPARSE, "mlp_only_layers": [1], "attention_bias": True, "norm_topk_prob": False},
    ],
    "Qwen3_5ForCausalLM": [
        QWEN35,
        {**DELTA, "rope_parameters": {**HALF, "mrope_interleaved": True, "mrope_section": [2, 1, 1]}},
    ],
    "Qwen3_5MoeForCausalLM": [{**QWEN35, **FEW, **SPARSE}],
    "KimiLinearForCausalLM": [
        {**KIMI, "num_expert_group": 4, "topk_group": 2, "num_shared_experts": 2},
        {**KIMI, "moe_renormalize": False, "q_lora_rank": 28},
    ],
    "RwkvForCausalLM": [{"intermediate_size": 80}, {"intermediate_size": None, "tie_word_embeddings": True}],
    "OlmoHybridForCausalLM": [  # transformers saves convolutions right where those of q, k and v are equally wide
        {**DELTA, "linear_value_head_dim": 10, "linear_key_head_dim": 20},
        {
            **DELTA,
            "linear_value_head_dim": 10,
            "linear_key_head_dim": 20,
            "linear_allow_neg_eigval": False,
            "attention_bias": True,
        },
    ],
    "FalconH1ForCausalLM": [
        {
            **HYBRID,
            "mamba_d_ssm": 128,
            "embedding_multiplier": 3.0,
            "lm_head_multiplier": 0.7,
            "key_multiplier": 0.8,
            "attention_in_multiplier": 1.3,
            "attention_out_multiplier": 0.6,
            "ssm_in_multiplier": 0.7,
            "ssm_out_multiplier": 1.4,
            "ssm_multipliers": [0.5, 1.2, 0.8, 1.5, 0.9],
            "mlp_multipliers": [0.8, 1.3],
        },
    ],
}
"""architecture -> configs"""

IGNORED = {
    *("initializer_range", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings"),
    *("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"),
    *("summary_proj_to_labels", "summary_use_proj", "residual_dropout", "embedding_dropout", "classifier_dropout"),
    *("n_positions", "max_seq_len", "dropout", "layerdrop", "init_std", "emb_pdrop", "eod_token_id"),
    *("router_aux_loss_coef",),
    *("output_router_logits", "input_jitter_noise", "moe_loss_weight", "sep_token_id"),
    *("num_nextn_predict_layers", "rescale_prenorm_residual", "residual_in_fp32", "time_step_floor", "time_step_max"),
    *("use_associative_scan", "use_mamba_kernels", "use_mambapy", "chunk_size", "mamba_chunk_size", "time_step_scale"),
    *("num_logits_to_keep", "z_loss_coefficient"),
    *("is_decoder", "pretraining_tp", "n_ctx"),
    *("transformers_version", "add_cross_attention", "initializer_cutoff_factor", "torch_dtype", "activation_dropout"),
    *("chunk_size_feed_forward", "is_encoder_decoder", "LABEL_0", "LABEL_1", "output_attentions", "return_dict"),
    *("output_hidden_states", "encoder_layerdrop", "decoder_layerdrop", "LABEL_2"),
    *("decoder_start_token_id", "forced_eos_token_id"),  # which a frontend reads
    *("dropout_rate", "initializer_factor", "model_max_length"),
}
"""Keys of a config that say nothing of what an inference computes."""

UNUSED: dict[str, set[str]] = {
    "Gemma3ForCausalLM": {"_sliding_window_pattern", "use_bidirectional_attention"},
    "Gemma3nForCausalLM": {"altup_coef_clip"},  # in training
    "DogeForCausalLM": {"keep_window_size", "norm_topk_prob"},  # of longer sequences; a softmax is normalised
    "DiffLlamaForCausalLM": {"lambda_std_dev"},  # of first weights
    "Gemma2ForCausalLM": {"use_bidirectional_attention"},
    "Phi3ForCausalLM": {"original_max_position_embeddings"},  # rope_parameters say it too
    "GPT2LMHeadModel": {"reorder_and_upcast_attn"},
    "GPTBigCodeForCausalLM": {"attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "num_key_value_heads"},
    "BloomForCausalLM": {"slow_but_exact"},
    "MptForCausalLM": {
        "attn_uses_sequence_id",
        "prefix_lm",
        "qk_ln",
        "learned_pos_emb",
        "no_bias",
        "embedding_fraction",
    },
    "Ernie4_5_MoeForCausalLM": {"moe_norm_min"},
    "MixtralForCausalLM": {"router_jitter_noise"},
    "MiniMaxM2ForCausalLM": {"router_jitter_noise"},
    "Llama4ForCausalLM": {"router_jitter_noise"},
    "MiniMaxForCausalLM": {"router_jitter_noise", "block_size"},
    **{name: {"shared_intermediate_size"} for name in ("MiniMaxText01ForCausalLM", "MiniMaxM1ForCausalLM")},  # 0
    "DbrxForCausalLM": {"hidden_size", "num_key_value_heads", "moe_jitter_eps"},
    **{name: {"expand", "time_step_min"} for name in ("MambaForCausalLM", "FalconMambaForCausalLM")},
    "Mamba2ForCausalLM": {"time_step_min", "time_step_rank"},
    "NemotronHForCausalLM": {"expand", "moe_shared_expert_overlap", "n_shared_experts", "use_bias"},
    "FalconH1ForCausalLM": {"mamba_expand", "mamba_norm_before_gate"},
    "OlmoHybridForCausalLM": {
        *("linear_a_log_max", "linear_a_log_min", "linear_dt_init_floor", "linear_dt_max", "linear_dt_min"),
    },
    "RecurrentGemmaForCausalLM": {"w_init_variance_scale", "final_w_init_variance_scale"},
    "ZambaForCausalLM": {
        *("attention_hidden_size", "attn_layer_offset", "attn_layer_period", "time_step_min"),  # layers are listed
    },
    "Zamba2ForCausalLM": {
        *("attention_hidden_size", "kv_channels", "mamba_headdim", "num_query_groups"),  # derived of others
        *("use_conv_bias", "use_mem_eff_path"),
    },
    "T5ForConditionalGeneration": {"is_gated_act"},
    "MT5ForConditionalGeneration": {"is_gated_act"},
    "UMT5ForConditionalGeneration": {"is_gated_act"},
    "RwkvForCausalLM": {"context_length", "rescale_every"},  # halves numbers, for float16's sake
    "RWForCausalLM": {"num_kv_heads"},
    "JAISLMHeadModel": {"rope_theta"},
}
UNUSED |= {name: {"head_dim", "qk_head_dim"} for name, variants in ZOO.items() if "qk_rope_head_dim" in variants[0]}
UNUSED["MPTForCausalLM"] = UNUSED["MptForCausalLM"]
"""Keys that change no number, or that an older spelling has beside another."""

WITHOUT_TYPES = (
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Exaone4ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Dots1ForCausalLM",
)
OLDER = {
    **dict.fromkeys(WITHOUT_TYPES, ("layer_types",)),
    "SmolLM3ForCausalLM": ("no_rope_layers",),
    "Llama4ForCausalLM": ("no_rope_layers", "moe_layers"),
    "DbrxForCausalLM": ("rope_parameters",),
}
"""Keys that older checkpoints lack, dropped while numbers are changed."""

ATTENTION = {"FalconForCausalLM": "sdpa"}  # eager adds ALiBi twice
"""Which of transformers' attentions is right, where not `eager`."""

TOLERANCES = {
    "DbrxForCausalLM": 2e-3,  # in float32 transformers itself is so far from its own float64
    "MT5ForConditionalGeneration": 5e-4,  # T5's logits without their factor, which is an eighth there
}
"""Largest difference of logits, where not 1e-4."""
