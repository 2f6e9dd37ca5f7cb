"""Qwen3: Qwen2 with a norm on each head of q and k in place of biases; heads of a size of their own."""

from cableway.workers.blocks.attention import Attention
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.norm import RMSNorm
from cableway.workers.models.config import Size, WindowedConfig
from cableway.workers.models.frames import pre_norm
from cableway.workers.models.gguf_names import GGUF
from cableway.workers.models.hf_names import HF, of_text
from cableway.workers.models.registry import arch


class Qwen3Config(WindowedConfig, frozen=True, kw_only=True):
    head_dim: Size = 128


@arch("Qwen3ForCausalLM", config=Qwen3Config, hf=HF, gguf=GGUF)
@arch("Qwen3VLForConditionalGeneration", config=Qwen3Config, hf=of_text(HF), like="Qwen3")
def qwen3(c: Qwen3Config) -> Decoder:
    norm = RMSNorm(c.head_dim, c.norm_eps)
    return pre_norm(c, [Attention.of(c, window=window, qk_norm=norm) for window in c.windows()])
