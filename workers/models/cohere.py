"""Command-R: attention and MLP side by side after one LayerNorm without a bias; neighbouring pairs are rotated. In
Command-R7B (Cohere 2) layers see a window, but for every fourth, which knows no positions."""

from cableway.workers.blocks.attention import Attention
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.mlp import MLP
from cableway.workers.blocks.norm import LayerNorm, Scale
from cableway.workers.models.config import DecoderConfig, Epsilon, Factor, Window
from cableway.workers.models.frames import side_by_side
from cableway.workers.models.gguf_names import GGUF
from cableway.workers.models.glm import halves
from cableway.workers.models.hf_names import HF
from cableway.workers.models.registry import arch


class CohereConfig(DecoderConfig, frozen=True, kw_only=True):
    norm_eps: Epsilon = 1e-5
    logit_scale: Factor = 0.0625
    use_qk_norm: bool = False
    tie_word_embeddings: bool = True


class Cohere2Config(CohereConfig, frozen=True, kw_only=True):
    sliding_window: Window = 4096
    global_period = 4


def command_r(c: CohereConfig, mix: Attention | list[Attention]) -> Decoder:
    norm = LayerNorm(c.hidden_size, c.norm_eps, bias=False)
    return side_by_side(c, mix, MLP.of(c), norm, on_logits=Scale(c.logit_scale))


@arch("CohereForCausalLM", config=CohereConfig, hf=halves(HF), gguf=halves(GGUF))
def cohere(c: CohereConfig) -> Decoder:
    norms = tuple(LayerNorm(c.head_dim, c.norm_eps, bias=False, heads=axis) for axis in c.head_axes())
    return command_r(c, Attention.of(c, qk_norm=norms if c.use_qk_norm else None))


@arch("Cohere2ForCausalLM", config=Cohere2Config, hf=halves(HF), gguf=halves(GGUF))
def cohere2(c: Cohere2Config) -> Decoder:
    near, far = Attention.of(c, window=c.sliding_window), Attention.of(c, rope=None)
    return command_r(c, c.by_layer({"sliding_attention": near, "full_attention": far}))
