"""Which slot each checkpoint tensor fills. A table a naming scheme; families combine them with `|`.

A table maps names, with `{}` for each number, to paths in the tree of blocks, followed by the part where the slot has
several. Most entries are stems: `model.layers.{}.self_attn.q_proj` for the leaves `weight` and `bias` alike. A tensor
without a leaf in its name has an entry of its own, which names the leaf.
"""

import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cableway.workers.formats.stored import Stored
from cableway.workers.parallel import Axis

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")

Layout = Callable[[Stored, Mapping[str, Axis]], dict[str, Stored]]
"""How parts lie in one tensor: cuts it into them. ValueError when its shape cannot be theirs."""


def concatenated(stored: Stored, parts: Mapping[str, Axis]) -> dict[str, Stored]:
    """One after another."""
    sizes = [axis.size for axis in parts.values()]
    if stored.shape[0] != sum(sizes):
        raise ValueError
    ends = itertools.accumulate(sizes)
    return {part: stored.rows(end - axis.size, end) for (part, axis), end in zip(parts.items(), ends, strict=True)}


def by_group(stored: Stored, parts: Mapping[str, Axis], num_groups: int = 0) -> dict[str, Stored]:
    """Group after group, each with its share of every part: the heads of q that read one KV head, that k, that v."""
    num_groups = num_groups or min(axis.count for axis in parts.values())
    shares = [axis.size // num_groups for axis in parts.values()]
    if stored.shape[0] != num_groups * sum(shares):
        raise ValueError
    cut = {}
    for part, share, end in zip(parts, shares, itertools.accumulate(shares), strict=True):

        def select(tensor: Tensor, start: int = end - share, end: int = end) -> Tensor:
            return tensor.unflatten(0, (num_groups, -1))[:, start:end].flatten(0, 1)

        cut[part] = stored.changed((num_groups * share, *stored.shape[1:]), select)
    return cut


def in_turns(stored: Stored, parts: Mapping[str, Axis]) -> dict[str, Stored]:
    """A row of each part in turn."""
    if stored.shape[0] != sum(axis.size for axis in parts.values()):
        raise ValueError
    shape, num = (stored.shape[0] // len(parts), *stored.shape[1:]), len(parts)
    return {part: stored.changed(shape, lambda t, i=i: t[i::num]) for i, part in enumerate(parts)}


def in_halves(stored: Stored, parts: Mapping[str, Axis]) -> dict[str, Stored]:
    """Of parts whose units are pairs, the first of each and then the second of each."""

    def pair(rows: Tensor, count: int) -> Tensor:
        return rows.unflatten(0, (2, count, -1)).transpose(0, 1).flatten(0, 2)

    cut = concatenated(stored, parts)
    return {part: one.changed(one.shape, partial(pair, count=parts[part].count)) for part, one in cut.items()}


def repeated(num: int) -> Layout:
    """A number a row, which stands `num` times in it."""

    def spread(stored: Stored, parts: Mapping[str, Axis]) -> dict[str, Stored]:
        shape = (stored.shape[0], num)
        return concatenated(stored.changed(shape, lambda t: t[:, None].expand(shape)), parts)

    return spread


def in_order(*order: str, layout: Layout = concatenated) -> Layout:
    """A layout whose parts lie in another order than ours."""
    return lambda stored, parts: layout(stored, {part: parts[part] for part in order})


def transposed(stored: Stored, parts: Mapping[str, Axis]) -> dict[str, Stored]:
    """Parts side by side in the columns of a matrix [in, out]."""
    return concatenated(stored.computed(stored.shape[::-1], Tensor.t) if len(stored.shape) == 2 else stored, parts)


def scaled(factors: Mapping[str, float] | float, layout: Layout = concatenated) -> Layout:
    """A layout whose parts are multiplied as they are read: all by one number, or each by its own."""

    def times(stored: Stored, parts: Mapping[str, Axis]) -> dict[str, Stored]:
        by_part = factors if isinstance(factors, Mapping) else dict.fromkeys(parts, factors)
        cut = layout(stored, parts)
        return {part: one.computed(one.shape, lambda t, f=by_part[part]: t * f) for part, one in cut.items()}

    return times


def normalised_rows(stored: Stored, parts: Mapping[str, Axis]) -> dict[str, Stored]:
    """Rows that are brought to length 1 before they are used."""
    return concatenated(stored.computed(stored.shape, F.normalize), parts)


def stacked(stored: Stored, parts: Mapping[str, Axis]) -> dict[str, Stored]:
    """Expert after expert [X, out, in], or [X * out, in], each with its parts one after another."""
    return _stacked(stored, parts, concatenated)


def stacked_transposed(stored: Stored, parts: Mapping[str, Axis]) -> dict[str, Stored]:
    """[X, in, out], expert after expert, each with its parts side by side."""
    return _stacked(stored, parts, transposed)


def stacked_in_turns(stored: Stored, parts: Mapping[str, Axis]) -> dict[str, Stored]:
    """[X, in, out], a column of each part in turn."""

    def across(one: Stored, of_one: Mapping[str, Axis]) -> dict[str, Stored]:
        return in_turns(one.computed(one.shape[::-1], Tensor.t) if len(one.shape) == 2 else one, of_one)

    return _stacked(stored, parts, across)


def _stacked(stored: Stored, parts: Mapping[str, Axis], layout: Layout) -> dict[str, Stored]:
    """Cut a tensor of all experts into those of each, and these by `layout`."""
    experts: dict[str, dict[str, Axis]] = {}
    for part, axis in parts.items():
        experts.setdefault(part.partition(".")[0], {})[part] = axis
    if stored.shape[0] != len(experts):
        rows = stored.shape[0] // len(experts)
        if stored.shape[0] != len(experts) * rows:
            raise ValueError
        stored = stored.changed((len(experts), rows, *stored.shape[1:]), lambda t: t.unflatten(0, (-1, rows)))
    cut = {}
    for number, of_one in enumerate(experts.values()):
        cut |= layout(stored.changed(stored.shape[1:], lambda t, i=number: t[i]), of_one)
    return cut


def by_head(stored: Stored, parts: Mapping[str, Axis]) -> dict[str, Stored]:
    """[H, out, in]"""
    num_heads, num_out, num_in = stored.shape
    return concatenated(stored.changed((num_heads * num_out, num_in), lambda t: t.flatten(0, 1)), parts)


def by_head_transposed(stored: Stored, parts: Mapping[str, Axis]) -> dict[str, Stored]:
    """[H, in, out]"""
    num_heads, num_in, num_out = stored.shape
    return concatenated(
        stored.computed((num_heads * num_out, num_in), lambda t: t.transpose(1, 2).flatten(0, 1)), parts
    )


def one_for_all(stored: Stored, parts: Mapping[str, Axis]) -> dict[str, Stored]:
    """One number, that of each part."""
    if math.prod(stored.shape) != 1:
        raise ValueError
    return dict.fromkeys(parts, stored.changed((1,), Tensor.flatten))


def flat(stored: Stored, parts: Mapping[str, Axis]) -> dict[str, Stored]:
    """A row of numbers saved as a table, such as one of heads."""
    return concatenated(stored.changed((math.prod(stored.shape),), Tensor.flatten), parts)


class Target(NamedTuple):
    """Where a tensor goes.

    Attributes:
        row_order: how the rows of a part lie within a unit of its axis (a head), None = as ours do.
        layout: how the slot's parts lie in it, where it has several.
        leaf: which leaf of the slot it is, where its name does not end in one.
        parts: which parts it holds, where not all of the slot's.
    """

    path: str
    row_order: Callable[[str, Axis], Tensor | None] | None = None
    layout: Layout = concatenated
    leaf: str = ""
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Names:
    """Stem or name -> target; the stems that hold nothing we need, and beginnings of names that do not."""

    targets: Mapping[str, Target] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    beyond: tuple[str, ...] = ()

    def __or__(self, other: "Names") -> "Names":
        return Names({**self.targets, **other.targets}, self.ignored | other.ignored, self.beyond + other.beyond)

    def find(self, name: str) -> Target | None:
        """The target of one tensor, with its leaf, or None when the scheme does not know it."""
        stem, _, leaf = name.rpartition(".")
        for known, leaf_of in ((name, "weight"), (stem, leaf)):
            if target := self.targets.get(known) or self.targets.get(_NUMBER.sub("{}", known)):
                path = target.path.format(*_NUMBER.findall(known))
                return target._replace(path=path, leaf=target.leaf or leaf_of)
        return None

    def ignores(self, name: str) -> bool:
        general = _NUMBER.sub("{}", name)
        is_known = general in self.ignored or general.rpartition(".")[0] in self.ignored
        return is_known or name.startswith(self.beyond)


def names(table: Mapping[str, str | Target], *, ignored: tuple[str, ...] = (), prefix: str = "", to: str = "") -> Names:
    """A scheme from a table, with `prefix` before each of its names and `to` before each path."""
    targets = {
        prefix + name: Target(to + value) if isinstance(value, str) else value._replace(path=to + value.path)
        for name, value in table.items()
    }
    return Names(targets, frozenset(prefix + name for name in ignored))


def neighbours_to_halves(part: str, axis: Axis, rotary_dim: int = 0, first: int = 0) -> Tensor | None:
    """Rows whose rotated pairs are neighbours (0 1, 2 3, …), in the order that has them half a head apart.

    Args:
        rotary_dim: how many of a head's rows are rotated, from row `first` on; 0 = all.
    """
    if part == "v":
        return None
    order = torch.arange(axis.unit)
    rotated = order[first : first + (rotary_dim or axis.unit)]
    rotated.copy_(rotated.view(-1, 2).t().flatten())
    return order


def interleaved(scheme: Names, rotary_dim: int) -> Names:
    """The scheme for checkpoints that rotate neighbours: q and k, and norms of their heads, in the order of halves."""
    order = partial(neighbours_to_halves, rotary_dim=rotary_dim)
    turned = (".qkv", ".qkv.q", ".qkv.k", ".q_norm", ".k_norm")
    changed = {name: t._replace(row_order=order) for name, t in scheme.targets.items() if t.path.endswith(turned)}
    return scheme | Names(changed)


_TOWERS = (
    *("vision_model.", "vision_tower.", "multi_modal_projector.", "visual.", "vit.", "audio_tower."),
    *("embed_vision.", "embed_audio."),
)
"""What makes images and sounds into embeddings."""


def of_text(scheme: Any) -> Any:
    """The scheme, or what makes it from the config, for checkpoints of more than text: all is within `language_model`,
    or one level deeper, or beside what is not used."""
    if callable(scheme):
        return lambda c: of_text(scheme(c))

    def places(name: str) -> tuple[str, ...]:
        return name, f"language_model.{name}", re.sub(r"^model\.", "model.language_model.", name)

    targets = {place: target for name, target in scheme.targets.items() for place in places(name)}
    ignored = frozenset(place for name in scheme.ignored for place in places(name))
    beyond = tuple(place for name in scheme.beyond for place in places(name))
    return Names(targets, ignored, beyond + _TOWERS + tuple(f"model.{tower}" for tower in _TOWERS))


def without_predictors(c: Any, layers: str = "model.layers.") -> Names:
    """Layers past the last, which predict further tokens (MTP): not used."""
    last = c.num_hidden_layers
    return Names(beyond=tuple(f"{layers}{last + i}." for i in range(c.num_nextn_predict_layers)))


EMBEDDINGS = names(
    {"model.embed_tokens": "embed", "model.norm": "norm_out", "lm_head": "head"}, ignored=("model.rotary_emb",)
)
ATTENTION = names(
    {
        "q_proj": "qkv.q",
        "k_proj": "qkv.k",
        "v_proj": "qkv.v",
        "qkv_proj": "qkv",
        "q_norm": "q_norm",
        "k_norm": "k_norm",
        "o_proj": "out",
        # Of f8 caches, as LLM Compressor, AutoFP8 and ModelOpt name them.
        "k_scale": Target("kv_scales.k", layout=one_for_all, leaf="weight"),
        "v_scale": Target("kv_scales.v", layout=one_for_all, leaf="weight"),
        "kv_scale": Target("kv_scales", layout=one_for_all, leaf="weight"),
        "k_proj.k_scale": Target("kv_scales.k", layout=one_for_all, leaf="weight"),
        "v_proj.v_scale": Target("kv_scales.v", layout=one_for_all, leaf="weight"),
    },
    ignored=("rotary_emb",),
    prefix="model.layers.{}.self_attn.",
    to="layers.{}.mix.",
)
GATED_MLP = names(
    {"gate_proj": "gate_up.gate", "up_proj": "gate_up.up", "gate_up_proj": "gate_up", "down_proj": "down"},
    prefix="model.layers.{}.mlp.",
    to="layers.{}.mlp.",
)
PLAIN_MLP = names({"up_proj": "up", "down_proj": "down"}, prefix="model.layers.{}.mlp.", to="layers.{}.mlp.")
PRE_NORMS = names(
    {"input_layernorm": "norm_in", "post_attention_layernorm": "norm_mlp"}, prefix="model.layers.{}.", to="layers.{}."
)
SANDWICH_NORMS = names(
    {
        "input_layernorm": "norm_in",
        "post_attention_layernorm": "norm_mix_out",
        "pre_feedforward_layernorm": "norm_mlp",
        "post_feedforward_layernorm": "norm_mlp_out",
    },
    prefix="model.layers.{}.",
    to="layers.{}.",
)


def experts(prefix: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> Names:
    """Experts one by one, `prefix.{}.gate`, which follows `model.layers.{}.`."""
    table = {f"{prefix}.{{}}.{gate}": "gate_up.{}.gate", f"{prefix}.{{}}.{up}": "gate_up.{}.up"}
    table[f"{prefix}.{{}}.{down}"] = "down.{}"
    return names(table, prefix="model.layers.{}.", to="layers.{}.mlp.")


HF = EMBEDDINGS | ATTENTION | GATED_MLP | PRE_NORMS
"""Names of Llama, which most families took over."""
