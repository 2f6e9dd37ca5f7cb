"""Llama family: Llama 1-3, Mistral, SmolLM, Yi, and Qwen2 (biases on q, k and v; later layers may see a window)."""

from cableway.workers.blocks.attention import Attention
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.layers import Layer
from cableway.workers.blocks.mlp import MLP
from cableway.workers.blocks.norm import RMSNorm
from cableway.workers.models.config import DecoderConfig, Window, WindowedConfig
from cableway.workers.models.names import GGUF, GGUF_LLAMA, HF
from cableway.workers.models.registry import arch


class LlamaConfig(DecoderConfig, frozen=True, kw_only=True):
    attention_bias: bool = False
    mlp_bias: bool = False


class MistralConfig(DecoderConfig, frozen=True, kw_only=True):
    sliding_window: Window | None = 4096


def pre_norm(c: DecoderConfig, mixes: list[Attention], **mlp: bool | None) -> Decoder:
    """A norm before each mixer and each gated MLP, and one at the end."""
    norm = RMSNorm(c.hidden_size, c.norm_eps)
    layers = [Layer(norm_in=norm, mix=mix, norm_mlp=norm, mlp=MLP.of(c, **mlp)) for mix in mixes]
    return Decoder(c, layers, norm_out=norm)


@arch("LlamaForCausalLM", config=LlamaConfig, hf=HF, gguf=GGUF_LLAMA)
def llama(c: LlamaConfig) -> Decoder:
    # Relatives of Llama save biases without a word about them in the config: one is used where there is one.
    bias, mlp_bias = c.attention_bias or None, c.mlp_bias or None
    return pre_norm(c, [Attention.of(c, bias=bias, out_bias=bias)] * c.num_hidden_layers, bias=mlp_bias)


@arch("MistralForCausalLM", config=MistralConfig, hf=HF)
def mistral(c: MistralConfig) -> Decoder:
    return pre_norm(c, [Attention.of(c, window=c.sliding_window or 0)] * c.num_hidden_layers)


@arch("Qwen2ForCausalLM", config=WindowedConfig, hf=HF, gguf=GGUF)
def qwen2(c: WindowedConfig) -> Decoder:
    return pre_norm(c, [Attention.of(c, window=window, bias=True) for window in c.windows()])
