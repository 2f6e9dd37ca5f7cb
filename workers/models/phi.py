"""Phi 1 and 2: attention and MLP side by side after one LayerNorm. Phi 3 and 4: Llama, fused matrices, longrope."""

from cableway.workers.blocks.attention import Attention
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.mlp import PlainMLP
from cableway.workers.blocks.norm import LayerNorm
from cableway.workers.models.config import DecoderConfig, Epsilon
from cableway.workers.models.frames import pre_norm, side_by_side
from cableway.workers.models.gguf_names import FUSED_MLP, GGUF, PLAIN_MLP
from cableway.workers.models.hf_names import HF
from cableway.workers.models.registry import arch


class PhiConfig(DecoderConfig, frozen=True, kw_only=True):
    norm_eps: Epsilon = 1e-5
    hidden_act: str = "gelu_new"
    qk_layernorm: bool = False
    rotary_frac = 0.5


class Phi3Config(DecoderConfig, frozen=True, kw_only=True):
    norm_eps: Epsilon = 1e-5


@arch("PhiForCausalLM", config=PhiConfig, hf=HF, gguf=GGUF | PLAIN_MLP)
def phi(c: PhiConfig) -> Decoder:
    head_norm = LayerNorm(c.head_dim, c.norm_eps) if c.qk_layernorm else None
    mix = Attention.of(c, bias=True, out_bias=True, qk_norm=head_norm)
    norm = LayerNorm(c.hidden_size, c.norm_eps)
    return side_by_side(c, mix, PlainMLP.of(c, bias=True), norm, head_bias=True)


@arch("Phi3ForCausalLM", config=Phi3Config, hf=HF, gguf=GGUF | FUSED_MLP)
def phi3(c: Phi3Config) -> Decoder:
    return pre_norm(c, Attention.of(c, window=c.sliding_window or 0))
