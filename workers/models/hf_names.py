"""Names of weights in Hugging Face folders: one table for all families, of the names that each slot goes by.

A name means the same wherever it does the same work, so that most families need no table of their own. A family says
what differs in it: names that nobody else has or that mean something else, and how parts lie in a tensor.
"""

import re
from collections.abc import Mapping
from functools import reduce
from operator import or_
from typing import Any

from cableway.workers.models.layouts import by_group, flat, one_for_all
from cableway.workers.models.names import Names, Target, names, of_parts

_TOWERS = (
    *("vision_model.", "vision_tower.", "multi_modal_projector.", "visual.", "vit.", "audio_tower."),
    *("embed_vision.", "embed_audio."),
)
"""What makes images and sounds into embeddings."""


def of_text(scheme: Any) -> Any:
    """The scheme, or what makes it from the config, for checkpoints of more than text: all is within `language_model`,
    or one level deeper, or beside what is not used."""

    def places(name: str) -> tuple[str, ...]:
        return name, f"language_model.{name}", re.sub(r"^model\.", "model.language_model.", name)

    def within(c: Any) -> Names:
        text = scheme(c) if callable(scheme) else scheme
        targets = {place: target for name, target in text.targets.items() for place in places(name)}
        ignored = frozenset(place for name in text.ignored for place in places(name))
        beyond = tuple(place for name in text.beyond for place in places(name))
        return Names(targets, ignored, beyond + _TOWERS + tuple(f"model.{tower}" for tower in _TOWERS))

    return within


def known_as(slots: Mapping[str, tuple[str, ...]], *modules: str, to: str = "", **how: Any) -> dict[str, Target]:
    """A table of the names that slots `to…` go by within any of these modules, and how parts lie there."""
    found = [(name, Target(to + slot, **how)) for slot, known in slots.items() for name in known]
    return {module + name: target for module in modules or ("",) for name, target in found}


_LAYERS = (
    *("model.layers.{}.", "model.layers.layers.{}.", "model.decoder.layers.{}.", "backbone.layers.{}."),
    *("transformer.h.{}.", "transformer.blocks.{}.", "transformer.encoder.layers.{}.", "gpt_neox.layers.{}."),
)


def in_layers(table: Mapping[str, str | Target], ignored: tuple[str, ...] = ()) -> Names:
    """A scheme from a table of the names within a layer, whatever layers are called."""
    return reduce(or_, (names(table, ignored=ignored, prefix=layer, to="layers.{}.") for layer in _LAYERS))


_AROUND = {
    "embed": (
        *("model.embed_tokens", "model.tok_embeddings", "model.word_embeddings", "model.decoder.embed_tokens"),
        *("transformer.wte", "transformer.word_embeddings", "transformer.embedding.word_embeddings"),
        *("gpt_neox.embed_in", "backbone.embeddings"),
    ),
    "on_embed": ("transformer.word_embeddings_layernorm",),
    "positions.table": ("transformer.wpe", "model.decoder.embed_positions"),
    "project_in": ("model.decoder.project_in",),
    "project_out": ("model.decoder.project_out",),
    "norm_out": (
        *("model.norm", "model.final_layernorm", "model.final_norm", "model.embedding_norm"),
        *("model.decoder.final_layer_norm", "transformer.ln_f", "transformer.norm_f"),
        *("transformer.encoder.final_layernorm", "gpt_neox.final_layer_norm", "backbone.norm_f"),
        "model.norm.scale",
    ),
    "head": ("lm_head", "output", "embed_out", "transformer.output_layer"),
}
_UNUSED_AROUND = (
    *("model.rotary_emb", "transformer.rotary_emb", "transformer.rotary_pos_emb", "transformer.rotary"),
    "transformer.relative_pe",
)
_NORMS = {
    "norm_in": (
        *("input_layernorm", "attention_layernorm", "attention_layer_norm", "self_attn_layer_norm", "ln_attn"),
        *("attention_norm", "operator_norm", "temporal_pre_norm", "pre_mixer_norm", "norm_attn_norm.norm_1"),
        *("pre_attn_norm.scale", "norm_1", "ln_1", "ln1", "norm"),
    ),
    "norm_mix_out": ("post_self_attn_layernorm", "post_mixer_norm", "post_attn_norm.scale"),
    "norm_mlp": (
        *("post_attention_layernorm", "feedforward_layernorm", "feedforward_layer_norm", "final_layer_norm"),
        *("pre_feedforward_layernorm", "pre_ff_layernorm", "pre_mlp_norm", "channel_pre_norm", "ln_mlp"),
        *("pre_moe_norm.scale", "ffn_norm", "norm_attn_norm.norm_2", "norm_2", "ln_2", "ln2"),
    ),
    "norm_mlp_out": ("post_feedforward_layernorm", "post_mlp_layernorm", "post_mlp_norm", "post_moe_norm.scale"),
}
_ATTENTIONS = (
    *("self_attn.", "self_attention.", "attention.", "attn.", "attn.attention.", "norm_attn_norm.attn."),
    *("mixer.", "temporal_block."),
)
_ATTENTION = {
    "qkv": ("qkv_proj", "W_pack", "Wqkv", "c_attn"),
    "qkv.q": ("q_proj", "query"),
    "qkv.k": ("k_proj",),
    "qkv.v": ("v_proj",),
    "q_norm.{}": ("q_layernorm.norms.{}",),
    "k_norm.{}": ("k_layernorm.norms.{}",),
    "sinks": ("sinks",),
    "q1": ("lambda_q1",),
    "k1": ("lambda_k1",),
    "q2": ("lambda_q2",),
    "k2": ("lambda_k2",),
    "norm_y": ("attn_sub_norm", "subln"),
    "out": ("o_proj", "out_proj", "c_proj", "dense", "wo"),
}
_ATTENTION_BY_GROUP = {"qkv": ("query_key_value", "wqkv")}
_HEAD_NORMS = {
    "q_norm": ("q_norm", "q_layernorm", "query_layernorm"),
    "k_norm": ("k_norm", "k_layernorm", "key_layernorm"),
}
_KV_SCALES = {
    "kv_scales.k": ("k_scale", "k_proj.k_scale"),
    "kv_scales.v": ("v_scale", "v_proj.v_scale"),
    "kv_scales": ("kv_scale",),
}
"""Of f8 caches, as LLM Compressor, AutoFP8 and ModelOpt name them."""
_UNUSED = tuple(module + name for module in _ATTENTIONS for name in ("rotary_emb", "rotary", "bias", "masked_bias"))
RECURRENT = {
    "project": ("in_proj",),
    "project.z": ("in_proj_z", "g_proj"),
    "steps.a": ("in_proj_a", "a_proj"),
    "steps.b": ("in_proj_b", "b_proj"),
    "conv": ("conv1d", "conv"),
    "conv.q": ("q_conv1d",),
    "conv.k": ("k_conv1d",),
    "conv.v": ("v_conv1d",),
    "select": ("x_proj",),
    "dt": ("dt_proj",),
    "dt_norm": ("dt_layernorm",),
    "b_norm": ("b_layernorm",),
    "c_norm": ("c_layernorm",),
    "dt_bias": ("dt_bias",),
    "a_log": ("A_log",),
    "d": ("D",),
    "norm": ("norm", "o_norm"),
    "out": ("out_proj", "o_proj"),
}
"""Of mixers that keep a state."""
_MLPS = ("mlp.", "feed_forward.", "ffn.", "mlp_block.", "block_sparse_moe.", "block_sparse_moe.mlp.", "")
_MLP = {
    "gate_up": ("gate_up_proj",),
    "gate_up.gate": ("gate_proj", "w1", "c_fc_0"),
    "gate_up.up": ("up_proj", "w3", "c_fc_1"),
    "up": ("fc1", "fc_in", "c_fc", "dense_h_to_4h"),
    "down": ("down_proj", "w2", "c_proj", "fc2", "fc_out", "dense_4h_to_h"),
    "norm": ("ffn_sub_norm",),
}
_SHARED = (
    *("mlp.shared_expert.", "mlp.shared_experts.", "mlp.shared_mlp.", "block_sparse_moe.shared_experts."),
    *("feed_forward.shared_expert.", "share_expert."),
)
_EXPERTS = ("mlp.experts.{}.", "block_sparse_moe.experts.{}.", "feed_forward.experts.{}.", "moe_block.experts.{}.")
_EXPERT = {
    "gate_up.{}.gate": ("gate_proj", "w1", "linear"),
    "gate_up.{}.up": ("up_proj", "w3", "linear_v"),
    "down.{}": ("down_proj", "w2", "linear_1"),
}
_ROUTER = {
    "router.gate": (
        *("mlp.gate", "mlp.gate.wg", "mlp.router", "block_sparse_moe.gate", "block_sparse_moe.router.layer"),
        *("feed_forward.gate", "feed_forward.router", "ffn.router.layer", "moe.gate", "moe_block.gate"),
    ),
    "shared_gate": ("mlp.shared_expert_gate",),
}
_CORRECTION = {
    "router.correction": (
        *("mlp.gate.e_score_correction_bias", "mlp.moe_statics.e_score_correction_bias", "feed_forward.expert_bias"),
        *("block_sparse_moe.e_score_correction_bias", "block_sparse_moe.gate.e_score_correction_bias"),
    )
}
HF = names(known_as(_AROUND), ignored=_UNUSED_AROUND) | in_layers(
    {
        **known_as(_NORMS),
        **known_as(_ATTENTION, *_ATTENTIONS, to="mix."),
        **known_as(_ATTENTION_BY_GROUP, *_ATTENTIONS, to="mix.", layout=by_group),
        **known_as(_HEAD_NORMS, *_ATTENTIONS, to="mix.", layout=flat),
        **known_as(_KV_SCALES, *_ATTENTIONS, to="mix.", layout=one_for_all),
        **known_as(RECURRENT, "mixer.", "mamba.", "linear_attn.", "conv.", to="mix."),
        **of_parts("linear_attn.*_proj", "mix.project"),
        **known_as(_MLP, *_MLPS, to="mlp."),
        **known_as(_MLP, *_SHARED, to="mlp.shared."),
        **known_as(_EXPERT, *_EXPERTS, to="mlp."),
        **known_as(_ROUTER, to="mlp."),
        **known_as(_CORRECTION, to="mlp.", layout=flat),
    },
    ignored=_UNUSED,
)
HF |= Names(beyond=("mtp.",))
"""Names of every family, of which each has some; `mtp` predicts further tokens, and is not used."""

LAYER = {"prefix": "model.layers.{}.", "to": "layers.{}."}
MIX = {"prefix": "model.layers.{}.self_attn.", "to": "layers.{}.mix."}
GPT_LAYER = {"prefix": "transformer.h.{}.", "to": "layers.{}."}
PLAIN_MLP = in_layers(known_as({"up": ("up_proj",)}, "mlp.", "ffn.", to="mlp."))
"""Of MLPs without a gate."""
POST_NORM = names({"post_attention_layernorm": "norm_mix_out"}, **LAYER)
"""This norm follows attention, and is not that before the MLP."""
