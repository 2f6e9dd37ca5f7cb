"""The KV cache: how many blocks there are, and the tensors that hold them.

Block ids are unique over all state groups, so groups share memory: the i-th layer of one group lies in the same tensor
as the i-th layer of another whose blocks have the same shape, and a block belongs to whichever group was given its id.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from cableway.ipc.config import WorkerConfig
from cableway.ipc.modelfiles import ModelError
from cableway.kernels.block_copy import block_copy
from cableway.kernels.kv_cache import kv_cache_shape
from cableway.kernels.lang import gpu_capability
from cableway.workers.batch import Batch, Decoder, Source, StateSpec

_CPU_BYTES = 1 << 30
"""Enough by default on a CPU, unless one sequence needs more."""
_CPU_AVAILABLE_FRAC = 0.5
_LOGITS_COPIES = 4
"""Beside those of the dry run: the sampler's, of rows with penalties or log-probabilities."""
_GIB = 1 << 30
_OF_8_BITS = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2, "int8": torch.int8}
_LEAST_FOR_E4M3 = 89
"""Capability of GPUs that convert it."""


_BLOCK_SIZE = 16
_STATE_BLOCK_SIZE = 256
"""Tokens of a block that keeps one state for all of them, often of megabytes."""


def settled(config: WorkerConfig, groups: Sequence[StateSpec]) -> WorkerConfig:
    """The same with the block size that a model's state asks for, where none was."""
    if config.block_size:
        return config
    keeps_states = any(group.state_len for group in groups)
    return msgspec.structs.replace(config, block_size=_STATE_BLOCK_SIZE if keeps_states else _BLOCK_SIZE)


@dataclass(frozen=True)
class KVCache:
    """`layers[i]` is what layer i reads and writes; `tensors` are the distinct ones among them."""

    layers: list[Tensor]
    tensors: list[Tensor]
    num_blocks: int

    def dropped(self) -> "KVCache":
        """None of its memory, but the number of its blocks."""
        return KVCache([], [], self.num_blocks)

    def copy_blocks(self, pairs: Tensor) -> None:
        """Copy block pairs[i, 0] over block pairs[i, 1] in every layer; pairs [n, 2] i64."""
        for tensor in self.tensors:
            block_copy(tensor, pairs)


def kept_as(config: WorkerConfig) -> torch.dtype:
    """In what numbers keys and values are kept; ModelError when the GPU does not know them."""
    is_old = config.device == "cuda" and gpu_capability() < _LEAST_FOR_E4M3
    if config.kv_cache_dtype == "fp8_e4m3" and is_old:
        raise ModelError("kv_cache_dtype fp8_e4m3 takes a GPU of capability 8.9 or more: choose int8 or fp8_e5m2")
    return _OF_8_BITS.get(config.kv_cache_dtype) or getattr(torch, config.kv_cache_dtype)


def allocate(decoder: Decoder, config: WorkerConfig, dtype: torch.dtype, device: torch.device) -> KVCache:
    """Make the cache, of keys and values in `dtype`. Zeroed memory: a CPU takes pages only as they are written.

    On a GPU the weights are there already, and a dry run of the largest step shows what else there will be.

    Raises:
        ModelError: not even one sequence of `max_model_len` tokens fits, the GPU has less than was asked for, or what
            layers keep cannot be kept in that dtype.
    """

    def available_bytes() -> int:
        if device.type == "cpu":
            return int(_available_bytes() * _CPU_AVAILABLE_FRAC)
        return _gpu_available_bytes(decoder, config, dtype, device)

    groups = decoder.state_groups()
    num_blocks = _num_blocks(config, groups, _block_bytes(groups, config, dtype), available_bytes, device)
    try:
        return _make(groups, config, num_blocks, dtype, device)
    except torch.cuda.OutOfMemoryError:
        free, _ = torch.cuda.mem_get_info(device)
        wanted = num_blocks * _block_bytes(groups, config, dtype)
        raise ModelError(
            f"the KV cache was to have {wanted / _GIB:.1f} GiB, but only {free / _GIB:.1f} GiB of the GPU are free: "
            "lower kv_cache_memory_bytes or num_kv_blocks"
        ) from None


def outline(decoder: Decoder, config: WorkerConfig, dtype: torch.dtype) -> KVCache:
    """A cache on the meta device, about as large as the one to come: the sizes of offsets depend on it."""
    groups, meta = decoder.state_groups(), torch.device("meta")
    num_blocks = _num_blocks(config, groups, _block_bytes(groups, config, dtype), most_bytes, meta)
    return _make(groups, config, num_blocks, dtype, meta)


def most_bytes() -> int:
    """All of the GPU's memory; where there is none, what a CPU's cache has by default."""
    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else _CPU_BYTES


def _make(
    groups: Sequence[StateSpec], config: WorkerConfig, num_blocks: int, dtype: torch.dtype, device: torch.device
) -> KVCache:
    places = _places(groups, config, dtype)
    tensors = {
        (shape, kind, index): _zeros((shape[0], num_blocks, *shape[2:]), kind, device)
        for shape, kind, index in dict.fromkeys(places.values())
    }
    layers = [tensors[places[layer]] for layer in sorted(places)]
    return KVCache(layers, list(tensors.values()), num_blocks)


def _block_bytes(groups: Sequence[StateSpec], config: WorkerConfig, dtype: torch.dtype) -> int:
    """Of one block in all tensors."""
    places = dict.fromkeys(_places(groups, config, dtype).values())
    return sum(torch.Size(shape).numel() * kind.itemsize for shape, kind, _ in places)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch writes its zeros at once; NumPy leaves them to the kernel.
    return torch.from_numpy(np.zeros(torch.Size(shape).numel() * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def _num_blocks(
    config: WorkerConfig,
    groups: Sequence[StateSpec],
    block_bytes: int,
    available_bytes: Callable[[], int],
    device: torch.device,
) -> int:
    """How many blocks of `block_bytes` to take: as configured, or as memory allows, which is then asked for."""
    sequence_blocks = -(-config.max_model_len // config.block_size) * len(groups)
    if config.num_kv_blocks:
        num_blocks = config.num_kv_blocks
    elif config.kv_cache_memory_bytes:
        num_blocks = config.kv_cache_memory_bytes // block_bytes
    else:
        num_blocks = max(available_bytes(), 0) // block_bytes
        if device.type == "cpu":
            wanted = max(sequence_blocks, _CPU_BYTES // block_bytes)
            num_blocks = min(config.max_num_seqs * sequence_blocks, wanted, num_blocks)
    if num_blocks < sequence_blocks:
        more = "" if device.type == "cpu" else ", raise gpu_memory_utilization, lower max_num_batched_tokens"
        raise ModelError(
            f"the KV cache has room for {num_blocks * config.block_size // len(groups)} tokens, but max_model_len is "
            f"{config.max_model_len}: lower it{more}, or give kv_cache_memory_bytes {sequence_blocks * block_bytes}"
        )
    return num_blocks


def _gpu_available_bytes(decoder: Decoder, config: WorkerConfig, dtype: torch.dtype, device: torch.device) -> int:
    """What is left for the cache: this process's share of the GPU, less its weights and what steps take.

    Steps take what a dry run took; twice with graphs, whose memory is their own; and copies of logits.
    """
    step_bytes = _dry_run_bytes(decoder, config, dtype, device) * (1 if config.enforce_eager else 2)
    logits_bytes = _LOGITS_COPIES * config.max_num_seqs * decoder.vocab_size * 4
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    share = int(total * config.gpu_memory_utilization) - torch.cuda.memory_reserved(device)
    return min(share, free) - step_bytes - logits_bytes


def _dry_run_bytes(decoder: Decoder, config: WorkerConfig, dtype: torch.dtype, device: torch.device) -> int:
    """What the largest step takes on a GPU beside weights and cache."""
    cache = _make(decoder.state_groups(), config, 1, dtype, device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    dry_run(decoder, config, cache)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_reserved(device) - before


def dry_run(decoder: Decoder, config: WorkerConfig, cache: KVCache) -> None:
    """The largest step, of nobody's tokens: nothing is written to the cache."""
    if decoder.has_encoder:
        decoder.encode(nobodies_source(config.max_num_batched_tokens, cache.tensors[0].device), cache.layers)
    num_seqs, num_tokens, device = config.max_num_seqs, config.max_num_batched_tokens, cache.tensors[0].device
    max_blocks, num_groups = -(-config.max_model_len // config.block_size), len(decoder.state_groups())
    query_start, *tables = (
        torch.zeros(shape, dtype=torch.int32, device=device)
        for shape in ((num_seqs + 1,), *[(num_seqs, max_blocks)] * num_groups)
    )
    query_start[1:] = num_tokens
    token_ids, positions = torch.zeros(2, num_tokens, dtype=torch.int32, device=device)
    slots = torch.full((num_groups, num_tokens), -1, dtype=torch.int64, device=device)
    batch = Batch(
        token_ids=token_ids,
        positions=positions,
        query_start=query_start,
        seq_lens=torch.zeros(num_seqs, dtype=torch.int32, device=device),
        max_query_len=num_tokens,
        max_seq_len=config.max_model_len,
        block_tables=tables,
        slots=list(slots),
        logits_at=torch.zeros(min(num_seqs, num_tokens), dtype=torch.int64, device=device),
        invariant=config.batch_invariant,
        block_size=config.block_size,
        source_lens=torch.zeros(num_seqs, dtype=torch.int32, device=device) if decoder.has_encoder else None,
    )
    decoder.logits(decoder.forward(batch, cache.layers))


def nobodies_source(num_tokens: int, device: torch.device) -> Source:
    """One of so many tokens, of which nothing is written to the cache."""
    token_ids, positions = torch.zeros(2, num_tokens, dtype=torch.int32, device=device)
    query_start = torch.zeros(2, dtype=torch.int32, device=device)
    query_start[1] = num_tokens
    slots = torch.full((num_tokens,), -1, dtype=torch.int64, device=device)
    return Source(token_ids, positions, query_start, slots, num_tokens)


def block_memory(
    group: StateSpec, block_size: int, dtype: torch.dtype, state_dtype: torch.dtype = torch.float32
) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of one block of one layer: of a state, or of keys and values in `dtype`; ModelError when those
    cannot be kept in numbers of 8 bits."""
    if group.state_len:
        return (1, 1, 1, 1, group.state_len), state_dtype
    if dtype in _OF_8_BITS.values():
        if group.kind == "latent":
            raise ModelError("kv_cache_dtype: this model keeps latents, which are not kept in 8 bits: leave it at auto")
        if dtype == torch.int8 and group.head_dim % 4:
            raise ModelError(f"kv_cache_dtype int8 takes heads of a multiple of 4 numbers, not of {group.head_dim}")
    return kv_cache_shape(1, block_size, group.num_kv_heads, group.head_dim, dtype, group.num_planes), dtype


def _places(
    groups: Sequence[StateSpec], config: WorkerConfig, dtype: torch.dtype
) -> dict[int, tuple[tuple[int, ...], torch.dtype, int]]:
    """layer -> (shape and dtype of one block's memory, which of the tensors of that shape)."""
    return {
        layer: (*block_memory(group, config.block_size, dtype, getattr(torch, config.state_dtype)), index)
        for group in groups
        for index, layer in enumerate(group.layers)
    }


def _available_bytes() -> int:
    """Memory that can be taken without swapping: the kernel's estimate, or less where the control group allows less."""
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(meminfo["MemAvailable"].split()[0]) * 1024
    try:
        limit, used = (int((Path("/sys/fs/cgroup") / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no control group, or one without a limit
        return available
    return min(available, max(0, limit - used))
