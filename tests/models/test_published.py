"""Published sizes, without weights: as many numbers as the model is said to have, and a name for each place."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from cableway.ipc import modelfiles
from cableway.workers import models, weights

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
PUBLISHED: dict[str, tuple[str, float, dict[str, Any]]] = {
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
"""model -> architecture, how many numbers its weights are, and what its config.json says"""


def general(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "{}", path)


@pytest.mark.parametrize("model", PUBLISHED)
def test_sizes_and_names(model: str, tmp_path: Path) -> None:
    name, num_expected, fields = PUBLISHED[model]
    config = {**fields, "architectures": [name]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    files = modelfiles.locate(str(tmp_path), "dummy")
    decoder = weights.outline(files, dtype=torch.bfloat16, max_model_len=1024, load_format="dummy")
    slots = {path: slot for path, slot in decoder.slots() if path not in decoder.tied}
    num = sum(
        torch.Size((axis.size, *dims)).numel()
        for slot in slots.values()
        for axis in slot.parts.values()
        for leaf, dims in slot.leaves.items()
        if leaf not in slot.optional
    )
    assert num == pytest.approx(num_expected, rel=4e-3)
    named = {general(target.path) for target in models.find(config).names("folder", config).targets.values()}
    parts = {(path, part) for path, slot in slots.items() if slot.leaves.keys() - slot.optional for part in slot.parts}
    assert not {(p, part) for p, part in parts if not named & {general(p), general(f"{p}.{part}".rstrip("."))}}
