"""Families that transformers does not know: a checkpoint of the nearest relative, in the family's published names."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models.zoo import MINIMAX

Config = dict[str, Any]
Tensors = dict[str, Tensor]


class Rewritten(NamedTuple):
    """What to make of a relative's checkpoint.

    Attributes:
        kin: transformers' class, without its ending.
        fields: of the relative's config.
        names: pieces of the relative's tensor names, and what to put there; longer ones first.
        config: changes the config in place.
        tensors: changes the tensors in place, before they are renamed.
        call: what else the relative is called with, to compute the same.
        prepare: changes the relative before it is saved.
        ending: of the class's name.
    """

    kin: str
    fields: Mapping[str, Any] = MappingProxyType({})
    names: Mapping[str, str] = MappingProxyType({})
    config: Callable[[Config], Any] = lambda config: None
    tensors: Callable[[Tensors, Config], Any] = lambda tensors, config: None
    call: Mapping[str, Any] = MappingProxyType({})
    prepare: Callable[[Any], Any] = lambda model: None
    ending: str = "ForCausalLM"

    @property
    def relative(self) -> str:
        return f"{self.kin}{self.ending}"

    def rewrite(self, name: str, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        self.tensors(tensors, config)
        renamed = {}
        for key, tensor in tensors.items():
            for old, new in self.names.items():
                key = key.replace(old, new)
            renamed[key] = tensor.contiguous()
        self.config(config)
        config["architectures"] = [name]
        save_file(renamed, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))


def renamed(**names: str) -> Callable[[Config], None]:
    """Config keys under other names; `old="new"`."""

    def change(config: Config) -> None:
        for old, new in names.items():
            config[new] = config.pop(old)

    return change


def old_rope(config: Config) -> None:
    """rope_theta beside the others, as before transformers 5."""
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]


def both(*changes: Callable[[Config], Any]) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        for one in changes:
            one(config)

    return change


def fuse(into: str, *stems: str, how: Callable[..., Tensor] = lambda *parts, **_: torch.cat(parts)) -> Any:
    """Replace tensors of each layer by one; `into` and `stems` follow `model.layers.{}.`."""

    def change(tensors: Tensors, config: Config) -> None:
        for i in range(config["num_hidden_layers"]):
            for leaf in ("weight", "bias"):
                keys = [f"model.layers.{i}.{stem}.{leaf}" for stem in stems]
                if keys[0] in tensors:
                    tensors[f"model.layers.{i}.{into}.{leaf}"] = how(*(tensors.pop(key) for key in keys), config=config)

    return change


def both_tensors(*changes: Callable[[Tensors, Config], Any]) -> Callable[[Tensors, Config], None]:
    def change(tensors: Tensors, config: Config) -> None:
        for one in changes:
            one(tensors, config)

    return change


def grouped(q: Tensor, k: Tensor, v: Tensor, *, config: Config) -> Tensor:
    """KV head by KV head: the heads of q that read it, then it."""
    num = config["num_key_value_heads"]
    parts = [x.unflatten(0, (num, -1)) for x in (q, k, v)]
    return torch.cat(parts, 1).flatten(0, 1)


def paired(k: Tensor, v: Tensor, *, config: Config) -> Tensor:
    """Head by head: k, then v."""
    return grouped(k[:0].unflatten(0, (config["num_key_value_heads"], -1)).flatten(0, 1), k, v, config=config)


QKV = tuple(f"self_attn.{part}_proj" for part in "qkv")
ODD_BIASES = {"attention_bias": True, "mlp_bias": True}
INTERNLM2 = {
    "model.embed_tokens": "model.tok_embeddings",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "lm_head": "output",
}
CHATGLM = {
    "model.embed_tokens": "transformer.embedding.word_embeddings",
    "model.layers": "transformer.encoder.layers",
    "self_attn.o_proj": "self_attention.dense",
    "mlp.gate_up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
    "model.norm": "transformer.encoder.final_layernorm",
    "lm_head": "transformer.output_layer",
}
EXAONE = {
    "model.embed_tokens": "transformer.wte",
    "model.layers": "transformer.h",
    "self_attn.o_proj": "attn.attention.out_proj",
    "self_attn": "attn.attention",
    "mlp.gate_proj": "mlp.c_fc_0",
    "mlp.up_proj": "mlp.c_fc_1",
    "mlp.down_proj": "mlp.c_proj",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "model.norm": "transformer.ln_f",
}


def chatglm_config(config: Config) -> None:
    renamed(
        num_hidden_layers="num_layers",
        intermediate_size="ffn_hidden_size",
        vocab_size="padded_vocab_size",
        head_dim="kv_channels",
        rms_norm_eps="layernorm_epsilon",
        num_key_value_heads="multi_query_group_num",
        attention_bias="add_qkv_bias",
    )(config)
    config |= {"multi_query_attention": True, "rope_ratio": config.pop("rope_parameters")["rope_theta"] / 10_000.0}


def minicpm_config(config: Config) -> None:
    config["scale_emb"] = config.pop("embedding_multiplier")
    config["scale_depth"] = config.pop("residual_multiplier") * config["num_hidden_layers"] ** 0.5
    config["dim_model_base"] = config["hidden_size"] / config.pop("logits_scaling")
    config.pop("attention_multiplier")


QWEN = {
    "model.embed_tokens": "transformer.wte",
    "model.layers": "transformer.h",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.gate_proj": "mlp.w2",
    "mlp.up_proj": "mlp.w1",
    "mlp.down_proj": "mlp.c_proj",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "model.norm": "transformer.ln_f",
}
TELECHAT2 = {
    "model.embed_tokens": "transformer.word_embeddings",
    "model.layers": "transformer.h",
    "self_attn.o_proj": "self_attention.dense",
    "self_attn.q_proj": "self_attention.query",
    "model.norm": "transformer.ln_f",
}
JAIS = {**QWEN, "mlp.gate_proj": "mlp.c_fc2", "mlp.up_proj": "mlp.c_fc"}


def qwen_config(config: Config) -> None:
    old_rope(config)
    renamed(rope_theta="rotary_emb_base", rms_norm_eps="layer_norm_epsilon")(config)
    config |= {"intermediate_size": 2 * config["intermediate_size"], "kv_channels": 16, "no_bias": True}
    for key in ("num_key_value_heads", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types"):
        config.pop(key)


def telechat2_config(config: Config) -> None:
    old_rope(config)
    renamed(
        num_hidden_layers="n_layer",
        num_attention_heads="n_head",
        intermediate_size="ffn_hidden_size",
        rms_norm_eps="layer_norm_epsilon",
    )(config)
    for key in ("attention_bias", "mlp_bias"):
        config.pop(key)


def jais_config(config: Config) -> None:
    renamed(
        hidden_size="n_embd",
        num_hidden_layers="n_layer",
        num_attention_heads="n_head",
        intermediate_size="n_inner",
        layer_norm_eps="layer_norm_epsilon",
    )(config)
    for key in ("num_key_value_heads", "rope_parameters", "use_qkv_bias", "qk_layernorm", "use_parallel_residual"):
        config.pop(key)
    config |= {"activation_function": "swiglu", "embeddings_scale": 1.0, "width_scale": 1.0}
    config |= {"mup_scale_qk_dot_by_d": False, "tie_word_embeddings": True}


def jais_tensors(tensors: Tensors, config: Config) -> None:
    fuse("attn.c_attn", *QKV)(tensors, config)
    tensors.pop("lm_head.weight", None)
    for key in [key for key in tensors if ".layers." in key and tensors[key].dim() == 2]:
        tensors[key] = tensors[key].t().contiguous()
        tensors.setdefault(key.replace("weight", "bias"), torch.zeros(tensors[key].shape[1]))


def biases_of(*stems: str) -> Callable[[Any], None]:
    """Leave a model only those of its biases."""

    def change(model: Any) -> None:
        for name, weight in model.named_parameters():
            if name.endswith("bias") and not any(stem in name for stem in stems):
                weight.data.zero_()

    return change


def without_zeros(tensors: Tensors, config: Config) -> None:
    for key in [key for key, tensor in tensors.items() if not tensor.any()]:
        del tensors[key]


def normed_head(model: Any) -> None:
    head = model.lm_head.weight.data
    head.copy_(head / head.norm(dim=1, keepdim=True))


def longer_head(tensors: Tensors, config: Config) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * (1 + torch.rand(config["vocab_size"], 1))


def alibi(num_heads: int = 4, num_tokens: int = 40) -> dict[str, Tensor]:
    """Arguments with which a rotary model does not rotate, but adds ALiBi."""
    slopes = torch.tensor([2.0 ** (-8 * (i + 1) / num_heads) for i in range(num_heads)])
    place = torch.arange(num_tokens)
    mask = slopes[:, None, None] * (place - place[:, None])
    mask = mask.masked_fill(place > place[:, None], float("-inf"))
    return {"attention_mask": mask[None], "position_ids": torch.zeros(1, num_tokens, dtype=torch.long)}


def without(*keys: str) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        for key in keys:
            config.pop(key)

    return change


def teleflm_config(config: Config) -> None:
    config |= {"use_mup": True, "input_mult": config.pop("embedding_multiplier"), "mup_scale_factor": 2.0}
    config["output_mult"] = 2.0 / config.pop("logits_scaling")
    without("residual_multiplier", "attention_multiplier")(config)


REWRITTEN: dict[str, Rewritten] = {
    "OrionForCausalLM": Rewritten(
        "StableLm",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0}},
        config=both(
            old_rope,
            renamed(layer_norm_eps="rms_norm_eps"),
            without("use_qkv_bias", "qk_layernorm", "use_parallel_residual"),
        ),
    ),
    "BaiChuanForCausalLM": Rewritten(
        "Llama",
        config=both(old_rope, without("num_key_value_heads", "attention_bias", "mlp_bias")),
        fields={"num_key_value_heads": 4},
        tensors=fuse("self_attn.W_pack", *QKV),
    ),
    "BaichuanForCausalLM": Rewritten(
        "Llama",
        {"num_key_value_heads": 4, "vocab_size": 125_696, "num_hidden_layers": 1},
        config=without(
            "max_position_embeddings", "num_key_value_heads", "rope_parameters", "attention_bias", "mlp_bias"
        ),
        tensors=both_tensors(fuse("self_attn.W_pack", *QKV), longer_head),
        call=alibi(),
        prepare=normed_head,
    ),
    "QWenLMHeadModel": Rewritten("Qwen2", {"num_key_value_heads": 4}, QWEN, qwen_config, fuse("attn.c_attn", *QKV)),
    "TeleChat2ForCausalLM": Rewritten(
        "Llama",
        ODD_BIASES,
        TELECHAT2,
        telechat2_config,
        both_tensors(without_zeros, fuse("self_attention.key_value", *QKV[1:], how=paired)),
        prepare=biases_of("o_proj", "down_proj"),
    ),
    "TeleFLMForCausalLM": Rewritten(
        "Granite",
        {"embedding_multiplier": 3.0, "attention_multiplier": 0.25, "logits_scaling": 0.5},
        config=both(teleflm_config, old_rope, without("attention_bias", "mlp_bias")),
    ),
    "JAISLMHeadModel": Rewritten(
        "StableLm",
        {"num_key_value_heads": 4, "use_qkv_bias": True, "tie_word_embeddings": True},
        JAIS,
        jais_config,
        jais_tensors,
        call=alibi(),
    ),
    **dict.fromkeys(("AquilaForCausalLM", "AquilaModel", "XverseForCausalLM"), Rewritten("Llama", config=old_rope)),
    "NanbeigeForCausalLM": Rewritten("Llama", config=old_rope),
    "YiForCausalLM": Rewritten(
        "Llama", names={"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}, config=old_rope
    ),
    "MiMoForCausalLM": Rewritten(
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1},
        config=both(old_rope, lambda config: config.pop("layer_types")),
    ),
    "ChatGLMModel": Rewritten(
        "Glm",
        {"attention_bias": True, "rope_parameters": {"rope_theta": 20_000.0, "partial_rotary_factor": 0.5}},
        CHATGLM,
        chatglm_config,
        fuse("self_attention.query_key_value", *QKV),
    ),
    "RWForCausalLM": Rewritten(
        "Falcon",
        {"multi_query": True},
        config=renamed(num_attention_heads="n_head", num_hidden_layers="n_layer"),
    ),
    "MPTForCausalLM": Rewritten("Mpt"),
    "MiniCPMForCausalLM": Rewritten(
        "Granite",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.25, "logits_scaling": 0.5},
        config=both(minicpm_config, old_rope),
    ),
    "ExaoneForCausalLM": Rewritten(
        "Llama",
        {},
        EXAONE,
        both(
            old_rope,
            renamed(num_hidden_layers="num_layers", rms_norm_eps="layer_norm_epsilon"),
            without("attention_bias", "mlp_bias"),
        ),
    ),
    "InternLMForCausalLM": Rewritten(
        "Llama",
        {"attention_bias": True},
        config=both(old_rope, lambda c: c.update(bias=c.pop("attention_bias"), mlp_bias=False)),
    ),
    "InternLM3ForCausalLM": Rewritten(
        "SeedOss",
        {"attention_bias": True},
        config=both(old_rope, lambda c: c.update(qkv_bias=c.pop("attention_bias"), bias=c.pop("attention_out_bias"))),
    ),
    "InternLM2ForCausalLM": Rewritten("Llama", {}, INTERNLM2, old_rope, fuse("attention.wqkv", *QKV, how=grouped)),
    "PanguEmbeddedForCausalLM": Rewritten(
        "Llama", {"attention_bias": True}, config=both(old_rope, renamed(attention_bias="bias"))
    ),
    "Ernie4_5_ForCausalLM": Rewritten("Ernie4_5", config=old_rope),
    "StableLMEpochForCausalLM": Rewritten(
        "StableLm",
        config=both(lambda c: c.update(rope_pct=c["rope_parameters"]["partial_rotary_factor"]), old_rope),
    ),
}
REWRITTEN["ChatGLMForConditionalGeneration"] = REWRITTEN["ChatGLMModel"]
REWRITTEN["TeleFLM"] = REWRITTEN["TeleFLMForCausalLM"]


def ungated_share(model: Any) -> None:
    """The shared experts' gates always give a half."""
    for name, weight in model.named_parameters():
        if "shared_expert_gate" in name:
            weight.data.zero_()


def deepseek_tensors(tensors: Tensors, config: Config) -> None:
    for key in list(tensors):
        if "shared_expert_gate" in key:
            del tensors[key]
        elif "shared_expert.down_proj" in key:
            tensors[key] = tensors[key] / 2


def deepseek_config(config: Config) -> None:
    old_rope(config)
    config |= {"first_k_dense_replace": 1, "moe_layer_freq": 1, "n_shared_experts": 2, "moe_intermediate_size": 40}
    renamed(num_experts="n_routed_experts")(config)
    without(
        *("mlp_only_layers", "decoder_sparse_step", "shared_expert_intermediate_size", "qkv_bias", "layer_types"),
        *("use_sliding_window", "sliding_window", "max_window_layers"),
    )(config)


MOE_FIELDS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 80,
    "mlp_only_layers": [0],
    "norm_topk_prob": True,
    "qkv_bias": False,
}
REWRITTEN["PhiMoEForCausalLM"] = Rewritten("Phimoe", {"num_local_experts": 4, "router_jitter_noise": 0.2})
REWRITTEN["DeepseekForCausalLM"] = Rewritten(
    "Qwen2Moe",
    MOE_FIELDS,
    {"shared_expert.": "shared_experts."},
    deepseek_config,
    deepseek_tensors,
    prepare=ungated_share,
)
REWRITTEN["BailingMoeForCausalLM"] = Rewritten(
    "Qwen2Moe",
    MOE_FIELDS,
    {
        "shared_expert.": "shared_experts.",
        "model.embed_tokens": "model.word_embeddings",
        "self_attn.o_proj": "attention.dense",
    },
    both(deepseek_config, renamed(n_shared_experts="num_shared_experts", n_routed_experts="num_experts")),
    both_tensors(deepseek_tensors, fuse("attention.query_key_value", *QKV)),
    prepare=ungated_share,
)


def minimax_config(config: Config) -> None:
    old_rope(config)
    without("block_size", "router_jitter_noise", "sliding_window")(config)
    for ours, theirs in (("full_attn", "full_attention"), ("linear_attn", "linear_attention"), ("mlp", "mlp")):
        for letter in ("alpha", "beta"):
            renamed(**{f"{ours}_{letter}_factor": f"layernorm_{theirs}_{letter}"})(config)
    config["attn_type_list"] = [int(kind == "full_attention") for kind in config.pop("layer_types")]
    config |= {"postnorm": True, "rotary_dim": config["head_dim"], "shared_intermediate_size": 0}


REWRITTEN["MiniMaxText01ForCausalLM"] = Rewritten("MiniMax", {**MINIMAX, "sliding_window": None}, config=minimax_config)
REWRITTEN["MiniMaxM1ForCausalLM"] = REWRITTEN["MiniMaxText01ForCausalLM"]
REWRITTEN["T5WithLMHeadModel"] = Rewritten(
    "T5",
    {"d_model": 64, "d_kv": 20, "d_ff": 96, "num_heads": 4, "num_layers": 3, "relative_attention_max_distance": 20},
    config=without("num_decoder_layers", "feed_forward_proj", "is_gated_act", "dense_act_fn", "scale_decoder_outputs"),
    ending="ForConditionalGeneration",
)
