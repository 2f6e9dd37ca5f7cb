"""OLMo: LayerNorms without weights. OLMo 2 and 3, Exaone 4: norms after each sublayer instead of before, and norms of q
and k; in OLMo 3 and the larger Exaone 4 most layers see a window, and Exaone's others know no positions."""

from typing import Any

from cableway.workers.blocks.attention import Attention, ClippedAttention
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.norm import JointNorm, PlainLayerNorm, RMSNorm
from cableway.workers.models.config import DecoderConfig, Factor, Window
from cableway.workers.models.frames import near_and_far, post_norm, pre_norm
from cableway.workers.models.gguf_names import GGUF, GGUF_NEIGHBOURS
from cableway.workers.models.hf_names import HF, POST_NORM
from cableway.workers.models.registry import arch


class OlmoConfig(DecoderConfig, frozen=True, kw_only=True):
    clip_qkv: Factor | None = None


class Olmo3Config(DecoderConfig, frozen=True, kw_only=True):
    sliding_window: Window = 4096
    global_period = 4


class Exaone4Config(DecoderConfig, frozen=True, kw_only=True):
    sliding_window: Window | None = 4096
    global_period = 1

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        if isinstance(config.get("sliding_window_pattern"), str):  # LLLG: local layers, then a global one
            config["sliding_window_pattern"] = len(config["sliding_window_pattern"])


@arch("OlmoForCausalLM", config=OlmoConfig, hf=HF, gguf=GGUF_NEIGHBOURS)
def olmo(c: OlmoConfig) -> Decoder:
    return pre_norm(c, ClippedAttention.of(c, clip=c.clip_qkv), norm=PlainLayerNorm(c.hidden_size, 1e-5))


def joint_norms(c: DecoderConfig) -> tuple[JointNorm, JointNorm]:
    """Of all heads of q together, and of all heads of k."""
    heads, kv_heads = c.head_axes()
    return JointNorm(heads, c.norm_eps), JointNorm(kv_heads, c.norm_eps)


@arch("Olmo2ForCausalLM", config=DecoderConfig, hf=HF | POST_NORM, gguf=GGUF)
def olmo2(c: DecoderConfig) -> Decoder:
    return post_norm(c, Attention.of(c, qk_norm=joint_norms(c)))


@arch("Olmo3ForCausalLM", config=Olmo3Config, hf=HF | POST_NORM, gguf=GGUF)
def olmo3(c: Olmo3Config) -> Decoder:
    return post_norm(c, near_and_far(c, qk_norm=joint_norms(c)))


@arch("Exaone4ForCausalLM", config=Exaone4Config, hf=HF | POST_NORM, gguf=GGUF)
def exaone4(c: Exaone4Config) -> Decoder:
    norm, window = RMSNorm(c.head_dim, c.norm_eps), c.sliding_window
    near = Attention.of(c, window=window or 0, qk_norm=norm)
    far = Attention.of(c, qk_norm=norm, rope=None) if window else near
    return post_norm(c, c.by_layer({"sliding_attention": near, "full_attention": far}))


@arch("ExaoneForCausalLM", config=DecoderConfig, hf=HF, gguf=GGUF, like="Llama")
def exaone(c: DecoderConfig) -> Decoder:
    return pre_norm(c, Attention.of(c))
