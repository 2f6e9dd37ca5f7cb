"""Llama family: Llama 1-3, Mistral, SmolLM, Yi, and Qwen2 (biases on q, k and v; later layers may see a window)."""

from cableway.workers.blocks.attention import Attention
from cableway.workers.blocks.decoder import Decoder, Layer
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


@arch("LlamaForCausalLM", config=LlamaConfig, hf=HF, gguf=GGUF_LLAMA)
def llama(c: LlamaConfig) -> Decoder:
    # Relatives of Llama save biases without a word about them in the config: one is used where there is one.
    bias, mlp_bias = c.attention_bias or None, c.mlp_bias or None
    norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
    mix, mlp = Attention.of(c, bias=bias, out_bias=bias), MLP.of(c, bias=mlp_bias)
    return Decoder(c, [Layer(norm_in=norm, mix=mix, norm_mlp=norm, mlp=mlp)] * c.num_hidden_layers, norm_out=norm)


@arch("MistralForCausalLM", config=MistralConfig, hf=HF)
def mistral(c: MistralConfig) -> Decoder:
    norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
    mix = Attention.of(c, window=c.sliding_window or 0)
    return Decoder(c, [Layer(norm_in=norm, mix=mix, norm_mlp=norm, mlp=MLP.of(c))] * c.num_hidden_layers, norm_out=norm)


@arch("Qwen2ForCausalLM", config=WindowedConfig, hf=HF, gguf=GGUF)
def qwen2(c: WindowedConfig) -> Decoder:
    norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
    mixes = [Attention.of(c, window=window, bias=True) for window in c.windows()]
    return Decoder(c, [Layer(norm_in=norm, mix=mix, norm_mlp=norm, mlp=MLP.of(c)) for mix in mixes], norm_out=norm)
