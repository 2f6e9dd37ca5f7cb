"""What models are made of.

A spec composes blocks into a tree. As a spec makes it a block is a template: it knows its sizes and logical axes and
holds no weights, so one `Layer` may stand for thirty. `Decoder` copies templates, `weights.load` fills their slots, and
`prepare` lets each block settle what depends on where it runs.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from cableway.kernels.kv_cache import NO_SCALES, KVScales
from cableway.workers.batch import StateSpec
from cableway.workers.blocks.rope import Rope
from cableway.workers.formats.base import Place
from cableway.workers.formats.stored import Stored
from cableway.workers.parallel import Axis, Mesh

Filling = Mapping[str, Mapping[str, Stored]]
"""part -> leaf -> tensor"""


class Block:
    """A node of the tree; attributes that are blocks, or lists of blocks, are its children.

    Attributes:
        takes_sum: its input goes into one product first of all, and may be a Sum.
    """

    takes_sum = False

    def children(self) -> Iterator[tuple[str, "Block"]]:
        """(name, block) of each child, in the order the spec made them; the i-th of a list is `name.i`."""
        for name, value in vars(self).items():
            if isinstance(value, Block):
                yield name, value
            elif isinstance(value, list):
                yield from ((f"{name}.{i}", item) for i, item in enumerate(value) if isinstance(item, Block))

    def copy(self) -> Self:
        """A template of its own, even where this one uses the same child twice."""
        twin = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Block):
                setattr(twin, name, value.copy())
            elif isinstance(value, list):
                setattr(twin, name, [item.copy() if isinstance(item, Block) else item for item in value])
        return twin

    def slots(self, path: str = "") -> Iterator[tuple[str, "Slot"]]:
        """(path, slot) of every slot below."""
        for name, child in self.children():
            yield from child.slots(f"{path}.{name}" if path else name)

    def mixers(self) -> Iterator["Mixer"]:
        """Every mixer below, in the order the spec made them."""
        for _, child in self.children():
            if isinstance(child, Mixer):
                yield child
            yield from child.mixers()

    def prepare(self, place: Place) -> None:
        """Called once all weights are loaded."""
        for _, child in self.children():
            child.prepare(place)


def are_alike(one: Any, other: Any) -> bool:
    """Whether two templates, or what they consist of, are the same but for being two."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Block):
        return are_alike(vars(one), vars(other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(are_alike(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(are_alike, one, other))
    return not isinstance(one, Tensor) and one == other


class Slot(Block):
    """A leaf of the tree: one place for weights, which a checkpoint gives as one tensor or several.

    Attributes:
        parts: axis of the rows of each part. `qkv` has parts q, k and v, one matrix in memory that a checkpoint gives
            whole or part by part; a slot of one part calls it "".
        leaves: what each part consists of, with its dimensions after the first: `weight` (in,), `bias` ().
        optional: leaves that a checkpoint may do without.
        is_shared: whether all copies of a template are this very slot.
    """

    parts: Mapping[str, Axis]
    leaves: Mapping[str, tuple[int, ...]]
    optional: frozenset[str] = frozenset()
    is_shared = False

    def copy(self) -> Self:
        return self if self.is_shared else super().copy()

    def slots(self, path: str = "") -> Iterator[tuple[str, "Slot"]]:
        yield path, self

    def load(self, parts: Filling, place: Place) -> None:
        """Take this rank's share of the given tensors: part -> leaf -> tensor, names and shapes already checked."""
        raise NotImplementedError

    def share(self, parts: Filling, place: Place, dtype: torch.dtype, leaf: str = "weight") -> list[Tensor]:
        """This rank's share of one leaf of each part."""
        return [parts[part][leaf].piece(place.mesh.span(axis)).decode(dtype) for part, axis in self.parts.items()]


BlockType = TypeVar("BlockType", bound=Block)


def shared(block: BlockType) -> BlockType:
    """A template whose weights all that is copied from it holds together."""
    for _, slot in block.slots():
        slot.is_shared = True
    return block


class Mixer(Block):
    """A block that mixes tokens, and keeps state of them. `number` counts a model's mixers; the decoder gives it."""

    number: int

    def state(self, mesh: Mesh) -> StateSpec:
        """What this rank keeps of each sequence."""
        raise NotImplementedError

    def ropes(self) -> list[Rope]:
        """Rotations it asks `Step.angles` for."""
        return []

    def scales(self) -> KVScales:
        """By what its keys and values are divided where they are kept as f8."""
        return NO_SCALES
