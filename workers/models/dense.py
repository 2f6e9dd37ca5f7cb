"""Relatives of Llama with one thing changed: another norm or MLP, norms of heads, biases, layers without positions."""

from typing import Any

from cableway.workers.blocks.attention import Attention, LateNormAttention, NormedAttention
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.linear import Axis
from cableway.workers.blocks.mlp import MLP, XIELU, PlainMLP
from cableway.workers.blocks.norm import HeadNorms, JointNorm, LayerNorm, RMSNorm
from cableway.workers.models.config import DecoderConfig, Epsilon, Size, WindowedConfig
from cableway.workers.models.frames import pre_norm, side_by_side
from cableway.workers.models.gguf_names import GGUF, GGUF_MIX, GGUF_NEIGHBOURS, MID_NORM, larger_norms
from cableway.workers.models.gguf_names import PLAIN_MLP as GGUF_PLAIN_MLP
from cableway.workers.models.glm import halves
from cableway.workers.models.hf_names import HF, LAYER, PLAIN_MLP, of_text
from cableway.workers.models.layouts import stacked
from cableway.workers.models.names import Target, names
from cableway.workers.models.registry import arch

PLAIN = HF | PLAIN_MLP
APERTUS = PLAIN | names(
    {"mlp.act_fn.alpha_p": "mlp.act.alpha_p", "mlp.act_fn.alpha_n": "mlp.act.alpha_n"},
    ignored=("mlp.act_fn.beta", "mlp.act_fn.eps"),
    **LAYER,
)
GGUF_STABLELM = GGUF | names(
    {"attn_q_norm": Target("q_norm", layout=stacked), "attn_k_norm": Target("k_norm", layout=stacked)}, **GGUF_MIX
)


class BiasConfig(DecoderConfig, frozen=True, kw_only=True):
    """Switches for biases under every name they go by: of q, k and v, of the attention's output, of the MLP."""

    attention_out_bias: bool = False

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        everywhere = config.get("use_bias", config.get("bias", False))
        bias = config.get("attention_bias", config.get("qkv_bias", everywhere))
        config["attention_bias"] = bias
        config.setdefault("attention_out_bias", everywhere if "qkv_bias" in config else bias)
        config.setdefault("mlp_bias", everywhere)


class HeliumConfig(BiasConfig, frozen=True, kw_only=True):
    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        super().derive(config)
        config["attention_out_bias"] = False


class NormConfig(BiasConfig, frozen=True, kw_only=True):
    norm_eps: Epsilon = 1e-5
    hidden_act: str = "relu2"


class NemotronConfig(NormConfig, frozen=True, kw_only=True):
    rotary_frac = 0.5


class PersimmonConfig(DecoderConfig, frozen=True, kw_only=True):
    norm_eps: Epsilon = 1e-5
    hidden_act: str = "relu2"
    qk_layernorm: bool = True
    rotary_frac = 0.5


class StableLmConfig(DecoderConfig, frozen=True, kw_only=True):
    norm_eps: Epsilon = 1e-5
    use_qkv_bias: bool = False
    qk_layernorm: bool = False
    use_parallel_residual: bool = False
    rotary_frac = 0.25


class SmolLM3Config(WindowedConfig, frozen=True, kw_only=True):
    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: Size = 4


class ErnieConfig(BiasConfig, frozen=True, kw_only=True):
    tie_word_embeddings: bool = True


@arch("SeedOssForCausalLM", config=BiasConfig, hf=HF, gguf=GGUF | MID_NORM)
@arch("InternLMForCausalLM", config=BiasConfig, hf=HF, like="Llama")
@arch("InternLM3ForCausalLM", config=BiasConfig, hf=HF, like="SeedOss")
@arch("InternLM2ForCausalLM", config=BiasConfig, hf=HF, gguf=GGUF_NEIGHBOURS, like="Llama")
@arch("PanguEmbeddedForCausalLM", config=BiasConfig, hf=HF, like="Llama")
@arch("HeliumForCausalLM", config=HeliumConfig, hf=halves(HF))
@arch("Ernie4_5ForCausalLM", config=ErnieConfig, hf=halves(HF), gguf=GGUF_NEIGHBOURS)
@arch("Ernie4_5_ForCausalLM", config=ErnieConfig, hf=halves(HF), like="Ernie4_5")
def biased(c: BiasConfig) -> Decoder:
    return pre_norm(c, Attention.of(c))


@arch("OrionForCausalLM", config=BiasConfig, hf=HF, gguf=GGUF, like="StableLm")
def orion(c: BiasConfig) -> Decoder:
    return pre_norm(c, Attention.of(c), norm=LayerNorm(c.hidden_size, c.norm_eps))


@arch("ArceeForCausalLM", config=NormConfig, hf=PLAIN, gguf=GGUF_NEIGHBOURS | GGUF_PLAIN_MLP)
def arcee(c: NormConfig) -> Decoder:
    return pre_norm(c, Attention.of(c), PlainMLP.of(c))


@arch("NemotronForCausalLM", config=NemotronConfig, hf=PLAIN, gguf=larger_norms(GGUF | GGUF_PLAIN_MLP))
def nemotron(c: NemotronConfig) -> Decoder:
    return pre_norm(c, Attention.of(c), PlainMLP.of(c), LayerNorm(c.hidden_size, c.norm_eps, offset=1.0))


@arch("Jais2ForCausalLM", config=NormConfig, hf=PLAIN)
def jais2(c: NormConfig) -> Decoder:
    return pre_norm(c, Attention.of(c), PlainMLP.of(c), LayerNorm(c.hidden_size, c.norm_eps))


@arch("ApertusForCausalLM", config=DecoderConfig, hf=APERTUS)
def apertus(c: DecoderConfig) -> Decoder:
    mix = Attention.of(c, qk_norm=RMSNorm(c.head_dim, c.norm_eps))
    return pre_norm(c, mix, PlainMLP.of(c, act=XIELU()))


@arch("PersimmonForCausalLM", config=PersimmonConfig, hf=HF)
def persimmon(c: PersimmonConfig) -> Decoder:
    head_norm = LayerNorm(c.head_dim, c.norm_eps) if c.qk_layernorm else None
    mix = Attention.of(c, bias=True, out_bias=True, qk_norm=head_norm)
    return pre_norm(c, mix, PlainMLP.of(c, bias=True), LayerNorm(c.hidden_size, c.norm_eps))


@arch("StableLmForCausalLM", config=StableLmConfig, hf=HF, gguf=GGUF_STABLELM)
@arch("StableLMEpochForCausalLM", config=StableLmConfig, hf=HF, like="StableLm")
def stablelm(c: StableLmConfig) -> Decoder:
    norm, head_norms = LayerNorm(c.hidden_size, c.norm_eps), None
    if c.qk_layernorm:
        head_norms = tuple(HeadNorms(axis, c.norm_eps) for axis in c.head_axes())
    mix = Attention.of(c, bias=c.use_qkv_bias, qk_norm=head_norms)
    return (side_by_side if c.use_parallel_residual else pre_norm)(c, mix, MLP.of(c), norm)


@arch("HunYuanDenseV1ForCausalLM", config=DecoderConfig, hf=HF, gguf=GGUF)
@arch("HunYuanVLForConditionalGeneration", config=DecoderConfig, hf=of_text(HF), like="HunYuanDenseV1")
def hunyuan(c: DecoderConfig) -> Decoder:
    return pre_norm(c, LateNormAttention.of(c, qk_norm=RMSNorm(c.head_dim, c.norm_eps)))


@arch("BitNetForCausalLM", config=DecoderConfig, hf=HF)
def bitnet(c: DecoderConfig) -> Decoder:
    norm = JointNorm(Axis("ffn", c.intermediate_size), c.norm_eps)
    return pre_norm(c, NormedAttention.of(c, eps=c.norm_eps), MLP.of(c, norm=norm))


@arch("SmolLM3ForCausalLM", config=SmolLM3Config, hf=HF, gguf=GGUF_NEIGHBOURS)
def smollm3(c: SmolLM3Config) -> Decoder:
    turns = c.no_rope_layers or [(i + 1) % c.no_rope_layer_interval for i in range(c.num_hidden_layers)]
    ropes = [c.rope() if turn else None for turn in turns]
    layers = zip(c.windows(), ropes, strict=True)
    return pre_norm(c, [Attention.of(c, window=window, rope=rope) for window, rope in layers])
