"""One worker's model, memory and rows: carries out the core's plans, one after another. The same on every device."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec
import numpy as np
import torch

from cableway.ipc import modelfiles
from cableway.ipc.config import WorkerConfig
from cableway.ipc.messages import Failed, Logprobs, StepPlan, StepResult
from cableway.workers import memory, warm_up, weights
from cableway.workers.account import Account
from cableway.workers.batch import Decoder, StateSpec
from cableway.workers.graphs import StepGraphs
from cableway.workers.logprobs import PromptLogprobs
from cableway.workers.parking import Parking
from cableway.workers.rehearsal import Rehearsal
from cableway.workers.rows import Chunks, Rows, unpack, upload
from cableway.workers.sampler import Drawn, Sampler

_BROKEN_LOGITS = "the model's logits for this request are not finite"


def build(config: WorkerConfig, account: Account | None = None) -> "Runner":
    """Load the model and take the memory; ModelError when the model's files, or the memory, will not do."""
    account = account or Account()
    rehearsal = None
    if config.device == "cuda":
        rehearsal = Rehearsal(config)
        account.beside["rehearsal"] = rehearsal.account
        rehearsal.start()
        torch.cuda.synchronize()  # makes the context
        account.note("context_s")
    decoder = load(config)
    account.note("weights_s")
    if rehearsal:
        _use_library(config)
        rehearsal.wait()
        account.note("compilation_s")
    runner = Runner(decoder, config)
    account.note("memory_s")
    runner.warm_up()
    account.note("warm_up_s")
    return runner


def _use_library(config: WorkerConfig) -> None:
    """Have torch's library of products set itself up, while there is nothing else to do."""
    matrix = torch.zeros(16, 16, dtype=getattr(torch, config.dtype), device=config.device)
    torch.mm(matrix, matrix)
    torch.cuda.synchronize()


def load(config: WorkerConfig) -> Decoder:
    """The model a worker is to run; also sets how many threads this process computes with."""
    torch.set_num_threads(config.num_threads)
    files = modelfiles.locate(config.model, config.load_format)
    return weights.load(
        files,
        dtype=getattr(torch, config.dtype),
        device=config.device,
        max_model_len=config.max_model_len,
        invariant=config.batch_invariant,
        load_format=config.load_format,
        seed=config.seed,
    )


@dataclass(slots=True)
class Begun:
    """A step that the device has been given, with what it needs to be told of when it is done."""

    epoch: int
    step: int
    began_ns: int
    chunks: Chunks | None = None
    drawing: np.ndarray | None = None  # indices of the rows that draw
    drawn: Drawn | None = None  # on the host, once `done`
    prompt_logprobs: list[Logprobs] = field(default_factory=list)
    done: torch.cuda.Event | None = None

    @property
    def is_done(self) -> bool:
        """Whether the device has carried it out."""
        return self.done is None or self.done.query()


class Runner:
    """Runs `decoder` for up to `max_num_seqs` requests, each in the row that the core gave it."""

    @torch.inference_mode()
    def __init__(self, decoder: Decoder, config: WorkerConfig) -> None:
        device = torch.device(config.device)
        self.state_groups: list[StateSpec] = decoder.state_groups()
        config = memory.settled(config, self.state_groups)
        self.block_size = config.block_size
        self._decoder = decoder
        self._device = device
        self._invariant = config.batch_invariant
        self._cache = memory.allocate(decoder, config, memory.kept_as(config), device)
        kinds = [group.kind for group in self.state_groups]
        self._rows = Rows(config.max_num_seqs, config.max_model_len, config.block_size, kinds, device)
        self._sampler = Sampler(self._rows.tokens, decoder.vocab_size)
        self._prompt_logprobs = PromptLogprobs(decoder.vocab_size)
        self._finished_ns = 0
        self._longest_captured = config.max_seq_len_to_capture or config.max_model_len
        self._graphs = self._capture(config)
        self._config = config
        self._parking: Parking | None = None

    def _capture(self, config: WorkerConfig) -> StepGraphs | None:
        """Graphs of steps, on a GPU where they are wanted."""
        if self._device.type != "cuda" or config.enforce_eager:
            return None
        return StepGraphs(
            self._decoder,
            self._rows,
            self._sampler,
            self._cache.layers,
            max_num_seqs=config.max_num_seqs,
            max_num_tokens=config.max_num_batched_tokens,
            invariant=config.batch_invariant,
        )

    @torch.inference_mode()
    def capture_next(self) -> bool:
        """Capture a graph that some step may need, while there is nothing else to do; whether there was one."""
        return self._graphs is not None and self._graphs.capture_next()

    @torch.inference_mode()
    def sleep(self) -> None:
        """Empty all rows, drop the cache, and move weights out of a GPU; `wake` before the next step."""
        self.forget()
        self._graphs, self._cache = None, self._cache.dropped()
        if self._device.type == "cuda":
            self._parking = self._parking or Parking(self._decoder)
            self._parking.park()

    @torch.inference_mode()
    def wake(self) -> None:
        """Take the memory again that `sleep` gave back; ModelError when it is not free any more."""
        if self._parking is not None:
            self._parking.fetch()
        same = msgspec.structs.replace(self._config, num_kv_blocks=self._cache.num_blocks)
        self._cache = memory.allocate(self._decoder, same, memory.kept_as(same), self._device)
        self._graphs = self._capture(same)

    @property
    def num_ahead(self) -> int:
        """Steps worth beginning before the one that runs is finished: a GPU need not wait for the host between them."""
        return int(self._device.type == "cuda")

    @property
    def num_blocks(self) -> int:
        """KV blocks the core may hand out."""
        return self._cache.num_blocks

    @contextmanager
    def without_graphs(self) -> Iterator[None]:
        """Steps begun meanwhile are carried out kernel by kernel."""
        longest, self._longest_captured = self._longest_captured, 0
        try:
            yield
        finally:
            self._longest_captured = longest

    def warm_up(self) -> None:
        """Answer prompts for nobody: what is compiled or loaded at its first use is so before the first request."""
        for plan in warm_up.plans(len(self._rows.num_tokens), [group.kind for group in self.state_groups]):
            self.step(plan)
        self.forget()

    def forget(self) -> None:
        """Empty all rows, for a core that knows nothing of them. Weights and memory stay."""
        for row in range(len(self._rows.num_tokens)):
            self._leave(row)

    def step(self, plan: StepPlan) -> StepResult:
        """Carry out a plan, and wait until it is done; see `begin`."""
        return self.finish(self.begin(plan))

    @torch.inference_mode()
    def begin(self, plan: StepPlan) -> "Begun":
        """Give a plan to the device, which may have others to carry out before.

        Raises:
            ValueError: the plan contradicts what the rows hold: the core and this worker no longer agree.
        """
        begun = Begun(plan.epoch, plan.step, time.perf_counter_ns())
        self._change_rows(plan)
        if plan.rows:
            chunks = self._rows.chunk(plan)
            begun.drawing = np.flatnonzero(chunks.samples)
            begun.chunks = chunks
            drawn, begun.prompt_logprobs = self._run(chunks, begun.drawing)
            begun.drawn = drawn and drawn.on_its_way_to_host()
        if self._device.type == "cuda":
            begun.done = torch.cuda.Event()
            begun.done.record()
        return begun

    def finish(self, begun: "Begun") -> StepResult:
        """Wait for the device. Plans are finished in the order in which they were begun."""
        if begun.done is not None:
            begun.done.synchronize()
        token_ids = b""
        logprobs, failed = begun.prompt_logprobs, []
        if begun.drawn is not None:
            drawn_ids = begun.drawn.token_ids.numpy()
            token_ids = drawn_ids.tobytes()
            logprobs += self._logprobs_of(begun.drawn, begun.chunks, begun.drawing)
            broken = begun.chunks.rows[begun.drawing[drawn_ids < 0]]
            failed = [Failed(row, 500, "broken_logits", _BROKEN_LOGITS) for row in broken.tolist()]
        now_ns = time.perf_counter_ns()
        elapsed_us = (now_ns - max(begun.began_ns, self._finished_ns)) // 1000
        self._finished_ns = now_ns
        return StepResult(begun.epoch, begun.step, token_ids, elapsed_us, logprobs, failed)

    def has_ended(self, begun: "Begun") -> bool:
        """Whether a row of a finished step ended with it: it drew a token that stops it, or its logits are broken."""
        if begun.drawn is None:
            return False
        drawn = zip(begun.chunks.rows[begun.drawing].tolist(), begun.drawn.token_ids.tolist(), strict=True)
        return any(token_id < 0 or token_id in self._rows.stop_ids[row] for row, token_id in drawn)

    def _change_rows(self, plan: StepPlan) -> None:
        """What happens to rows, blocks and sources before the forward pass."""
        for row in unpack(plan.freed).tolist():
            self._leave(row)
        for new in plan.new:
            self._rows.enter(new)
            self._prompt_logprobs.enter(new)
        if plan.new:
            self._sampler.enter(plan.new)
        if plan.copies:
            pairs = unpack(plan.copies).reshape(-1, 2).astype(np.int64)
            self._cache.copy_blocks(upload(pairs, self._device))
        self._rows.append_blocks(plan)
        if (source := self._rows.sources(plan.new)) is not None:
            self._decoder.encode(source, self._cache.layers)

    def _leave(self, row: int) -> None:
        self._rows.leave(row)
        self._sampler.leave(row)
        self._prompt_logprobs.leave(row)

    def _run(self, chunks: Chunks, drawing: np.ndarray) -> tuple[Drawn | None, list[Logprobs]]:
        """Forward pass and draws: what rows `chunks.rows[drawing]` drew, and log-probabilities of prompts."""
        rows, decoder = self._rows, self._decoder
        stretches = self._prompt_logprobs.stretches(chunks, rows)
        judged: list[Logprobs] = []
        if self._graphs and not stretches and chunks.ends.max() <= self._longest_captured:
            logits = self._graphs.forward(chunks, drawing)
            if logits is None:
                return None, []
            if self._sampler.is_plain(chunks.rows[drawing]):
                return Drawn(self._graphs.draw(len(drawing)), drawing[:0], None), []
        else:
            last_tokens = chunks.query_start[1:][drawing] - 1
            logits_at = np.concatenate((last_tokens, *(stretch.tokens for stretch in stretches)))
            batch = rows.gather(chunks, logits_at, invariant=self._invariant)
            hidden = decoder.forward(batch, self._cache.layers)
            judged = self._prompt_logprobs.judge(stretches, hidden[len(drawing) :], rows, decoder.logits)
            if not len(drawing):
                return None, judged
            logits = decoder.logits(hidden[: len(drawing)])
        drawing_rows, positions = chunks.rows[drawing], chunks.ends[drawing]
        num_drawn = positions - rows.num_prompt_tokens[drawing_rows]
        drawn = self._sampler.draw(logits, drawing_rows, positions, num_drawn)
        rows.write(drawing_rows, positions, drawn.token_ids)
        return drawn, judged

    def _logprobs_of(self, drawn: Drawn, chunks: Chunks, drawing: np.ndarray) -> list[Logprobs]:
        """Log-probabilities of drawn tokens, each as wide as its request asked for."""
        if drawn.logprobs is None:
            return []
        where = drawing[drawn.logprob_rows]
        rows_and_positions = zip(chunks.rows[where].tolist(), chunks.ends[where].tolist(), strict=True)
        return [
            drawn.logprobs.narrowed(index, self._sampler.num_logprobs(row)).message(row, position)
            for index, (row, position) in enumerate(rows_and_positions)
        ]
