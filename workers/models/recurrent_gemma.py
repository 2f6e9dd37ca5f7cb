"""RecurrentGemma (Griffin): Gemma's frame, with real-gated linear recurrences and, in every third layer, attention to a
window."""

import math
from typing import Any

from cableway.workers.blocks.attention import Attention
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.lru import GatedLRU
from cableway.workers.blocks.mlp import MLP, Activation
from cableway.workers.blocks.norm import RMSNorm, Scale, SoftCap
from cableway.workers.models.config import DecoderConfig, Factor, Size, Window
from cableway.workers.models.frames import pre_norm
from cableway.workers.models.hf_names import HF
from cableway.workers.models.layouts import by_head_transposed, flat
from cableway.workers.models.names import Target, names, of_parts
from cableway.workers.models.registry import arch

RECURRENT_GEMMA = HF | names(
    {
        **of_parts("linear_*", "project", "xy"),
        "linear_out": "out",
        "conv_1d": "conv",
        "rg_lru.input_gate_weight": Target("gates.taken", layout=by_head_transposed),
        "rg_lru.input_gate_bias": Target("gates.taken", layout=flat, leaf="bias"),
        "rg_lru.recurrent_gate_weight": Target("gates.decay", layout=by_head_transposed),
        "rg_lru.recurrent_gate_bias": Target("gates.decay", layout=flat, leaf="bias"),
        "rg_lru.recurrent_param": "rate",
    },
    prefix="model.layers.{}.temporal_block.",
    to="layers.{}.mix.",
)


class RecurrentGemmaConfig(DecoderConfig, frozen=True, kw_only=True):
    hidden_act: str = "gelu_pytorch_tanh"
    tie_word_embeddings: bool = True
    lru_width: Size
    conv1d_width: Size = 4
    attention_window_size: Window = 2048
    block_types: tuple[str, ...] = ("recurrent", "recurrent", "attention")
    logits_soft_cap: Factor = 30.0
    rotary_frac = 0.5

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        config["lru_width"] = config.get("lru_width") or config["hidden_size"]
        config["intermediate_size"] //= 2


def _rounded(x: float) -> float:
    """To the 8 bits of a bfloat16, which the scale of embeddings is kept in, whatever the weights are."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(mantissa * 256), exponent - 8)


@arch("RecurrentGemmaForCausalLM", config=RecurrentGemmaConfig, hf=RECURRENT_GEMMA)
def recurrent_gemma(c: RecurrentGemmaConfig) -> Decoder:
    sizes, act = (c.hidden_size, c.num_attention_heads, c.lru_width, c.conv1d_width), Activation(c.hidden_act)
    attention = Attention.of(c, window=c.attention_window_size, bias=c.attention_bias, out_bias=True)
    kinds = [c.block_types[i % len(c.block_types)] for i in range(c.num_hidden_layers)]
    mixes = c.by_layer({"recurrent": GatedLRU(*sizes, act=act), "attention": attention}, kinds)
    embed, logits = Scale(_rounded(c.hidden_size**0.5)), SoftCap(c.logits_soft_cap)
    norm = RMSNorm(c.hidden_size, c.norm_eps, 1.0)
    return pre_norm(c, mixes, MLP.of(c, bias=True), norm, on_embed=embed, on_logits=logits)
