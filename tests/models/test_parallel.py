"""Tensor parallelism: the ranks' shares make up the whole, and two ranks together compute what one does."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from cableway.ipc.modelfiles import ModelError
from cableway.workers.blocks.linear import Embedding, Linear
from cableway.workers.formats.base import Place
from cableway.workers.formats.stored import PLAIN, Stored
from cableway.workers.parallel import Axis, Mesh, Span
from tests.checkpoints import oracle, tiny
from tests.models import gguf_files
from tests.models.harness import load, logits_of, prompt


class ThreadMesh(Mesh):
    """Ranks as threads of this process, that meet at a barrier."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, board: list[Any]):
        super().__init__(rank, size)
        object.__setattr__(self, "_barrier", barrier)
        object.__setattr__(self, "_board", board)

    def _exchange(self, x: Tensor) -> list[Tensor]:
        self._board[self.tp_rank] = x.clone()
        self._barrier.wait()
        everyone = list(self._board)
        self._barrier.wait()
        return everyone

    def all_reduce(self, x: Tensor) -> Tensor:
        return sum(self._exchange(x))

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._exchange(x), -1)


def on_ranks(size: int, work: Any) -> list[Any]:
    """`work(mesh)` on `size` ranks at once; each one's result."""
    barrier, board, results = threading.Barrier(size, timeout=30), [None] * size, [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadMesh(rank, size, barrier, board))
        except BaseException as error:
            results[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def test_spans_cover_an_axis_once_in_whole_units() -> None:
    axis = Axis("heads", 6, unit=8)
    spans = [Mesh(rank, 3).span(axis) for rank in range(3)]
    assert spans == [Span(0, 16, 16), Span(16, 32, 16), Span(32, 48, 16)]
    assert [Mesh(rank, 3).span(Axis("embed", 5)) for rank in range(3)] == [Span(0, 5, 5)] * 3


def test_kv_heads_are_shared_where_ranks_are_more() -> None:
    spans = [Mesh(rank, 4).span(Axis("kv_heads", 2, unit=8)) for rank in range(4)]
    assert spans == [Span(0, 8, 8), Span(0, 8, 8), Span(8, 16, 8), Span(8, 16, 8)]


def test_a_vocabulary_is_padded_alike_on_every_rank() -> None:
    vocab = Axis("vocab", 300)
    assert Mesh().span(vocab) == Span(0, 300, 320)
    assert [Mesh(rank, 2).span(vocab) for rank in range(2)] == [Span(0, 192, 192), Span(192, 300, 192)]
    assert Mesh(3, 4).span(Axis("vocab", 65)) == Span(65, 65, 64)


def test_heads_that_cannot_be_dealt_out_are_an_error() -> None:
    with pytest.raises(ModelError, match="9 heads cannot be split over 2 ranks"):
        Mesh(0, 2).span(Axis("heads", 9, unit=64))


def weight_of(slot: Linear, mesh: Mesh, tensors: dict[str, Tensor]) -> Tensor:
    """The matrix [out, in] a rank holds, seen by multiplying with the identity."""
    place = Place(torch.float32, torch.device("cpu"), 8, mesh=mesh)
    slot.load(
        {part: {"weight": Stored(part, tuple(t.shape), PLAIN, lambda t=t: t)} for part, t in tensors.items()}, place
    )
    slot._reduce = None
    return slot(torch.eye(mesh.span(slot._in).size)).T


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_ranks_shares_of_a_linear_make_up_the_whole(size: int) -> None:
    heads, kv_heads, embed = Axis("heads", 8, 4), Axis("kv_heads", 4, 4), Axis("embed", 12)
    qkv = {"q": heads, "k": kv_heads, "v": kv_heads}
    tensors = {part: torch.randn(axis.size, 12) for part, axis in qkv.items()}
    shares = [weight_of(Linear(qkv, embed), Mesh(rank, size), tensors) for rank in range(size)]
    for index, part in enumerate("qkv"):
        sizes = [tensors[p].shape[0] // size for p in "qkv"]
        assert torch.equal(torch.cat([share.split(sizes)[index] for share in shares]), tensors[part])

    out = torch.randn(12, 32)
    shares = [weight_of(Linear(embed, heads), Mesh(r, size), {"": out}) for r in range(size)]
    assert torch.equal(torch.cat(shares, 1), out)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_rows_of_a_padded_embedding_come_from_the_rank_that_holds_them(size: int) -> None:
    table = torch.randn(130, 6)
    ids = torch.tensor([0, 129, 64, 63, 128, 1])

    def rows(mesh: Mesh) -> Tensor:
        embedding = Embedding(Axis("vocab", 130), Axis("embed", 6))
        stored = Stored("t", (130, 6), PLAIN, lambda: table)
        embedding.load({"": {"weight": stored}}, Place(torch.float32, torch.device("cpu"), 8, mesh=mesh))
        return embedding(ids)

    assert all(torch.equal(got, table[ids]) for got in on_ranks(size, rows))


@pytest.mark.parametrize(
    ("family", "size", "overrides"),
    [
        ("llama", 2, {}),
        ("llama", 4, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("qwen2", 2, {}),
        ("qwen3", 4, {"num_key_value_heads": 1}),
        ("mistral", 2, {"sliding_window": 9}),
    ],
)
def test_ranks_together_compute_what_one_does(
    tmp_path: Path, family: str, size: int, overrides: dict[str, Any]
) -> None:
    folder = tiny(tmp_path, family, **overrides)
    expected = logits_of(load(folder), prompt())
    for logits in on_ranks(size, lambda mesh: logits_of(load(folder, mesh=mesh), prompt())):
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q8_0, Kind.Q6_K])
def test_quantized_files_are_cut_too(tmp_path: Path, kind: Kind) -> None:
    """Shares of 96 columns are whole blocks of 32 and parts of blocks of 256."""
    model = oracle("llama", hidden_size=256, intermediate_size=256, head_dim=64, num_hidden_layers=1)
    path = tmp_path / "model.gguf"
    gguf_files.write(path, model, "llama", kind)
    expected = logits_of(load(path), prompt())
    for logits in on_ranks(2, lambda mesh: logits_of(load(path, mesh=mesh), prompt())):
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_dummy_weights_do_not_depend_on_the_mesh(tmp_path: Path) -> None:
    folder = tiny(tmp_path, "qwen3")
    expected = logits_of(load(folder, load_format="dummy"), prompt())
    for logits in on_ranks(2, lambda mesh: logits_of(load(folder, load_format="dummy", mesh=mesh), prompt())):
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
