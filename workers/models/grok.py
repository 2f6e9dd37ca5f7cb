"""Grok-1: norms on both sides of each sublayer, capped scores, experts with GELU whose weights are not renormalised."""

from cableway.workers.blocks.attention import Attention
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.norm import Scale
from cableway.workers.models.config import Epsilon, Factor, MoEConfig
from cableway.workers.models.frames import sandwich
from cableway.workers.models.gguf_names import GGUF, GGUF_LAYER
from cableway.workers.models.hf_names import HF
from cableway.workers.models.moe import mixture
from cableway.workers.models.names import names
from cableway.workers.models.registry import arch

GGUF_GROK = GGUF | names({"attn_output_norm": "norm_mix_out", "layer_output_norm": "norm_mlp_out"}, **GGUF_LAYER)


class GrokConfig(MoEConfig, frozen=True, kw_only=True):
    norm_eps: Epsilon = 1e-5
    hidden_act: str = "gelu_tanh"  # what the first release, in JAX, calls gelu
    attn_output_multiplier: Factor = 128**-0.5
    max_attn_value: Factor = 30.0
    embedding_multiplier_scale: Factor = 6144**0.5
    output_multiplier_scale: Factor = 3**-0.5
    tie_word_embeddings: bool = True


@arch("Grok1ModelForCausalLM", config=GrokConfig, hf=HF, gguf=GGUF_GROK, like="Gemma2")
def grok(c: GrokConfig) -> Decoder:
    mix = Attention.of(c, scale=c.attn_output_multiplier, soft_cap=c.max_attn_value)
    embed, logits = Scale(c.embedding_multiplier_scale), Scale(c.output_multiplier_scale)
    return sandwich(c, mix, mixture(c), on_embed=embed, on_logits=logits)
