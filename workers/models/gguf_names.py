"""Names of weights in GGUF files: one table for all families, and what its converter changes in some of them.

A tensor has the same name wherever it does the same work, so that a family needs no table of its own; it says how its
values or rows differ from ours.
"""

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from cableway.workers.formats.stored import Stored
from cableway.workers.models.layouts import Layout, by_group, by_head, by_head_transposed, concatenated, flat, stacked
from cableway.workers.models.names import Names, Target, interleaved, names, of_mlp, of_parts
from cableway.workers.parallel import Axis


def less(number: float) -> Layout:
    """Larger by a number than in other checkpoints."""
    return lambda stored, parts: concatenated(stored.computed(stored.shape, lambda t: t - number), parts)


def logs_of_negatives(stored: Stored, parts: Mapping[str, Axis], layout: Layout = concatenated) -> dict[str, Stored]:
    """-exp(a) in place of a; as a column, where a head has but one."""
    shape = stored.shape[:1] if stored.shape[1:] == (1,) else stored.shape
    return layout(stored.computed(shape, lambda t: torch.log(-t).view(shape)), parts)


def channels(stored: Stored, parts: Mapping[str, Axis]) -> dict[str, Stored]:
    """A convolution [C, width], for [C, 1, width]."""
    num_channels, width = stored.shape
    return concatenated(stored.changed((num_channels, 1, width), lambda t: t.unsqueeze(1)), parts)


def one_row(stored: Stored, parts: Mapping[str, Axis]) -> dict[str, Stored]:
    """A matrix of one row, as a row."""
    shape = (1, math.prod(stored.shape))
    return concatenated(stored.computed(shape, lambda t: t.view(shape)), parts)


_ATTENTION: dict[str, str | Target] = {
    **of_parts("attn_*", "qkv"),
    "attn_qkv": "qkv",
    "attn_q_norm": Target("q_norm", layout=flat),
    "attn_k_norm": Target("k_norm", layout=flat),
    "attn_output": "out",
    "attn_sinks": "sinks",
    "attn_q_a": "q_down",
    "attn_q_a_norm": "q_norm",
    "attn_q_b": "q",
    "attn_kv_a_mqa": "kv_down",
    "attn_kv_a_norm": "kv_norm",
    "attn_kv_b": Target("kv_up", layout=by_group),
    "attn_k_b": Target("kv_up", layout=by_head_transposed, parts=("k",)),
    "attn_v_b": Target("kv_up", layout=by_head, parts=("v",)),
}
_STATE_SPACE: dict[str, str | Target] = {
    "ssm_in": "project",
    "ssm_conv1d": "conv",
    "ssm_conv1d.weight": Target("conv", layout=channels),
    "ssm_x": "select",
    "ssm_dt": "dt",
    "ssm_a": Target("a_log", layout=logs_of_negatives),
    "ssm_d": Target("d", layout=flat),
    "ssm_norm": Target("norm", layout=flat),
    "ssm_dt_norm": "dt_norm",
    "ssm_b_norm": "b_norm",
    "ssm_c_norm": "c_norm",
    "ssm_out": "out",
}
_SHORT_CONVOLUTION: dict[str, str | Target] = {
    "shortconv.in_proj": "project",
    "shortconv.conv": "conv",
    "shortconv.conv.weight": Target("conv", layout=channels),
    "shortconv.out_proj": "out",
}
_MLP: dict[str, str | Target] = {
    **of_mlp("ffn_*", gate="gate", up="up", down="down"),
    "ffn_gate_inp": "mlp.router.gate",
    "exp_probs_b.bias": Target("mlp.router.correction", layout=flat),
    "ffn_gate_exps": Target("mlp.gate_up", layout=stacked, parts=("gate",)),
    "ffn_up_exps": Target("mlp.gate_up", layout=stacked, parts=("up",)),
    "ffn_gate_up_exps": Target("mlp.gate_up", layout=stacked),
    "ffn_down_exps": Target("mlp.down", layout=stacked),
    "ffn_gate.{}": "mlp.gate_up.{}.gate",  # before experts were stacked
    "ffn_up.{}": "mlp.gate_up.{}.up",
    "ffn_down.{}": "mlp.down.{}",
    **of_mlp("ffn_*_shexp", "mlp.shared", gate="gate", up="up", down="down"),
    "ffn_gate_inp_shexp": Target("mlp.shared_gate", layout=one_row),
}
_NORMS: dict[str, str | Target] = {
    "attn_norm": "norm_in",
    "post_attention_norm": "norm_mix_out",
    "ffn_norm": "norm_mlp",
    "post_ffw_norm": "norm_mlp_out",
}
GGUF_LAYER = {"prefix": "blk.{}.", "to": "layers.{}."}
GGUF_MIX = {"prefix": "blk.{}.", "to": "layers.{}.mix."}
GGUF = (
    names(_ATTENTION | _STATE_SPACE | _SHORT_CONVOLUTION, ignored=("attn_rot_embd",), **GGUF_MIX)
    | names(_MLP | _NORMS, **GGUF_LAYER)
    | names(
        {
            "token_embd": "embed",
            "token_embd_norm": "on_embed",
            "position_embd": "positions.table",
            "rope_freqs": "rope_divisors",
            "output_norm": "norm_out",
            "output": "head",
        },
        ignored=("rope_factors_long", "rope_factors_short"),  # the config has them
    )
)
"""Names of every family, of which each has some."""

PLAIN_MLP = names({"ffn_up": "mlp.up"}, **GGUF_LAYER)
FUSED_MLP = names({"ffn_up": "mlp.gate_up"}, **GGUF_LAYER)
_STEPS = {"ssm_dt.bias": "dt_bias"}
MAMBA2 = names(_STEPS, **GGUF_MIX)
TWO_MIXERS = names(_STATE_SPACE | _STEPS, prefix="blk.{}.", to="layers.{}.mix.mixes.0.") | names(
    _ATTENTION, prefix="blk.{}.", to="layers.{}.mix.mixes.1."
)
"""Mamba 2 and attention side by side."""

MID_NORM = names({"post_attention_norm": "norm_mlp"}, **GGUF_LAYER)
"""The norm before the MLP is named by where it stands, not by what it is for."""

GGUF_NEIGHBOURS = interleaved(GGUF, 0)
"""Pairs of q and k that are rotated together are neighbours, as in the original release of Llama."""


def larger_norms(scheme: Names) -> Names:
    """The scheme for files that hold norms' weights as they multiply, where ours hold one less."""
    norms = {name: target for name, target in scheme.targets.items() if "norm" in target.path.rpartition(".")[2]}
    return scheme | Names({f"{name}.weight": t._replace(layout=less(1.0)) for name, t in norms.items()})


def value_heads_in_turns(scheme: Names, num_key_heads: int, head_dim: int) -> Names:
    """Of gated delta nets: files have the first value head of each key head, then the second of each, and so on."""

    def by_key_head(stored: Stored, parts: Mapping[str, Axis], layout: Layout) -> dict[str, Stored]:
        def sort(rows: Tensor, unit: int) -> Tensor:
            return rows.unflatten(0, (-1, num_key_heads, unit)).transpose(0, 1).flatten(0, 2)

        cut = layout(stored, parts)
        sorted_ = {part: one.changed(one.shape, partial(sort, unit=parts[part].unit)) for part, one in cut.items()}
        return sorted_ | {part: cut[part] for part in cut if part in ("q", "k")}

    def columns(stored: Stored, parts: Mapping[str, Axis]) -> dict[str, Stored]:
        def sort(matrix: Tensor) -> Tensor:
            return matrix.unflatten(1, (-1, num_key_heads, head_dim)).transpose(1, 2).flatten(1, 3)

        return concatenated(stored.computed(stored.shape, sort), parts)

    turned = ("attn_qkv", "attn_gate", "ssm_beta", "ssm_alpha", "ssm_a", "ssm_dt.bias", "ssm_conv1d.weight")
    targets = {f"blk.{{}}.{name}": scheme.targets[f"blk.{{}}.{name}"] for name in turned}
    changed = {name: t._replace(layout=partial(by_key_head, layout=t.layout)) for name, t in targets.items()}
    return scheme | Names(changed) | names({"ssm_out": Target("out", layout=columns)}, **GGUF_MIX)
