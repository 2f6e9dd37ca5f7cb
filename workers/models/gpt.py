"""GPT-2, BigCode (StarCoder: one KV head), GPT-J and GPT-NeoX (side by side), StarCoder2: LayerNorms and plain MLPs."""

from typing import Any

from cableway.workers.blocks.attention import Attention
from cableway.workers.blocks.decoder import Decoder, Positions
from cableway.workers.blocks.layers import Layer, ParallelLayer
from cableway.workers.blocks.mlp import PlainMLP
from cableway.workers.blocks.norm import LayerNorm
from cableway.workers.models.config import DecoderConfig, Epsilon, Size
from cableway.workers.models.frames import pre_norm, side_by_side
from cableway.workers.models.gguf_names import GGUF, PLAIN_MLP
from cableway.workers.models.hf_names import GPT_LAYER, HF
from cableway.workers.models.layouts import by_group, transposed
from cableway.workers.models.names import Target, interleaved, names
from cableway.workers.models.registry import arch

_GPT2 = {"attn.c_attn": "mix.qkv", "attn.c_proj": "mix.out", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}
GPT2 = HF | names({name: Target(slot, layout=transposed) for name, slot in _GPT2.items()}, **GPT_LAYER)
BIGCODE = HF | names({"attn.c_attn": Target("mix.qkv", layout=by_group)}, **GPT_LAYER)


class GPTConfig(DecoderConfig, frozen=True, kw_only=True):
    norm_eps: Epsilon = 1e-5
    hidden_act: str = "gelu_new"

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        config.setdefault("intermediate_size", 4 * config["hidden_size"])


class GPT2Config(GPTConfig, frozen=True, kw_only=True):
    max_position_embeddings: Size = 1024
    tie_word_embeddings: bool = True
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    multi_query: bool = True


class BigCodeConfig(GPT2Config, frozen=True, kw_only=True):
    hidden_act: str = "gelu_pytorch_tanh"

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        super().derive(config)
        config["num_key_value_heads"] = 1 if config.get("multi_query", True) else config["num_attention_heads"]


class GPTJConfig(GPTConfig, frozen=True, kw_only=True):
    rotary_dim: Size = 64


class NeoXConfig(GPTConfig, frozen=True, kw_only=True):
    hidden_act: str = "gelu"
    use_parallel_residual: bool = True
    attention_bias: bool = True
    rotary_frac = 0.25


class StarCoder2Config(GPTConfig, frozen=True, kw_only=True):
    hidden_act: str = "gelu_pytorch_tanh"
    use_bias: bool = True
    tie_word_embeddings: bool = True


@arch("GPT2LMHeadModel", config=GPT2Config, hf=GPT2 | GPT2.without("transformer."), gguf=GGUF | PLAIN_MLP)
@arch("GPTBigCodeForCausalLM", config=BigCodeConfig, hf=BIGCODE, gguf=GGUF | PLAIN_MLP)
def gpt2(c: GPT2Config) -> Decoder:
    norm, mlp = LayerNorm(c.hidden_size, c.norm_eps), PlainMLP.of(c, bias=True)
    scale = c.head_dim**-0.5 if c.scale_attn_weights else 1.0
    by_depth = c.scale_attn_by_inverse_layer_idx
    scales = [scale / (i + 1) if by_depth else scale for i in range(c.num_hidden_layers)]
    mixes = [Attention.of(c, rope=None, scale=scale, bias=True, out_bias=True) for scale in scales]
    return pre_norm(c, mixes, mlp, norm, positions=Positions(c.max_position_embeddings, c.hidden_size))


@arch("GPTJForCausalLM", config=GPTJConfig, hf=lambda c: interleaved(HF, c.rotary_dim))
def gptj(c: GPTJConfig) -> Decoder:
    mlp, norm = PlainMLP.of(c, bias=True), LayerNorm(c.hidden_size, c.norm_eps)
    return side_by_side(c, Attention.of(c), mlp, norm, head_bias=True)


@arch("GPTNeoXForCausalLM", config=NeoXConfig, hf=HF, gguf=GGUF | PLAIN_MLP)
def neox(c: NeoXConfig) -> Decoder:
    mlp, norm = PlainMLP.of(c, bias=True), LayerNorm(c.hidden_size, c.norm_eps)
    return pre_norm(c, Attention.of(c), mlp, norm, layer=ParallelLayer if c.use_parallel_residual else Layer)


@arch("Starcoder2ForCausalLM", config=StarCoder2Config, hf=HF, gguf=GGUF | PLAIN_MLP)
def starcoder2(c: StarCoder2Config) -> Decoder:
    bias = c.use_bias
    mix = Attention.of(c, window=c.sliding_window or 0, bias=bias, out_bias=bias)
    return pre_norm(c, mix, PlainMLP.of(c, bias=bias), LayerNorm(c.hidden_size, c.norm_eps))
