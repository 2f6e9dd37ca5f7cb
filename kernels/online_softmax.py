"""A softmax over keys that come tile by tile, as the Triton kernels of attention compute it."""

from __future__ import annotations

from cableway.kernels.lang import jit, tl


@jit
def add_scores(scores, top, mass):
    """Take one more tile of scores [rows, keys] in: the weights of its keys, what was summed before is to be multiplied
    by [rows], and the new top score and mass [rows]."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen nothing yet has no maximum: keep its differences finite.
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp(scores - shift[:, None])
    decay = tl.exp(top - shift)
    return weights, decay, new_top, mass * decay + tl.sum(weights, 1)
