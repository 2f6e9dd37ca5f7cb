"""Which slot each checkpoint tensor fills. A table a naming scheme; families combine them with `|`.

A tensor's name is a stem and a leaf: `model.layers.3.self_attn.q_proj` and `weight`. A table maps stems, with `{}` for
each number, to paths in the tree of blocks, followed by the part where the slot has several.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from cableway.workers.parallel import Axis

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


class Target(NamedTuple):
    """Where a tensor goes. `row_order`: how its rows lie within a unit of its axis (a head), if not as ours do."""

    path: str
    row_order: Callable[[Axis], Tensor] | None = None


@dataclass(frozen=True)
class Names:
    """Stem -> target, and the stems that hold nothing we need."""

    targets: Mapping[str, Target] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()

    def __or__(self, other: "Names") -> "Names":
        return Names({**self.targets, **other.targets}, self.ignored | other.ignored)

    def find(self, stem: str) -> Target | None:
        """The target of one stem, or None when the scheme does not know it."""
        numbers = _NUMBER.findall(stem)
        target = self.targets.get(_NUMBER.sub("{}", stem))
        return target and target._replace(path=target.path.format(*numbers))

    def ignores(self, stem: str) -> bool:
        return _NUMBER.sub("{}", stem) in self.ignored


def _names(table: Mapping[str, str | Target], ignored: tuple[str, ...] = ()) -> Names:
    targets = {stem: Target(value) if isinstance(value, str) else value for stem, value in table.items()}
    return Names(targets, frozenset(ignored))


def neighbours_to_halves(axis: Axis) -> Tensor:
    """Rows whose rotated pairs are neighbours (0 1, 2 3, …), in the order that has them half a head apart."""
    return torch.arange(axis.unit).view(-1, 2).t().flatten()


HF = _names(
    {
        "model.embed_tokens": "embed",
        "model.layers.{}.input_layernorm": "layers.{}.norm_in",
        "model.layers.{}.self_attn.q_proj": "layers.{}.mix.qkv.q",
        "model.layers.{}.self_attn.k_proj": "layers.{}.mix.qkv.k",
        "model.layers.{}.self_attn.v_proj": "layers.{}.mix.qkv.v",
        "model.layers.{}.self_attn.qkv_proj": "layers.{}.mix.qkv",
        "model.layers.{}.self_attn.q_norm": "layers.{}.mix.q_norm",
        "model.layers.{}.self_attn.k_norm": "layers.{}.mix.k_norm",
        "model.layers.{}.self_attn.o_proj": "layers.{}.mix.out",
        "model.layers.{}.post_attention_layernorm": "layers.{}.norm_mlp",
        "model.layers.{}.mlp.gate_proj": "layers.{}.mlp.gate_up.gate",
        "model.layers.{}.mlp.up_proj": "layers.{}.mlp.gate_up.up",
        "model.layers.{}.mlp.gate_up_proj": "layers.{}.mlp.gate_up",
        "model.layers.{}.mlp.down_proj": "layers.{}.mlp.down",
        "model.norm": "norm_out",
        "lm_head": "head",
    },
    ignored=("model.rotary_emb", "model.layers.{}.self_attn.rotary_emb"),
)

GGUF = _names(
    {
        "token_embd": "embed",
        "rope_freqs": "rope_divisors",
        "blk.{}.attn_norm": "layers.{}.norm_in",
        "blk.{}.attn_q": "layers.{}.mix.qkv.q",
        "blk.{}.attn_k": "layers.{}.mix.qkv.k",
        "blk.{}.attn_v": "layers.{}.mix.qkv.v",
        "blk.{}.attn_qkv": "layers.{}.mix.qkv",
        "blk.{}.attn_q_norm": "layers.{}.mix.q_norm",
        "blk.{}.attn_k_norm": "layers.{}.mix.k_norm",
        "blk.{}.attn_output": "layers.{}.mix.out",
        "blk.{}.ffn_norm": "layers.{}.norm_mlp",
        "blk.{}.ffn_gate": "layers.{}.mlp.gate_up.gate",
        "blk.{}.ffn_up": "layers.{}.mlp.gate_up.up",
        "blk.{}.ffn_down": "layers.{}.mlp.down",
        "output_norm": "norm_out",
        "output": "head",
    },
    ignored=("blk.{}.attn_rot_embd",),
)

GGUF_LLAMA = GGUF | _names(
    {
        "blk.{}.attn_q": Target("layers.{}.mix.qkv.q", neighbours_to_halves),
        "blk.{}.attn_k": Target("layers.{}.mix.qkv.k", neighbours_to_halves),
    }
)
"""Files of the `llama` architecture keep q and k in the order of the original release."""
