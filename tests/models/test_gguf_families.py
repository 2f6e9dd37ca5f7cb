"""Every family that llama.cpp's converter knows, through GGUF files as it writes them: the logits of transformers."""

from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from cableway.frontend.served import decoder_prompt
from cableway.ipc import gguf_config, modelfiles
from cableway.ipc.gguf import Header, ModelError, read_header
from cableway.workers import models
from cableway.workers.models.config import read
from tests.checkpoints import save
from tests.models.assembled import REWRITTEN
from tests.models.converter.families import CONVERSIONS, Conversion
from tests.models.converter.metadata import ATTENTION, INDEXER_TYPES, LLM, Config, always
from tests.models.converter.tensors import PERMUTED, Tensors, experts_stacked, renamed
from tests.models.converter.writing import convert, in_blocks, rounded
from tests.models.harness import load, logits_of
from tests.models.test_parallel import on_ranks
from tests.models.test_zoo import close, ids_of, oracle, their_logits
from tests.models.zoo import (
    BY_TYPE,
    DEEPSEEK,
    DEFAULT,
    DELTA,
    EXPERTS,
    FEW,
    GEMMA3N,
    HALF,
    HYBRID,
    INDEX,
    LATENT,
    LINEAR,
    LLAMA3,
    LLAMA4,
    LOCAL,
    LONG,
    MAMBA2,
    MULTIPLIERS,
    SOME_NEAR,
    SPARSE,
    T5,
    YARN,
    ZOO,
)

WHOLE = {**EXPERTS, "moe_intermediate_size": 32}
BLOCKS = {"vocab_size": 320, "moe_intermediate_size": 32, "intermediate_size": 96}
REPEATED = {"sliding_window": 9, "num_hidden_layers": 7}
"""Layers whose window the format does not give: those of the family's published pattern."""
HYBRID_LAYERS = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "position_embedding_type": None,
}
OLD_T5 = {**T5, "relative_attention_max_distance": 128}
FULL = {"rope_type": "default", "rope_theta": 500.0}

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "LlamaForCausalLM": [
        {"rope_parameters": LLAMA3},
        {"rope_parameters": LINEAR, "attention_bias": True, "mlp_bias": True},
        {"rope_parameters": YARN, "head_dim": 24},
    ],
    "MistralForCausalLM": [{"sliding_window": None}],
    "MixtralForCausalLM": [{**WHOLE, "sliding_window": None}],
    "Qwen2ForCausalLM": [{"rope_parameters": FULL}],
    "Qwen3ForCausalLM": [{"head_dim": 24}],
    "Qwen2MoeForCausalLM": [{**FEW, **SPARSE}],
    "Qwen3MoeForCausalLM": [{**WHOLE, "norm_topk_prob": True}],
    "GemmaForCausalLM": [{}],
    "Gemma2ForCausalLM": [
        {
            **REPEATED,
            "num_hidden_layers": 3,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.0,
        }
    ],
    "Gemma3ForCausalLM": [
        {**REPEATED, "query_pre_attn_scalar": 16, "rope_parameters": {**BY_TYPE, "full_attention": LINEAR}}
    ],
    "Gemma3nForCausalLM": [
        {
            **GEMMA3N,
            "vocab_size_per_layer_input": 300,
            "final_logit_softcapping": 30.0,
            "rope_parameters": {**BY_TYPE, "sliding_attention": DEFAULT},
        }
    ],
    "Llama4ForCausalLM": [
        {**LLAMA4, "num_hidden_layers": 4, "no_rope_layer_interval": 4, "attention_chunk_size": 8192}
        | {"floor_scale": 8192, "attn_scale": 0.1, "num_local_experts": 16}
    ],
    "Ministral3ForCausalLM": [
        {
            "rope_parameters": {
                **YARN,
                "original_max_position_embeddings": 8,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.7,
            }
        }
    ],
    "PhiForCausalLM": [{"rope_parameters": HALF, "intermediate_size": 256, "num_key_value_heads": 4}],
    "Phi3ForCausalLM": [
        {"sliding_window": 11, "rope_parameters": HALF, "original_max_position_embeddings": 256},
        {"rope_parameters": LONG, "original_max_position_embeddings": 32, "max_position_embeddings": 128},
    ],
    "Starcoder2ForCausalLM": [{}, {"use_bias": False, "tie_word_embeddings": False}],
    "GPTBigCodeForCausalLM": [{}],
    "GPT2LMHeadModel": [{}, {"tie_word_embeddings": False}],
    "GPTNeoXForCausalLM": [{"rope_parameters": HALF}, {"use_parallel_residual": False}],
    "FalconForCausalLM": [
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        {"multi_query": True, "num_kv_heads": 1},
    ],
    "BloomForCausalLM": [{}],
    "MptForCausalLM": [{"attn_config": {"clip_qkv": 0.7}, "layer_norm_epsilon": 1e-5}],
    "StableLmForCausalLM": [
        {"rope_parameters": HALF, "qk_layernorm": True},
        {"use_parallel_residual": True, "use_qkv_bias": True},
    ],
    "CohereForCausalLM": [{"logit_scale": 0.3, "use_qk_norm": True}, {"attention_bias": True}],
    "Cohere2ForCausalLM": [{**REPEATED, "num_hidden_layers": 5, "logit_scale": 0.3}],
    "OlmoForCausalLM": [{"clip_qkv": 0.8}],
    "Olmo2ForCausalLM": [{}],
    "Olmo3ForCausalLM": [{**SOME_NEAR}],
    "OlmoeForCausalLM": [{**EXPERTS}],
    "DeepseekV2ForCausalLM": [
        {**LATENT, **DEEPSEEK, "topk_method": "group_limited_greedy", "norm_topk_prob": False},
        {**LATENT, **DEEPSEEK, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "q_lora_rank": None}
        | {"norm_topk_prob": False},
    ],
    "DeepseekV3ForCausalLM": [
        {**LATENT, **DEEPSEEK, "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}},
    ],
    "DeepseekV32ForCausalLM": [
        {**LATENT, **DEEPSEEK, **INDEX, "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}},
    ],
    "GlmMoeDsaForCausalLM": [
        {**LATENT, **DEEPSEEK, **INDEX, "num_hidden_layers": 4, "indexer_types": ["full", "full", "full", "shared"]},
    ],
    "T5ForConditionalGeneration": [
        {**OLD_T5, "feed_forward_proj": "gated-gelu"},
        {**OLD_T5, "num_decoder_layers": None, "num_heads": 6},
    ],
    "UMT5ForConditionalGeneration": [OLD_T5],
    "GraniteForCausalLM": [{**MULTIPLIERS}, {**MULTIPLIERS, "attention_bias": True, "mlp_bias": True}],
    "GraniteMoeForCausalLM": [{**LOCAL, **MULTIPLIERS}],
    "GraniteMoeSharedForCausalLM": [{**LOCAL, **MULTIPLIERS, "shared_intermediate_size": 56}],
    "MiniCPM3ForCausalLM": [{**LATENT, "v_head_dim": 16, "scale_emb": 12.0, "scale_depth": 1.4, "dim_model_base": 256}],
    "MambaForCausalLM": [{"state_size": 6, "time_step_rank": 5, "conv_kernel": 3, "intermediate_size": 128}],
    "FalconMambaForCausalLM": [{"state_size": 6, "time_step_rank": 5, "conv_kernel": 3, "intermediate_size": 128}],
    "Mamba2ForCausalLM": [{**MAMBA2, "conv_kernel": 3}],
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
    "GlmForCausalLM": [{"rope_parameters": HALF}],
    "Glm4ForCausalLM": [{"rope_parameters": HALF}],
    "Exaone4ForCausalLM": [{**SOME_NEAR}],
    "NemotronForCausalLM": [{"rope_parameters": HALF}, {"attention_bias": True, "mlp_bias": True}],
    "ArceeForCausalLM": [{}],
    "SmolLM3ForCausalLM": [{"num_hidden_layers": 5, "no_rope_layer_interval": 4}],
    "SeedOssForCausalLM": [{"attention_bias": True}],
    "Ernie4_5ForCausalLM": [{}],
    "HunYuanDenseV1ForCausalLM": [{}],
    "Glm4MoeForCausalLM": [{**DEEPSEEK, "rope_parameters": HALF, "use_qk_norm": True, "attention_bias": True}],
    "Dots1ForCausalLM": [{**DEEPSEEK}],
    "MiniMaxM2ForCausalLM": [{**EXPERTS, "rope_parameters": HALF}],
    "GraniteMoeHybridForCausalLM": [
        {**HYBRID, **LOCAL, **MULTIPLIERS, **HYBRID_LAYERS, "shared_intermediate_size": 56},
        {**HYBRID, **MULTIPLIERS, **HYBRID_LAYERS, "num_local_experts": 0, "shared_intermediate_size": 56},
    ],
    "Lfm2ForCausalLM": [
        {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    ],
    "Lfm2MoeForCausalLM": [
        {
            **FEW,
            "layer_types": ["conv", "full_attention", "conv"],
            "num_dense_layers": 1,
            "moe_intermediate_size": 40,
        },
    ],
    "Qwen3NextForCausalLM": [{**DELTA, "linear_num_value_heads": 6, **FEW, **SPARSE, "rope_parameters": HALF}],
    "Qwen3_5ForCausalLM": [{**DELTA, "linear_num_value_heads": 6, "rope_parameters": HALF}],
    "Qwen3_5MoeForCausalLM": [{**DELTA, "linear_num_value_heads": 6, **FEW, **SPARSE, "rope_parameters": HALF}],
    "NemotronHForCausalLM": [{**ZOO["NemotronHForCausalLM"][0], "time_step_min": 0.001}],
    "FalconH1ForCausalLM": [ZOO["FalconH1ForCausalLM"][0]],
    "PhimoeForCausalLM": [{"num_local_experts": 4, "lm_head_bias": True, "attention_bias": True}],
    "HunYuanMoEV1ForCausalLM": [{"num_experts": 4, "moe_topk": 2}],
    "Ernie4_5_MoeForCausalLM": [
        {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 40, "moe_layer_start_index": 1},
    ],
    "DbrxForCausalLM": [ZOO["DbrxForCausalLM"][0]],
    "GptOssForCausalLM": [
        {
            **EXPERTS,
            "sliding_window": 9,
            "rope_parameters": {**YARN, "truncate": False, "original_max_position_embeddings": 256},
        }
    ],
}
REMOTE: dict[str, dict[str, Any]] = {
    "ArcticForCausalLM": {"moe_layer_frequency": 1},
    "Grok1ModelForCausalLM": {},
    "Plamo2ForCausalLM": {"sliding_window": 2049},
    "Plamo3ForCausalLM": {},
    "ExaoneForCausalLM": {},
    "InternLM2ForCausalLM": {},
    "MiniCPMForCausalLM": {},
    "OrionForCausalLM": {},
    "BaiChuanForCausalLM": {},
    "XverseForCausalLM": {},
    "QWenLMHeadModel": {},
    "DeepseekForCausalLM": {"norm_topk_prob": False},
}
"""Those whose checkpoints are a relative's, rewritten."""
CASES = [(name, fields) for name, variants in VARIANTS.items() for fields in variants]
CASES += REMOTE.items()


UNREAD = {"vocab_size", "attention.value_length"}
"""Keys that say nothing of their own: the vocabulary's size is that of its tokens, values are as wide as keys."""
UNREAD_OF = {
    "deepseek2": {"attention.head_count_kv", "attention.key_length"},  # of latents
    **dict.fromkeys(
        ("deepseek32", "glm-dsa"),
        frozenset({"attention.head_count_kv", "attention.key_length", "expert_gating_func"}),
    ),
    "minicpm3": {"attention.head_count_kv"},
    "plamo2": {"ssm.inner_size", "ssm.group_count"},
    "grok": {"router_logit_softcapping"},
    "t5": {"attention.layer_norm_epsilon", "decoder_start_token_id"},
    **dict.fromkeys(("mamba", "mamba2"), frozenset({"feed_forward_length", "attention.head_count"})),  # there is none
    **dict.fromkeys(("qwen3next", "qwen35", "qwen35moe"), frozenset({"full_attention_interval"})),  # tensors say it
    **dict.fromkeys(("glm4moe", "dots1", "minimax-m2", "lfm2moe"), frozenset({"expert_gating_func"})),  # always sigmoid
    "hunyuan-moe": {"feed_forward_length"},  # there are but experts, shared and not
    "bloom": {"feed_forward_length"},  # four times hidden_size
    "phi3": {"rope.scaling.original_context_length"},  # where RoPE is not scaled
    "nemotron_h": {"expert_count", "expert_used_count", "expert_group_count", "expert_group_used_count"},  # without any
}


def written(
    folder: Path, name: str, fields: dict[str, Any], kind: Kind, *, conversion: Any = None, prepare: Any = None
) -> tuple[Path, torch.Tensor]:
    """A random model as a GGUF file, and transformers' logits of a prompt.

    Args:
        conversion: how it is written, where not as its family is now.
        prepare: changes the model, which has values that blocks of `kind` hold, before it is saved.
    """
    rewritten = REWRITTEN[name] if name in REMOTE else None
    model = oracle(rewritten.relative, {**rewritten.fields, **fields}) if rewritten else oracle(name, fields)
    if rewritten:
        rewritten.prepare(model)
    if kind != Kind.F32:
        rounded(model, kind)
    if prepare:
        prepare(model)
    save(model, folder)
    if rewritten:
        rewritten.rewrite(name, folder)
    path = folder / "model.gguf"
    convert(folder, path, kind, conversion or CONVERSIONS[name])
    return path, their_logits(model)


@pytest.mark.parametrize(("name", "fields"), CASES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)])
def test_logits_are_those_of_transformers(tmp_path: Path, name: str, fields: dict[str, Any]) -> None:
    path, expected = written(tmp_path, name, fields, Kind.F32)
    close(logits_of(load(path), ids_of(expected)), expected, name)
    assert unread(path) <= UNREAD | UNREAD_OF.get(CONVERSIONS[name].architecture, set())


def test_a_decoder_begins_with_what_the_file_says(tmp_path: Path) -> None:
    fields = {**VARIANTS["T5ForConditionalGeneration"][0], "decoder_start_token_id": 7}
    path, _ = written(tmp_path, "T5ForConditionalGeneration", fields, Kind.F32)
    assert decoder_prompt(modelfiles.locate(str(path))) == [7]


def what_is_read(header: Header) -> tuple[str, Any]:
    config = gguf_config.derive([header])
    architecture = models.find(config)
    return architecture.name, read(config, architecture.config)


def another(value: Any) -> Any:
    return not value if isinstance(value, bool) else 2 * value or 3


def unread(path: Path) -> set[str]:
    """Keys of a file's metadata that may say something else, and what the family reads of its config is the same."""
    header = read_header(str(path))
    was, prefix = what_is_read(header), f"{header.metadata['general.architecture']}."
    found = set()
    for key, value in header.metadata.items():
        if key.startswith(prefix) and not isinstance(value, str):
            other = [another(item) for item in value] if isinstance(value, list) else another(value)
            changed = msgspec.structs.replace(header, metadata={**header.metadata, key: other})
            try:
                if what_is_read(changed) == was:
                    found.add(key.removeprefix(prefix))
            except ModelError:
                continue
    return found


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0])
@pytest.mark.parametrize(
    "name", ["MixtralForCausalLM", "Qwen3MoeForCausalLM", "Gemma2ForCausalLM", "Phi3ForCausalLM", "FalconForCausalLM"]
)
def test_matrices_and_experts_in_blocks(tmp_path: Path, name: str, kind: Kind) -> None:
    path, expected = written(tmp_path, name, VARIANTS[name][0], kind)
    for logits in (logits_of(load(path), ids_of(expected)), *of_two_ranks(path, expected)):
        close(logits, expected, name)


@pytest.mark.parametrize(
    "name",
    [
        *("DeepseekV3ForCausalLM", "StableLmForCausalLM", "BloomForCausalLM", "CohereForCausalLM", "JambaForCausalLM"),
        *("Mamba2ForCausalLM", "Qwen2MoeForCausalLM", "GptOssForCausalLM", "Lfm2ForCausalLM", "FalconH1ForCausalLM"),
        "Qwen3_5ForCausalLM",
    ],
)
def test_two_ranks_compute_what_one_does(tmp_path: Path, name: str) -> None:
    path, expected = written(tmp_path, name, VARIANTS[name][0], Kind.F32)
    for logits in of_two_ranks(path, expected):
        close(logits, expected, name)


def of_two_ranks(path: Path, expected: torch.Tensor) -> list[torch.Tensor]:
    return on_ranks(2, lambda mesh: logits_of(load(path, mesh=mesh), ids_of(expected)))


def test_matrices_of_latents_in_blocks(tmp_path: Path) -> None:
    """Those that make keys are stored across, so that blocks run along what is a column of ours."""
    name, fields = "DeepseekV2ForCausalLM", VARIANTS["DeepseekV2ForCausalLM"][0]
    wide = {**fields, "qk_nope_head_dim": 32, "kv_lora_rank": 32, "vocab_size": 320}

    def across(model: Any) -> None:
        for weight in (layer.self_attn.kv_b_proj.weight for layer in model.model.layers):
            keys = weight.data.view(4, -1, 32)[:, :32]
            keys.copy_(in_blocks(keys.transpose(1, 2).contiguous(), Kind.Q8_0).transpose(1, 2))

    path, expected = written(tmp_path, name, wide, Kind.Q8_0, prepare=across)
    kinds = {key: tensor.ggml_type for key, tensor in read_header(str(path)).tensors.items()}
    assert kinds["blk.0.attn_k_b.weight"] == kinds["blk.0.attn_v_b.weight"] == Kind.Q8_0
    for logits in (logits_of(load(path), ids_of(expected)), *of_two_ranks(path, expected)):
        close(logits, expected, name)


def test_a_model_split_over_files(tmp_path: Path) -> None:
    name = "Qwen3MoeForCausalLM"
    _, expected = written(tmp_path, name, VARIANTS[name][0], Kind.F32)
    folder = tmp_path / "split"
    folder.mkdir()
    convert(tmp_path, folder / "model.gguf", Kind.F32, CONVERSIONS[name], split_max_tensors=9)
    shards = sorted(folder.iterdir())
    assert len(shards) > 3
    assert modelfiles.locate(str(shards[2])).name == "model"
    for path in (folder, shards[0], shards[2]):
        close(logits_of(load(path), ids_of(expected)), expected, name)
    shards[1].unlink()
    with pytest.raises(ModelError, match=r"00002-of-.*missing"):
        load(folder)


def test_experts_before_they_were_stacked(tmp_path: Path) -> None:
    def unstacked(tensors: Tensors, config: Config) -> None:
        parts = {"w1": "gate", "w2": "down", "w3": "up"}
        renamed(
            *((rf"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.{matrix}", rf"blk.\1.ffn_{part}.\2")
              for matrix, part in parts.items())
        )(tensors, config)  # fmt: skip

    check_older(tmp_path, "MixtralForCausalLM", (*PERMUTED, unstacked))


def test_latents_before_they_were_split(tmp_path: Path) -> None:
    fields = {
        ATTENTION.KEY_LENGTH: lambda c: c["qk_nope_head_dim"] + c["qk_rope_head_dim"],
        ATTENTION.VALUE_LENGTH: lambda c: c["v_head_dim"],
        ATTENTION.KEY_LENGTH_MLA: always(None),
        ATTENTION.VALUE_LENGTH_MLA: always(None),
        ATTENTION.HEAD_COUNT_KV: lambda c: c["num_attention_heads"],
    }
    check_older(tmp_path, "DeepseekV2ForCausalLM", (experts_stacked,), fields)


def test_which_layers_choose_before_files_said_it(tmp_path: Path) -> None:
    """GLM 5.2: after three every fourth; those before it, which saw less far: all."""
    fields = VARIANTS["GlmMoeDsaForCausalLM"][0]
    check_older(
        tmp_path, "GlmMoeDsaForCausalLM", None, {INDEXER_TYPES: always(None), LLM.CONTEXT_LENGTH: always(1 << 20)}
    )
    kinds = gguf_config.derive([read_header(str(tmp_path / "model.gguf"))])
    assert read(kinds, models.find(kinds).config).indexer_types == fields["indexer_types"]


def check_older(folder: Path, name: str, changes: Any, fields: Any = MappingProxyType({})) -> None:
    """A file as an older converter wrote it."""
    now = CONVERSIONS[name]
    older = Conversion(now.architecture, {**now.fields, **fields}, now.changes if changes is None else changes)
    path, expected = written(folder, name, VARIANTS[name][0], Kind.F32, conversion=older)
    close(logits_of(load(path), ids_of(expected)), expected, name)


def test_what_is_known_in_gguf_files_is_what_is_tested() -> None:
    known = {architecture.name for architecture in models.architectures() if "gguf" in architecture.schemes}
    others = {"BaichuanForCausalLM", "Glm4MoeLiteForCausalLM"}  # by the same scheme
    assert known - others | {"MistralForCausalLM"} == CONVERSIONS.keys() == VARIANTS.keys() | REMOTE.keys()
