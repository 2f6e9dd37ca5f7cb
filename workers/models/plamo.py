"""PLaMo 3: norms before and after each sublayer, stored as w less a number; most layers see a window and are rotated by
a base of their own. PLaMo 2: so too, and every other layer is Mamba with heads instead."""

from functools import partial
from typing import Any

from cableway.workers.blocks.attention import Attention
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.mamba import Mamba
from cableway.workers.blocks.norm import HeadRMSNorm, RMSNorm
from cableway.workers.models.config import DecoderConfig, Size, Window
from cableway.workers.models.frames import near_and_far, sandwich
from cableway.workers.models.gguf_names import (
    FUSED_MLP,
    GGUF,
    GGUF_LAYER,
    GGUF_MIX,
    larger_norms,
    less,
    logs_of_negatives,
)
from cableway.workers.models.hf_names import HF
from cableway.workers.models.layouts import by_group, flat, in_order, repeated
from cableway.workers.models.names import Names, Target, names
from cableway.workers.models.registry import arch

_AFTER = {"norm_mix_out": 1 / 5, "norm_mlp_out": 5**-1.5}
"""Slot -> how much less than its weights is stored, for norms after sublayers."""
GGUF_PLAMO = larger_norms(GGUF | FUSED_MLP) | names(
    {
        name + leaf: Target(slot, layout=less(_AFTER[slot]))
        for name, slot in (("post_attention_norm", "norm_mix_out"), ("post_ffw_norm", "norm_mlp_out"))
        for leaf in ("", ".weight")  # files lack it
    },
    **GGUF_LAYER,
)


class Plamo3Config(DecoderConfig, frozen=True, kw_only=True):
    head_dim: Size = 128
    sliding_window: Window
    global_period = 8
    tie_word_embeddings: bool = True

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        config["hidden_act"] = "silu"  # said to be `swiglu`
        if not isinstance(config.get("sliding_window"), int):
            config["sliding_window"] = config["window_size"]
        far = {"rope_theta": config.get("rope_theta", 1e6)}
        if config.get("rope_scaling_factor", 1) != 1:
            old = config["initial_context_length"]
            far |= {"rope_type": "yarn", "factor": config["rope_scaling_factor"], "truncate": False}
            far["original_max_position_embeddings"] = old
        near = {"rope_theta": config.get("rope_local_theta", 1e4)}
        config["rope_parameters"] = {"full_attention": far, "sliding_attention": near}


class Plamo2Config(DecoderConfig, frozen=True, kw_only=True):
    """Every `mamba_step`-th layer has attention, to a window but for the layers of `full_attention_idx`."""

    head_dim: Size = 128
    attention_window_size: Window = 2048
    layer_types: list[str]
    mamba_num_heads: Size = 64
    mamba_d_state: Size = 64
    mamba_d_conv: Size = 4
    tie_word_embeddings: bool = True

    @classmethod
    def derive(cls, config: dict[str, Any]) -> None:
        config["hidden_act"] = "silu"
        num_layers, step = config["num_hidden_layers"], config.get("mamba_step", 2)
        full, middle = config.get("full_attention_idx") or [], step // 2
        with_attention = range(middle, num_layers, step) if num_layers > middle else [num_layers - 1]
        kinds = ["full_attention" if i in full else "sliding_attention" for i in range(num_layers)]
        if config.get("mamba_enabled", True):
            kinds = [kind if i in with_attention else "mamba" for i, kind in enumerate(kinds)]
        config.setdefault("layer_types", kinds)


def lessened(c: DecoderConfig, mixes: list[Any]) -> Decoder:
    norm, mix_out, mlp_out = (RMSNorm(c.hidden_size, c.norm_eps, offset) for offset in (1.0, *_AFTER.values()))
    return sandwich(c, mixes, norm=norm, mix_out=mix_out, mlp_out=mlp_out)


@arch("Plamo3ForCausalLM", config=Plamo3Config, hf=HF, gguf=GGUF_PLAMO, like="Gemma3")
def plamo3(c: Plamo3Config) -> Decoder:
    return lessened(c, near_and_far(c, qk_norm=RMSNorm(c.head_dim, c.norm_eps, 1.0)))


_BY_HEAD = in_order("z", "x", layout=by_group)
_SELECTED = in_order("b", "c", "dt")


def _plamo2_names(c: Plamo2Config) -> Names:
    mixer = {
        "q_weight": Target("q_norm", layout=flat),
        "k_weight": Target("k_norm", layout=flat),
        "in_proj": Target("project", layout=_BY_HEAD),
        "bcdt_proj": Target("select", layout=_SELECTED),
        "dt_norm_weight": "dt_norm",
        "B_norm_weight": "b_norm",
        "C_norm_weight": "c_norm",
        "dt_bias": Target("dt", leaf="bias"),
        "A_log": Target("a_log", layout=repeated(c.mamba_d_state)),
    }
    return HF | names(mixer, prefix="model.layers.layers.{}.mixer.", to="layers.{}.mix.")


def _plamo2_gguf(c: Plamo2Config) -> Names:
    by_number = partial(logs_of_negatives, layout=repeated(c.mamba_d_state))
    mixer = {
        "attn_q_norm.weight": Target("q_norm", layout=flat),
        "attn_k_norm.weight": Target("k_norm", layout=flat),
        "ssm_in": Target("project", layout=_BY_HEAD),
        "ssm_x": Target("select", layout=_SELECTED),
        "ssm_a": Target("a_log", layout=by_number),
    }
    return GGUF_PLAMO | names(mixer, **GGUF_MIX)


@arch("Plamo2ForCausalLM", config=Plamo2Config, hf=_plamo2_names, gguf=_plamo2_gguf, like="Gemma3")
def plamo2(c: Plamo2Config) -> Decoder:
    head_norms = tuple(HeadRMSNorm(axis, c.norm_eps) for axis in c.head_axes())
    # A window is said without the token that looks.
    near, far = (Attention.of(c, qk_norm=head_norms, window=window) for window in (c.attention_window_size + 1, 0))
    step_size = max(64, c.hidden_size // 16)
    norms = tuple(RMSNorm(size, c.norm_eps) for size in (step_size, c.mamba_d_state, c.mamba_d_state))
    sizes = (c.mamba_num_heads * c.head_dim, c.mamba_d_state, step_size, c.mamba_d_conv)
    mamba = Mamba(c.hidden_size, *sizes, bias=False, conv_bias=False, norms=norms, head_dim=c.head_dim)
    kinds = {"mamba": mamba, "sliding_attention": near, "full_attention": far}
    return lessened(c, c.by_layer(kinds))
