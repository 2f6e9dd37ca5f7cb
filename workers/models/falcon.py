"""Falcon (7b: one KV head; 40b, 180b: groups, and a norm each for attention and MLP; RW: ALiBi, one after another),
Bloom and MPT (ALiBi), OPT (learned positions)."""

from typing import Any, Literal

from cableway.workers.blocks.attention import ALiBi, Attention, ClippedAttention
from cableway.workers.blocks.decoder import Decoder, Positions
from cableway.workers.blocks.layers import Layer, ParallelLayer, PostNormLayer
from cableway.workers.blocks.mlp import Activation, PlainMLP
from cableway.workers.blocks.norm import LayerNorm, PlainLayerNorm
from cableway.workers.models.config import DecoderConfig, Epsilon, Factor, Never, Size
from cableway.workers.models.frames import pre_norm, side_by_side
from cableway.workers.models.gguf_names import GGUF, GGUF_LAYER
from cableway.workers.models.gguf_names import PLAIN_MLP as GGUF_PLAIN_MLP
from cableway.workers.models.hf_names import HF, PLAIN_MLP
from cableway.workers.models.names import Names, names
from cableway.workers.models.registry import arch

GGUF_TWO_NORMS = names({"attn_norm_2": "norm_in", "attn_norm": "norm_mlp"}, **GGUF_LAYER)


class FalconConfig(DecoderConfig, frozen=True, kw_only=True):
    norm_eps: Epsilon = 1e-5
    hidden_act: str = "gelu"
    tie_word_embeddings: bool = True
    alibi: bool = False
    bias: bool = False
    parallel_attn: bool = True
    new_decoder_architecture: bool = False
    num_ln_in_parallel_attn: int | None = None

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        config.setdefault("intermediate_size", 4 * config["hidden_size"])
        if not config.get("new_decoder_architecture"):
            config["num_key_value_heads"] = 1 if config.get("multi_query", True) else config["num_attention_heads"]


class BloomConfig(DecoderConfig, frozen=True, kw_only=True):
    norm_eps: Epsilon = 1e-5
    apply_residual_connection_post_layernorm: Never = False
    tie_word_embeddings: bool = True

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        config["intermediate_size"] = 4 * config["hidden_size"]


class MPTConfig(DecoderConfig, frozen=True, kw_only=True):
    norm_eps: Epsilon = 1e-5
    tie_word_embeddings: bool = True
    alibi: Literal[True] = True
    alibi_bias_max: Factor = 8
    clip_qkv: Factor | None = None
    softmax_scale: Factor | None = None
    max_position_embeddings: Size = 2048

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        config |= {key: value for key, value in (config.get("attn_config") or {}).items() if key not in config}
        config["intermediate_size"] = int(config.get("expansion_ratio", 4) * config["hidden_size"])


class OPTConfig(DecoderConfig, frozen=True, kw_only=True):
    norm_eps: Epsilon = 1e-5
    hidden_act: str = "relu"
    tie_word_embeddings: bool = True
    max_position_embeddings: Size = 2048
    word_embed_proj_dim: Size | None = None
    do_layer_norm_before: bool = True
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    remove_final_layer_norm: bool = False

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        config["remove_final_layer_norm"] = config.get("_remove_final_layer_norm", False)


def _falcon_gguf(c: FalconConfig) -> Names:
    return GGUF | GGUF_PLAIN_MLP | GGUF_TWO_NORMS if c.num_ln_in_parallel_attn == 2 else GGUF | GGUF_PLAIN_MLP


@arch("FalconForCausalLM", config=FalconConfig, hf=HF, gguf=_falcon_gguf)
@arch("RWForCausalLM", config=FalconConfig, hf=HF, like="Falcon")
def falcon(c: FalconConfig) -> Decoder:
    norm, bias, has_two = LayerNorm(c.hidden_size, c.norm_eps), c.bias, c.num_ln_in_parallel_attn
    position = {"rope": ALiBi(c.num_attention_heads, scale=c.head_dim**-0.5)} if c.alibi else {}
    mix, mlp = Attention.of(c, bias=bias, out_bias=bias, **position), PlainMLP.of(c, bias=bias)
    if c.new_decoder_architecture and has_two in (None, 2):
        return pre_norm(c, mix, mlp, norm, layer=ParallelLayer)
    return (side_by_side if c.parallel_attn else pre_norm)(c, mix, mlp, norm)


@arch("BloomForCausalLM", config=BloomConfig, hf=HF, gguf=GGUF | GGUF_PLAIN_MLP)
def bloom(c: BloomConfig) -> Decoder:
    norm, alibi = LayerNorm(c.hidden_size, c.norm_eps), ALiBi(c.num_attention_heads)
    mix = Attention.of(c, rope=alibi, bias=True, out_bias=True)
    return pre_norm(c, mix, PlainMLP.of(c, act=Activation("gelu_tanh"), bias=True), norm, on_embed=norm)


@arch("MptForCausalLM", config=MPTConfig, hf=HF | PLAIN_MLP, gguf=GGUF | GGUF_PLAIN_MLP)
@arch("MPTForCausalLM", config=MPTConfig, hf=HF | PLAIN_MLP, like="Mpt")
def mpt(c: MPTConfig) -> Decoder:
    norm = LayerNorm(c.hidden_size, c.norm_eps, bias=None)
    alibi = ALiBi(c.num_attention_heads, most=c.alibi_bias_max)
    mix = ClippedAttention.of(c, rope=alibi, scale=c.softmax_scale, clip=c.clip_qkv, bias=None, out_bias=None)
    return pre_norm(c, mix, PlainMLP.of(c, act=Activation("gelu"), bias=None), norm)


@arch("OPTForCausalLM", config=OPTConfig, hf=HF)
def opt(c: OPTConfig) -> Decoder:
    norm = LayerNorm(c.hidden_size, 1e-5) if c.layer_norm_elementwise_affine else PlainLayerNorm(c.hidden_size, 1e-5)
    bias = c.enable_bias
    mix, mlp = Attention.of(c, rope=None, bias=bias, out_bias=bias), PlainMLP.of(c, bias=bias)
    around: dict[str, Any] = {"positions": Positions(c.max_position_embeddings, c.hidden_size, offset=2)}
    if c.remove_final_layer_norm or not c.do_layer_norm_before:
        around["norm_out"] = None
    layer = Layer if c.do_layer_norm_before else PostNormLayer
    return pre_norm(c, mix, mlp, norm, layer=layer, embed_size=c.word_embed_proj_dim or 0, **around)
