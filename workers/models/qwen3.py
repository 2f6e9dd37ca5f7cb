"""Qwen3: Qwen2 with a norm on each head of q and k in place of biases; heads of a size of their own."""

from cableway.workers.blocks.attention import Attention
from cableway.workers.blocks.decoder import Decoder, Layer
from cableway.workers.blocks.mlp import MLP
from cableway.workers.blocks.norm import RMSNorm
from cableway.workers.models.config import Size, WindowedConfig
from cableway.workers.models.names import GGUF, HF
from cableway.workers.models.registry import arch


class Qwen3Config(WindowedConfig, frozen=True, kw_only=True):
    head_dim: Size = 128
    attention_bias: bool = False


@arch("Qwen3ForCausalLM", config=Qwen3Config, hf=HF, gguf=GGUF)
def qwen3(c: Qwen3Config) -> Decoder:
    norm, head_norm = RMSNorm(c.hidden_size, c.rms_norm_eps), RMSNorm(c.head_dim, c.rms_norm_eps)
    bias = c.attention_bias
    mixes = [Attention.of(c, window=w, qk_norm=head_norm, bias=bias, out_bias=bias) for w in c.windows()]
    return Decoder(c, [Layer(norm_in=norm, mix=mix, norm_mlp=norm, mlp=MLP.of(c)) for mix in mixes], norm_out=norm)
