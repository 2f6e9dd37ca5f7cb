"""Compiling all kernels that steps will launch, side by side, while weights are loaded.

An outline of the model, on the meta device, goes through every kind of step. Nothing is computed; what its kernels are
compiled for is known from shapes, and shapes are those of the steps to come.
"""

from collections.abc import Iterator
from threading import Thread

import numpy as np
import torch

from cableway.ipc import modelfiles
from cableway.ipc.config import WorkerConfig
from cableway.ipc.messages import NewRow, ints
from cableway.kernels import compilation
from cableway.workers import memory, repertoire, weights
from cableway.workers.account import Account
from cableway.workers.graphs import StepGraphs
from cableway.workers.rows import Chunks, Rows
from cableway.workers.sampler import Sampler
from cableway.workers.warm_up import SAMPLINGS

_META = torch.device("meta")


class Rehearsal(Thread):
    """Compiles for this process's GPU in a thread of its own; `wait` for it before the first step.

    What was compiled before, and is still on disk, is loaded from there, and what an earlier start like this one has
    found to be needed is not looked for again.
    """

    def __init__(self, config: WorkerConfig) -> None:
        super().__init__(name="rehearsal", daemon=True)
        self._config = config
        self._error: Exception | None = None
        self.account = Account()

    def run(self) -> None:
        try:
            counter, known = compilation.watch(), repertoire.read(self._config)
            self.account.note("repertoire_s")
            with torch.inference_mode(), compilation.ahead():
                repertoire.load(known) if known else rehearse(self._config, self.account)
            self.account.note("compilers_s")
            if not known:
                repertoire.write(self._config, counter.kernels)
        except Exception as error:
            self._error = error

    def wait(self) -> None:
        """Until all is compiled; raises what went wrong."""
        self.join()
        if self._error is not None:
            raise self._error


def rehearse(config: WorkerConfig, account: Account | None = None) -> None:
    """Take an outline of the model through every kind of step."""
    account = account or Account()
    decoder = weights.outline(
        modelfiles.locate(config.model, config.load_format),
        dtype=getattr(torch, config.dtype),
        max_model_len=config.max_model_len,
        invariant=config.batch_invariant,
        load_format=config.load_format,
    )
    account.note("outline_s")
    groups, num_seqs = decoder.state_groups(), config.max_num_seqs
    config = memory.settled(config, groups)
    rows = Rows(num_seqs, config.max_model_len, config.block_size, [group.kind for group in groups], _META)
    sampler = Sampler(rows.tokens, decoder.vocab_size)
    cache = memory.outline(decoder, config, memory.kept_as(config))
    cache.copy_blocks(torch.zeros(1, 2, dtype=torch.int64, device=_META))
    memory.dry_run(decoder, config, cache)
    if not config.enforce_eager:
        graphs = StepGraphs(
            decoder, rows, sampler, cache.layers,
            max_num_seqs=num_seqs, max_num_tokens=config.max_num_batched_tokens, invariant=config.batch_invariant,
        )  # fmt: skip
        graphs.rehearse()
    for chunks in _steps(config):
        logits_at = chunks.query_start[1:] - 1
        if decoder.has_encoder:
            decoder.encode(memory.nobodies_source(chunks.num_tokens, _META), cache.layers)
        batch = rows.gather(chunks, logits_at, invariant=config.batch_invariant)
        decoder.logits(decoder.forward(batch, cache.layers))
    account.note("steps_s")
    for num in (1, min(2, num_seqs), min(17, num_seqs)):
        _draw(sampler, num, decoder.vocab_size)
    account.note("draws_s")


def _steps(config: WorkerConfig) -> Iterator[Chunks]:
    """Steps without graphs: of one token a row, of prompts, and of both."""
    longest = min(config.max_num_batched_tokens, config.max_model_len)
    most = min(config.max_num_seqs, longest)
    prompts = ([min(length, longest)] for length in (2, 17, 33, 65, longest))
    for lengths in ([1], [1] * min(2, most), [1] * most, *prompts, [1, max(longest - 1, 1)]):
        if len(lengths) <= config.max_num_seqs:
            yield _chunks(lengths)


def _chunks(lengths: list[int]) -> Chunks:
    ends = np.array(lengths, np.int32)
    query_start = np.concatenate(([0], ends.cumsum()), dtype=np.int32)
    return Chunks(
        np.arange(len(ends), dtype=np.int32), np.zeros_like(ends), ends, np.ones(len(ends), bool), query_start
    )


def _draw(sampler: Sampler, num_rows: int, vocab_size: int) -> None:
    """Draw for so many rows, in every way that there is, alone and beside others."""
    rows, ones = np.arange(num_rows, dtype=np.int32), np.ones(num_rows, np.int32)
    logits = torch.empty(num_rows, vocab_size, device=_META)
    for sampling in SAMPLINGS:
        sampler.enter([NewRow(row, ints([0]), 1, 0, 0, sampling, []) for row in range(num_rows)])
        sampler.draw(logits, rows, ones, ones)
