"""Matrices of many experts, of which each row is multiplied by its own."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cableway.kernels.expert_gemv import expert_gemv
from cableway.kernels.grouped_linear import grouped_linear, tile_rows_for
from cableway.kernels.order_by_expert import order_by_expert
from cableway.kernels.silu_mul import silu_mul
from cableway.kernels.sum_experts import sum_experts
from cableway.workers.formats.base import Format, Place, joined
from cableway.workers.formats.stored import Piece


class Order(NamedTuple):
    """What is for which expert: see order_by_expert.py. Without rows: one token, whose rows are as its experts."""

    experts: Tensor  # [T, K] i32
    rows: Tensor | None = None
    tiles: Any = None  # on a CPU a list, one an expert
    tile_rows: int = 0


class OneByOne:
    """On a CPU: each expert in the format that suits it, one after another."""

    def __init__(self, form: Format):
        self._form = form

    def finish(self, experts: Sequence[Sequence[Piece]]) -> list[Any]:
        return [self._form.finish(pieces) for pieces in experts]

    def order(self, experts: Tensor, num_experts: int) -> Order:
        flat = experts.flatten()
        counts = flat.bincount(minlength=num_experts).tolist()
        spans = zip(range(num_experts), accumulate(counts, initial=0), accumulate(counts), strict=False)
        return Order(experts, flat.argsort(stable=True), [span for span in spans if span[1] < span[2]])

    def inward(self, x: Tensor, params: list[Any], bias: Tensor | None, order: Order, *, gated: bool) -> Tensor:
        y = self._apply(x.index_select(0, order.rows // (len(order.rows) // len(x))), params, bias, order)
        return silu_mul(y) if gated else y

    def joined(
        self, x: Tensor, params: list[Any], bias: Tensor | None, order: Order, weights: Tensor,
        other: Tensor | None, gate: Tensor | None,
    ) -> Tensor:  # fmt: skip
        y = self._apply(x, params, bias, order)
        y = torch.empty_like(y).index_copy_(0, order.rows, y).view(*order.experts.shape, -1)
        y = (y.float() * weights[..., None]).sum(1).to(x.dtype)
        return y if other is None else sum_experts(y[:, None], other, gate)

    def _apply(self, x: Tensor, params: list[Any], bias: Tensor | None, order: Order) -> Tensor:
        y = torch.cat([self._form.apply(x[first:end], params[e]) for e, first, end in order.tiles])
        return y if bias is None else y.add_(bias.index_select(0, order.experts.flatten()[order.rows]))


class Together:
    """On a GPU: one kernel for all, on plain numbers."""

    def __init__(self, place: Place):
        self._place = place

    def finish(self, experts: Sequence[Sequence[Piece]]) -> Tensor:
        matrices = [piece.decode(self._place.dtype) for pieces in experts for piece in pieces]
        return joined(matrices, self._place.device).unflatten(0, (len(experts), -1))

    def order(self, experts: Tensor, num_experts: int) -> Order:
        if len(experts) == 1 and not self._place.invariant:
            return Order(experts)
        tile_rows = tile_rows_for(experts.numel(), num_experts, invariant=self._place.invariant)
        return Order(experts, *order_by_expert(experts, num_experts=num_experts, tile_rows=tile_rows), tile_rows)

    def inward(self, x: Tensor, params: Tensor, bias: Tensor | None, order: Order, *, gated: bool) -> Tensor:
        if order.rows is None:
            return expert_gemv(x, params, order.experts, bias, gated=gated)
        return grouped_linear(x, params, order.rows, order.tiles, bias, tile_rows=order.tile_rows, gated=gated)

    def joined(
        self, x: Tensor, params: Tensor, bias: Tensor | None, order: Order, weights: Tensor,
        other: Tensor | None, gate: Tensor | None,
    ) -> Tensor:  # fmt: skip
        if order.rows is None:
            y = expert_gemv(x, params, order.experts, bias, weights=weights)
            return y if other is None else sum_experts(y[:, None], other, gate)
        y = grouped_linear(
            x, params, order.rows, order.tiles, bias, tile_rows=order.tile_rows, weights=weights.flatten(), outward=True
        )
        return sum_experts(y.view(*order.experts.shape, -1), other, gate)
