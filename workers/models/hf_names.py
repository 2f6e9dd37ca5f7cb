"""Names of weights in Hugging Face folders that several families have."""

import re
from typing import Any

from cableway.workers.models.layouts import one_for_all
from cableway.workers.models.names import Names, Target, names, of_parts

_TOWERS = (
    *("vision_model.", "vision_tower.", "multi_modal_projector.", "visual.", "vit.", "audio_tower."),
    *("embed_vision.", "embed_audio."),
)
"""What makes images and sounds into embeddings."""


def of_text(scheme: Any) -> Any:
    """The scheme, or what makes it from the config, for checkpoints of more than text: all is within `language_model`,
    or one level deeper, or beside what is not used."""
    if callable(scheme):
        return lambda c: of_text(scheme(c))

    def places(name: str) -> tuple[str, ...]:
        return name, f"language_model.{name}", re.sub(r"^model\.", "model.language_model.", name)

    targets = {place: target for name, target in scheme.targets.items() for place in places(name)}
    ignored = frozenset(place for name in scheme.ignored for place in places(name))
    beyond = tuple(place for name in scheme.beyond for place in places(name))
    return Names(targets, ignored, beyond + _TOWERS + tuple(f"model.{tower}" for tower in _TOWERS))


def without_predictors(c: Any, layers: str = "model.layers.") -> Names:
    """Layers past the last, which predict further tokens (MTP): not used."""
    last = c.num_hidden_layers
    return Names(beyond=tuple(f"{layers}{last + i}." for i in range(c.num_nextn_predict_layers)))


LAYER = {"prefix": "model.layers.{}.", "to": "layers.{}."}
MIX = {"prefix": "model.layers.{}.self_attn.", "to": "layers.{}.mix."}
EMBEDDINGS = names(
    {"model.embed_tokens": "embed", "model.norm": "norm_out", "lm_head": "head"}, ignored=("model.rotary_emb",)
)
ATTENTION = names(
    {
        **of_parts("*_proj", "qkv"),
        "qkv_proj": "qkv",
        "q_norm": "q_norm",
        "k_norm": "k_norm",
        "o_proj": "out",
        # Of f8 caches, as LLM Compressor, AutoFP8 and ModelOpt name them.
        "k_scale": Target("kv_scales.k", layout=one_for_all, leaf="weight"),
        "v_scale": Target("kv_scales.v", layout=one_for_all, leaf="weight"),
        "kv_scale": Target("kv_scales", layout=one_for_all, leaf="weight"),
        "k_proj.k_scale": Target("kv_scales.k", layout=one_for_all, leaf="weight"),
        "v_proj.v_scale": Target("kv_scales.v", layout=one_for_all, leaf="weight"),
    },
    ignored=("rotary_emb",),
    **MIX,
)
GATED_MLP = names(
    {"gate_proj": "gate_up.gate", "up_proj": "gate_up.up", "gate_up_proj": "gate_up", "down_proj": "down"},
    prefix="model.layers.{}.mlp.",
    to="layers.{}.mlp.",
)
PLAIN_MLP = names({"up_proj": "up", "down_proj": "down"}, prefix="model.layers.{}.mlp.", to="layers.{}.mlp.")
PRE_NORMS = names({"input_layernorm": "norm_in", "post_attention_layernorm": "norm_mlp"}, **LAYER)
SANDWICH_NORMS = names(
    {
        "input_layernorm": "norm_in",
        "post_attention_layernorm": "norm_mix_out",
        "pre_feedforward_layernorm": "norm_mlp",
        "post_feedforward_layernorm": "norm_mlp_out",
    },
    **LAYER,
)


def experts(prefix: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> Names:
    """Experts one by one, `prefix.{}.gate`, which follows `model.layers.{}.`."""
    table = {f"{prefix}.{{}}.{gate}": "gate_up.{}.gate", f"{prefix}.{{}}.{up}": "gate_up.{}.up"}
    table[f"{prefix}.{{}}.{down}"] = "down.{}"
    return names(table, prefix="model.layers.{}.", to="layers.{}.mlp.")


GPT_LAYER = {"prefix": "transformer.h.{}.", "to": "layers.{}."}
GPT = (
    names({"wte": "embed", "ln_f": "norm_out"}, prefix="transformer.")
    | names({"ln_1": "norm_in", "ln_2": "norm_mlp"}, ignored=("attn.bias", "attn.masked_bias"), **GPT_LAYER)
    | names({"lm_head": "head"})
)
"""Names of GPT-2 around its attention and MLP, which others took over."""

HF = EMBEDDINGS | ATTENTION | GATED_MLP | PRE_NORMS
"""Names of Llama, which most families took over."""
