"""Runs a decoder on sequences cut into chunks as one pleases: batches and caches without a runner."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cableway.ipc import modelfiles
from cableway.workers import memory, weights
from cableway.workers.batch import Batch, Source

BLOCK_SIZE = 8
MAX_MODEL_LEN = 256


def load(path: Path | str, *, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A decoder from a folder or a GGUF file."""
    files = modelfiles.locate(str(path), options.get("load_format", "auto"))
    return weights.load(files, dtype=dtype, **{"max_model_len": MAX_MODEL_LEN, **options})


class Session:
    """Sequences in progress on one model; each has blocks of its own, dealt out so that none are neighbours."""

    def __init__(self, model: Any, *, num_seqs: int = 1, invariant: bool = False, dtype: torch.dtype = torch.float32):
        self.model, self.num_seqs, self.invariant = model, num_seqs, invariant
        self.computed = [0] * num_seqs
        self.max_blocks = MAX_MODEL_LEN // BLOCK_SIZE
        caches: dict[int, Tensor] = {}
        for spec in model.state_groups():
            shape, kind = memory.block_memory(spec, BLOCK_SIZE, dtype)
            shape = (shape[0], self.max_blocks * num_seqs, *shape[2:])
            caches |= {layer: torch.zeros(shape, dtype=kind) for layer in spec.layers}
        self.caches = [caches[layer] for layer in sorted(caches)]
        self.source_lens = torch.zeros(num_seqs, dtype=torch.int32)
        table = torch.arange(self.max_blocks * num_seqs, dtype=torch.int32)
        self.blocks = table.view(self.max_blocks, -1).T.contiguous()

    def encode(self, sources: Sequence[tuple[int, Tensor]]) -> None:
        """Give some sequences what they attend to."""
        sizes = [len(ids) for _, ids in sources]
        positions = torch.cat([torch.arange(size) for size in sizes])
        rows = torch.repeat_interleave(torch.tensor([seq for seq, _ in sources]), torch.tensor(sizes))
        for seq, ids in sources:
            self.source_lens[seq] = len(ids)
        source = Source(
            token_ids=torch.cat([ids for _, ids in sources]).int(),
            positions=positions.int(),
            query_start=torch.tensor([0, *torch.tensor(sizes).cumsum(0)], dtype=torch.int32),
            slots=self.blocks[rows, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE,
            max_len=max(sizes),
        )
        with torch.inference_mode():
            self.model.encode(source, self.caches)

    def step(self, chunks: Sequence[tuple[int, Tensor]]) -> list[Tensor]:
        """Compute the next tokens of some sequences; the logits [n, vocab] of each chunk."""
        sizes = [len(ids) for _, ids in chunks]
        starts = [self.computed[seq] for seq, _ in chunks]
        blocks = self.blocks[[seq for seq, _ in chunks]].contiguous()
        positions = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, sizes, strict=True)])
        row = torch.repeat_interleave(torch.arange(len(chunks)), torch.tensor(sizes))
        slots = blocks[row, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
        ends = [start + size for start, size in zip(starts, sizes, strict=True)]
        num_groups = len(self.model.state_groups())
        batch = Batch(
            token_ids=torch.cat([ids for _, ids in chunks]).int(),
            positions=positions.int(),
            query_start=torch.tensor([0, *torch.tensor(sizes).cumsum(0)], dtype=torch.int32),
            seq_lens=torch.tensor(ends, dtype=torch.int32),
            max_query_len=max(sizes),
            max_seq_len=max(ends),
            block_tables=[blocks] * num_groups,
            slots=[slots] * num_groups,
            logits_at=torch.arange(sum(sizes)),
            invariant=self.invariant,
            block_size=BLOCK_SIZE,
            source_lens=self.source_lens[[seq for seq, _ in chunks]] if self.model.has_encoder else None,
        )
        for (seq, _), end in zip(chunks, ends, strict=True):
            self.computed[seq] = end
        with torch.inference_mode():
            logits = self.model.logits(self.model.forward(batch, self.caches))
        return list(logits.split(sizes))


def logits_of(model: Any, ids: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits [T, vocab] of one prompt in one go."""
    session = Session(model, dtype=dtype)
    if model.has_encoder:
        session.encode([(0, source_of(ids))])
    return session.step([(0, ids)])[0]


def source_of(ids: Tensor) -> Tensor:
    """What a sequence of these tokens attends to, where a model has an encoder: some others."""
    return ids.flip(0)[3:26]


def prompt(num_tokens: int = 40, vocab_size: int = 300, seed: int = 1) -> Tensor:
    return torch.randint(vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(seed))
