"""Block pool: who owns a block, and which content can be found again."""

from collections import OrderedDict


class BlockPool:
    """A block is *owned* (references > 0), *cached* (nobody's, but its content can be found), or *free*.

    Cached blocks are given up least recently used first, when nothing is free. One key names one block at most; content
    that is there twice is found under the first.
    """

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self.references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        # Oldest first. PERF: a plain dict walks over all that were taken from its front to find the next, 80 us each.
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._key: list[bytes | None] = [None] * num_blocks
        self._block: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give."""
        return len(self._free) + len(self._cached)

    def allocate(self) -> int:
        """A block with one reference; IndexError when none is available."""
        if self._free:
            block_id = self._free.pop()
        elif self._cached:
            block_id, _ = self._cached.popitem(last=False)
            self._forget(block_id)
        else:
            raise IndexError("no block is available")
        self.references[block_id] = 1
        return block_id

    def share(self, block_id: int) -> None:
        """Take one more reference to a block that is owned or cached."""
        if not self.references[block_id]:
            del self._cached[block_id]
        self.references[block_id] += 1

    def release(self, block_id: int) -> None:
        """Give one reference back; the last one leaves the block cached if it was published, else free."""
        if not self.references[block_id]:
            raise ValueError(f"block {block_id} is nobody's")
        self.references[block_id] -= 1
        if self.references[block_id]:
            return
        if self._key[block_id] is None:
            self._free.append(block_id)
        else:
            self._cached[block_id] = None

    def publish(self, block_id: int, key: bytes) -> None:
        """Let an owned block, whose content will not change any more, be found under `key`."""
        if self._key[block_id] is None and key not in self._block:
            self._key[block_id] = key
            self._block[key] = block_id

    def find(self, key: bytes) -> int | None:
        return self._block.get(key)

    def _forget(self, block_id: int) -> None:
        key = self._key[block_id]
        if key is not None:
            del self._block[key]
            self._key[block_id] = None
