"""Which slot each checkpoint tensor fills. A table a naming scheme; families combine them with `|`.

A table maps names, with `{}` for each number, to paths in the tree of blocks, followed by the part where the slot has
several. Most entries are stems: `model.layers.{}.self_attn.q_proj` for the leaves `weight` and `bias` alike. A tensor
without a leaf in its name has an entry of its own: it is a `weight`, unless the entry names another leaf.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cableway.workers.models.layouts import Layout, concatenated
from cableway.workers.parallel import Axis

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


class Target(NamedTuple):
    """Where a tensor goes.

    Attributes:
        row_order: how the rows of a part lie within a unit of its axis (a head), None = as ours do.
        layout: how the slot's parts lie in it, where it has several.
        leaf: which leaf of the slot it is, where its name does not end in one and it is no weight.
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

    def without(self, prefix: str) -> "Names":
        """The same names where a checkpoint has nothing before them."""
        targets = {name.removeprefix(prefix): target for name, target in self.targets.items()}
        return Names(targets, frozenset(name.removeprefix(prefix) for name in self.ignored), self.beyond)

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


def of_parts(name: str, slot: str, parts: str = "qkv") -> dict[str, str]:
    """The names that parts of a slot have, with their letters in place of `*`."""
    return {name.replace("*", part): f"{slot}.{part}" for part in parts}


def of_mlp(
    name: str, slot: str = "mlp", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> dict[str, str]:
    """The names that matrices of a gated MLP have, with these in place of `*`."""
    slots = {gate: f"{slot}.gate_up.gate", up: f"{slot}.gate_up.up", down: f"{slot}.down"}
    return {name.replace("*", matrix): path for matrix, path in slots.items()}
