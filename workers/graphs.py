"""CUDA graphs of decode steps: from row numbers on the device to logits, replayed by one call of the host.

A step of one token a row is hundreds of small kernels, which take the host longer to start than the GPU to run. They
are captured for some numbers of rows, and run for the next larger of them: what is too much is rows of nobody.
"""

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cableway.workers.batch import Decoder
from cableway.workers.rows import Rows, upload


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
        self, decoder: Decoder, rows: Rows, caches: Sequence[Tensor], max_num_seqs: int, *, invariant: bool = False
    ) -> None:
        self._decoder, self._rows, self._caches, self._invariant = decoder, rows, list(caches), invariant
        device = self._caches[0].device
        self._device = device
        self._sizes = sizes(max_num_seqs)
        self._logits = torch.empty(max_num_seqs, decoder.vocab_size, device=device)
        self._inputs = [upload(rows.nobodies(size), device) for size in self._sizes]
        self._graphs = self._capture()

    def run(self, rows: np.ndarray, ends: np.ndarray) -> Tensor:
        """Compute the last token of each row.

        Args:
            rows: [S] i32.
            ends: [S] i32, tokens of each row once this one is computed.

        Returns:
            Logits [S, vocab_size] f32, which the next run overwrites.
        """
        num = len(rows)
        which = bisect_left(self._sizes, num)
        packed = self._rows.nobodies(self._sizes[which])
        packed[0, :num], packed[1, :num], packed[2, :num] = rows, ends - 1, ends
        self._inputs[which].copy_(upload(packed, self._device))
        self._graphs[which].replay()
        return self._logits[:num]

    def _capture(self) -> list[torch.cuda.CUDAGraph]:
        """Largest first: the others fit into its memory."""
        graphs, pool = [], torch.cuda.graph_pool_handle()
        for inputs in reversed(self._inputs):
            self._compute(inputs)  # what is compiled or set up at its first use cannot be while capturing
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._compute(inputs)
            graphs.append(graph)
        return graphs[::-1]

    def _compute(self, inputs: Tensor) -> None:
        batch = self._rows.gather_decode(inputs, invariant=self._invariant)
        hidden = self._decoder.forward(batch, self._caches)
        self._decoder.logits(hidden, out=self._logits[: inputs.shape[1]])
