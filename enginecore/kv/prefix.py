"""Names of prefixes: a block's key says what it holds and everything that comes before it."""

import hashlib
from array import array


class PrefixChain:
    """Chained hashes of one sequence's full blocks, computed as far as asked for.

    key[i] = blake2b(key[i-1] + the packed int32 tokens of block i), key[-1] = blake2b(salt): equal keys mean equal
    tokens from the start on, under the same salt.
    """

    __slots__ = ("_keys", "_salt")

    def __init__(self, salt: str = ""):
        self._salt = salt
        self._keys: list[bytes] = []

    def key(self, index: int, tokens: "array[int]", block_size: int) -> bytes:
        """Key of block `index`, which `tokens` fill. `tokens` may have grown since the last call, nothing else."""
        keys = self._keys
        while len(keys) <= index:
            before = keys[-1] if keys else _digest(self._salt.encode())
            begin = len(keys) * block_size
            keys.append(_digest(before + tokens[begin : begin + block_size].tobytes()))
        return keys[index]


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()
