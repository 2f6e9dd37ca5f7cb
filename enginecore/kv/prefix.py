"""Names of prefixes: a block's key says what it holds and everything that comes before it."""

import hashlib
from array import array


class PrefixChain:
    """Chained hashes of one sequence's full blocks, computed as far as asked for.

    key[i] = blake2b(key[i-1] + the packed int32 tokens of block i), key[-1] = blake2b(salt): equal keys mean equal
    tokens from the start on, under the same salt. Where a sequence attends to a source, key[-1] is of that too.
    """

    __slots__ = ("_keys", "_root", "_salt", "_source")

    def __init__(self, salt: str = "", source: bytes = b""):
        self._salt, self._source = salt, source
        self._root = b""  # until it is asked for
        self._keys: list[bytes] = []

    @property
    def root(self) -> bytes:
        """key[-1]"""
        if not self._root:
            self._root = _digest(self._salt.encode())
            if self._source:
                self._root = _digest(self._root + self._source)
        return self._root

    def source_key(self, index: int) -> bytes:
        """Key of block `index` of what the source was encoded to: each depends on all of the source."""
        return _digest(self.root + b"source %d" % index)

    def key(self, index: int, tokens: "array[int]", block_size: int) -> bytes:
        """Key of block `index`, which `tokens` fill. `tokens` may have grown since the last call, nothing else."""
        keys = self._keys
        while len(keys) <= index:
            before = keys[-1] if keys else self.root
            begin = len(keys) * block_size
            keys.append(_digest(before + tokens[begin : begin + block_size].tobytes()))
        return keys[index]


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()
