"""The KV cache: how many blocks there are, and the tensors that hold them.

Block ids are unique over all state groups, so groups share memory: the i-th layer of one group lies in the same tensor
as the i-th layer of another whose blocks have the same shape, and a block belongs to whichever group was given its id.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cableway.ipc.config import WorkerConfig
from cableway.ipc.modelfiles import ModelError
from cableway.kernels.block_copy import block_copy
from cableway.kernels.kv_write import kv_cache_shape
from cableway.workers.batch import StateSpec

_CPU_BYTES = 1 << 30
"""Enough by default on a CPU, unless one sequence needs more."""
_CPU_AVAILABLE_FRAC = 0.5
_CUDA_FREE_FRAC = 0.9


@dataclass(frozen=True)
class KVCache:
    """`layers[i]` is what layer i reads and writes; `tensors` are the distinct ones among them."""

    layers: list[Tensor]
    tensors: list[Tensor]
    num_blocks: int

    def copy_blocks(self, pairs: Tensor) -> None:
        """Copy block pairs[i, 0] over block pairs[i, 1] in every layer; pairs [n, 2] i64."""
        for tensor in self.tensors:
            block_copy(tensor, pairs)


def allocate(groups: Sequence[StateSpec], config: WorkerConfig, dtype: torch.dtype, device: torch.device) -> KVCache:
    """Make the cache. Zeroed memory: a CPU takes pages only as they are written.

    Raises:
        ModelError: not even one sequence of `max_model_len` tokens fits.
    """
    places = _places(groups, config.block_size, dtype)
    distinct = list(dict.fromkeys(places.values()))
    block_bytes = sum(torch.Size(shape).numel() * kind.itemsize for shape, kind, _ in distinct)
    num_blocks = num_blocks_for(config, len(groups), block_bytes, device)
    tensors = {
        (shape, kind, index): _zeros((shape[0], num_blocks, *shape[2:]), kind, device)
        for shape, kind, index in distinct
    }
    layers = [tensors[places[layer]] for layer in sorted(places)]
    return KVCache(layers, list(tensors.values()), num_blocks)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch writes its zeros at once; NumPy leaves them to the kernel.
    return torch.from_numpy(np.zeros(torch.Size(shape).numel() * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def num_blocks_for(config: WorkerConfig, num_groups: int, block_bytes: int, device: torch.device) -> int:
    """How many blocks of `block_bytes` to take: as configured, or as the free memory allows.

    Raises:
        ModelError: not even one sequence of `max_model_len` tokens fits.
    """
    sequence_blocks = -(-config.max_model_len // config.block_size) * num_groups
    if config.num_kv_blocks:
        num_blocks = config.num_kv_blocks
    elif config.kv_cache_memory_bytes:
        num_blocks = config.kv_cache_memory_bytes // block_bytes
    elif device.type == "cpu":
        most = int(_available_bytes() * _CPU_AVAILABLE_FRAC) // block_bytes
        wanted = max(sequence_blocks, _CPU_BYTES // block_bytes)
        num_blocks = min(config.max_num_seqs * sequence_blocks, wanted, most)
    else:
        num_blocks = int(torch.cuda.mem_get_info(device)[0] * _CUDA_FREE_FRAC) // block_bytes
    if num_blocks < sequence_blocks:
        raise ModelError(
            f"the KV cache has room for {num_blocks * config.block_size // num_groups} tokens, but max_model_len is "
            f"{config.max_model_len}: lower it, or give kv_cache_memory_bytes {sequence_blocks * block_bytes}"
        )
    return num_blocks


def block_memory(group: StateSpec, block_size: int, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of one block of one layer."""
    if group.state_len:
        return (1, 1, 1, 1, group.state_len), torch.float32
    return kv_cache_shape(1, block_size, group.num_kv_heads, group.head_dim, group.num_planes), dtype


def _places(
    groups: Sequence[StateSpec], block_size: int, dtype: torch.dtype
) -> dict[int, tuple[tuple[int, ...], torch.dtype, int]]:
    """layer -> (shape and dtype of one block's memory, which of the tensors of that shape)."""
    return {
        layer: (*block_memory(group, block_size, dtype), index)
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
