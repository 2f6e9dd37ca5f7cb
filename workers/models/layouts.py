"""How the parts of a slot lie in one tensor of a checkpoint."""

import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from cableway.workers.formats.stored import Stored
from cableway.workers.parallel import Axis

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


def in_turns_transposed(stored: Stored, parts: Mapping[str, Axis]) -> dict[str, Stored]:
    """A column of each part in turn, of a matrix [in, out]."""
    return in_turns(stored.computed(stored.shape[::-1], Tensor.t) if len(stored.shape) == 2 else stored, parts)


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


stacked = partial(_stacked, layout=concatenated)
"""Expert after expert [X, out, in], or [X * out, in], each with its parts one after another."""
stacked_transposed = partial(_stacked, layout=transposed)
"""[X, in, out], expert after expert, each with its parts side by side."""
stacked_in_turns = partial(_stacked, layout=in_turns_transposed)
"""[X, in, out], a column of each part in turn."""


def by_head(stored: Stored, parts: Mapping[str, Axis]) -> dict[str, Stored]:
    """[H, out, in]"""
    num_heads, num_out, num_in = stored.shape
    return concatenated(stored.changed((num_heads * num_out, num_in), lambda t: t.flatten(0, 1)), parts)


def by_head_transposed(stored: Stored, parts: Mapping[str, Axis]) -> dict[str, Stored]:
    """[H, in, out]"""
    num_heads, num_in, num_out = stored.shape
    return by_head(stored.computed((num_heads, num_out, num_in), lambda t: t.transpose(1, 2)), parts)


def one_for_all(stored: Stored, parts: Mapping[str, Axis]) -> dict[str, Stored]:
    """One number, that of each part."""
    if math.prod(stored.shape) != 1:
        raise ValueError
    return dict.fromkeys(parts, stored.changed((1,), Tensor.flatten))


def flat(stored: Stored, parts: Mapping[str, Axis]) -> dict[str, Stored]:
    """A row of numbers saved as a table, such as one of heads."""
    return concatenated(stored.changed((math.prod(stored.shape),), Tensor.flatten), parts)
