"""A GGUF header is read as the `gguf` package writes it, and every way of breaking it is one clear ModelError."""

import contextlib
import struct

import gguf
import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cableway.ipc.gguf import ModelError, read_header


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_float64("x.double", 2.5)
    writer.add_bool("x.flag", True)
    writer.add_array("x.numbers", [1, -2, 3])
    writer.add_token_list(["a", "é", "日本"])
    writer.add_tensor("f32", numpy.arange(12, dtype=numpy.float32).reshape(3, 4))
    blocks = gguf.quants.quantize(numpy.ones((2, 64), numpy.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("q8", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_reads_what_the_gguf_package_wrote(model):
    header = read_header(str(model))
    assert header.metadata["llama.block_count"] == 2
    assert header.metadata["x.double"] == 2.5
    assert header.metadata["x.flag"] is True
    assert header.metadata["x.numbers"] == [1, -2, 3]
    assert header.metadata["tokenizer.ggml.tokens"] == ["a", "é", "日本"]
    assert header.tensors["f32"].shape == (3, 4)
    assert header.tensors["q8"].shape == (2, 64)
    assert header.tensors["q8"].num_bytes == 2 * 2 * 34
    data = model.read_bytes()
    info = header.tensors["f32"]
    values = numpy.frombuffer(data[info.offset : info.offset + info.num_bytes], numpy.float32)
    assert values.tolist() == list(range(12))


def test_every_truncation_is_a_model_error(model, tmp_path):
    data = model.read_bytes()
    whole = read_header(str(model))
    cut = tmp_path / "cut.gguf"
    for end in {*range(0, whole.data_offset, 7), whole.data_offset + 8, len(data) - 64}:
        cut.write_bytes(data[:end])
        with pytest.raises(ModelError):
            _ = read_header(str(cut)).tensors


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 400), value=st.integers(0, 255))
def test_a_flipped_byte_never_does_worse_than_a_model_error(model, tmp_path, position, value):
    data = bytearray(model.read_bytes())
    data[position] = value
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(data)
    with contextlib.suppress(ModelError):
        _ = read_header(str(broken)).tensors


@pytest.mark.parametrize(
    ("num_tensors", "num_fields", "body"),
    [
        (1 << 60, 0, b""),
        (0, 1 << 60, b""),
        (0, 1, struct.pack("<Q", 1 << 62)),  # a name of 4 EB
        (0, 1, struct.pack("<Q1sIIQ", 1, b"a", 9, 8, 1 << 61)),  # 2**61 strings
        (0, 1, struct.pack("<Q1sIIQ", 1, b"a", 9, 10, 1 << 61)),  # 2**61 integers
        (0, 1, struct.pack("<Q1sIIQ", 1, b"a", 9, 9, 1)),  # array of arrays
        (0, 1, struct.pack("<Q1sI", 1, b"a", 77)),  # unknown type
        (1, 0, struct.pack("<Q1sI", 1, b"a", 99)),  # 99 dimensions
        (1, 0, struct.pack("<Q1sIQQIQ", 1, b"a", 2, 1 << 40, 1 << 40, 0, 0)),  # larger than the file
        (1, 0, struct.pack("<Q1sIQIQ", 1, b"a", 1, 32, 12345, 0)),  # unknown tensor type
    ],
)
def test_hostile_headers(tmp_path, num_tensors, num_fields, body):
    path = tmp_path / "hostile.gguf"
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, num_tensors, num_fields) + body + b"\0" * 64)
    with pytest.raises(ModelError):
        _ = read_header(str(path)).tensors
