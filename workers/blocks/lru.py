"""Real-gated linear recurrent units, as Griffin has them.

Key: T tokens, E hidden, C channels, H heads of P of them.
"""

import torch.nn.functional as F
from torch import Tensor

from cableway.kernels.lru_scan import lru_scan
from cableway.workers.blocks.gates import sigmoid
from cableway.workers.blocks.linear import HeadLinear, Linear, Vector
from cableway.workers.blocks.mamba import CausalConv, Recurrent
from cableway.workers.blocks.mlp import Activation
from cableway.workers.blocks.step import Step
from cableway.workers.formats.base import Place
from cableway.workers.parallel import Axis, Mesh

_FASTEST = -8.0
"""Of decay, at most, in units of softplus(rate)."""


class GatedLRU(Recurrent):
    """y = out(act(y) * lru(conv(x))), with x and y projected; gates of the unit are made of its own head's channels."""

    def __init__(self, hidden_size: int, num_heads: int, inner_size: int, width: int, *, act: Activation):
        embed, self.channels = Axis("embed", hidden_size), Axis("heads", num_heads, inner_size // num_heads)
        self.project = Linear({"x": self.channels, "y": self.channels}, embed, bias=True)
        self.conv = CausalConv({"": self.channels}, width, bias=True, silu=False)
        self.gates = HeadLinear({"taken": self.channels, "decay": self.channels}, self.channels.unit, bias=True)
        self.rate = Vector(self.channels)
        self.act = act
        self.out = Linear(embed, self.channels, bias=True)

    def state_len(self, mesh: Mesh) -> int:
        return self.conv.state_len(mesh) + mesh.span(self.channels).size

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        self._rate = F.softplus(self.rate.weight).mul_(_FASTEST)

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        """x [T, E] -> [T, E]"""
        states, plan = step.recurrent(self.number)
        x, y = self.project(x).chunk(2, 1)
        x, states = self.conv(x, states, plan)
        gates = sigmoid(self.gates(x.unflatten(1, (-1, self.channels.unit))).float())
        taken, decay = (gate.flatten(1) for gate in gates.chunk(2, -1))
        h = lru_scan(decay.mul(self._rate), taken.mul(x), states, plan)
        return self.out(self.act(y.contiguous()).mul_(h))
