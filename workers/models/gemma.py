"""Gemma 1-3: norms stored as w - 1, embeddings times sqrt(hidden). From 2 on norms on both sides of each sublayer and
local layers; 2 caps scores and logits, 3 norms q and k and rotates local layers by a base of their own."""

from typing import Any

from cableway.workers.blocks.attention import Attention
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.norm import RMSNorm, Scale, SoftCap
from cableway.workers.models.config import DecoderConfig, Factor, Size, Window
from cableway.workers.models.frames import near_and_far, pre_norm, sandwich
from cableway.workers.models.gguf_names import GGUF, larger_norms
from cableway.workers.models.hf_names import HF, POST_NORM, of_text
from cableway.workers.models.registry import arch


class GemmaConfig(DecoderConfig, frozen=True, kw_only=True):
    head_dim: Size = 256
    hidden_act: str = "gelu_pytorch_tanh"
    tie_word_embeddings: bool = True

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        # The first release said `gelu` and meant, as it added later, the tanh form.
        config["hidden_act"] = config.get("hidden_activation") or "gelu_pytorch_tanh"


class Gemma2Config(GemmaConfig, frozen=True, kw_only=True):
    global_period = 2
    query_pre_attn_scalar: Factor = 256
    sliding_window: Window = 4096
    attn_logit_softcapping: Factor | None = 50.0
    final_logit_softcapping: Factor | None = 30.0


class Gemma3Config(Gemma2Config, frozen=True, kw_only=True):
    global_period = 6
    attn_logit_softcapping: Factor | None = None
    final_logit_softcapping: Factor | None = None

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        super().derive(config)
        if not config.get("rope_parameters"):
            far = {"rope_theta": config.get("rope_theta", 1e6), **(config.get("rope_scaling") or {})}
            near = {"rope_theta": config.get("rope_local_base_freq", 1e4)}
            config["rope_parameters"] = {"full_attention": far, "sliding_attention": near}


@arch("GemmaForCausalLM", config=GemmaConfig, hf=HF, gguf=larger_norms(GGUF))
def gemma(c: GemmaConfig) -> Decoder:
    norm = RMSNorm(c.hidden_size, c.norm_eps, 1.0)
    return pre_norm(c, Attention.of(c), norm=norm, on_embed=Scale(c.hidden_size**0.5))


@arch("Gemma2ForCausalLM", config=Gemma2Config, hf=HF | POST_NORM, gguf=larger_norms(GGUF))
def gemma2(c: Gemma2Config) -> Decoder:
    return capped(c, None)


@arch("Gemma3ForConditionalGeneration", config=Gemma3Config, hf=of_text(HF | POST_NORM), like="Gemma3")
@arch("Gemma3ForCausalLM", config=Gemma3Config, hf=HF | POST_NORM, gguf=larger_norms(GGUF))
def gemma3(c: Gemma3Config) -> Decoder:
    return capped(c, RMSNorm(c.head_dim, c.norm_eps, 1.0))


def capped(c: Gemma2Config, head_norm: RMSNorm | None) -> Decoder:
    norm, scale = RMSNorm(c.hidden_size, c.norm_eps, 1.0), c.query_pre_attn_scalar**-0.5
    mixes = near_and_far(c, scale=scale, soft_cap=c.attn_logit_softcapping or 0.0, qk_norm=head_norm)
    embed, logits = Scale(c.hidden_size**0.5), c.final_logit_softcapping and SoftCap(c.final_logit_softcapping)
    return sandwich(c, mixes, norm=norm, on_embed=embed, on_logits=logits)
