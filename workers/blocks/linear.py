"""Slots: the places in a model where weights go, each with the logical axes by which it is cut over ranks."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cableway.kernels.silu_mul import silu_mul
from cableway.workers import formats
from cableway.workers.blocks.block import Filling, Slot
from cableway.workers.formats.base import Place, Sum, joined
from cableway.workers.parallel import Axis

_TILE_ROWS = 8


class Linear(Slot):
    """y = x Wᵀ + b, with W [out, in] of one or several parts along `out` that are multiplied as one.

    Where `in` is cut over ranks, the ranks' results are summed.

    Args:
        out: axis of each part, or one axis.
        bias: whether the checkpoint has one; None = as it pleases.
    """

    def __init__(self, out: Axis | Mapping[str, Axis], in_: Axis, *, bias: bool | None = False):
        self.parts = dict(out) if isinstance(out, Mapping) else {"": out}
        self.leaves = {"weight": (in_.size,)} if bias is False else {"weight": (in_.size,), "bias": ()}
        self.optional = frozenset({"bias"} if bias is None else ())
        self.local_sizes: list[int] = []
        self._in = in_
        self._apply: Callable[[Tensor, Any], Tensor]
        self._fused: Callable[..., Tensor] | None = None
        self._fused_and_input: Callable[..., tuple[Tensor, Tensor]] | None = None
        self._write: Callable[[Tensor, Any, Tensor], None] | None = None
        self._params: Any
        self._bias: Tensor | None = None
        self._reduce: Callable[[Tensor], Tensor] | None = None

    def load(self, parts: Filling, place: Place) -> None:
        mesh, columns = place.mesh, place.mesh.span(self._in)
        spans = {part: mesh.span(axis) for part, axis in self.parts.items()}
        self.local_sizes = [span.size for span in spans.values()]
        pieces = [parts[part]["weight"].piece(span, columns) for part, span in spans.items()]
        form = formats.choose([piece.encoding for piece in pieces], sum(self.local_sizes), columns.size, place)
        self._params, self._apply = form.finish(pieces), form.apply
        self._fused, self._write = getattr(form, "fused", None), getattr(form, "write", None)
        self._fused_and_input = getattr(form, "fused_and_input", None)
        if any("bias" in leaves for leaves in parts.values()):
            self._bias = joined(self.share(parts, place, place.dtype, "bias"), place.device)
        if mesh.is_cut(self._in):
            self._reduce = mesh.all_reduce
            if mesh.tp_rank > 0:
                self._bias = None  # it is added once, by rank 0

    def __call__(self, x: Tensor | Sum) -> Tensor:
        """x [T, in] -> [T, out], in the dtype of x; sizes are this rank's."""
        y = self._fused(x, self._params, self._bias, gated=False) if self._fused else self._multiply(x)
        return y if self._reduce is None else self._reduce(y)

    def and_input(self, x: Tensor | Sum) -> tuple[Tensor, Tensor]:
        """What `__call__` gives, and x as a tensor, where more than this is made of it."""
        if isinstance(x, Tensor):
            return self(x), x
        if self._fused_and_input is None or self._reduce is not None:
            x = x.tensor()
            return self(x), x
        return self._fused_and_input(x, self._params, self._bias)

    def gated(self, x: Tensor | Sum) -> Tensor:
        """silu(first half) * second half of what `__call__` gives, for outputs that are not summed over ranks."""
        return self._fused(x, self._params, self._bias, gated=True) if self._fused else silu_mul(self._multiply(x))

    def write(self, x: Tensor, out: Tensor) -> None:
        """What `__call__` gives, in float32 into `out` [T, out]: not rounded before, where the format can."""
        if self._write is None or self._reduce is not None:
            out.copy_(self(x))
            return
        self._write(x, self._params, out)
        if self._bias is not None:
            out += self._bias

    def _multiply(self, x: Tensor | Sum) -> Tensor:
        y = self._apply(x.tensor() if isinstance(x, Sum) else x, self._params)
        if self._bias is not None:
            y += self._bias
        return y


class HeadLinear(Slot):
    """For each head a matrix of its own: y[h] = W[h] x[h] + b[h].

    Args:
        out: axis of each part, with a head for a unit, or one axis.
    """

    def __init__(self, out: Axis | Mapping[str, Axis], in_size: int, *, bias: bool = False):
        self.parts = dict(out) if isinstance(out, Mapping) else {"": out}
        self.leaves = {"weight": (in_size,), "bias": ()} if bias else {"weight": (in_size,)}
        self._weight: Tensor  # [H, in, out]
        self._bias: Tensor | None = None
        self._is_invariant = False

    def load(self, parts: Filling, place: Place) -> None:
        def side_by_side(leaf: str) -> Tensor:
            """[H, out, …]"""
            shares = zip(self.share(parts, place, place.dtype, leaf), self.parts.values(), strict=True)
            return torch.cat([share.unflatten(0, (-1, axis.unit)) for share, axis in shares], 1).to(place.device)

        self._weight = side_by_side("weight").transpose(1, 2).contiguous()
        if "bias" in self.leaves:
            self._bias = side_by_side("bias")
        self._is_invariant = place.invariant

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, H, in] -> [T, H, out], with the parts of a head one after another"""
        y = by_heads(x, self._weight, is_invariant=self._is_invariant)
        return y if self._bias is None else y + self._bias


def by_heads(x: Tensor, matrices: Tensor, *, is_invariant: bool) -> Tensor:
    """x [T, H, in] through matrices [H, in, out] -> [T, H, out]"""
    if not is_invariant:
        return torch.bmm(x.transpose(0, 1), matrices).transpose(0, 1)
    padded = F.pad(x, (0, 0, 0, 0, 0, -len(x) % _TILE_ROWS))  # sums in one order, whatever rows are beside
    tiles = [torch.bmm(tile.transpose(0, 1), matrices).transpose(0, 1) for tile in padded.split(_TILE_ROWS)]
    return torch.cat(tiles)[: len(x)]


class Embedding(Slot):
    """Rows of a table [vocab, hidden]; where the vocabulary is cut over ranks, each adds the rows it holds."""

    def __init__(self, vocab: Axis, hidden: Axis):
        self.parts, self.leaves = {"": vocab}, {"weight": (hidden.size,)}
        self._table: Tensor
        self._first = 0
        self._reduce: Callable[[Tensor], Tensor] | None = None

    def load(self, parts: Filling, place: Place) -> None:
        (table,) = self.share(parts, place, place.dtype)
        self._table = table.to(place.device, copy=True)
        if place.mesh.is_cut(self.parts[""]):
            self._first, self._reduce = place.mesh.span(self.parts[""]).start, place.mesh.all_reduce

    def __call__(self, token_ids: Tensor) -> Tensor:
        """token_ids [T] -> [T, hidden]"""
        if self._reduce is None:
            return self._table.index_select(0, token_ids)
        local = token_ids - self._first
        inside = (local >= 0) & (local < len(self._table))
        return self._reduce(self._table.index_select(0, local * inside) * inside[:, None])


class Vector(Slot):
    """Numbers along one axis, a norm's weight say, or rows of `dims`; kept in float32, since it costs nothing."""

    def __init__(self, axis: Axis, *dims: int, optional: bool = False):
        self.parts, self.leaves = {"": axis}, {"weight": dims}
        self.optional = frozenset({"weight"} if optional else ())
        self.weight: Tensor | None = None

    def load(self, parts: Filling, place: Place) -> None:
        if "weight" in parts[""]:
            self.weight = joined(self.share(parts, place, torch.float32), place.device)
