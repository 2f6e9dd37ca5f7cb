"""Runs: steps that the workers do one after another without being told each, and tell of together.

Core, frontends and clients are woken once for several tokens. Where the model is computed on the same cores, this is
worth more than all that could be saved in what they do when they are awake.
"""

from collections.abc import Sequence

from cableway.enginecore.kv.manager import KVManager
from cableway.enginecore.request import Request

LONGEST = 32
"""A run is left when anything comes between, so its length costs nothing but blocks that are taken early."""


def num_steps(running: Sequence[Request], kv: KVManager) -> int:
    """Steps, 1 or more, in which those that run need nothing but a token each, and none comes to its length limit.

    PERF: 0.2 µs a row, once a run.
    """
    most = LONGEST
    for request in running:
        left = request.compute_limit - request.num_planned
        if left > 0:  # else its last token is being drawn
            # One that was hit by a death goes step by step, so that what it had come to is known.
            if left == 1 or request.num_left > 1 or request.only_scores or request.standing.deaths:
                return 1
            most = min(most, left)
    num_blocks = len(running) * len(kv.groups) * (most // kv.block_size + 1)
    return most if num_blocks <= kv.num_available else 1
