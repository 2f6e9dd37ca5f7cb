"""Alternating updates: a stream of several, of which each layer computes one and mends the others.

Key: N streams, T tokens, E hidden, L layers, P numbers of a layer's own input.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cableway.workers.batch import Batch
from cableway.workers.blocks.block import Block
from cableway.workers.blocks.decoder import Decoder
from cableway.workers.blocks.layers import Layer, Norm
from cableway.workers.blocks.linear import Embedding, Linear, Vector
from cableway.workers.blocks.mlp import Activation
from cableway.workers.blocks.moe import Experts
from cableway.workers.blocks.norm import RMSNorm
from cableway.workers.blocks.step import Step
from cableway.workers.parallel import Axis

_LEAST_SQUARE = 1e-5


class AltUp(Block):
    """How streams are guessed from each other, and mended by the one that was computed.

    Args:
        active: which one that is.
    """

    def __init__(self, hidden_size: int, num_streams: int, active: int, eps: float):
        embed, streams = Axis("embed", hidden_size), Axis("streams", num_streams)
        self.norm, self.router = RMSNorm(hidden_size, eps), Linear(streams, embed)
        self.guess, self.mend = Vector(Axis("streams", num_streams**2), num_streams), Vector(streams, num_streams)
        self.num_streams, self.active = num_streams, active

    def guessed(self, streams: Tensor, dtype: torch.dtype) -> Tensor:
        """streams [N, T, E] f32 -> the same, before a layer"""
        weights = self._weights(streams[self.active].to(dtype), self.guess).unflatten(0, (self.num_streams, -1))
        guess = streams.clone()
        for i, stream in enumerate(streams):  # element by element: a row does not depend on the others
            guess.addcmul_(weights[:, i], stream)
        return guess

    def mended(self, guess: Tensor, computed: Tensor, dtype: torch.dtype) -> Tensor:
        """Changes of all streams [N, T, E] f32, from the active one's guess and what it came to [T, E] f32."""
        return (self._weights(computed.to(dtype), self.mend) + 1) * (computed - guess)

    def _weights(self, x: Tensor, table: Vector) -> Tensor:
        """x [T, E], a table [n, N] -> [n, T, 1] f32"""
        routed = torch.tanh(self.router(self.norm(x)).float() / x.shape[1])
        return (table.weight[:, None] * routed).sum(-1, keepdim=True)


class Laurel(Block):
    """y = x + norm(right(left(x))), through a narrow middle."""

    def __init__(self, hidden_size: int, rank: int, eps: float):
        embed, narrow = Axis("embed", hidden_size), Axis("rank", rank)
        self.left, self.right, self.norm = Linear(narrow, embed), Linear(embed, narrow), RMSNorm(hidden_size, eps)

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, E] -> [T, E]"""
        return self.norm(self.right(self.left(x))).add_(x)


class LayerInput(Block):
    """norm(up(act(gate(x)) * input)), with each layer's own input of a token."""

    def __init__(self, hidden_size: int, input_size: int, act: Activation, eps: float):
        embed, inputs = Axis("embed", hidden_size), Axis("inputs", input_size)
        self.gate, self.act, self.up = Linear(inputs, embed), act, Linear(embed, inputs)
        self.norm = RMSNorm(hidden_size, eps)

    def __call__(self, x: Tensor, own: Tensor) -> Tensor:
        """x [T, E], own [T, P] -> [T, E]"""
        return self.norm(self.up(self.act(self.gate(x)) * own))


class AltUpLayer(Layer):
    """A layer on the active stream, with a narrow path beside its mixer and an input of its own for the other streams.

    Args:
        number: of the layer. scales: whether what the input is gated by counts by a weight a number.
    """

    def __init__(
        self, *, number: int, altup: AltUp, laurel: Laurel, layer_input: LayerInput, scales: bool, hidden_size: int,
        **blocks: Any,
    ):  # fmt: skip
        super().__init__(**blocks)
        self.altup, self.laurel, self.layer_input = altup, laurel, layer_input
        self.scale, self.scales, self.number = Vector(Axis("norm", hidden_size)), scales, number

    def __call__(self, delta: Tensor, residual: Tensor, step: Step) -> Tensor:
        """As of a Layer, with all streams [N, T, E]."""
        dtype, active = delta.dtype, self.altup.active
        residual.copy_(self.altup.guessed(residual.add_(delta), dtype))
        guess = residual[active]
        x = self.norm_in(guess.to(dtype))
        h = guess + self.norm_mix_out(self.mix(x, step)) + self.laurel(x)
        h.div_(math.sqrt(2))
        h.add_(self.norm_mlp_out(self.mlp(self.norm_mlp(h.to(dtype)))))
        changes = self.altup.mended(guess, h, dtype)
        first = guess + changes[active]
        if self.scales:
            first *= self.scale.weight
        changes[1:] += self.layer_input(first.to(dtype), step.kept["inputs"][:, self.number])
        return changes.to(dtype)


class LayerInputs(Block):
    """The inputs of all layers, from the token's id and from its embedding."""

    def __init__(self, hidden_size: int, num_layers: int, input_size: int, vocab_size: int, eps: float):
        inputs = Axis("inputs", num_layers, input_size)
        self.table = Embedding(Axis("vocab", vocab_size), inputs)
        self.project = Linear(inputs, Axis("embed", hidden_size))
        self.norm = RMSNorm(input_size, eps)
        self.input_size, self.vocab_size = input_size, vocab_size

    def __call__(self, token_ids: Tensor, embeddings: Tensor) -> Tensor:
        """token_ids [T], embeddings [T, E] -> [T, L, P]"""
        known = token_ids.where(token_ids < self.vocab_size, 0)
        own = self.table(known).unflatten(1, (-1, self.input_size)) * self.input_size**0.5
        projected = self.project(embeddings).mul_(embeddings.shape[1] ** -0.5).unflatten(1, (-1, self.input_size))
        return own.add_(self.norm(projected)).mul_(2**-0.5)


class AltUpDecoder(Decoder):
    """A decoder of several streams, projected from the embeddings and back, each as long as the first."""

    def __init__(
        self, c: Any, layers: Sequence[Block], *, num_streams: int, inputs: LayerInputs, norm_out: Norm, **out: Any
    ):
        super().__init__(c, layers, norm_out=norm_out, **out)
        embed = Axis("embed", c.hidden_size)
        self.inputs = inputs.copy()
        self.spread = Linear({str(i): embed for i in range(num_streams - 1)}, embed)
        self.join = Experts(num_streams - 1, {"": embed}, embed)  # each stream has a matrix of its own

    def enter(self, batch: Batch, step: Step) -> Tensor:
        first = super().enter(batch, step)
        step.kept["inputs"] = self.inputs(batch.token_ids, first)
        others = self.spread(first).unflatten(1, (-1, first.shape[1])).transpose(0, 1)
        return torch.cat((first[None], _as_long_as(first, others)))

    def leave(self, delta: Tensor, residual: Tensor) -> Tensor:
        streams = residual.add_(delta).to(delta.dtype)
        first, others = streams[0], streams[1:]
        numbers = torch.arange(len(others), dtype=torch.int32, device=streams.device).repeat_interleave(len(first))
        joined = self.join(others.flatten(0, 1), self.join.order(numbers[:, None])).view(others.shape)
        joined = torch.cat((first[None], _as_long_as(first, joined)))
        return self.norm_out(joined.float().mean(0).to(delta.dtype))


def _as_long_as(like: Tensor, x: Tensor) -> Tensor:
    """x [..., T, E], its rows as long as those of `like` [T, E]"""
    square, wanted = (part.float().square().mean(-1, keepdim=True) for part in (x, like))
    return (x.float() * (wanted / square.clamp(min=_LEAST_SQUARE)).sqrt()).to(x.dtype)
