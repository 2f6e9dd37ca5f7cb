"""CUDA graphs of decode steps: from row numbers on the device to logits and drawn tokens, by two calls of the host.

A step of one token a row is hundreds of small kernels, which take the host longer to start than the GPU to run. They
are captured for some numbers of rows, and run for the next larger of them: what is too much is rows of nobody.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cableway.workers.batch import Decoder
from cableway.workers.rows import Rows, upload
from cableway.workers.sampler import Sampler


def sizes(most: int) -> list[int]:
    """Numbers of rows worth a graph of their own, up to `most`: at most 8 rows, or an eighth, are in vain."""
    steps = [1, 2, 4, *range(8, min(most, 256), 8), *range(256, most, 32)]
    return [*(size for size in steps if size < most), most]


class DecodeGraphs:
    """Graphs of one model on one GPU; they share their memory, so one runs at a time.

    Args:
        max_num_seqs: rows of the largest graph.
    """

    def __init__(
        self,
        decoder: Decoder,
        rows: Rows,
        sampler: Sampler,
        caches: Sequence[Tensor],
        max_num_seqs: int,
        *,
        invariant: bool = False,
    ) -> None:
        self._decoder, self._rows, self._sampler = decoder, rows, sampler
        self._caches, self._invariant, self._device = list(caches), invariant, caches[0].device
        self._sizes = sizes(max_num_seqs)
        self._logits = torch.empty(max_num_seqs, decoder.vocab_size, device=self._device)
        self._token_ids = torch.empty(max_num_seqs, dtype=torch.int32, device=self._device)
        self._inputs = [upload(rows.nobodies(size), self._device) for size in self._sizes]
        pool = torch.cuda.graph_pool_handle()
        # Largest first: the others fit into its memory.
        captured = [(_capture(self._forward, i, pool), _capture(self._draw, i, pool)) for i in self._inputs[::-1]]
        self._graphs = captured[::-1]

    def forward(self, rows: np.ndarray, ends: np.ndarray) -> Tensor:
        """Compute the last token of each row.

        Args:
            rows: [S] i32.
            ends: [S] i32, tokens of each row once this one is computed.

        Returns:
            Logits [S, vocab_size] f32, which the next call overwrites.
        """
        num = len(rows)
        self._which = bisect_left(self._sizes, num)
        packed = self._rows.nobodies(self._sizes[self._which])
        packed[0, :num], packed[1, :num], packed[2, :num] = rows, ends - 1, ends
        self._inputs[self._which].copy_(upload(packed, self._device))
        self._graphs[self._which][0].replay()
        return self._logits[:num]

    def draw(self, num_rows: int) -> Tensor:
        """Draw from the logits that `forward` gave, and write the tokens into the rows: [S] i32, overwritten."""
        self._graphs[self._which][1].replay()
        return self._token_ids[:num_rows]

    def _forward(self, inputs: Tensor) -> None:
        batch = self._rows.gather_decode(inputs, invariant=self._invariant)
        hidden = self._decoder.forward(batch, self._caches)
        self._decoder.logits(hidden, out=self._logits[: inputs.shape[1]])

    def _draw(self, inputs: Tensor) -> None:
        rows, _, positions = inputs
        num = inputs.shape[1]
        token_ids = self._token_ids[:num].copy_(self._sampler.draw_plain(self._logits[:num], rows, positions))
        self._rows.write_at(rows, positions, token_ids)


def _capture(function: Callable[[Tensor], None], inputs: Tensor, pool: Any) -> torch.cuda.CUDAGraph:
    function(inputs)  # what is compiled or set up at its first use cannot be while capturing
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        function(inputs)
    return graph
