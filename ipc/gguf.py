"""Read the header of a GGUF file: metadata and the table of tensors. Nothing in the file is trusted.

The `gguf` package reads a 49k-token vocabulary in about two seconds, since it makes views of every string; each of our
processes needs the header, so this reader walks it once in some 50 ms, and leaves the tensors' blocks to that package.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

import mmap
import struct
from functools import cached_property
from typing import Any, NamedTuple

import msgspec

from cableway.ipc.errors import EXIT_UNMENDABLE, UserError

_MAX_FIELDS = 1 << 16
_MAX_TENSORS = 1 << 18
_MAX_DIMS = 4
_MAX_NAME_BYTES = 1 << 16
_MAX_FLOATS_BYTES = 1 << 16
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32


class ModelError(UserError):
    """A model file that is missing, broken, hostile or not supported. One clear line, for people."""

    exit_code = EXIT_UNMENDABLE


class TensorInfo(NamedTuple):
    shape: tuple[int, ...]  # torch order: rows first
    ggml_type: int  # a gguf.GGMLQuantizationType
    offset: int  # absolute, bytes
    num_bytes: int


class _RawTensor(NamedTuple):
    shape: tuple[int, ...]
    ggml_type: int
    relative_offset: int


class Header(msgspec.Struct, frozen=True, dict=True):
    """What precedes the weights in a GGUF file."""

    path: str
    metadata: dict[str, Any]
    tensor_names: frozenset[str]
    raw_tensors: dict[str, _RawTensor]
    data_offset: int
    file_bytes: int

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Place and size of each tensor's blocks; ModelError for an unknown type or one that lies outside the file."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        tensors = {}
        for name, raw in self.raw_tensors.items():
            if raw.ggml_type not in sizes:
                raise ModelError(f"{self.path}: tensor {name!r} has the unknown type {raw.ggml_type}")
            block_len, block_bytes = sizes[raw.ggml_type]
            num_values = 1
            for dim in raw.shape:
                num_values *= dim
            if raw.shape and raw.shape[-1] % block_len:
                kind = GGMLQuantizationType(raw.ggml_type).name
                raise ModelError(f"{self.path}: tensor {name!r} has rows of {raw.shape[-1]}, not whole {kind} blocks")
            num_bytes = num_values // block_len * block_bytes
            offset = self.data_offset + raw.relative_offset
            if offset + num_bytes > self.file_bytes:
                raise ModelError(f"{self.path}: truncated, tensor {name!r} ends past the end of the file")
            tensors[name] = TensorInfo(raw.shape, raw.ggml_type, offset, num_bytes)
        return tensors


def read_header(path: str) -> Header:
    """Parse the header of `path`; ModelError when it is no sound GGUF file."""
    try:
        with open(path, "rb") as file:
            try:
                view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError:
                raise ModelError(f"{path}: the file is empty") from None
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from None
    with view:
        try:
            return _parse(path, view)
        except (struct.error, IndexError, OverflowError):
            raise ModelError(f"{path}: truncated, the header ends past the end of the file") from None


def read_floats(header: Header, name: str) -> list[float]:
    """The numbers of a short float32 tensor; ModelError when it is none."""
    tensor = header.tensors.get(name)
    if tensor is None or tensor.ggml_type != 0 or not 0 < tensor.num_bytes <= _MAX_FLOATS_BYTES:
        raise ModelError(f"{header.path}: no short tensor {name!r} of float32 numbers")
    with open(header.path, "rb") as file:
        file.seek(tensor.offset)
        return list(struct.unpack(f"<{tensor.num_bytes // 4}f", file.read(tensor.num_bytes)))


def _parse(path: str, view: mmap.mmap) -> Header:
    if view[:4] != b"GGUF":
        raise ModelError(f"{path}: not a GGUF file")
    version, num_tensors, num_fields = struct.unpack_from("<IQQ", view, 4)
    if version not in (2, 3):
        raise ModelError(f"{path}: GGUF version {version} is not supported (2 and 3 are)")
    if num_fields > _MAX_FIELDS or num_tensors > _MAX_TENSORS:
        raise ModelError(f"{path}: {num_fields} metadata fields and {num_tensors} tensors are more than a model has")
    cursor = _Cursor(path, view, 24)

    metadata: dict[str, Any] = {}
    for _ in range(num_fields):
        name = cursor.string()
        metadata[name] = cursor.value(cursor.scalar("I"))
    raw_tensors: dict[str, _RawTensor] = {}
    for _ in range(num_tensors):
        name = cursor.string(_MAX_NAME_BYTES)
        num_dims = cursor.scalar("I")
        if num_dims > _MAX_DIMS:
            raise ModelError(f"{path}: tensor {name!r} has {num_dims} dimensions")
        shape = tuple(cursor.scalar("Q") for _ in range(num_dims))[::-1]
        if name in raw_tensors:
            raise ModelError(f"{path}: tensor {name!r} is there twice")
        raw_tensors[name] = _RawTensor(shape, cursor.scalar("I"), cursor.scalar("Q"))

    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise ModelError(f"{path}: alignment {alignment!r} is no power of two")
    data_offset = (cursor.offset + alignment - 1) // alignment * alignment
    return Header(path, metadata, frozenset(raw_tensors), raw_tensors, data_offset, len(view))


class _Cursor:
    """Walks the header; every read is checked against the end of the file."""

    def __init__(self, path: str, view: mmap.mmap, offset: int):
        self._path = path
        self._view = view
        self.offset = offset

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._view, self.offset)
        self.offset += struct.calcsize("<" + code)
        return value

    def string(self, max_bytes: int | None = None) -> str:
        num_bytes = self.scalar("Q")
        end = self.offset + num_bytes
        if end > len(self._view) or (max_bytes is not None and num_bytes > max_bytes):
            raise ModelError(f"{self._path}: broken, a string of {num_bytes} bytes in the header")
        text = self._view[self.offset : end].decode(errors="replace")
        self.offset = end
        return text

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        raise ModelError(f"{self._path}: metadata of the unknown type {kind}")

    def _array(self) -> list[Any]:
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind == _STRING:
            if count * 8 > len(self._view) - self.offset:
                raise ModelError(f"{self._path}: broken, an array of {count} strings in the header")
            return [self.string() for _ in range(count)]
        if kind not in _SCALARS:
            raise ModelError(f"{self._path}: metadata array of the unsupported type {kind}")
        num_bytes = struct.calcsize("<" + _SCALARS[kind]) * count
        if num_bytes > len(self._view) - self.offset:
            raise ModelError(f"{self._path}: broken, an array of {count} values in the header")
        values = list(struct.unpack_from(f"<{count}{_SCALARS[kind]}", self._view, self.offset))
        self.offset += num_bytes
        return values
