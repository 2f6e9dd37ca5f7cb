"""Real models by their published numbers: architecture, how many numbers their weights are, and their config.json."""

from typing import Any

BART = {
    **{f"{side}_attention_heads": 16 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 4096 for side in ("encoder", "decoder")},
    **{f"{side}_layers": 12 for side in ("encoder", "decoder")},
    "d_model": 1024,
    "max_position_embeddings": 1024,
    "is_encoder_decoder": True,
}
FLAN = {"d_ff": 2048, "d_kv": 64, "d_model": 768, "num_heads": 12, "num_layers": 12, "num_decoder_layers": 12}
ZAMBA2_LAYERS = [*["mamba"] * 6, "hybrid"] + [*["mamba"] * 5, "hybrid"] * 6
ZAMBA2_LAYERS += [*["mamba"] * 4, "hybrid", *["mamba"] * 3, "hybrid", "mamba", "mamba"]
EXPERTS = {"routed_scaling_factor": 2.5, "moe_layer_freq": 1, "norm_topk_prob": True}
LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
NEMOTRON_LAYERS = "MEMEM*" + "EMEMEM*" * 4 + "EMEMEMEM*" + "EMEMEMEME"
QWEN = {"vocab_size": 151_936}
EXACTLY: dict[str, tuple[str, int, dict[str, Any]]] = {
    "SmolLM2-135M": ("LlamaForCausalLM", 134_515_008, {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49_152, "tie_word_embeddings": True,
    }),
    "Llama-3.1-8B": ("LlamaForCausalLM", 8_030_261_248, {
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 131_072,
    }),
    "Mistral-7B": ("MistralForCausalLM", 7_241_732_096, {
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32_000, "sliding_window": 4096,
    }),
    "Qwen2.5-7B": ("Qwen2ForCausalLM", 7_615_616_512, {
        "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152_064,
    }),
    "Qwen3-0.6B": ("Qwen3ForCausalLM", 596_049_920, QWEN | {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    }),
    "gemma-2-9b": ("Gemma2ForCausalLM", 9_241_705_984, {
        "hidden_size": 3584, "intermediate_size": 14_336, "num_hidden_layers": 42, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 256_000,
    }),
    "gemma-3-1b": ("Gemma3ForCausalLM", 999_885_952, {
        "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4,
        "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262_144,
    }),
    "phi-2": ("PhiForCausalLM", 2_779_683_840, {
        "hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 51_200, "partial_rotary_factor": 0.4,
    }),
    "Phi-3-mini": ("Phi3ForCausalLM", 3_821_079_552, {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32_064,
    }),
    "gpt2": ("GPT2LMHeadModel", 124_439_808, {
        "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50_257,
    }),
    "bloom-560m": ("BloomForCausalLM", 559_214_592, {
        "hidden_size": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 250_880,
    }),
    "opt-125m": ("OPTForCausalLM", 125_239_296, {
        "hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 50_272,
        "word_embed_proj_dim": 768,
    }),
    "opt-350m": ("OPTForCausalLM", 331_196_416, {
        "hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "vocab_size": 50_272,
        "word_embed_proj_dim": 512, "do_layer_norm_before": False,
    }),
    "pythia-410m": ("GPTNeoXForCausalLM", 405_334_016, {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "vocab_size": 50_304,
    }),
    "gpt-j-6b": ("GPTJForCausalLM", 6_050_882_784, {
        "n_embd": 4096, "n_layer": 28, "n_head": 16, "n_positions": 2048, "rotary_dim": 64, "vocab_size": 50_400,
    }),
    "falcon-7b": ("FalconForCausalLM", 6_921_720_704, {
        "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71, "vocab_size": 65_024, "bias": False,
        "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False,
    }),
    "mpt-7b": ("MptForCausalLM", 6_649_286_656, {
        "d_model": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 50_432,
    }),
    "starcoder2-3b": ("Starcoder2ForCausalLM", 3_030_371_328, {
        "hidden_size": 3072, "intermediate_size": 12_288, "num_hidden_layers": 30, "num_attention_heads": 24,
        "num_key_value_heads": 2, "vocab_size": 49_152, "tie_word_embeddings": True,
    }),
    "stablelm-2-1_6b": ("StableLmForCausalLM", 1_644_515_328, {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 100_352, "use_qkv_bias": True,
    }),
    "c4ai-command-r-v01": ("CohereForCausalLM", 34_980_831_232, {
        "hidden_size": 8192, "intermediate_size": 22_528, "num_hidden_layers": 40, "num_attention_heads": 64,
        "num_key_value_heads": 64, "vocab_size": 256_000,
    }),
    "OLMo-1B": ("OlmoForCausalLM", 1_176_764_416, {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 16,
        "vocab_size": 50_304, "tie_word_embeddings": True,
    }),
    "Mixtral-8x7B": ("MixtralForCausalLM", 46_702_792_704, {
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32_000,
    }),
    "Qwen1.5-MoE-A2.7B": ("Qwen2MoeForCausalLM", 14_315_784_192, QWEN | {
        "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16,
        "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    }),
    "Qwen3-30B-A3B": ("Qwen3MoeForCausalLM", 30_532_122_624, QWEN | {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    }),
    "OLMoE-1B-7B": ("OlmoeForCausalLM", 6_919_161_856, {
        "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_experts": 64, "num_experts_per_tok": 8, "vocab_size": 50_304,
    }),
    "gpt-oss-20b": ("GptOssForCausalLM", 20_914_757_184, {
        "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4,
        "vocab_size": 201_088,
    }),
    "DeepSeek-V2-Lite": ("DeepseekV2ForCausalLM", 15_706_484_224, {
        "hidden_size": 2048, "intermediate_size": 10_944, "moe_intermediate_size": 1408, "num_hidden_layers": 27,
        "num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 64, "n_shared_experts": 2,
        "num_experts_per_tok": 6, "first_k_dense_replace": 1, "q_lora_rank": None, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 102_400,
    }),
    "DeepSeek-V3": ("DeepseekV3ForCausalLM", 671_026_419_200, {
        "hidden_size": 7168, "intermediate_size": 18_432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
        "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1,
        "num_experts_per_tok": 8, "first_k_dense_replace": 3, "q_lora_rank": 1536, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 129_280, "n_group": 8,
        "topk_group": 4,
    }),
    "mamba-130m": ("MambaForCausalLM", 129_135_360, {
        "hidden_size": 768, "num_hidden_layers": 24, "state_size": 16, "vocab_size": 50_280,
    }),
}  # fmt: skip
"""As their files have them."""
ABOUT: dict[str, tuple[str, float, dict[str, Any]]] = {
    "bart-large-cnn": ("BartForConditionalGeneration", 406e6, {**BART, "vocab_size": 50_264}),
    "mbart-large-50": (
        "MBartForConditionalGeneration",
        611e6,
        {**BART, "vocab_size": 250_054, "scale_embedding": True, "activation_function": "relu"},
    ),
    "flan-t5-base": (
        "T5ForConditionalGeneration",
        248e6,
        {**FLAN, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "vocab_size": 32_128},
    ),
    "recurrentgemma-2b": (
        "RecurrentGemmaForCausalLM",
        2.68e9,
        {
            "hidden_size": 2560,
            "intermediate_size": 15_360,
            "num_attention_heads": 10,
            "num_key_value_heads": 1,
            "num_hidden_layers": 26,
            "lru_width": 2560,
            "vocab_size": 256_000,
        },
    ),
    "zamba2-2.7b": (
        "Zamba2ForCausalLM",
        2.66e9,
        {
            "hidden_size": 2560,
            "ffn_hidden_size": 10_240,
            "kv_channels": 80,
            "num_attention_heads": 32,
            "n_mamba_heads": 80,
            "num_mem_blocks": 2,
            "num_hidden_layers": 54,
            "layers_block_type": ZAMBA2_LAYERS,
            "vocab_size": 32_000,
        },
    ),
    "zamba-7b": (
        "ZambaForCausalLM",
        7.23e9,
        {
            "hidden_size": 3712,
            "intermediate_size": 14_848,
            "num_attention_heads": 16,
            "num_hidden_layers": 76,
            "vocab_size": 32_000,
        },
    ),
    "nemotron-3-nano": (
        "NemotronHForCausalLM",
        31.6e9,
        {
            **EXPERTS,
            "hidden_size": 2688,
            "intermediate_size": 1856,
            "hybrid_override_pattern": NEMOTRON_LAYERS,
            "mamba_num_heads": 64,
            "n_routed_experts": 128,
            "num_experts_per_tok": 6,
            "moe_shared_expert_intermediate_size": 3712,
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "vocab_size": 131_072,
        },
    ),
    "kimi-linear-48b": (
        "KimiLinearForCausalLM",
        49.1e9,
        {
            **LATENT,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "moe_intermediate_size": 1024,
            "linear_attn_config": {
                "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
                "head_dim": 128,
                "num_heads": 32,
                "short_conv_kernel_size": 4,
            },
            "num_attention_heads": 32,
            "num_experts": 256,
            "num_experts_per_token": 8,
            "num_shared_experts": 1,
            "num_hidden_layers": 27,
            "vocab_size": 163_840,
        },
    ),
    "rwkv-4-169m": ("RwkvForCausalLM", 169e6, {"hidden_size": 768, "num_hidden_layers": 12, "vocab_size": 50_277}),
    "deepseek-v3.2": (
        "DeepseekV32ForCausalLM",
        671.9e9,
        {
            **LATENT,
            **EXPERTS,
            "q_lora_rank": 1536,
            "hidden_size": 7168,
            "intermediate_size": 18_432,
            "moe_intermediate_size": 2048,
            "first_k_dense_replace": 3,
            "n_group": 8,
            "topk_group": 4,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "num_attention_heads": 128,
            "num_hidden_layers": 61,
            "num_nextn_predict_layers": 1,
            "vocab_size": 129_280,
        },
    ),
}
"""As they are announced, rounded."""
