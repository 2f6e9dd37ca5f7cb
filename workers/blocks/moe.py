"""Mixtures of experts: a router chooses a few of many MLPs for each token.

Key: T tokens, X experts, K of them a token, E hidden.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cableway.workers import formats
from cableway.workers.blocks.block import Block, Slot
from cableway.workers.blocks.gates import sigmoid
from cableway.workers.blocks.linear import Linear, Vector
from cableway.workers.blocks.mlp import Activation, ClampedGate
from cableway.workers.formats.base import Place
from cableway.workers.formats.stored import Stored
from cableway.workers.parallel import Axis


def softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


class Groups(NamedTuple):
    """Only experts of the best `kept` of `num` groups may be chosen; a group is as good as its `best` experts."""

    num: int
    kept: int
    best: int

    def only(self, scores: Tensor) -> Tensor:
        """scores [T, X], -inf in the other groups"""
        by_group = scores.unflatten(-1, (self.num, -1))
        chosen = by_group.topk(self.best, -1).values.sum(-1).topk(self.kept, -1).indices
        others = torch.ones_like(by_group[..., 0], dtype=torch.bool).scatter_(-1, chosen, False)
        return by_group.masked_fill(others[..., None], float("-inf")).flatten(-2)


class Router(Block):
    """The K experts of a token and their weights.

    Args:
        score: of the gate's logits.
        correction: a checkpoint's number an expert, added to scores for the choice alone.
        groups: which experts may be chosen together.
        renorm: weights of a token are divided by their sum and this; None = they are not.
        scale: of the weights.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, score: Callable[[Tensor], Tensor] = softmax,
        correction: bool = False, groups: Groups | None = None, renorm: float | None = None, scale: float = 1.0,
        bias: bool = False,
    ):  # fmt: skip
        experts = Axis("experts", num_experts)
        self.gate = Linear(experts, Axis("embed", hidden_size), bias=bias)
        self.correction = Vector(experts) if correction else None
        self.top_k, self.score, self.groups = top_k, score, groups
        self.renorm, self.scale = renorm, scale

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, E] -> weights [T, K] f32, experts [T, K] i64"""
        scores = self.score(self.gate(x).float())
        choice = scores if self.correction is None else scores + self.correction.weight
        if self.groups is not None:
            choice = self.groups.only(choice)
        experts = choice.topk(self.top_k, -1).indices
        weights = scores.gather(-1, experts)
        if self.renorm is not None:
            weights = weights / (weights.sum(-1, keepdim=True) + self.renorm)
        return weights * self.scale, experts


class SparseMixer(Block):
    """PhiMoE: one after another the likeliest expert is drawn; its weight is a softmax over those not much unlikelier.

    Args:
        jitter: how much unlikelier, as part of the larger logit's size.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, *, jitter: float):
        self.gate = Linear(Axis("experts", num_experts), Axis("embed", hidden_size))
        self.top_k, self.jitter = top_k, jitter

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.gate(x).float()
        left, weights, experts = logits, [], []
        for _ in range(self.top_k):
            top, expert = left.max(-1, keepdim=True)
            is_far = (top - logits) / logits.abs().maximum(top) > 2 * self.jitter
            weights.append(left.masked_fill(is_far, float("-inf")).softmax(-1).gather(-1, expert))
            experts.append(expert)
            left = left.scatter(-1, expert, float("-inf"))
        return torch.cat(weights, -1), torch.cat(experts, -1)


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

    def load(self, parts: Mapping[str, Mapping[str, Stored]], place: Place) -> None:
        mesh, columns = place.mesh, place.mesh.span(self._in)
        spans = {part: mesh.span(axis) for part, axis in self.parts.items()}
        pieces = [parts[part]["weight"].piece(span, columns) for part, span in spans.items()]
        num_parts = len(pieces) // self._num_experts
        experts = [pieces[i : i + num_parts] for i in range(0, len(pieces), num_parts)]
        num_out = sum(span.size for span in list(spans.values())[:num_parts])
        self._form = formats.choose_for_experts([p.encoding for p in pieces], num_out, columns.size, place)
        self._params = self._form.finish(experts)
        if "bias" in self.leaves:
            biases = [parts[part]["bias"].piece(span).decode(place.dtype) for part, span in spans.items()]
            self._bias = torch.cat(biases).view(self._num_experts, -1).to(place.device)
            if mesh.is_cut(self._in) and mesh.tp_rank > 0:
                self._bias.zero_()  # it is added once, by rank 0

    def __call__(self, x: Tensor, experts: Tensor, offsets: Tensor) -> Tensor:
        """x [M, in], in the order of experts [M] i64, those of expert e from offsets[e] on -> [M, out]"""
        y = self._form.apply(x, self._params, offsets)
        return y if self._bias is None else y.add_(self._bias.index_select(0, experts))


class MoE(Block):
    """y = sum over a token's experts of weight * down(act(gate(x)) * up(x)), and what `shared` gives for all tokens.

    Args:
        shared: an MLP that every token goes through. shared_gate: its result counts by a sigmoid of its own gate.
    """

    def __init__(
        self, hidden_size: int, ffn_size: int, num_experts: int, *, router: Router | SparseMixer,
        act: Activation | ClampedGate | None = None, bias: bool = False, shared: Any = None, shared_gate: bool = False,
    ):  # fmt: skip
        hidden, ffn = Axis("embed", hidden_size), Axis("ffn", ffn_size)
        self.router = router
        self.gate_up = Experts(num_experts, {"gate": ffn, "up": ffn}, hidden, bias=bias)
        self.act = act or Activation("silu")
        self.down = Experts(num_experts, {"": hidden}, ffn, bias=bias)
        self.shared = shared
        self.shared_gate = Linear(Axis("one", 1), hidden) if shared_gate else None
        self.num_experts, self.ffn = num_experts, ffn

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        self._reduce = place.mesh.all_reduce if place.mesh.is_cut(self.ffn) else None

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, E] -> [T, E]"""
        y = self.routed(x)
        if self._reduce is not None:
            y = self._reduce(y)
        if self.shared is None:
            return y
        other = self.shared(x)
        return y.add_(other if self.shared_gate is None else other * sigmoid(self.shared_gate(x)))

    def routed(self, x: Tensor) -> Tensor:
        """What this rank's share of the experts gives."""
        weights, experts = self.router(x)
        y = self.through(x.repeat_interleave(experts.shape[1], 0), experts)
        return (y.float() * weights[..., None]).sum(1).to(x.dtype)

    def through(self, x: Tensor, experts: Tensor) -> Tensor:
        """x [T * K, E], a row for each of experts [T, K] -> what that expert makes of it [T, K, E]"""
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        counts = torch.zeros(self.num_experts + 1, dtype=torch.int32, device=x.device)
        offsets = counts.index_add_(0, flat + 1, torch.ones_like(flat, dtype=torch.int32)).cumsum(0, dtype=torch.int32)
        chosen = flat.index_select(0, order)
        y = self.down(self.inner(x.index_select(0, order), chosen, offsets), chosen, offsets)
        return torch.empty_like(y).index_copy_(0, order, y).view(*experts.shape, -1)

    def inner(self, x: Tensor, experts: Tensor, offsets: Tensor) -> Tensor:
        """What `down` is given, of x [M, in], in the order of experts [M]."""
        return self.act.gate(self.gate_up(x, experts, offsets))


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

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, E] -> [T, E]"""
        weights, experts = self.router(x)
        rows = x if self.narrow is None else self.narrow(x)
        y = self.through(rows.repeat_interleave(experts.shape[1], 0), experts)
        y = (y.float() * weights[..., None]).sum(1).to(x.dtype)
        if self._reduce is not None:
            y = self._reduce(y)
        return (y if self.widen is None else self.widen(y)).add_(self.shared(x))

    def inner(self, x: Tensor, experts: Tensor, offsets: Tensor) -> Tensor:
        return self.act(self.up(x, experts, offsets))


class InputMoE(MoE):
    """Llama 4: what goes into an expert is weighted, not what comes out."""

    def routed(self, x: Tensor) -> Tensor:
        weights, experts = self.router(x)
        weighted = (x[:, None] * weights[..., None].to(x.dtype)).flatten(0, 1)
        return self.through(weighted, experts).float().sum(1).to(x.dtype)


class IdentityMoE(MoE):
    """LongCat: the router knows more experts than there are; the others give back what they are given."""

    def routed(self, x: Tensor) -> Tensor:
        weights, experts = self.router(x)
        is_real = experts < self.num_experts
        y = self.through(x.repeat_interleave(experts.shape[1], 0), experts.where(is_real, 0)).float()
        part = (~is_real * weights).sum(-1, keepdim=True) * x.float()
        routed = (y * (weights * is_real)[..., None]).sum(1)
        return (routed + part / self._num_ranks).to(x.dtype)

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        self._num_ranks = place.mesh.tp_size if place.mesh.is_cut(self.ffn) else 1
