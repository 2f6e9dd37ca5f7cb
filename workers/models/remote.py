"""Families that publish code of their own beside their weights: Baichuan, Qwen 1, TeleChat 2, Jais. Each is a relative
of Llama or GPT-2 under other names; none of their code is run."""

from typing import Any

from cableway.workers.blocks.attention import ALiBi, Attention
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.mlp import MLP
from cableway.workers.blocks.norm import LayerNorm, Scale
from cableway.workers.models.config import DecoderConfig, Epsilon, Factor
from cableway.workers.models.frames import pre_norm
from cableway.workers.models.gguf_names import GGUF, GGUF_NEIGHBOURS
from cableway.workers.models.hf_names import GPT_LAYER, HF
from cableway.workers.models.layouts import by_group, normalised_rows, transposed
from cableway.workers.models.names import Names, Target, names, of_mlp
from cableway.workers.models.registry import arch

_NORMED_HEAD_VOCAB_SIZE = 125_696
"""Of Baichuan 2, whose rows of the head are normalised before they are used."""

NORMED_HEAD = names({"lm_head": Target("head", layout=normalised_rows)})
QWEN = HF | names({"w2": "gate_up.gate", "w1": "gate_up.up"}, prefix="transformer.h.{}.mlp.", to="layers.{}.mlp.")
TELECHAT2 = HF | names({"self_attention.key_value": Target("mix.qkv", layout=by_group, parts=("k", "v"))}, **GPT_LAYER)
_JAIS = {"attn.c_attn": "mix.qkv", "attn.c_proj": "mix.out", **of_mlp("mlp.*", gate="c_fc2", up="c_fc", down="c_proj")}
JAIS = HF | names({name: Target(slot, layout=transposed) for name, slot in _JAIS.items()}, **GPT_LAYER)
GGUF_NORMED_HEAD = names({"output": Target("head", layout=normalised_rows)})


class BaichuanConfig(DecoderConfig, frozen=True, kw_only=True):
    has_rope: bool = True

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        config.setdefault("has_rope", "max_position_embeddings" in config)  # 13B has `model_max_length`, and ALiBi


class QwenConfig(DecoderConfig, frozen=True, kw_only=True):
    no_bias: bool = True

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        config["intermediate_size"] //= 2


class JaisConfig(DecoderConfig, frozen=True, kw_only=True):
    norm_eps: Epsilon = 1e-5
    tie_word_embeddings: bool = True
    embedding_factor: Factor = 1.0
    logit_factor: Factor = 1.0
    mup_scale_qk_dot_by_d: bool = False

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        config["hidden_act"] = "silu"  # said to be `swiglu`
        config["embedding_factor"] = config.get("mup_embeddings_scale", config.get("embeddings_scale", 1.0))
        by_width = config.get("mup_output_alpha", 1.0) * config.get("mup_width_scale", 1.0)
        config["logit_factor"] = config.get("width_scale", by_width)


def _with_head(plain: Names, normed_head: Names) -> Any:
    """The scheme for a config, whose head may be that of Baichuan 2."""
    return lambda c: plain | normed_head if c.vocab_size == _NORMED_HEAD_VOCAB_SIZE else plain


_BAICHUAN = {"hf": _with_head(HF, NORMED_HEAD), "gguf": _with_head(GGUF_NEIGHBOURS, GGUF_NORMED_HEAD)}


@arch("BaiChuanForCausalLM", "BaichuanForCausalLM", config=BaichuanConfig, **_BAICHUAN, like="Llama")
def baichuan(c: BaichuanConfig) -> Decoder:
    return pre_norm(c, Attention.of(c, rope=c.rope() if c.has_rope else ALiBi(c.num_attention_heads)))


@arch("QWenLMHeadModel", config=QwenConfig, hf=QWEN, gguf=GGUF, like="Qwen2")
def qwen(c: QwenConfig) -> Decoder:
    bias = not c.no_bias
    return pre_norm(c, Attention.of(c, bias=True, out_bias=bias), MLP.of(c, bias=bias))


@arch("TeleChat2ForCausalLM", config=DecoderConfig, hf=TELECHAT2, like="Llama")
def telechat2(c: DecoderConfig) -> Decoder:
    return pre_norm(c, Attention.of(c, out_bias=True), MLP.of(c, out_bias=True))


@arch("JAISLMHeadModel", config=JaisConfig, hf=JAIS, like="StableLm")
def jais(c: JaisConfig) -> Decoder:
    norm, scale = LayerNorm(c.hidden_size, c.norm_eps), c.head_dim ** -(1.0 if c.mup_scale_qk_dot_by_d else 0.5)
    mix = Attention.of(c, rope=ALiBi(c.num_attention_heads), scale=scale, bias=True, out_bias=True)
    embed, logits = Scale(c.embedding_factor), Scale(c.logit_factor)
    return pre_norm(c, mix, MLP.of(c, bias=True), norm, on_embed=embed, on_logits=logits)
