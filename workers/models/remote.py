"""Families that publish code of their own beside their weights: Baichuan, Qwen 1, TeleChat 2, Jais. Each is a relative
of Llama or GPT-2 under other names; none of their code is run."""

from typing import Any

from cableway.workers.blocks.attention import ALiBi, Attention
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.mlp import MLP
from cableway.workers.blocks.norm import LayerNorm, Scale
from cableway.workers.models.config import DecoderConfig, Factor
from cableway.workers.models.frames import pre_norm
from cableway.workers.models.gguf_names import GGUF, GGUF_NEIGHBOURS
from cableway.workers.models.names import HF, Names, Target, by_group, names, normalised_rows, transposed
from cableway.workers.models.registry import arch, relative

_NORMED_HEAD_VOCAB_SIZE = 125_696
"""Of Baichuan 2, whose rows of the head are normalised before they are used."""

BAICHUAN = HF | names({"model.layers.{}.self_attn.W_pack": "layers.{}.mix.qkv"})

NORMED_HEAD = names({"lm_head": Target("head", layout=normalised_rows)})
QWEN = names(
    {
        "wte": "embed",
        "h.{}.ln_1": "layers.{}.norm_in",
        "h.{}.attn.c_attn": "layers.{}.mix.qkv",
        "h.{}.attn.c_proj": "layers.{}.mix.out",
        "h.{}.ln_2": "layers.{}.norm_mlp",
        "h.{}.mlp.w2": "layers.{}.mlp.gate_up.gate",
        "h.{}.mlp.w1": "layers.{}.mlp.gate_up.up",
        "h.{}.mlp.c_proj": "layers.{}.mlp.down",
        "ln_f": "norm_out",
    },
    ignored=("rotary_emb",),
    prefix="transformer.",
) | names({"lm_head": "head"})
TELECHAT2 = names(
    {
        "word_embeddings": "embed",
        "h.{}.input_layernorm": "layers.{}.norm_in",
        "h.{}.self_attention.query": "layers.{}.mix.qkv.q",
        "h.{}.self_attention.key_value": Target("layers.{}.mix.qkv", layout=by_group, parts=("k", "v")),
        "h.{}.self_attention.dense": "layers.{}.mix.out",
        "h.{}.post_attention_layernorm": "layers.{}.norm_mlp",
        "h.{}.mlp.gate_proj": "layers.{}.mlp.gate_up.gate",
        "h.{}.mlp.up_proj": "layers.{}.mlp.gate_up.up",
        "h.{}.mlp.down_proj": "layers.{}.mlp.down",
        "ln_f": "norm_out",
    },
    prefix="transformer.",
) | names({"lm_head": "head"})
JAIS = names(
    {
        "wte": "embed",
        "h.{}.ln_1": "layers.{}.norm_in",
        "h.{}.attn.c_attn": Target("layers.{}.mix.qkv", layout=transposed),
        "h.{}.attn.c_proj": Target("layers.{}.mix.out", layout=transposed),
        "h.{}.ln_2": "layers.{}.norm_mlp",
        "h.{}.mlp.c_fc2": Target("layers.{}.mlp.gate_up.gate", layout=transposed),
        "h.{}.mlp.c_fc": Target("layers.{}.mlp.gate_up.up", layout=transposed),
        "h.{}.mlp.c_proj": Target("layers.{}.mlp.down", layout=transposed),
        "ln_f": "norm_out",
    },
    ignored=("h.{}.attn.bias", "h.{}.attn.masked_bias", "relative_pe"),
    prefix="transformer.",
)
GGUF_NORMED_HEAD = names({"output": Target("head", layout=normalised_rows)})


class BaichuanConfig(DecoderConfig, frozen=True, kw_only=True):
    has_rope: bool = True

    @staticmethod
    def derive(config: dict[str, Any]) -> None:
        config.setdefault("has_rope", "max_position_embeddings" in config)  # 13B has `model_max_length`, and ALiBi


class QwenConfig(DecoderConfig, frozen=True, kw_only=True):
    no_bias: bool = True

    @staticmethod
    def derive(config: dict[str, Any]) -> None:
        config["intermediate_size"] //= 2


class JaisConfig(DecoderConfig, frozen=True, kw_only=True):
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    embedding_factor: Factor = 1.0
    logit_factor: Factor = 1.0
    mup_scale_qk_dot_by_d: bool = False

    @staticmethod
    def derive(config: dict[str, Any]) -> None:
        config["hidden_act"] = "silu"  # said to be `swiglu`
        config["embedding_factor"] = config.get("mup_embeddings_scale", config.get("embeddings_scale", 1.0))
        by_width = config.get("mup_output_alpha", 1.0) * config.get("mup_width_scale", 1.0)
        config["logit_factor"] = config.get("width_scale", by_width)


def _baichuan_names(c: BaichuanConfig) -> Names:
    return BAICHUAN | NORMED_HEAD if c.vocab_size == _NORMED_HEAD_VOCAB_SIZE else BAICHUAN


def _baichuan_gguf(c: BaichuanConfig) -> Names:
    normed = c.vocab_size == _NORMED_HEAD_VOCAB_SIZE
    return GGUF_NEIGHBOURS | GGUF_NORMED_HEAD if normed else GGUF_NEIGHBOURS


@arch(
    "BaiChuanForCausalLM",
    "BaichuanForCausalLM",
    config=BaichuanConfig,
    hf=_baichuan_names,
    gguf=_baichuan_gguf,
    verified=relative("Llama"),
)
def baichuan(c: BaichuanConfig) -> Decoder:
    return pre_norm(c, Attention.of(c, rope=c.rope() if c.has_rope else ALiBi(c.num_attention_heads)))


@arch("QWenLMHeadModel", config=QwenConfig, hf=QWEN, gguf=GGUF, verified=relative("Qwen2"))
def qwen(c: QwenConfig) -> Decoder:
    bias = not c.no_bias
    return pre_norm(c, Attention.of(c, bias=True, out_bias=bias), MLP.of(c, bias=bias))


@arch("TeleChat2ForCausalLM", config=DecoderConfig, hf=TELECHAT2, verified=relative("Llama"))
def telechat2(c: DecoderConfig) -> Decoder:
    return pre_norm(c, Attention.of(c, out_bias=True), MLP.of(c, out_bias=True))


@arch("JAISLMHeadModel", config=JaisConfig, hf=JAIS, verified=relative("StableLm"))
def jais(c: JaisConfig) -> Decoder:
    norm, scale = LayerNorm(c.hidden_size, c.norm_eps), c.head_dim ** -(1.0 if c.mup_scale_qk_dot_by_d else 0.5)
    mix = Attention.of(c, rope=ALiBi(c.num_attention_heads), scale=scale, bias=True, out_bias=True)
    embed, logits = Scale(c.embedding_factor), Scale(c.logit_factor)
    return pre_norm(c, mix, MLP.of(c, bias=True), norm, on_embed=embed, on_logits=logits)
