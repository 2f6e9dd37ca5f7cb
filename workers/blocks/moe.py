"""Mixtures of experts: a router chooses a few of many MLPs for each token.

Key: T tokens, X experts, K of them a token, E hidden.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from cableway.kernels.choose_experts import choose_experts
from cableway.workers import formats
from cableway.workers.blocks.block import Block, Filling, Slot
from cableway.workers.blocks.gates import sigmoid
from cableway.workers.blocks.linear import Linear, Vector
from cableway.workers.blocks.mlp import Activation, ClampedGate
from cableway.workers.formats.base import Place, Sum, joined
from cableway.workers.formats.experts import Order
from cableway.workers.parallel import Axis


class Groups(NamedTuple):
    """Only experts of the best `kept` of `num` groups may be chosen; a group is as good as its `best` experts."""

    num: int
    kept: int
    best: int


class Router(Block):
    """The K experts of a token and their weights.

    Args:
        score: of the gate's logits, "softmax" or "sigmoid".
        correction: a checkpoint's number an expert, added to scores for the choice alone.
        groups: which experts may be chosen together.
        renorm: weights of a token are divided by their sum and this; None = they are not.
        scale: of the weights.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, score: str = "softmax", correction: bool = False,
        groups: Groups | None = None, renorm: float | None = None, scale: float = 1.0, bias: bool = False,
    ):  # fmt: skip
        experts = Axis("experts", num_experts)
        self.gate = Linear(experts, Axis("embed", hidden_size), bias=bias)
        self.correction = Vector(experts) if correction else None
        some = groups if groups is not None and groups.kept < groups.num else None
        self._rule = {"top_k": top_k, "score": score, "groups": some, "renorm": renorm, "scale": scale}

    @classmethod
    def of(cls, c: Any, **rule: Any) -> Self:
        """Of as many experts as the config has."""
        return cls(c.hidden_size, c.num_experts, c.num_experts_per_tok, **rule)

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """logits [T, X], of `gate` -> weights [T, K] f32, experts [T, K] i32"""
        return choose_experts(logits, None if self.correction is None else self.correction.weight, **self._rule)


class SparseMixer(Block):
    """PhiMoE: one after another the likeliest expert is drawn; its weight is a softmax over those not much unlikelier.

    Args:
        jitter: how much unlikelier, as part of the larger logit's size.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, *, jitter: float):
        self.gate = Linear(Axis("experts", num_experts), Axis("embed", hidden_size))
        self.top_k, self.jitter = top_k, jitter

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.float()
        left, weights, experts = logits, [], []
        for _ in range(self.top_k):
            top, expert = left.max(-1, keepdim=True)
            is_far = (top - logits) / logits.abs().maximum(top) > 2 * self.jitter
            weights.append(left.masked_fill(is_far, float("-inf")).softmax(-1).gather(-1, expert))
            experts.append(expert)
            left = left.scatter(-1, expert, float("-inf"))
        return torch.cat(weights, -1), torch.cat(experts, -1).int()


class Experts(Slot):
    """A matrix [out, in] of one or several parts for each expert: `0.gate`, `0.up`, `1.gate`, … or `0`, `1`, …."""

    def __init__(self, num_experts: int, out: Mapping[str, Axis], in_: Axis, *, bias: bool = False):
        self.parts = {
            f"{expert}.{part}".rstrip("."): axis for expert in range(num_experts) for part, axis in out.items()
        }
        self.leaves = {"weight": (in_.size,), "bias": ()} if bias else {"weight": (in_.size,)}
        self._num_experts, self._in = num_experts, in_
        self._params: Any
        self._bias: Tensor | None = None

    def load(self, parts: Filling, place: Place) -> None:
        mesh, columns = place.mesh, place.mesh.span(self._in)
        spans = {part: mesh.span(axis) for part, axis in self.parts.items()}
        pieces = [parts[part]["weight"].piece(span, columns) for part, span in spans.items()]
        num_parts = len(pieces) // self._num_experts
        experts = [pieces[i : i + num_parts] for i in range(0, len(pieces), num_parts)]
        num_out = sum(span.size for span in list(spans.values())[:num_parts])
        self._form = formats.choose_for_experts([p.encoding for p in pieces], num_out, columns.size, place)
        self._params = self._form.finish(experts)
        if "bias" in self.leaves:
            self._bias = joined(self.share(parts, place, place.dtype, "bias"), place.device).view(self._num_experts, -1)
            if mesh.is_cut(self._in) and mesh.tp_rank > 0:
                self._bias.zero_()  # it is added once, by rank 0

    def order(self, experts: Tensor) -> Order:
        """What of experts [T, K] i32 is for which."""
        return self._form.order(experts, self._num_experts)

    def __call__(self, x: Tensor, order: Order, *, gated: bool = False) -> Tensor:
        """x [T, in], or [T * K, in] where each of a token's experts has a row of its own -> [T * K, out], as `order`
        has them; silu(first half) * second half where gated"""
        return self._form.inward(x, self._params, self._bias, order, gated=gated)

    def joined(
        self, x: Tensor, order: Order, weights: Tensor, other: Tensor | None = None, gate: Tensor | None = None
    ) -> Tensor:
        """x [T * K, in], as `order` has them -> the sum of a token's experts by their weights [T, K], and of `other`
        [T, out] by the sigmoid of `gate` [T, 1] where there is one [T, out]"""
        return self._form.joined(x, self._params, self._bias, order, weights, other, gate)


class MoE(Block):
    """y = sum over a token's experts of weight * down(act(gate(x)) * up(x)), and what `shared` gives for all tokens.

    Args:
        shared: an MLP that every token goes through. shared_gate: its result counts by a sigmoid of its own gate.
    """

    takes_sum = True

    def __init__(
        self, hidden_size: int, ffn_size: int, num_experts: int, *, router: Router | SparseMixer,
        act: Activation | ClampedGate | None = None, bias: bool = False, shared: Any = None, shared_gate: bool = False,
    ):  # fmt: skip
        hidden, ffn = Axis("embed", hidden_size), Axis("ffn", ffn_size)
        self.router = router
        self.gate_up = Experts(num_experts, {"gate": ffn, "up": ffn}, hidden, bias=bias)
        self.act = act or Activation("silu")
        self._is_silu = isinstance(self.act, Activation) and self.act.kind == "silu"
        self.down = Experts(num_experts, {"": hidden}, ffn, bias=bias)
        self.shared = shared
        self.shared_gate = Linear(Axis("one", 1), hidden) if shared_gate else None
        self.num_experts, self.ffn = num_experts, ffn

    @classmethod
    def of(cls, c: Any, router: Router | SparseMixer, **options: Any) -> Self:
        """Sizes and activation as the config has them."""
        if "act" not in options:
            options["act"] = Activation(c.hidden_act)
        return cls(c.hidden_size, c.moe_intermediate_size, c.num_experts, router=router, **options)

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        self._reduce = place.mesh.all_reduce if place.mesh.is_cut(self.ffn) else None

    def __call__(self, x: Tensor | Sum) -> Tensor:
        """x [T, E] -> [T, E]"""
        logits, x = self.router.gate.and_input(x)
        other = None if self.shared is None else self.shared(x)
        gate = None if self.shared_gate is None else self.shared_gate(x)
        weights, experts = self.router(logits)
        if self._reduce is None:
            return self.routed(x, weights, experts, other, gate)
        y = self._reduce(self.routed(x, weights, experts))
        return y if other is None else y.add_(other if gate is None else other * sigmoid(gate))

    def routed(self, x: Tensor, weights: Tensor, experts: Tensor, *also: Tensor | None) -> Tensor:
        """What this rank's share of the experts gives, and what is to be added: see `Experts.joined`.

        x [T, E], or [T * K, E] with a row for each of experts [T, K]; weights [T, K] f32 -> [T, E]
        """
        order = self.down.order(experts)
        return self.down.joined(self.inner(x, order), order, weights, *also)

    def inner(self, x: Tensor, order: Order) -> Tensor:
        """What `down` is given."""
        return self.gate_up(x, order, gated=True) if self._is_silu else self.act.gate(self.gate_up(x, order))


class PlainMoE(MoE):
    """Nemotron-H: experts without gates, down(act(up(x))).

    Args:
        latent: experts are this wide; x is made narrower before them, and their sum wide again; 0 = they are as wide.
        bias: of what makes it narrower and wide again.
    """

    def __init__(
        self, hidden_size: int, ffn_size: int, num_experts: int, *, router: Router, act: Activation, shared: Any,
        latent: int = 0, bias: bool = False,
    ):  # fmt: skip
        super().__init__(hidden_size, ffn_size, num_experts, router=router, act=act, shared=shared)
        hidden, inside = Axis("embed", hidden_size), Axis("latent" if latent else "embed", latent or hidden_size)
        del self.gate_up
        self.up = Experts(num_experts, {"": self.ffn}, inside)
        self.down = Experts(num_experts, {"": inside}, self.ffn)
        self.narrow = Linear(inside, hidden, bias=bias) if latent else None
        self.widen = Linear(hidden, inside, bias=bias) if latent else None

    def __call__(self, x: Tensor | Sum) -> Tensor:
        """x [T, E] -> [T, E]"""
        logits, x = self.router.gate.and_input(x)
        y = self.routed(x if self.narrow is None else self.narrow(x), *self.router(logits))
        if self._reduce is not None:
            y = self._reduce(y)
        return (y if self.widen is None else self.widen(y)).add_(self.shared(x))

    def inner(self, x: Tensor, order: Order) -> Tensor:
        return self.act(self.up(x, order))


class InputMoE(MoE):
    """Llama 4: what goes into an expert is weighted, not what comes out."""

    def routed(self, x: Tensor, weights: Tensor, experts: Tensor, *also: Tensor | None) -> Tensor:
        weighted = (x[:, None] * weights[..., None].to(x.dtype)).flatten(0, 1)
        return super().routed(weighted, torch.ones_like(weights), experts, *also)


class IdentityMoE(MoE):
    """LongCat: the router knows more experts than there are; the others give back what they are given."""

    def routed(self, x: Tensor, weights: Tensor, experts: Tensor, *also: Tensor | None) -> Tensor:
        is_real = experts < self.num_experts
        y = super().routed(x, weights * is_real, experts.where(is_real, 0), *also)
        part = (~is_real * weights).sum(-1, keepdim=True) * x.float()
        return (y.float() + part / self._num_ranks).to(x.dtype)

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        self._num_ranks = place.mesh.tp_size if place.mesh.is_cut(self.ffn) else 1
