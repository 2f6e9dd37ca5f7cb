"""Layers, and the model around them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cableway.workers.batch import Batch, StateSpec
from cableway.workers.blocks.attention import Attention
from cableway.workers.blocks.block import Block
from cableway.workers.blocks.linear import Embedding, Linear, Vector
from cableway.workers.blocks.mlp import MLP
from cableway.workers.blocks.norm import RMSNorm
from cableway.workers.blocks.rope import Rope
from cableway.workers.blocks.step import Step
from cableway.workers.formats.base import Place, Sum
from cableway.workers.parallel import Axis


class Layer(Block):
    """A mixer and an MLP on a residual stream, with a norm before and after each where the family has one."""

    def __init__(
        self,
        *,
        mix: Attention,
        mlp: MLP,
        norm_in: RMSNorm | None = None,
        norm_mix_out: RMSNorm | None = None,
        norm_mlp: RMSNorm | None = None,
        norm_mlp_out: RMSNorm | None = None,
    ):
        self.norm_in, self.mix, self.norm_mix_out = norm_in, mix, norm_mix_out
        self.norm_mlp, self.mlp, self.norm_mlp_out = norm_mlp, mlp, norm_mlp_out

    def __call__(self, delta: Tensor, residual: Tensor, step: Step, index: int) -> Tensor:
        """Add `delta` [T, E], what the layer before made, to `residual` [T, E] f32; what this layer makes [T, E]."""
        delta = self.mix(_add(delta, residual, self.norm_in, self.mix), step, index)
        if self.norm_mix_out is not None:
            delta = self.norm_mix_out(delta)
        delta = self.mlp(_add(delta, residual, self.norm_mlp, self.mlp))
        return delta if self.norm_mlp_out is None else self.norm_mlp_out(delta)


def _add(delta: Tensor, residual: Tensor, norm: RMSNorm | None, block: Block) -> Tensor | Sum:
    """Add in place, and normalise the sum where there is a norm: what `block` takes, in the dtype of delta."""
    if norm is None:
        return residual.add_(delta).to(delta.dtype)
    total = Sum(delta, residual, norm)
    return total if block.takes_sum else total.tensor()


class Decoder(Block):
    """Token ids in, logits out.

    Args:
        c: the config: hidden_size, vocab_size, tie_word_embeddings.
        layers: templates, copied here; the same one may stand several times.
        norm_out: norm of the last hidden states.
    """

    def __init__(self, c: Any, layers: Sequence[Layer], *, norm_out: RMSNorm):
        vocab, hidden = Axis("vocab", c.vocab_size), Axis("embed", c.hidden_size)
        self.vocab_size: int = c.vocab_size
        self.embed = Embedding(vocab, hidden)
        self.layers = [layer.copy() for layer in layers]
        self.norm_out = norm_out.copy()
        self.head = Linear(vocab, hidden)
        rotary_dims = {layer.mix.rope.rotary_dim for layer in layers}
        self.rope_divisors = Vector(Axis("rope", max(rotary_dims) // 2), optional=True)
        self.tied: dict[str, str] = {"head": "embed"} if c.tie_word_embeddings else {}
        """Slots that are filled with the tensors of another one."""

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        self._place = place
        self._groups, self._group_of = _group([layer.mix.state(i, place.mesh) for i, layer in enumerate(self.layers)])
        ropes: dict[Rope, None] = dict.fromkeys(layer.mix.rope for layer in self.layers)
        divisors = self.rope_divisors.weight
        self._tables = {rope: rope.table(place.max_model_len, divisors).to(place.device) for rope in ropes}

    def state_groups(self) -> list[StateSpec]:
        """Layers by the state they keep; the order is that of a batch's block tables."""
        return self._groups

    def forward(self, batch: Batch, caches: Sequence[Tensor]) -> Tensor:
        """Hidden states [T, E] of the batch's tokens; `caches`, one a layer, take their keys and values."""
        step = Step(batch, caches, self._group_of, self._tables)
        delta = self.embed(batch.token_ids)
        # PERF: a residual stream in float32 halves the error of bfloat16 logits (SmolLM2-135M: std 0.21 -> 0.11).
        residual = torch.zeros_like(delta, dtype=torch.float32)
        for index, layer in enumerate(self.layers):
            delta = layer(delta, residual, step, index)
        return self.norm_out.add(delta, residual)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden [R, E] -> [R, vocab_size] f32, written to `out` if there is one"""
        if out is None:
            out = torch.empty(len(hidden), self.vocab_size, device=hidden.device)
        if self.head.local_sizes == [self.vocab_size]:
            self.head.write(hidden, out)
        else:
            out.copy_(self._place.mesh.all_gather(self.head(hidden))[:, : self.vocab_size])
        return out


def _group(states: Sequence[StateSpec]) -> tuple[list[StateSpec], list[int]]:
    """Join layers whose state differs in nothing but the layer; the groups, and each layer's group."""
    groups: dict[StateSpec, list[int]] = {}
    for layer, state in enumerate(states):
        groups.setdefault(replace(state, layers=()), []).append(layer)
    group_of = [0] * len(states)
    for index, layers in enumerate(groups.values()):
        for layer in layers:
            group_of[layer] = index
    return [replace(state, layers=tuple(layers)) for state, layers in groups.items()], group_of
