"""Families that transformers does not know, made like those of rewritten.py of a relative some of whose modules are
exchanged for others: for modules of a third family, or for a few lines that say what is new."""

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.jamba.modeling_jamba import JambaMambaMixer

from tests.checkpoints import randomize
from tests.models.rewritten import QKV, REWRITTEN, Config, Rewritten, Tensors, both_tensors, fuse
from tests.models.zoo import DEFAULT

KEPT = {
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"),
    *("vocab_size", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "dtype", "model_type"),
}
"""Keys that mean the same everywhere."""


def only(*keys: str, **others: Any) -> Any:
    """Leave a config these keys and those that mean the same everywhere, and add others."""

    def change(config: Config) -> None:
        for key in [key for key in config if key not in KEPT and key not in keys]:
            del config[key]
        config |= others

    return change


PLAMO = {
    "input_layernorm": "pre_mixer_norm",
    "post_attention_layernorm": "post_mixer_norm",
    "pre_feedforward_layernorm": "pre_mlp_norm",
    "post_feedforward_layernorm": "post_mlp_norm",
    "self_attn.": "mixer.",
    "model.layers.": "model.layers.layers.",
}
NEAR_AND_FAR = {"full_attention": {**DEFAULT, "rope_theta": 1000.0}, "sliding_attention": DEFAULT}
GEMMA3 = {
    "hidden_activation": "silu",
    "query_pre_attn_scalar": 16,
    "sliding_window": 9,
    "tie_word_embeddings": False,
    "rms_norm_eps": 0.02,
}


def plamo_tensors(tensors: Tensors, config: Config) -> None:
    """Norms hold weights less numbers of their own, and embeddings are what the layers see."""
    for key, tensor in tensors.items():
        for norm, offset in (("post_attention_layernorm", 1 / 5), ("post_feedforward_layernorm", 5**-1.5)):
            if norm in key:
                tensors[key] = tensor + 1 - offset
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] * config["hidden_size"] ** 0.5


PLAMO_TENSORS = (
    plamo_tensors,
    fuse("self_attn.qkv_proj", *QKV),
    fuse("mlp.gate_up_proj", "mlp.gate_proj", "mlp.up_proj"),
)


class HeadNorm(nn.Module):
    """An RMS norm with a weight a head; x [B, H, T, D]."""

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_heads, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 0.02) * self.weight[:, None]


class Mixer(JambaMambaMixer):
    """Called as an attention is."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return super().forward(hidden_states), None


PLAMO2_HEADS, PLAMO2_MAMBA = (4, 2), {"mamba_num_heads": 8, "mamba_d_state": 10, "mamba_d_conv": 3}


def plamo2_modules(model: Any) -> None:
    """Every other layer is Jamba's Mamba, whose channels of a head are alike; heads are normalised each by its own."""
    mamba = transformers.JambaConfig(
        hidden_size=64,
        mamba_d_state=10,
        mamba_d_conv=3,
        mamba_expand=2,
        mamba_dt_rank=64,
        mamba_conv_bias=False,
        rms_norm_eps=0.02,
    )
    for number, layer in enumerate(model.model.layers):
        if number % 2 == 0:
            layer.self_attn = Mixer(mamba, number)
        else:
            layer.self_attn.q_norm, layer.self_attn.k_norm = (HeadNorm(num, 16) for num in PLAMO2_HEADS)
    randomize(model)
    for layer in model.model.layers[::2]:
        mixer = layer.self_attn
        mixer.A_log.data[:] = mixer.A_log[:, :1]
        for weight in (mixer.dt_proj.weight, mixer.dt_proj.bias, mixer.D, mixer.A_log):
            of_head = weight.data.unflatten(0, (8, 16))
            of_head[:] = of_head[:, :1].clone()


def plamo2_tensors(tensors: Tensors, config: Config) -> None:
    for number in range(0, config["num_hidden_layers"], 2):
        mixer = f"model.layers.{number}.self_attn."
        old = {key.removeprefix(mixer): tensors.pop(key) for key in list(tensors) if key.startswith(mixer)}
        x, z = (part.unflatten(0, (8, 16)) for part in old["in_proj.weight"].chunk(2))
        dt, b, c = old["x_proj.weight"].split((64, 10, 10))
        new = {
            "in_proj.weight": torch.cat((z, x), 1).flatten(0, 1),
            "bcdt_proj.weight": torch.cat((b, c, dt)),
            "dt_proj.weight": old["dt_proj.weight"][::16],
            "dt_bias": old["dt_proj.bias"][::16],
            "A_log": old["A_log"][::16, 0],
            "D": old["D"][::16],
            "dt_norm_weight": old["dt_layernorm.weight"],
            "B_norm_weight": old["b_layernorm.weight"],
            "C_norm_weight": old["c_layernorm.weight"],
            "conv1d.weight": old["conv1d.weight"],
            "out_proj.weight": old["out_proj.weight"],
        }
        tensors |= {mixer + name: tensor for name, tensor in new.items()}


ASSEMBLED = {
    "Plamo3ForCausalLM": Rewritten(
        "Gemma3",
        {
            **GEMMA3,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": NEAR_AND_FAR,
        },
        PLAMO,
        only("head_dim", window_size=9, sliding_window_pattern=3, rope_theta=1000.0, rope_local_theta=10_000.0),
        both_tensors(*PLAMO_TENSORS),
    ),
    "Plamo2ForCausalLM": Rewritten(
        "Gemma3",
        {
            **GEMMA3,
            "num_hidden_layers": 4,
            "rope_parameters": dict.fromkeys(NEAR_AND_FAR, DEFAULT),
            "layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"],
        },
        {"q_norm.weight": "q_weight", "k_norm.weight": "k_weight", **PLAMO},
        only(**PLAMO2_MAMBA, attention_window_size=8, full_attention_idx=[3], mamba_step=2, hidden_size_per_head=16),
        both_tensors(*PLAMO_TENSORS, plamo2_tensors),
        prepare=plamo2_modules,
    ),
}
REWRITTEN |= ASSEMBLED
