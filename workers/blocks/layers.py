"""Layers: how a mixer and an MLP sit on the residual stream."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cableway.workers.blocks.block import Block, Mixer
from cableway.workers.blocks.linear import Vector
from cableway.workers.blocks.norm import LayerNorm, PlainLayerNorm, RMSNorm
from cableway.workers.blocks.step import Step
from cableway.workers.formats.base import Sum
from cableway.workers.parallel import Axis

Norm = RMSNorm | LayerNorm | PlainLayerNorm


class Layer(Block):
    """A mixer and an MLP, or a mixer alone, each with a norm before and after it where the family has one."""

    def __init__(
        self, *, mix: Any, mlp: Any = None, norm_in: Norm | None = None, norm_mix_out: Any = None,
        norm_mlp: Norm | None = None, norm_mlp_out: Any = None,
    ):  # fmt: skip
        self.norm_in, self.mix, self.norm_mix_out = norm_in, mix, norm_mix_out
        self.norm_mlp, self.mlp, self.norm_mlp_out = norm_mlp, mlp, norm_mlp_out

    def __call__(self, delta: Tensor, residual: Tensor, step: Step) -> Tensor:
        """Add `delta` [T, E], what the layer before made, to `residual` [T, E] f32; what this layer makes [T, E]."""
        return self.finish(self.begin(delta, residual, step), residual)

    def begin(self, delta: Tensor, residual: Tensor, step: Step) -> Tensor:
        """The mixer's half."""
        delta = self.mix(add(delta, residual, self.norm_in, self.mix), step)
        return delta if self.norm_mix_out is None else self.norm_mix_out(delta)

    def finish(self, delta: Tensor, residual: Tensor) -> Tensor:
        """The MLP's half, in which no token sees another."""
        if self.mlp is None:
            return delta
        delta = self.mlp(add(delta, residual, self.norm_mlp, self.mlp))
        return delta if self.norm_mlp_out is None else self.norm_mlp_out(delta)


class ParallelLayer(Block):
    """Mixer and MLP side by side on the same stream; they share a norm, or have one each."""

    def __init__(self, *, mix: Mixer, mlp: Any, norm_in: Norm, norm_mlp: Norm | None = None):
        self.norm_in, self.mix = norm_in, mix
        self.norm_mlp, self.mlp = norm_mlp, mlp

    def __call__(self, delta: Tensor, residual: Tensor, step: Step) -> Tensor:
        x = add(delta, residual, self.norm_in)
        y = self.mix(x, step)
        return y.add_(self.mlp(x if self.norm_mlp is None else self.norm_mlp(residual.to(x.dtype))))


class MixerSum(Block):
    """Two mixers side by side, as one."""

    def __init__(self, mixes: list[Mixer]):
        self.mixes = mixes

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """x [T, E] -> [T, E]"""
        return self.mixes[0](x, step).add_(self.mixes[1](x, step))


class MLPLayer(Block):
    """An MLP alone."""

    def __init__(self, *, norm_in: Norm, mlp: Any):
        self.norm_in, self.mlp = norm_in, mlp

    def __call__(self, delta: Tensor, residual: Tensor, step: Step) -> Tensor:
        return self.mlp(add(delta, residual, self.norm_in, self.mlp))


class DetourLayer(Block):
    """Before its mixer it has an attention and an MLP, which see the embeddings again beside the stream. What they give
    is added to what the mixer is given, and not to the stream."""

    def __init__(
        self, *, norm_both: Norm, attention: Mixer, norm_mlp: Norm, mlp: Any, join: Any, norm_in: Norm, mix: Mixer
    ):
        self.norm_both, self.attention = norm_both, attention
        self.norm_mlp, self.mlp, self.join = norm_mlp, mlp, join
        self.norm_in, self.mix = norm_in, mix

    def __call__(self, delta: Tensor, residual: Tensor, step: Step) -> Tensor:
        stream = add(delta, residual, None)
        both = self.norm_both(torch.cat((stream, step.embeddings), -1))
        detour = self.join(self.mlp(self.norm_mlp(self.attention(both, step))))
        return self.mix(self.norm_in((residual + detour).to(delta.dtype)), step)


class ShortcutLayer(Block):
    """Two layers, and a mixture of experts that starts from the first one's MLP input and ends with the second's."""

    def __init__(self, *, mixes: list[Mixer], mlps: list[Any], moe: Any, norms_in: list[Norm], norms_mlp: list[Norm]):
        self.norms_in, self.mixes = norms_in, mixes
        self.norms_mlp, self.mlps = norms_mlp, mlps
        self.moe = moe

    def __call__(self, delta: Tensor, residual: Tensor, step: Step) -> Tensor:
        for i in range(2):
            delta = self.mixes[i](add(delta, residual, self.norms_in[i]), step)
            x = add(delta, residual, self.norms_mlp[i])
            if i == 0:
                bridge = self.moe(x)
            delta = self.mlps[i](x)
        return delta.add_(bridge)


class BypassLayer(Block):
    """A mixture of experts goes past mixer and MLP, from what the layer is given to its end."""

    def __init__(self, *, norm_in: Norm, mix: Mixer, norm_mlp: Norm, mlp: Any, norm_moe: Norm, moe: Any):
        self.norm_in, self.mix = norm_in, mix
        self.norm_mlp, self.mlp = norm_mlp, mlp
        self.norm_moe, self.moe = norm_moe, moe

    def __call__(self, delta: Tensor, residual: Tensor, step: Step) -> Tensor:
        x = add(delta, residual, self.norm_in)
        past = self.moe(self.norm_moe(residual.to(x.dtype)))
        delta = self.mix(x, step)
        return self.mlp(add(delta, residual, self.norm_mlp, self.mlp)).add_(past)


class BridgedLayer(Layer):
    """Before it the stream is kept, or blended with what was kept before an earlier layer.

    Args:
        keeps, takes: names of what is kept and blended.
        part: of a blend that was kept.
    """

    def __init__(self, *, keeps: Sequence[str], takes: Sequence[str], part: float, **blocks: Any):
        super().__init__(**blocks)
        self.keeps, self.takes, self.part = tuple(keeps), tuple(takes), part

    def __call__(self, delta: Tensor, residual: Tensor, step: Step) -> Tensor:
        if self.keeps or self.takes:
            residual.add_(delta)
            delta = torch.zeros_like(delta)
        for name in self.keeps:
            step.kept[name] = residual.clone()
        for name in self.takes:
            residual.lerp_(step.kept[name], self.part)
        return super().__call__(delta, residual, step)


class CrossLayer(Block):
    """Mixer, attention to a source, MLP, each after a norm."""

    def __init__(self, *, norm_in: Norm, mix: Mixer, norm_cross: Norm, cross: Mixer, norm_mlp: Norm, mlp: Any):
        self.norm_in, self.mix = norm_in, mix
        self.norm_cross, self.cross = norm_cross, cross
        self.norm_mlp, self.mlp = norm_mlp, mlp

    def __call__(self, delta: Tensor, residual: Tensor, step: Step) -> Tensor:
        delta = self.mix(add(delta, residual, self.norm_in, self.mix), step)
        delta = self.cross(add(delta, residual, self.norm_cross), step)
        return self.mlp(add(delta, residual, self.norm_mlp, self.mlp))


class PostNormLayer(Block):
    """Norms stand on the stream itself, after each sum: h = norm_in(h + mix(h)), norm_mlp(h + mlp(h)).

    With `cross`, attention to a source, and its norm between the two.
    """

    def __init__(
        self, *, mix: Mixer, mlp: Any, norm_in: Norm, norm_mlp: Norm, cross: Mixer | None = None,
        norm_cross: Norm | None = None,
    ):  # fmt: skip
        self.mix, self.norm_in = mix, norm_in
        self.cross, self.norm_cross = cross, norm_cross
        self.mlp, self.norm_mlp = mlp, norm_mlp

    def __call__(self, delta: Tensor, residual: Tensor, step: Step) -> Tensor:
        x = add(delta, residual, None)
        x = self._onto(residual, self.norm_in, self.mix(x, step))
        if self.cross is not None:
            x = self._onto(residual, self.norm_cross, self.cross(x, step))
        x = self._onto(residual, self.norm_mlp, self.mlp(x))
        residual.zero_()
        return x

    def _onto(self, residual: Tensor, norm: Norm, delta: Tensor) -> Tensor:
        """The stream becomes the normed sum, which is returned in the dtype of delta."""
        x = norm.add(delta, residual)
        residual.copy_(x)
        return x


class WeightedStreamLayer(Block):
    """The stream counts by a weight a number, before what mixer and MLP make is added."""

    def __init__(self, *, mix: Mixer, mlp: Any, norm_in: Norm, norm_mlp: Norm, hidden_size: int):
        self.norm_in, self.mix, self.keep_mix = norm_in, mix, Vector(Axis("norm", hidden_size))
        self.norm_mlp, self.mlp, self.keep_mlp = norm_mlp, mlp, Vector(Axis("norm", hidden_size))

    def __call__(self, delta: Tensor, residual: Tensor, step: Step) -> Tensor:
        x = add(delta, residual, self.norm_in)
        residual.mul_(self.keep_mix.weight)
        x = add(self.mix(x, step), residual, self.norm_mlp)
        residual.mul_(self.keep_mlp.weight)
        return self.mlp(x)


class NormedStreamLayer(Block):
    """Norms stand on the stream itself, before each block: with x = norm(h), h = keep x + block(x).

    Args:
        keep: of the mixer and of the MLP.
    """

    def __init__(
        self, *, mix: Mixer, mlp: Any, norm_in: Norm, norm_mlp: Norm, keep: tuple[float, float],
        norm_mix_out: Any = None, norm_mlp_out: Any = None,
    ):  # fmt: skip
        self.norm_in, self.mix, self.norm_mix_out = norm_in, mix, norm_mix_out
        self.norm_mlp, self.mlp, self.norm_mlp_out = norm_mlp, mlp, norm_mlp_out
        self.keep = keep

    def __call__(self, delta: Tensor, residual: Tensor, step: Step) -> Tensor:
        x = add(delta, residual, self.norm_in)
        torch.mul(x, self.keep[0], out=residual)
        delta = self.mix(x, step)
        if self.norm_mix_out is not None:
            delta = self.norm_mix_out(delta)
        x = add(delta, residual, self.norm_mlp)
        torch.mul(x, self.keep[1], out=residual)
        delta = self.mlp(x)
        return delta if self.norm_mlp_out is None else self.norm_mlp_out(delta)


def add(delta: Tensor, residual: Tensor, norm: Norm | None, block: Block | None = None) -> Any:
    """Add in place, and normalise the sum in the same pass where there is a norm; the result in the dtype of delta.

    For a `block` that takes sums it is a Sum where it can be.
    """
    if norm is None:
        return residual.add_(delta).to(delta.dtype, copy=True)
    if isinstance(norm, RMSNorm) and block is not None and block.takes_sum:
        return Sum(delta, residual, norm)
    return norm.add(delta, residual)
