"""CUDA graphs of whole steps: from row numbers on the device to logits and drawn tokens, by two or three calls.

A step is hundreds of kernels, which take the host longer to start than the GPU to run. Steps of one token a row are
captured for some numbers of rows (few rows twice, as kernels for short sequences are others), all others for some
numbers of tokens, and each is run by the next larger graph: what is too much is nobody's. Graphs are captured while
there is nothing else to do, largest first as the others fit into its memory, or when they are first needed, by a step
that is carried out without.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cableway.kernels.cluster_decode import longest as longest_of_few
from cableway.workers.batch import Decoder
from cableway.workers.rows import NO_CHUNKS, Chunks, Rows, upload, upload_into
from cableway.workers.sampler import Sampler


def row_sizes(most: int) -> list[int]:
    """Numbers of rows worth a graph of their own, up to `most`: at most 8 rows, or an eighth, are in vain."""
    steps = [1, 2, 4, *range(8, min(most, 256), 8), *range(256, most, 32)]
    return [*(size for size in steps if size < most), most]


def token_sizes(most: int) -> list[int]:
    """Numbers of tokens worth a graph of their own, up to `most`: at most 16 tokens, or an eighth, are in vain."""
    sizes, size = [], 16
    while size < most:
        sizes.append(size)
        size += max(16, 1 << size.bit_length() - 4)
    return [*sizes, most]


class Memory:
    """What graphs share: one takes what another is done with, if they were captured on the same stream."""

    @cached_property
    def pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()


class Captured:
    """Room for numbers on the device, and the graph of one function of them.

    It does not keep the function: whoever has that has this, and a circle would keep the memory of both.
    """

    def __init__(self, inputs: Tensor, memory: Memory) -> None:
        self.inputs = inputs
        self._memory = memory
        self._graph: Any = None

    @property
    def is_captured(self) -> bool:
        return self._graph is not None

    def run(self, function: Callable[[Tensor], None]) -> None:
        """Carry the function out: as it is the first time, by its graph from then on."""
        if self._graph is not None:
            self._graph.replay()
            return
        function(self.inputs)  # what is compiled or set up at its first use cannot be while capturing
        self._graph = _capture(function, self.inputs, self._memory)


class StepGraphs:
    """Graphs of one model on one GPU; they share their memory, so one runs at a time.

    Args:
        max_num_seqs: rows of the largest step.
        max_num_tokens: tokens of the largest step.
    """

    def __init__(
        self, decoder: Decoder, rows: Rows, sampler: Sampler, caches: Sequence[Tensor], *, max_num_seqs: int,
        max_num_tokens: int, invariant: bool = False,
    ) -> None:  # fmt: skip
        self._decoder, self._rows, self._sampler = decoder, rows, sampler
        self._caches, self._invariant, self._device = list(caches), invariant, caches[0].device
        self._max_num_seqs = max_num_seqs
        self._logits = torch.empty(max_num_seqs, decoder.vocab_size, device=self._device)
        self._token_ids = torch.empty(max_num_seqs, dtype=torch.int32, device=self._device)
        self._hidden: Tensor | None = None  # [max_num_seqs + 1, E], once it is known what a hidden state is
        self._memory = Memory()
        self._row_sizes, self._token_sizes = row_sizes(max_num_seqs), token_sizes(max_num_tokens)
        drawing = {size: self._nobodies(size) for size in self._row_sizes}
        few = {size: drawing[size] for size in drawing if 0 < longest_of_few(size) < rows.tokens.shape[1]}
        self._shorts, self._singles, self._heads, self._draws = (
            {size: Captured(inputs, self._memory) for size, inputs in each.items()}
            for each in (few, drawing, drawing, drawing)
        )
        self._bodies: dict[int, Captured] = {}

    def rehearse(self) -> None:
        """Carry out what all graphs consist of, without making them."""
        for size in self._token_sizes:
            packed = self._rows.padded(NO_CHUNKS, min(self._max_num_seqs, size) + 1, size)
            self._body(size, upload(packed, self._device))
        for graphs, function in self._kinds():
            for graph in graphs.values():
                function(graph.inputs)

    def capture_next(self) -> bool:
        """Make the next of the graphs that there are not yet; whether there was one."""
        for capture in self._missing():
            capture()
            return True
        return False

    def _missing(self) -> Iterator[Callable[[], None]]:
        """What makes each of the graphs that there are not yet."""

        def bodies(sizes: Sequence[int]) -> Iterator[Callable[[], None]]:
            return (partial(self._run_body, NO_CHUNKS, size) for size in sizes if size not in self._bodies)

        yield from bodies(self._token_sizes[-1:])
        for size in reversed(self._row_sizes):
            for graphs, function in self._kinds():
                if size in graphs and not graphs[size].is_captured:
                    yield partial(graphs[size].run, function)
        yield from bodies(self._token_sizes[-2::-1])

    def _kinds(self) -> Iterator[tuple[dict[int, Captured], Callable[[Tensor], None]]]:
        """Graphs by number of rows, and what they are of."""
        yield self._shorts, self._short
        yield self._singles, self._single
        yield self._heads, self._head
        yield self._draws, self._draw

    def forward(self, chunks: Chunks, drawing: np.ndarray) -> Tensor | None:
        """Compute a step.

        Args:
            drawing: [R] indices of the sequences that draw a token.

        Returns:
            Logits [R, vocab_size] f32, which the next call overwrites; None where none are wanted.
        """
        num_rows = len(drawing)
        is_of_singles = num_rows == len(chunks.rows) == chunks.num_tokens
        if not is_of_singles:
            self._run_body(chunks, chunks.num_tokens)
            if not num_rows:
                return None
        self._size = size = self._row_sizes[bisect_left(self._row_sizes, num_rows)]
        graphs, function = self._heads, self._head
        if is_of_singles:
            is_short = size in self._shorts and chunks.ends.max() <= longest_of_few(size)
            graphs, function = (self._shorts, self._short) if is_short else (self._singles, self._single)
        graph = graphs[size]
        packed = np.zeros(graph.inputs.shape, np.int32)
        packed[0, :num_rows], packed[0, num_rows:] = chunks.rows[drawing], self._max_num_seqs
        packed[1, :num_rows], packed[2, :num_rows] = chunks.ends[drawing], drawing
        upload_into(graph.inputs, packed)
        graph.run(function)
        return self._logits[:num_rows]

    def draw(self, num_rows: int) -> Tensor:
        """Draw from the logits that `forward` gave, and write the tokens into the rows: [R] i32, overwritten."""
        self._draws[self._size].run(self._draw)
        return self._token_ids[:num_rows]

    def _nobodies(self, num_rows: int) -> Tensor:
        """Rows that draw [3, R] i32: which, their lengths, and which of the step's rows they are."""
        inputs = torch.zeros(3, num_rows, dtype=torch.int32, device=self._device)
        inputs[0] = self._max_num_seqs
        return inputs

    def _run_body(self, chunks: Chunks, num_tokens: int) -> None:
        """Hidden states of a step of so many tokens; all are nobody's where there are no chunks."""
        size = self._token_sizes[bisect_left(self._token_sizes, num_tokens)]
        if not self._bodies and size < self._token_sizes[-1]:
            self._run_body(NO_CHUNKS, self._token_sizes[-1])  # the others fit into its memory, but it not into theirs
        packed = self._rows.padded(chunks, min(self._max_num_seqs, size) + 1, size)
        if size not in self._bodies:
            inputs = torch.empty(packed.shape, dtype=torch.int32, device=self._device)
            self._bodies[size] = Captured(inputs, self._memory)
        upload_into(self._bodies[size].inputs, packed)
        self._bodies[size].run(partial(self._body, size))

    def _body(self, num_tokens: int, packed: Tensor) -> None:
        batch = self._rows.gather_padded(packed, num_tokens, invariant=self._invariant)
        hidden = self._decoder.forward(batch, self._caches)
        if self._hidden is None:
            self._hidden = hidden.new_zeros(self._max_num_seqs + 1, hidden.shape[1])
        self._hidden[: len(hidden)].copy_(hidden)

    def _short(self, inputs: Tensor) -> None:
        self._step(inputs, longest_of_few(inputs.shape[1]))

    def _single(self, inputs: Tensor) -> None:
        self._step(inputs, self._rows.tokens.shape[1])

    def _step(self, inputs: Tensor, most_tokens: int) -> None:
        rows, seq_lens, _ = inputs
        batch = self._rows.gather_singles(rows, seq_lens, most_tokens=most_tokens, invariant=self._invariant)
        self._decoder.logits(self._decoder.forward(batch, self._caches), out=self._logits[: len(rows)])

    def _head(self, inputs: Tensor) -> None:
        which = inputs[2]
        self._decoder.logits(self._hidden.index_select(0, which), out=self._logits[: len(which)])

    def _draw(self, inputs: Tensor) -> None:
        rows, positions, _ = inputs
        num = len(rows)
        logits, out = self._logits[:num], self._token_ids[:num]
        self._sampler.draw_plain(logits, rows, positions, self._rows.tokens, out)


def _capture(function: Callable[[Tensor], None], inputs: Tensor, memory: Memory) -> torch.cuda.CUDAGraph:
    """A graph of what `function` does, which it does not do now."""
    graph = torch.cuda.CUDAGraph()
    memory.stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(memory.stream):
        graph.capture_begin(pool=memory.pool, capture_error_mode="thread_local")
        function(inputs)
        graph.capture_end()
    return graph
