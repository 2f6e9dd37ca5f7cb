"""Gated delta nets with attention in every fourth layer. Qwen3-Next and the text of Qwen3.5: that attention is gated,
norms are stored as w - 1; experts, or in the smaller Qwen3.5 a plain MLP. OLMo Hybrid: norms after its attention."""

from functools import partial
from typing import Any

from cableway.workers.blocks.attention import Attention, GatedAttention
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.delta import GatedDeltaNet
from cableway.workers.blocks.layers import Layer
from cableway.workers.blocks.mlp import MLP
from cableway.workers.blocks.norm import RMSNorm
from cableway.workers.models.config import Count, DecoderConfig, Size, SomeMoEConfig, every
from cableway.workers.models.frames import pre_norm
from cableway.workers.models.gguf_names import GGUF, GGUF_MIX, MID_NORM, larger_norms, value_heads_in_turns
from cableway.workers.models.hf_names import HF, LAYER, of_text
from cableway.workers.models.layouts import by_group
from cableway.workers.models.moe import mixture, some_sparse
from cableway.workers.models.names import Names, Target, names
from cableway.workers.models.olmo import joint_norms
from cableway.workers.models.registry import arch


class Qwen3NextConfig(SomeMoEConfig, frozen=True, kw_only=True):
    head_dim: Size = 256
    layer_types: list[str]
    linear_num_value_heads: Size = 32
    linear_num_key_heads: Size = 16
    linear_value_head_dim: Size = 128
    linear_key_head_dim: Size = 128
    linear_conv_kernel_dim: Size = 4
    norm_topk_prob: bool = True
    decoder_sparse_step: Size = 1
    mlp_only_layers: tuple[int, ...] = ()
    shared_expert_intermediate_size: Count = 0
    num_nextn_predict_layers: Count = 0
    rotary_frac = 0.25

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        period = config.get("full_attention_interval") or 4
        config.setdefault("layer_types", every(period, config["num_hidden_layers"], "linear_attention"))

    def is_sparse(self, layer: int) -> bool:
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0


def _names(c: Qwen3NextConfig) -> Names:
    by_key_head = partial(by_group, num_groups=c.linear_num_key_heads)
    mixers = {
        "self_attn.q_proj": Target("mix.qkv", layout=by_group, parts=("q", "gate")),
        "linear_attn.in_proj_qkvz": Target("mix.project", layout=by_key_head),
        "linear_attn.in_proj_ba": Target("mix.steps", layout=by_key_head),
        "linear_attn.in_proj_qkv": Target("mix.project", parts=("q", "k", "v")),
    }
    return HF | names(mixers, **LAYER)


def _gguf(c: Qwen3NextConfig) -> Names:
    by_key_head = partial(by_group, num_groups=c.linear_num_key_heads)
    mixers = {
        "attn_q": Target("qkv", layout=by_group, parts=("q", "gate")),
        "attn_qkv": Target("project", parts=("q", "k", "v")),
        "attn_gate": "project.z",
        "ssm_in": Target("project", layout=by_key_head),  # before it was taken apart
        "ssm_ba": Target("steps", layout=by_key_head),
        "ssm_beta": "steps.b",
        "ssm_alpha": "steps.a",
        "ssm_dt.bias": "dt_bias",
        "ssm_norm.weight": "norm",
    }
    return larger_norms(GGUF | MID_NORM) | names(mixers, **GGUF_MIX)


def _gguf_in_turns(c: Qwen3NextConfig) -> Names:
    return value_heads_in_turns(_gguf(c), c.linear_num_key_heads, c.linear_value_head_dim)


@arch("Qwen3NextForCausalLM", config=Qwen3NextConfig, hf=_names, gguf=_gguf)
@arch("Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM", config=Qwen3NextConfig, hf=_names, gguf=_gguf_in_turns)
@arch("Qwen3_5ForConditionalGeneration", config=Qwen3NextConfig, hf=of_text(_names), like="Qwen3_5")
@arch("Qwen3_5MoeForConditionalGeneration", config=Qwen3NextConfig, hf=of_text(_names), like="Qwen3_5Moe")
def qwen3_next(c: Qwen3NextConfig) -> Decoder:
    kinds = {
        "full_attention": GatedAttention.of(c, qk_norm=RMSNorm(c.head_dim, c.norm_eps, 1.0)),
        "linear_attention": GatedDeltaNet.of(c, norm_eps=c.norm_eps),
    }
    mlps: Any = MLP.of(c)
    if c.num_experts:
        shared = MLP.of(c, ffn_size=c.shared_expert_intermediate_size)
        mlps = some_sparse(c, mixture(c, shared=shared, shared_gate=True))
    return pre_norm(c, c.by_layer(kinds), mlps, RMSNorm(c.hidden_size, c.norm_eps, 1.0))


class OlmoHybridConfig(DecoderConfig, frozen=True, kw_only=True):
    layer_types: list[str]
    has_rope: bool = True
    linear_num_value_heads: Size
    linear_num_key_heads: Size
    linear_value_head_dim: Size
    linear_key_head_dim: Size
    linear_conv_kernel_dim: Size = 4
    linear_allow_neg_eigval: bool = True

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        config["has_rope"] = bool(config.get("rope_parameters") or config.get("rope_theta"))


def _olmo_names(c: OlmoHybridConfig) -> Names:
    after = {}
    for i, kind in enumerate(c.layer_types):
        if kind == "full_attention":
            after[f"model.layers.{i}.post_attention_layernorm"] = f"layers.{i}.norm_mix_out"
            after[f"model.layers.{i}.feedforward_layer_norm"] = f"layers.{i}.norm_mix_out"  # as transformers saves it
            after[f"model.layers.{i}.post_feedforward_layernorm"] = f"layers.{i}.norm_mlp_out"
    return HF | names(after)


@arch("OlmoHybridForCausalLM", config=OlmoHybridConfig, hf=_olmo_names)
def olmo_hybrid(c: OlmoHybridConfig) -> Decoder:
    norm, mlp = RMSNorm(c.hidden_size, c.norm_eps), MLP.of(c)
    attention = Attention.of(c, qk_norm=joint_norms(c), rope=c.rope() if c.has_rope else None)
    linear = GatedDeltaNet.of(c, norm_eps=1e-5, most=2.0 if c.linear_allow_neg_eigval else 1.0)
    kinds = {
        "linear_attention": Layer(norm_in=norm, mix=linear, norm_mlp=norm, mlp=mlp),
        "full_attention": Layer(mix=attention, norm_mix_out=norm, mlp=mlp, norm_mlp_out=norm),
    }
    return Decoder(c, c.by_layer(kinds), norm_out=norm)
