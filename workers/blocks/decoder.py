"""The model around the layers."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cableway.workers.batch import Batch, Source, StateSpec
from cableway.workers.blocks.block import Block, Slot, are_alike
from cableway.workers.blocks.encoder import CrossAttention, Encoder
from cableway.workers.blocks.layers import DetourLayer, Layer, Norm, add
from cableway.workers.blocks.linear import Embedding, Linear, Vector
from cableway.workers.blocks.rope import Rope
from cableway.workers.blocks.step import Step
from cableway.workers.formats.base import Place
from cableway.workers.parallel import Axis


class Decoder(Block):
    """Token ids in, logits out.

    Args:
        c: the config: hidden_size, vocab_size, tie_word_embeddings.
        layers: templates, copied here; the same one may stand several times.
        norm_out: norm of the last hidden states.
        positions: learned embeddings of positions, added to those of tokens.
        on_embed: what is done to embeddings. on_logits: what is done to logits [R, V] f32, in place.
        head_bias: whether the checkpoint has one; None = as it pleases.
        embed_size: of the embeddings, which are projected to the layers' size and back where it is another.
        encoder: of what sequences attend to besides; it has the same embeddings.
    """

    def __init__(
        self, c: Any, layers: Sequence[Block], *, norm_out: Norm | None, positions: "Positions | None" = None,
        on_embed: Any = None, on_logits: Any = None, head_bias: bool | None = False, embed_size: int = 0,
        encoder: Encoder | None = None,
    ):  # fmt: skip
        vocab, hidden = Axis("vocab", c.vocab_size), Axis("embed", c.hidden_size)
        narrow = Axis("embed", embed_size or c.hidden_size)
        self.vocab_size: int = c.vocab_size
        self.embed = Embedding(vocab, narrow)
        self.project_in = Linear(hidden, narrow) if narrow != hidden else None
        self.positions = positions
        self.on_embed = on_embed and on_embed.copy()
        self.encoder = encoder
        self.has_encoder = encoder is not None
        self.layers = [layer.copy() for layer in layers]
        self._kinds = [next(i for i, other in enumerate(layers) if are_alike(layer, other)) for layer in layers]
        self.norm_out = norm_out and norm_out.copy()
        self.project_out = Linear(narrow, hidden) if narrow != hidden else None
        self.head = Linear(vocab, narrow, bias=head_bias)
        self.on_logits = on_logits
        self._mixers = tuple(self.mixers())
        for number, mixer in enumerate(self._mixers):
            mixer.number = number
        self._sees_embeddings = any(isinstance(layer, DetourLayer) for layer in self.layers)
        self._ropes: dict[Rope, None] = dict.fromkeys(rope for mixer in self._mixers for rope in mixer.ropes())
        if self._ropes:
            self.rope_divisors = Vector(Axis("rope", max(r.rotary_dim for r in self._ropes) // 2), optional=True)
        self.tied: dict[str, str] = {"head": "embed"} if c.tie_word_embeddings else {}
        """Slots that are filled with the tensors of another one."""

    def slots(self, path: str = "") -> Iterator[tuple[str, Slot]]:
        """(path, slot) of every slot; of one that layers share, the path in the first of them."""
        known = set()
        for place, slot in super().slots(path):
            if id(slot) not in known:
                known.add(id(slot))
                yield place, slot

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        self._place = place
        self._groups, self._group_of = _group([mixer.state(place.mesh) for mixer in self._mixers])
        self._scales = [mixer.scales() for mixer in self._mixers]
        divisors = self.rope_divisors.weight if self._ropes else None
        self._tables = {rope: rope.table(place.max_model_len, divisors).to(place.device) for rope in self._ropes}

    def abridge(self) -> None:
        """Keep two layers of each kind, and the last: steps launch the same kernels, each less often.

        For outlines, before they are filled. The state is that of all layers.
        """
        before, wanted = Counter[int](), []
        for layer, kind in zip(self.layers, self._kinds, strict=True):
            if before[kind] < 2 or layer is self.layers[-1]:
                wanted.append(layer)
            before[kind] += 1
        self.layers = wanted

    def state_groups(self) -> list[StateSpec]:
        """Mixers by the state they keep; the order is that of a batch's block tables."""
        return self._groups

    def forward(self, batch: Batch, caches: Sequence[Tensor]) -> Tensor:
        """Hidden states [R, E] of the tokens whose logits are wanted; `caches`, one a mixer, take what each keeps."""
        step = Step(batch, caches, self._group_of, self._scales, self._tables)
        delta = self.enter(batch, step)
        # PERF: a residual stream in float32 halves the error of bfloat16 logits (SmolLM2-135M: std 0.21 -> 0.11).
        residual = torch.zeros_like(delta, dtype=torch.float32)
        *layers, last = self.layers
        for layer in layers:
            delta = layer(delta, residual, step)
        if (wanted := batch.logits_at) is None:
            return self.leave(last(delta, residual, step), residual)
        if type(last) is Layer and len(wanted) < len(delta):  # kinds of it have no such halves
            # PERF: tokens that nobody asks about are done with once the last mixer has seen them: with prompts that is
            # most of a layer.
            delta = last.begin(delta, residual, step).index_select(0, wanted)
            residual = residual.index_select(0, wanted)
            return self.leave(last.finish(delta, residual), residual) if len(wanted) else delta
        return self.leave(last(delta, residual, step), residual).index_select(0, wanted)

    def enter(self, batch: Batch, step: Step) -> Tensor:
        """What the first layer is given."""
        delta = self.embed(batch.token_ids)
        if self.project_in is not None:
            delta = self.project_in(delta)
        if self.positions is not None:
            delta = delta.add_(self.positions(batch.positions))
        if self.on_embed is not None:
            delta = self.on_embed(delta)
        if self._sees_embeddings:
            step.embeddings = delta
        return delta

    def leave(self, delta: Tensor, residual: Tensor) -> Tensor:
        """Hidden states [T, E], from what the last layer has made and the stream."""
        hidden = add(delta, residual, self.norm_out)
        return hidden if self.project_out is None else self.project_out(hidden)

    def encode(self, source: Source, caches: Sequence[Tensor]) -> None:
        """Take whole sources through the encoder; `caches` take what their sequences attend to."""
        encoded = self.encoder(self.embed(source.token_ids), source)
        for mixer in self._mixers:
            if isinstance(mixer, CrossAttention):
                mixer.keep(encoded, caches[mixer.number], source.slots)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden [R, E] -> [R, vocab_size] f32, written to `out` if there is one"""
        if out is None:
            out = torch.empty(len(hidden), self.vocab_size, device=hidden.device)
        if self.head.local_sizes == [self.vocab_size]:
            self.head.write(hidden, out)
        else:
            out.copy_(self._place.mesh.all_gather(self.head(hidden))[:, : self.vocab_size])
        return out if self.on_logits is None else self.on_logits(out)


class Positions(Block):
    """Learned embeddings of positions, the first of them in row `offset` of the table."""

    def __init__(self, num_positions: int, hidden_size: int, *, offset: int = 0):
        self.table = Embedding(Axis("positions", num_positions + offset), Axis("embed", hidden_size))
        self.offset = offset

    def __call__(self, positions: Tensor) -> Tensor:
        """positions [T] i32 -> [T, E]"""
        return self.table(positions + self.offset if self.offset else positions)


def _group(states: Sequence[StateSpec]) -> tuple[list[StateSpec], list[int]]:
    """Join mixers whose state differs in nothing but the mixer; the groups, and each mixer's group."""
    groups: dict[StateSpec, list[int]] = {}
    for number, state in enumerate(states):
        groups.setdefault(replace(state, layers=()), []).append(number)
    group_of = [0] * len(states)
    for index, numbers in enumerate(groups.values()):
        for number in numbers:
            group_of[number] = index
    return [replace(state, layers=tuple(numbers)) for state, numbers in groups.items()], group_of
