"""Grouped-query attention over a paged cache."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from cableway.ipc.modelfiles import ModelError
from cableway.kernels.attention_plan import Scores
from cableway.kernels.kv_cache import NO_SCALES, KVScales
from cableway.kernels.kv_write import kv_write
from cableway.kernels.paged_attention import paged_attention
from cableway.kernels.rope import rope as rotate
from cableway.kernels.rope_and_write import rope_and_write
from cableway.workers.batch import StateSpec
from cableway.workers.blocks.block import Block, Filling, Mixer, Slot
from cableway.workers.blocks.gates import sigmoid, softplus
from cableway.workers.blocks.linear import Linear, Vector
from cableway.workers.blocks.norm import HeadRMSNorm, JointNorm, LayerNorm, RMSNorm, RMSScale
from cableway.workers.blocks.rope import Rope
from cableway.workers.blocks.step import Step
from cableway.workers.formats.base import Place, Sum
from cableway.workers.parallel import Axis, Mesh

_ALIGNED = 8
"""Numbers that heads grow by at once."""

HeadNorm = RMSNorm | RMSScale | HeadRMSNorm | LayerNorm | JointNorm


class Attention(Mixer):
    """Causal self-attention.

    Args:
        scores: how they are made: scale, window, soft cap.
        rope: rotary positions, or scores that fall with distance; None = neither.
        qk_norm: norm of each head of q and k, or of all of them, before they are rotated; or one for each of the two.
        bias: of what is projected in. out_bias: of the output projection.
    """

    takes_sum = True

    def __init__(
        self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, scores: Scores, *,
        rope: "Rope | ALiBi | None", qk_norm: HeadNorm | tuple[HeadNorm, HeadNorm] | None = None,
        bias: bool | None = False, out_bias: bool | None = False,
    ):  # fmt: skip
        embed = Axis("embed", hidden_size)
        self.heads, self.kv_heads = Axis("heads", num_heads, head_dim), Axis("kv_heads", num_kv_heads, head_dim)
        self.qkv = Linear(self.projected(), embed, bias=bias)
        self.q_norm, self.k_norm = qk_norm if isinstance(qk_norm, tuple) else (qk_norm, qk_norm)
        self.kv_scales = KeptScales()
        self.out = Linear(embed, self.heads, bias=out_bias)
        self.rope, self.alibi = (None, rope) if isinstance(rope, ALiBi) else (rope, None)
        self.scores = scores
        self.head_dim = head_dim

    @classmethod
    def of(
        cls, c: Any, *, scale: float | None = None, window: int = 0, chunk: int = 0, soft_cap: float = 0.0,
        **options: Any,
    ) -> Self:  # fmt: skip
        """Heads, rotation and biases as the config has them; the scale is 1 / sqrt(head_dim), if nothing else is said.

        The output has a bias where the input has one, unless there is an `attention_out_bias`.
        """
        if "rope" not in options:
            options["rope"] = Rope.of(c.head_dim, c.rope_parameters)
        if "bias" not in options:
            options["bias"] = c.attention_bias
            options.setdefault("out_bias", getattr(c, "attention_out_bias", c.attention_bias))
        scores = Scores(c.head_dim**-0.5 if scale is None else scale, window, soft_cap, chunk=chunk)
        return cls(c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, scores, **options)

    def projected(self) -> dict[str, Axis]:
        """Axes of what is projected in: q, k and v first."""
        return {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads}

    def state(self, mesh: Mesh) -> StateSpec:
        num_kv_heads, window = mesh.span(self.kv_heads).size // self.head_dim, self.scores.window or self.scores.chunk
        return StateSpec("sliding" if window else "paged", (self.number,), num_kv_heads, self.head_dim, window)

    def ropes(self) -> list[Rope]:
        return [] if self.rope is None else [self.rope]

    def scales(self) -> KVScales:
        return self.kv_scales.given

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        self._num_heads = [size // self.head_dim for size in self.qkv.local_sizes]
        if self.alibi is not None:
            self.scores = replace(self.scores, slopes=self.alibi.slopes)
        self._norms, self._eps = None, 0.0
        if self.is_fused and self.q_norm is not None:
            self._norms, self._eps = (self.q_norm.weight, self.k_norm.weight), self.q_norm.eps

    @property
    def is_fused(self) -> bool:
        """Whether one kernel does all between the projection and attention."""
        return self.rope is not None and type(self.q_norm) in (type(None), RMSNorm)

    def __call__(self, x: Tensor | Sum, step: Step) -> Tensor:
        """x [T, E] -> [T, E], and this layer's cache takes the keys and values of the T tokens."""
        return self.out(self.attend(*self.project(x), step).flatten(1))

    def project(self, x: Tensor | Sum) -> tuple[Tensor, ...]:
        """x [T, E] -> heads of each thing that is projected in, [T, H, D] or [T, KV, D]."""
        heads = self.qkv(x)
        return heads.view(len(heads), -1, self.head_dim).split(self._num_heads, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        """What the heads take from their sequences [T, H, D]; k and v go to this layer's cache."""
        cache, plan, slots = step.state(self.number)
        scales = step.scales(self.number)
        if self.is_fused:
            angles = step.angles(self.rope)
            q = rope_and_write(q, k, v, angles, cache, slots, self._norms, eps=self._eps, scales=scales)
        else:
            q, k, v = self.turn(*self.norm(q, k, v), step)
            kv_write(k, v, cache, slots, scales)
        return paged_attention(q, cache, plan, self.scores, scales)

    def norm(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Heads as they are rotated."""
        return (q, k, v) if self.q_norm is None else (self.q_norm(q), self.k_norm(k), v)

    def turn(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Heads as they attend, from those that `norm` gives."""
        if self.rope is not None:
            rotate(q, k, step.angles(self.rope))
        return q, k, v


class KeptScales(Slot):
    """What keys and values are divided by where they are kept as f8: 1 unless the checkpoint says otherwise."""

    def __init__(self) -> None:
        self.parts = {"k": Axis("one", 1), "v": Axis("one", 1)}
        self.leaves, self.optional = {"weight": ()}, frozenset({"weight"})
        self.given = NO_SCALES

    def load(self, parts: Filling, place: Place) -> None:
        given = [leaves["weight"] for leaves in parts.values() if leaves]
        if given and place.device.type != "meta":
            self.given = KVScales(*(float(stored.read()) for stored in given))
            if not all(0 < scale < math.inf for scale in self.given):
                raise ModelError(f"{given[0].name}: scales of keys and values are {self.given}, not positive numbers")


class GatedAttention(Attention):
    """What attention gives counts by a sigmoid of a gate for each of its numbers, projected beside q."""

    def projected(self) -> dict[str, Axis]:
        return {**super().projected(), "gate": self.heads}

    def __call__(self, x: Tensor | Sum, step: Step) -> Tensor:
        q, k, v, gate = self.project(x)
        return self.out(self.attend(q, k, v, step).mul_(sigmoid(gate)).flatten(1))


class NarrowAttention(Attention):
    """Queries are made from narrow latents, normed.

    Args:
        latent: their size. eps: of their norm.
    """

    def __init__(self, hidden_size: int, num_heads: int, *sizes: Any, latent: int, eps: float, **options: Any):
        self.latent = Axis("latent", latent)
        super().__init__(hidden_size, num_heads, *sizes, **options)
        self.latent_norm, self.up = RMSNorm(latent, eps), Linear(self.heads, self.latent)

    def projected(self) -> dict[str, Axis]:
        return {**super().projected(), "q": self.latent}

    def project(self, x: Tensor | Sum) -> tuple[Tensor, ...]:
        latent, k, v = self.qkv(x).split(self.qkv.local_sizes, 1)
        parts = self.up(self.latent_norm(latent)), k, v
        return tuple(part.unflatten(1, (-1, self.head_dim)) for part in parts)


class NormedAttention(Attention):
    """What attention gives is normed, all heads together, before it is projected out."""

    def __init__(self, *sizes: Any, eps: float, **options: Any):
        super().__init__(*sizes, **options)
        self.norm_y = JointNorm(self.heads, eps)

    def __call__(self, x: Tensor | Sum, step: Step) -> Tensor:
        return self.out(self.norm_y(self.attend(*self.project(x), step).flatten(1)))


class LateNormAttention(Attention):
    """Norms q and k after they are rotated."""

    is_fused = False

    def norm(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q, k, v

    def turn(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        return super().norm(*super().turn(q, k, v, step))


class ValueNormAttention(Attention):
    """Values are brought to length too."""

    is_fused = False

    def __init__(self, *sizes: Any, eps: float, **options: Any):
        super().__init__(*sizes, **options)
        self.v_norm = RMSScale(self.head_dim, eps)

    def norm(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().norm(q, k, v)
        return q, k, self.v_norm(v)


class BorrowingAttention(Block):
    """Attention to the keys and values of an earlier mixer, like it in all but its own queries.

    Args:
        source: the mixer's number.
        like: how that one attends.
    """

    def __init__(self, source: int, like: Attention, *, bias: bool):
        (embed,) = like.out.parts.values()
        self.source, self.rope, self.scores, self.head_dim = source, like.rope, like.scores, like.head_dim
        self.q, self.q_norm = Linear(like.heads, embed, bias=bias), like.q_norm
        self.out = Linear(embed, like.heads, bias=bias)

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """x [T, E] -> [T, E]"""
        q = self.q_norm(self.q(x).unflatten(1, (-1, self.head_dim)))
        rotate(q, q[:, :0], step.angles(self.rope))
        cache, plan, _ = step.state(self.source)
        return self.out(paged_attention(q, cache, plan, self.scores, step.scales(self.source)).flatten(1))


class Temper(NamedTuple):
    """By how much queries grow with their position p: 1 + scale * log(1 + floor((p + ahead) / length))"""

    length: int
    scale: float
    ahead: int = 0


class TemperedAttention(Attention):
    """Queries grow slowly with their position."""

    is_fused = False

    def __init__(self, *sizes: Any, temper: Temper, **options: Any):
        super().__init__(*sizes, **options)
        self.temper = temper

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        steps = (torch.arange(place.max_model_len) + self.temper.ahead) // self.temper.length
        self._growth = (1 + self.temper.scale * torch.log1p(steps)).to(place.device)

    def turn(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().turn(q, k, v, step)
        return (q * self._growth.index_select(0, step.positions)[:, None, None]).to(q.dtype), k, v


class KeyBiasAttention(Attention):
    """A number of each key, made from its token's values, is added to the scores of it.

    It stands behind the key, where queries have the inverse of the scale.

    Args:
        most_tokens: of a sequence; in longer ones the keys with the smallest numbers would not be seen.
    """

    is_fused = False

    def __init__(self, *sizes: Any, most_tokens: int, bias: bool, **options: Any):
        super().__init__(*sizes, bias=bias, **options)
        keys, self.one_each = Axis("keys", self.kv_heads.count), Axis("kv_heads", self.kv_heads.count)
        self.step, self.step_bias = Linear(keys, self.kv_heads), Vector(keys) if bias else None
        self.growth = Vector(self.one_each)
        self.most_tokens = most_tokens

    def state(self, mesh: Mesh) -> StateSpec:
        return replace(super().state(mesh), head_dim=self.head_dim + _ALIGNED)

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        if place.max_model_len > self.most_tokens:
            raise ModelError(f"sequences of more than {self.most_tokens} tokens are not supported: lower max_model_len")
        mesh, own = place.mesh, place.mesh.span(self.one_each)
        self._own = slice(own.start, own.stop)
        self._held = mesh.num_held(self.kv_heads) / self.kv_heads.size  # ranks that hold the same have summed it up

    def turn(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().turn(q, k, v, step)
        length = self.step(v.flatten(1)).float() / self._held
        if self.step_bias is not None:
            length += self.step_bias.weight
        bias = (self.growth.weight * softplus(length[:, self._own])).exp()
        q, k, v = (F.pad(part, (0, _ALIGNED)) for part in (q, k, v))
        q[..., self.head_dim], k[..., self.head_dim] = 1 / self.scores.scale, bias
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        return super().attend(q, k, v, step)[..., : self.head_dim]


class ClippedAttention(Attention):
    """Keeps q, k and v within `clip` before they are rotated, where it is not None."""

    def __init__(self, *sizes: Any, clip: float | None, **options: Any):
        super().__init__(*sizes, **options)
        self.clip = clip

    @property
    def is_fused(self) -> bool:
        return self.clip is None and super().is_fused

    def norm(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = super().norm(q, k, v)
        return heads if self.clip is None else tuple(x.clamp_(-self.clip, self.clip) for x in heads)


class SinkAttention(Attention):
    """Each head has a score, learned, that takes its part of the softmax and gives nothing."""

    def __init__(self, hidden_size: int, num_heads: int, *sizes: Any, **options: Any):
        super().__init__(hidden_size, num_heads, *sizes, **options)
        self.sinks = Vector(Axis("heads", num_heads))

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        self.scores = replace(self.scores, sinks=self.sinks.weight)


class ALiBi(Block):
    """Scores fall with distance, at a slope of each head's own: a geometric series over the heads.

    Args:
        most: the series runs down to 2^-most.
        scale: of the slopes.
    """

    def __init__(self, num_heads: int, *, most: float = 8.0, scale: float = 1.0):
        self.heads = Axis("heads", num_heads)
        self.most = most
        self.scale = scale

    def prepare(self, place: Place) -> None:
        span = place.mesh.span(self.heads)
        slopes = torch.tensor(_slopes(self.heads.count, self.most)[span.start : span.stop]) * self.scale
        self.slopes = slopes.to(place.device)


def _slopes(num_heads: int, most: float) -> Sequence[float]:
    """2^-(most i / n) for the n heads up to a power of 2; those beyond take every second one of the series of 2 n."""
    power = 1 << math.floor(math.log2(num_heads))
    series = [2 ** (-most * i / power) for i in range(1, power + 1)]
    between = [2 ** (-most * i / (2 * power)) for i in range(1, 2 * power, 2)]
    return (series + between)[:num_heads]
