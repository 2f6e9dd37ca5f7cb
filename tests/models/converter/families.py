"""How llama.cpp's converter writes each family: its name there, its metadata, and what is done to its tensors."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from tests.models.converter.metadata import (
    ATTENTION,
    BASE,
    DELTA_NETS,
    EXPERT_SIZES,
    FOURFOLD,
    GROK,
    HYBRID,
    INDEX,
    INDEXER_TYPES,
    JAMBA,
    LATENT,
    LAYER_NORM_SIZES,
    LFM2,
    LLAMA,
    LLM,
    MAMBA,
    MULTIPLIERS,
    NEAR,
    NEAR_LAYERS,
    PLAMO2,
    ROPE,
    ROTATED,
    SHARED,
    SIZES,
    SOFT_CAPS,
    SSM,
    STATE_SPACE,
    T5,
    Config,
    always,
    block_types,
    heads,
    hidden,
    kv_heads,
    latent,
    layers,
    rope,
    said,
)
from tests.models.converter.tensors import (
    PERMUTED,
    Tensors,
    conv_squeezed,
    dbrx_experts,
    delta_net,
    experts_split,
    experts_stacked,
    falcon_h1_multiplied,
    gpt2_turned,
    gpt_oss,
    granite_experts,
    granite_hybrid,
    granite_shared,
    grok_experts,
    heads_stacked,
    hybrid_states,
    internlm2_split,
    latent_correction,
    latents_split,
    llama4_down,
    llama4_experts,
    longrope_factors,
    mamba2_shapes,
    negated,
    one_more,
    pack_split,
    plamo2_states,
    plamo_norms,
    renamed,
    rope_divisors,
    squeezed,
    streams_stacked,
    ungrouped,
    unmixed,
    value_heads_in_turns,
)


class Conversion(NamedTuple):
    """`kin`: an architecture with the same names, where the gguf package does not know this one's yet."""

    architecture: str
    fields: Mapping[str, Callable[[Config], Any]]
    changes: Iterable[Callable[[Tensors, Config], None]] = ()
    kin: str = ""


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
    "Gemma3nForCausalLM": Conversion(
        "gemma3n",
        BASE
        | NEAR_LAYERS
        | {
            LLM.ALTUP_ACTIVE_IDX: said("altup_active_idx"),
            LLM.ALTUP_NUM_INPUTS: said("altup_num_inputs"),
            LLM.EMBD_LENGTH_PER_LAYER_INP: said("hidden_size_per_layer_input"),
            ATTENTION.SHARED_KV_LAYERS: said("num_kv_shared_layers"),
            LLM.ACTIVATION_SPARSITY_SCALE: lambda c: torch.special.ndtri(
                torch.tensor(c["activation_sparsity_pattern"])
            ).tolist(),
        },
        (streams_stacked,),
    ),
    "Llama4ForCausalLM": Conversion(
        "llama4",
        LLAMA
        | {
            LLM.FEED_FORWARD_LENGTH: said("intermediate_size_mlp"),
            LLM.EXPERT_FEED_FORWARD_LENGTH: said("intermediate_size"),
            LLM.INTERLEAVE_MOE_LAYER_STEP: said("interleave_moe_layer_step"),
        },
        (llama4_experts, llama4_down, rope_divisors),
    ),
    "Ministral3ForCausalLM": Conversion(
        "mistral3",
        LLAMA
        | {
            ROPE.SCALING_YARN_LOG_MUL: lambda c: rope(c)["mscale_all_dim"],
            ATTENTION.TEMPERATURE_SCALE: lambda c: rope(c)["llama_4_scaling_beta"],
        },
        PERMUTED,
    ),
    "ArcticForCausalLM": Conversion("arctic", BASE | ROTATED, (*PERMUTED, experts_stacked)),
    "Grok1ModelForCausalLM": Conversion("grok", BASE | GROK, (grok_experts,)),
    "T5ForConditionalGeneration": Conversion("t5", T5),
    "UMT5ForConditionalGeneration": Conversion("t5", T5),
    "Plamo2ForCausalLM": Conversion("plamo2", PLAMO2, (plamo_norms, negated, squeezed, plamo2_states)),
    "Plamo3ForCausalLM": Conversion(
        "plamo3",
        BASE
        | {
            LLM.VOCAB_SIZE: said("vocab_size"),
            ATTENTION.SLIDING_WINDOW: said("window_size"),
            ATTENTION.SLIDING_WINDOW_PATTERN: said("sliding_window_pattern"),
        },
        (plamo_norms, renamed((r"model\.layers\.layers\.(\d+)\.pre_mlp_norm", r"blk.\1.ffn_norm"))),
    ),
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
        (latents_split, experts_stacked, latent_correction),
    ),
    "DeepseekV32ForCausalLM": Conversion(
        "deepseek32",
        latent(**{LLM.EXPERT_GATING_FUNC: always(2)}) | INDEX,
        (latents_split, experts_stacked, latent_correction),
        kin="glm-dsa",
    ),
    "GlmMoeDsaForCausalLM": Conversion(
        "glm-dsa",
        latent(**{LLM.EXPERT_GATING_FUNC: always(2)})
        | INDEX
        | {INDEXER_TYPES: lambda c: [kind == "full" for kind in c["indexer_types"]]},
        (latents_split, experts_stacked, latent_correction),
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
    "GraniteMoeHybridForCausalLM": Conversion(
        "granitehybrid",
        LLAMA
        | MULTIPLIERS
        | HYBRID
        | {
            LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH: said("shared_intermediate_size"),
            ATTENTION.HEAD_COUNT_KV: lambda c: [
                c["num_key_value_heads"] if "attention" in kind and "linear" not in kind else 0
                for kind in c["layer_types"]
            ],
            ROPE.SCALING_FINETUNED: always(False),
        },
        (*PERMUTED, granite_hybrid, squeezed, hybrid_states),
    ),
    "NemotronHForCausalLM": Conversion(
        "nemotron_h",
        BASE
        | {
            LLM.FEED_FORWARD_LENGTH: lambda c: [c["intermediate_size"] * (kind == "mlp") for kind in block_types(c)],
            ATTENTION.HEAD_COUNT_KV: lambda c: [
                c["num_key_value_heads"] * (kind in ("attention", "full_attention")) for kind in block_types(c)
            ],
            SSM.CONV_KERNEL: said("conv_kernel"),
            SSM.STATE_SIZE: said("ssm_state_size"),
            SSM.GROUP_COUNT: said("n_groups"),
            SSM.INNER_SIZE: lambda c: c["mamba_num_heads"] * c["mamba_head_dim"],
            SSM.TIME_STEP_RANK: said("mamba_num_heads"),
        },
        (*PERMUTED, negated, squeezed, mamba2_shapes, renamed((r"\.dt_bias", ".dt_proj.bias"))),
    ),
    "FalconH1ForCausalLM": Conversion("falcon-h1", BASE | HYBRID, (falcon_h1_multiplied, squeezed, hybrid_states)),
    "Qwen3NextForCausalLM": Conversion(
        "qwen3next", BASE | ROTATED | EXPERT_SIZES | DELTA_NETS, (negated, squeezed, delta_net, experts_stacked)
    ),
    "Qwen3_5ForCausalLM": Conversion(
        "qwen35", BASE | ROTATED | DELTA_NETS, (value_heads_in_turns, negated, squeezed, delta_net)
    ),
    "Qwen3_5MoeForCausalLM": Conversion(
        "qwen35moe",
        BASE | ROTATED | EXPERT_SIZES | DELTA_NETS,
        (value_heads_in_turns, negated, squeezed, delta_net, experts_stacked, experts_split),
    ),
    "Lfm2ForCausalLM": Conversion("lfm2", LFM2, (conv_squeezed,)),
    "Lfm2MoeForCausalLM": Conversion(
        "lfm2moe",
        LFM2
        | {
            LLM.EXPERT_FEED_FORWARD_LENGTH: said("moe_intermediate_size"),
            LLM.LEADING_DENSE_BLOCK_COUNT: said("num_dense_layers"),
            LLM.EXPERT_GATING_FUNC: always(2),
        },
        (conv_squeezed, experts_stacked, renamed(("expert_bias", "expert_bias.bias"))),
    ),
    "PhimoeForCausalLM": Conversion(
        "phimoe",
        BASE | ROTATED,
        (experts_stacked,),
    ),
    "HunYuanMoEV1ForCausalLM": Conversion(
        "hunyuan-moe",
        BASE
        | {
            LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH: said("intermediate_size"),
            LLM.EXPERT_FEED_FORWARD_LENGTH: said("intermediate_size"),
            LLM.EXPERT_USED_COUNT: said("moe_topk", "num_experts_per_tok"),
            LLM.EXPERT_SHARED_COUNT: always(1),
        },
        (experts_stacked,),
    ),
    "Ernie4_5_MoeForCausalLM": Conversion(
        "ernie4_5-moe",
        BASE
        | {
            LLM.EXPERT_COUNT: said("moe_num_experts"),
            LLM.EXPERT_USED_COUNT: said("moe_k"),
            LLM.INTERLEAVE_MOE_LAYER_STEP: said("moe_layer_interval"),
            LLM.LEADING_DENSE_BLOCK_COUNT: said("moe_layer_start_index"),
            LLM.EXPERT_FEED_FORWARD_LENGTH: said("moe_intermediate_size"),
            LLM.EXPERT_SHARED_COUNT: said("moe_num_shared_experts"),
        },
        (experts_stacked, renamed(("e_score_correction_bias", "e_score_correction.bias"))),
    ),
    "DbrxForCausalLM": Conversion(
        "dbrx",
        SIZES
        | {
            LLM.CONTEXT_LENGTH: said("max_seq_len"),
            LLM.FEED_FORWARD_LENGTH: lambda c: c["ffn_config"]["ffn_hidden_size"],
            ATTENTION.HEAD_COUNT_KV: lambda c: c["attn_config"]["kv_n_heads"],
            ROPE.FREQ_BASE: lambda c: rope(c)["rope_theta"],
            ATTENTION.CLAMP_KQV: lambda c: c["attn_config"]["clip_qkv"],
            LLM.EXPERT_COUNT: lambda c: c["ffn_config"]["moe_num_experts"],
            LLM.EXPERT_USED_COUNT: lambda c: c["ffn_config"]["moe_top_k"],
            ATTENTION.LAYERNORM_EPS: always(1e-5),
        },
        (dbrx_experts,),
    ),
    "GptOssForCausalLM": Conversion(
        "gpt-oss",
        BASE | NEAR | {LLM.EXPERT_FEED_FORWARD_LENGTH: said("intermediate_size")},
        (gpt_oss,),
    ),
}
"""transformers' class -> how its checkpoints are written"""
