"""Loaded as invariant, a model gives each token the same logits, to the bit, whatever is computed beside it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from cableway.workers import formats
from cableway.workers.formats import gguf as gguf_format
from cableway.workers.formats.base import Place
from cableway.workers.formats.stored import Stored
from cableway.workers.parallel import Span
from tests.checkpoints import oracle, save
from tests.models import gguf_files, test_zoo
from tests.models.harness import Session, load, prompt, source_of
from tests.models.zoo import ZOO

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "num_out", "num_in"),
    [
        *[
            (kind, *shape)
            for kind in (Kind.F32, Kind.Q4_0, Kind.Q4_1)
            for shape in ((960, 576), (192, 1536), (320, 64))
        ],
        (Kind.F32, 37, 100),
    ],
)
def test_a_row_of_a_product_does_not_depend_on_the_others(
    kind: Kind, num_out: int, num_in: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    encoded = gguf_files.encode(torch.randn(num_out, num_in, generator=generator).numpy(), kind)
    raw, shape = encoded.view("u1").reshape(-1), (num_out, num_in)
    tensor = Stored("x", shape, gguf_format.encoding(kind, 2, "x"), lambda: gguf_format.view(raw, shape, kind))
    form = formats.choose([tensor.encoding], *shape, Place(dtype, torch.device("cpu"), 8, invariant=True))
    params = form.finish([tensor.piece(Span(0, num_out, num_out), Span(0, num_in, num_in))])
    x = torch.randn(70, num_in, generator=generator).to(dtype)
    together = form.apply(x, params)
    assert together.shape == (70, num_out)
    for start, stop in [(0, 1), (69, 70), (3, 5), (0, 4), (10, 17), (1, 34), (5, 70), (0, 64)]:
        assert torch.equal(form.apply(x[start:stop], params), together[start:stop])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("invariance")
    model = oracle(
        "llama", hidden_size=192, intermediate_size=320, head_dim=64, num_attention_heads=3, num_key_value_heads=1
    )
    quantized = folder / "quantized.gguf"
    gguf_files.write(quantized, model, "llama", Kind.Q4_1)
    return {"plain": save(oracle("qwen3"), folder / "plain"), "quantized": quantized}


def collect(session: Session, steps: list[list[tuple[int, Tensor]]]) -> Tensor:
    """Logits of sequence 0 over all steps."""
    parts = []
    for chunks in steps:
        logits = session.step(chunks)
        parts += [part for (sequence, _), part in zip(chunks, logits, strict=True) if sequence == 0]
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["plain", "quantized"])
def test_logits_do_not_depend_on_batch_or_chunks(checkpoints: dict[str, Path], name: str, dtype: torch.dtype) -> None:
    model: Any = load(checkpoints[name], dtype=dtype, invariant=True)
    ids, other = prompt(70), prompt(90, seed=2)

    def session() -> Session:
        return Session(model, num_seqs=2, invariant=True, dtype=dtype)

    alone = collect(session(), [[(0, ids)]])
    one_by_one = collect(session(), [[(0, ids[i : i + 1])] for i in range(70)])
    assert torch.equal(one_by_one, alone)
    chunked = [[(0, ids[:33])], [(0, ids[33:34])], [(0, ids[34:50])], [(0, ids[50:])]]
    assert torch.equal(collect(session(), chunked), alone)
    mixed = [[(1, other[:5]), (0, ids[:40])], [(0, ids[40:41]), (1, other[5:80])], [(1, other[80:]), (0, ids[41:])]]
    assert torch.equal(collect(session(), mixed), alone)


@pytest.mark.parametrize(
    "name",
    [
        *("Mamba2ForCausalLM", "Qwen3NextForCausalLM", "DeepseekV3ForCausalLM", "RecurrentGemmaForCausalLM"),
        *("T5ForConditionalGeneration", "NemotronHForCausalLM", "RwkvForCausalLM"),
    ],
)
def test_nor_do_those_of_models_with_other_states(tmp_path: Path, name: str) -> None:
    model: Any = load(save(test_zoo.oracle(name, ZOO[name][0]), tmp_path), invariant=True, max_model_len=64)
    ids, other = prompt(40), prompt(30, seed=2)

    def logits_in(steps: list[list[tuple[int, Tensor]]], *, beside: bool = True) -> Tensor:
        session = Session(model, num_seqs=2, invariant=True)
        if model.has_encoder:
            session.encode([(1, source_of(other))] * beside + [(0, source_of(ids))])
        return collect(session, steps)

    alone = logits_in([[(0, ids)]], beside=False)
    assert torch.equal(logits_in([[(0, ids[i : i + 1])] for i in range(40)]), alone)
    mixed = [[(1, other[:5]), (0, ids[:21])], [(0, ids[21:22]), (1, other[5:])], [(0, ids[22:])]]
    assert torch.equal(logits_in(mixed), alone)


def test_without_it_results_do_differ(checkpoints: dict[str, Path]) -> None:
    """Otherwise the test above would show nothing."""
    model: Any = load(checkpoints["quantized"], dtype=torch.bfloat16)
    ids = prompt(70)
    alone = collect(Session(model, dtype=torch.bfloat16), [[(0, ids)]])
    one_by_one = collect(Session(model, dtype=torch.bfloat16), [[(0, ids[i : i + 1])] for i in range(70)])
    assert not torch.equal(one_by_one, alone)
