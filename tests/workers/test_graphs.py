"""Steps by graphs are those without. On a CPU a graph is played by the function that it was captured from."""

import json
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
import torch

from cableway.bench.driver import Driver
from cableway.ipc.config import WorkerConfig
from cableway.ipc.messages import Sampling, ints
from cableway.workers import graphs
from cableway.workers.batch import Decoder
from cableway.workers.rows import Chunks
from cableway.workers.runner import Runner, build
from tests.workers.running import drive, load, prompt_of, worker_config

NUM_TOKENS = 20
SAMPLINGS = [
    Sampling(temperature=0),
    Sampling(temperature=1, seed=5),
    Sampling(temperature=0.8, seed=6, top_k=20, top_p=0.9),
    Sampling(temperature=0, frequency_penalty=0.7),
    Sampling(temperature=0, logprobs=2),
    Sampling(temperature=0, logit_bias={7: 3.0}),
    Sampling(temperature=0, bad_words=[ints([token_id]) for token_id in range(0, 300, 2)]),
    Sampling(temperature=0, allowed_token_ids=ints(range(0, 300, 7))),
]
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "eos_token_id": 257,
}  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> WorkerConfig:
    """Any weights will do, so that this runs on machines without transformers."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return worker_config(folder, load_format="dummy")


@pytest.fixture(scope="module")
def decoder(config: WorkerConfig) -> Decoder:
    return load(config)


class PlayedGraph:
    def __init__(self, function: Callable[[torch.Tensor], None], inputs: torch.Tensor, pool: object):
        self._function, self._inputs = function, inputs

    @torch.inference_mode()
    def replay(self) -> None:
        self._function(self._inputs)


def outputs(driver: Driver, samplings: list[Sampling]) -> list[list[int]]:
    """Requests that come one after another and end likewise, so that steps have all numbers of rows."""
    requests = []
    for number, sampling in enumerate(samplings):
        requests.append(driver.add(prompt_of(9 + 5 * number, number), sampling))
        driver.step()
        driver.step()
    driver.generate(NUM_TOKENS)
    return [request.output[:NUM_TOKENS] for request in requests]


@pytest.mark.parametrize("samplings", [SAMPLINGS, SAMPLINGS[:3]], ids=["of all kinds", "plain"])
def test_tokens_are_the_same(
    decoder: Decoder, config: WorkerConfig, monkeypatch: pytest.MonkeyPatch, samplings: list[Sampling]
):
    expected = outputs(drive(decoder, config), samplings)
    monkeypatch.setattr(graphs, "_capture", PlayedGraph)
    for sizes in ("row_sizes", "token_sizes"):
        monkeypatch.setattr(graphs, sizes, lambda most: list(range(1, most + 1)))  # a CPU writes no rows of nobody
    monkeypatch.setattr(graphs, "longest_of_few", lambda num_seqs: 16 if num_seqs < 3 else 0)
    runner, most = Runner(decoder, config), {"max_num_seqs": config.max_num_seqs, "max_num_tokens": 512}
    made = graphs.StepGraphs(decoder, runner._rows, runner._sampler, runner._cache.layers, **most)
    made._bodies[512] = None  # the largest, which comes first and is nobody's
    runner._graphs, drawn, computed = made, [], []
    monkeypatch.setattr(made, "draw", lambda num: drawn.append(num) or graphs.StepGraphs.draw(made, num))
    monkeypatch.setattr(
        made, "forward", lambda *step: computed.append(step[0].num_tokens) or graphs.StepGraphs.forward(made, *step)
    )
    assert outputs(Driver(runner, config.block_size, config.max_num_seqs), samplings) == expected
    assert max(drawn) == 3  # those that are not plain draw without
    assert {len(samplings), 9, 9 + 5 * (len(samplings) - 1) + len(samplings) - 1} <= set(computed)


def test_graphs_are_captured_one_at_a_time_the_largest_first(
    decoder: Decoder, config: WorkerConfig, monkeypatch: pytest.MonkeyPatch
):
    runner, most = Runner(decoder, config), {"max_num_seqs": 3, "max_num_tokens": 50}
    monkeypatch.setattr(graphs, "longest_of_few", {3: 0, 2: 10, 1: 1 << 20}.get)  # 1: as long as all may be
    monkeypatch.setattr(graphs, "_capture", PlayedGraph)
    made = graphs.StepGraphs(decoder, runner._rows, runner._sampler, runner._cache.layers, **most)
    captured: list[tuple[str, int]] = []
    monkeypatch.setattr(made, "_body", lambda num_tokens, packed: captured.append(("body", num_tokens)))
    for name in ("_short", "_single", "_head", "_draw"):
        monkeypatch.setattr(made, name, lambda inputs, name=name: captured.append((name, inputs.shape[1])))
    num_captured = []
    while made.capture_next():
        num_captured.append(len(captured))
    assert num_captured == list(range(1, len(captured) + 1))
    rows = [(name, size) for size in (3, 2, 1) for name in ("_single", "_head", "_draw")]
    rows.insert(3, ("_short", 2))
    assert captured == [("body", 50), *rows, *(("body", size) for size in graphs.token_sizes(50)[-2::-1])]


def test_the_largest_graph_comes_before_one_that_is_needed(
    decoder: Decoder, config: WorkerConfig, monkeypatch: pytest.MonkeyPatch
):
    runner, most = Runner(decoder, config), {"max_num_seqs": 3, "max_num_tokens": 50}
    monkeypatch.setattr(graphs, "longest_of_few", lambda num_seqs: 0)
    monkeypatch.setattr(graphs, "_capture", PlayedGraph)
    made = graphs.StepGraphs(decoder, runner._rows, runner._sampler, runner._cache.layers, **most)
    computed: list[tuple[int, int]] = []  # tokens, of how long a sequence
    monkeypatch.setattr(made, "_body", lambda size, packed: computed.append((size, int(packed[len(packed) // 3]))))
    made._run_body(Chunks(*(np.array(x, np.int32) for x in ([0], [0], [9], [1], [0, 9]))), 9)
    assert computed == [(50, 0), (16, 9)]


def test_long_sequences_run_without_graphs(decoder: Decoder, config: WorkerConfig):
    runner = Runner(decoder, msgspec.structs.replace(config, max_seq_len_to_capture=12))
    captured: list[list[int]] = []

    class Graphs:
        def forward(self, chunks: Chunks, drawing: np.ndarray) -> None:
            captured.append(chunks.ends.tolist())

    runner._graphs = Graphs()
    driver = Driver(runner, config.block_size, config.max_num_seqs)
    for length in (14, 12, 13):
        driver.add(prompt_of(length), SAMPLINGS[0])
    driver.step({0: 4, 1: 11})
    driver.step({0: 12 - 4})
    driver.step({2: 13})
    driver.step({0: 2, 2: 1})
    assert captured == [[4, 11], [12]]
    with runner.without_graphs():
        driver.step({1: 1})
    assert captured == [[4, 11], [12]]


@pytest.mark.parametrize("most", [1, 3, 8, 64, 100, 256, 1000, 8192])
def test_little_is_computed_for_nobody(most: int):
    for sizes, few in ((graphs.row_sizes(most), 8), (graphs.token_sizes(most), 16)):
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == most
        for num in range(1, most + 1):
            assert next(size for size in sizes if size >= num) - num <= max(few, num // 8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_captured_graphs_give_the_tokens_of_eager_steps(config: WorkerConfig):
    made = {}
    for enforce_eager in (True, False):
        on_gpu = msgspec.structs.replace(config, device="cuda", enforce_eager=enforce_eager, num_kv_blocks=512)
        made[enforce_eager] = outputs(Driver(build(on_gpu), on_gpu.block_size, on_gpu.max_num_seqs), SAMPLINGS)
    assert made[True] == made[False]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_all_graphs_fit_into_the_memory_of_the_largest(config: WorkerConfig):
    on_gpu = msgspec.structs.replace(config, device="cuda", num_kv_blocks=512, max_num_batched_tokens=8192)
    runner = build(on_gpu)
    reserved = [torch.cuda.memory_reserved()]
    while runner.capture_next():
        reserved.append(torch.cuda.memory_reserved())
    of_largest, of_all = reserved[1] - reserved[0], reserved[-1] - reserved[0]
    assert len(reserved) > 50
    assert of_largest > 4 << 20  # more than what is taken at once for what is small
    assert of_all < 1.5 * of_largest


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_host_does_not_wait_while_it_begins_a_step(config: WorkerConfig):
    on_gpu = msgspec.structs.replace(config, device="cuda", num_kv_blocks=512)
    runner = build(on_gpu)
    for mode in ("default", "error"):  # what happens once may wait
        driver = Driver(runner, on_gpu.block_size, on_gpu.max_num_seqs)
        begun = []
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for length in (14, 12, 13):
                driver.add(prompt_of(length), SAMPLINGS[0])
                begun.append(runner.begin(driver.plan_ahead()))
            begun.append(runner.begin(driver.plan_ahead()))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for step in begun:
            runner.finish(step)
        runner.forget()
