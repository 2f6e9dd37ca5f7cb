"""GGUF files: every block type, decoded and multiplied, and whole models against transformers."""

import copy
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from cableway.ipc import modelfiles
from cableway.workers import formats
from cableway.workers.formats import gguf as gguf_format
from cableway.workers.formats.base import Place
from cableway.workers.formats.stored import GROUP_LEN, Stored
from cableway.workers.parallel import Span
from tests.checkpoints import oracle
from tests.models import gguf_files
from tests.models.gguf_files import demo_model
from tests.models.harness import Session, load, logits_of, prompt

QUANTIZED = [Kind[n] for n in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")]
QUANTIZED += [Kind.IQ4_NL, Kind.IQ4_XS, Kind.MXFP4]
PLAIN = [Kind.F32, Kind.F16, Kind.BF16]
BF16 = Place(torch.bfloat16, torch.device("cpu"), 64)


def stored(kind: Kind, num_rows: int = 48, num_columns: int = 512) -> tuple[Stored, np.ndarray]:
    """A random matrix of `kind`, and its values by the gguf package."""
    values = np.random.default_rng(0).standard_normal((num_rows, num_columns), dtype=np.float32)
    encoded = gguf_files.encode(values, kind)
    raw = encoded.view(np.uint8).reshape(-1)
    shape = (num_rows, num_columns)
    encoding = gguf_format.encoding(kind, 2, "x")
    tensor = Stored("x", shape, encoding, lambda: gguf_format.view(raw, shape, kind))
    return tensor, gguf.quants.dequantize(encoded, kind)


@pytest.mark.parametrize("kind", [*PLAIN, *QUANTIZED])
def test_a_type_is_decoded_exactly(kind: Kind) -> None:
    tensor, values = stored(kind)
    piece = tensor.piece(Span(0, 48, 48), Span(0, 512, 512))
    assert np.array_equal(piece.decode(torch.float32).numpy(), values)


@pytest.mark.parametrize("kind", [*PLAIN, *QUANTIZED])
@pytest.mark.parametrize("columns", [(0, 256), (256, 512), (32, 96), (40, 100)])
def test_a_piece_holds_its_rows_and_columns_and_zeros_after(kind: Kind, columns: tuple[int, int]) -> None:
    tensor, values = stored(kind)
    start, stop = columns
    piece = tensor.piece(Span(16, 40, 32), Span(start, stop, stop - start))
    got = piece.decode(torch.float32).numpy()
    assert np.array_equal(got[:24], values[16:40, start:stop])
    assert got.shape[0] == 32
    assert not got[24:].any()


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q4_K])
def test_integers_and_scales_are_the_values(kind: Kind) -> None:
    tensor, values = stored(kind)
    ints = tensor.encoding.group_ints(tensor.read())
    scale, offset = (part.repeat_interleave(GROUP_LEN, 1).double() for part in ints[1:])
    got = ints.codes.double() * scale + offset
    assert ints.codes.max() == 15
    np.testing.assert_allclose(got.numpy(), values, atol=1e-6)


def test_bytes_and_scales_are_the_values() -> None:
    tensor, values = stored(Kind.Q8_0)
    codes, scale = tensor.encoding.group_bytes(tensor.read())
    assert np.array_equal((codes.float() * scale.repeat_interleave(GROUP_LEN, 1)).numpy(), values)


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("num_rows", [1, 2, 4, 5, 33])
def test_products_in_bfloat16_are_as_good_as_with_rounded_weights(kind: Kind, num_rows: int) -> None:
    tensor, values = stored(kind)
    form = formats.choose([tensor.encoding], 48, 512, BF16)
    params = form.finish([tensor.piece(Span(0, 48, 48), Span(0, 512, 512))])
    x = torch.randn(num_rows, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight = torch.from_numpy(values)
    exact = x.double() @ weight.double().T
    rounded = (x.double() @ weight.bfloat16().double().T).bfloat16()
    assert (form.apply(x, params) - exact).std() <= 1.3 * (rounded - exact).std()


@pytest.mark.parametrize("kind", [*PLAIN, *QUANTIZED])
@pytest.mark.parametrize(("family", "architecture"), [("llama", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")])
def test_a_model_of_each_type_gives_the_logits_of_transformers(
    tmp_path: Path, kind: Kind, family: str, architecture: str
) -> None:
    # Types with blocks of 256 want wide matrices.
    model = oracle(family, hidden_size=256, intermediate_size=256, head_dim=64, num_hidden_layers=2)
    path = tmp_path / "model.gguf"
    gguf_files.write(path, model, architecture, kind)
    ids = prompt()
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    torch.testing.assert_close(logits_of(load(path), ids), expected, atol=2e-4, rtol=0)


def test_tied_embeddings_are_those_of_a_file_without_output(tmp_path: Path) -> None:
    model = oracle("llama", tie_word_embeddings=True)
    path = tmp_path / "model.gguf"
    gguf_files.write(path, model, "llama", Kind.Q8_0)
    ids = prompt()
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    torch.testing.assert_close(logits_of(load(path), ids), expected, atol=1e-4, rtol=0)


def test_biases_of_q_and_k_are_reordered_like_their_rows(tmp_path: Path) -> None:
    model = oracle("llama", attention_bias=True)
    path = tmp_path / "model.gguf"
    gguf_files.write(path, model, "llama", Kind.F32)
    ids = prompt()
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    torch.testing.assert_close(logits_of(load(path), ids), expected, atol=1e-4, rtol=0)


def test_rope_divisors_of_the_file_are_used(tmp_path: Path) -> None:
    """Llama 3.1 files keep the slowed frequencies as a tensor, and say nothing of them in metadata."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    model = oracle("llama", rope_parameters=rope)
    plain = 1 / 10_000.0 ** (torch.arange(0, 16, 2) / 16)
    divisors = (plain / model.model.rotary_emb.inv_freq).numpy().astype(np.float32)
    assert divisors.max() > 3
    path = tmp_path / "model.gguf"
    gguf_files.write(path, model, "llama", Kind.F32, extra={"rope_freqs.weight": (divisors, Kind.F32)})
    ids = prompt()
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    torch.testing.assert_close(logits_of(load(path), ids), expected, atol=1e-4, rtol=0)


def test_types_that_are_not_served_are_named(tmp_path: Path) -> None:
    model = oracle("llama", hidden_size=256, intermediate_size=256)
    path = tmp_path / "model.gguf"
    gguf_files.write(path, model, "llama", Kind.F32, extra={"odd.weight": (np.zeros(4, np.int32), Kind.I32)})
    with pytest.raises(modelfiles.ModelError, match=r"'odd.weight' of 1 dimensions is I32, not one of F32, F16"):
        load(path)


def test_a_vector_in_blocks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    encoded = gguf.quants.quantize(np.ones((1, 64), np.float32), Kind.Q8_0)[0]
    gguf_files.write(path, oracle("llama"), "llama", Kind.F32, extra={"odd.bias": (encoded, Kind.Q8_0)})
    with pytest.raises(modelfiles.ModelError, match="of 1 dimensions is Q8_0"):
        load(path)


@pytest.mark.slow  # its reading takes some 15 s
def test_the_demo_model_is_what_transformers_reads() -> None:
    path = modelfiles.locate("smollm2-135m").path
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=demo_model())["tensors"]
    ours = demo_model().state_dict()
    assert tensors.keys() == ours.keys() - {"lm_head.weight"}
    assert all(torch.equal(tensor, ours[name]) for name, tensor in tensors.items())


def test_the_demo_model_gives_the_logits_of_transformers() -> None:
    ids = prompt(64, 49152)
    with torch.inference_mode():
        expected = demo_model()(ids[None]).logits[0]
    torch.testing.assert_close(logits_of(load("smollm2-135m"), ids), expected, atol=1e-3, rtol=0)


def test_bfloat16_is_as_good_as_that_of_transformers() -> None:
    """Our 4-bit products round scales where transformers rounds weights."""
    ids = prompt(64, 49152)
    with torch.inference_mode():
        exact = demo_model()(ids[None]).logits[0]
        theirs = (copy.deepcopy(demo_model()).bfloat16()(ids[None]).logits[0] - exact).std()
    ours = load("smollm2-135m", dtype=torch.bfloat16)
    one_go = (logits_of(ours, ids, dtype=torch.bfloat16) - exact).std()
    session = Session(ours, dtype=torch.bfloat16)
    few_rows = (torch.cat([session.step([(0, rows)])[0] for rows in ids.split(4)]) - exact).std()
    assert max(one_go, few_rows) < 1.3 * theirs
