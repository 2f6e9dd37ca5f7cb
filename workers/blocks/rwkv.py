"""RWKV 4: tokens are mixed with the ones before them, then in time or over channels.

Key: T tokens, E hidden, C channels.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from cableway.kernels.causal_conv import causal_conv
from cableway.kernels.wkv_scan import wkv_scan
from cableway.workers.blocks.gates import sigmoid
from cableway.workers.blocks.linear import Linear, Vector
from cableway.workers.blocks.mamba import Recurrent
from cableway.workers.blocks.mlp import Activation
from cableway.workers.blocks.step import Step
from cableway.workers.formats.base import Place
from cableway.workers.parallel import Axis, Mesh


class Shifted(Recurrent):
    """A mixer whose projections see each token mixed with the one before it, a number of E at a time: the newer counts
    by what `mixes` have for that projection. Its state begins with the last token."""

    def __init__(self, hidden_size: int, num_mixes: int):
        self.mixes = [Vector(Axis("norm", hidden_size)) for _ in range(num_mixes)]
        self.hidden_size = hidden_size

    def state_len(self, mesh: Mesh) -> int:
        return self.hidden_size

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        self._taps = torch.tensor([[1.0], [0.0]], device=place.device).repeat(1, self.hidden_size)  # of a convolution

    def mixed(self, x: Tensor, step: Step) -> Iterator[Tensor]:
        """x [T, E] -> what each projection sees [T, E]"""
        states, plan = step.recurrent(self.number)
        before = causal_conv(x, self._taps, None, states[:, : self.hidden_size], plan, silu=False)
        for mix in self.mixes:
            yield torch.lerp(before, x, mix.weight.to(x.dtype))


class TimeMix(Shifted):
    """y = out(sigmoid(r) * wkv(k, v)), with k, v and r projected; mixes are those of k, v and r."""

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__(hidden_size, 3)
        embed, self.inner = Axis("embed", hidden_size), Axis("ffn", inner_size)
        self.k, self.v, self.r = (Linear(self.inner, embed) for _ in range(3))
        self.decay, self.first = Vector(self.inner), Vector(self.inner)
        self.out = Linear(embed, self.inner)

    def state_len(self, mesh: Mesh) -> int:
        return self.hidden_size + 3 * mesh.span(self.inner).size

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        self._w = -self.decay.weight.exp()

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """x [T, E] -> [T, E]"""
        states, plan = step.recurrent(self.number)
        k, v, r = (linear(y) for linear, y in zip((self.k, self.v, self.r), self.mixed(x, step), strict=True))
        y = wkv_scan(k.float(), v.float(), self._w, self.first.weight, states[:, self.hidden_size :], plan)
        return self.out(sigmoid(r).mul_(y))


class ChannelMix(Shifted):
    """y = sigmoid(r) * down(relu(up)²), with up and r projected; mixes are those of up and r."""

    def __init__(self, hidden_size: int, ffn_size: int):
        super().__init__(hidden_size, 2)
        embed, ffn = Axis("embed", hidden_size), Axis("ffn", ffn_size)
        self.up, self.r, self.down = Linear(ffn, embed), Linear(embed, embed), Linear(embed, ffn)
        self.act = Activation("relu2")

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """x [T, E] -> [T, E]"""
        up, r = self.mixed(x, step)
        return self.down(self.act(self.up(up))).mul_(sigmoid(self.r(r)))
