"""Drives a worker's `Runner` by hand-made plans, without a core or processes: for its tests and its benchmark."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cableway.ipc.messages import (
    Failed,
    Logprobs,
    NewRow,
    Sampling,
    StepPlan,
    StepResult,
    ints,
    unpack_floats,
    unpack_ints,
)


@dataclass
class Request:
    """A request in a row of the runner, with all that came back for it."""

    row: int
    tokens: list[int]  # prompt, then output
    num_prompt_tokens: int
    sampling: Sampling
    choice: int = 0
    num_computed: int = 0
    blocks: list[list[int]] = field(default_factory=list)  # a state group
    logprobs: dict[int, "Position"] = field(default_factory=dict)  # by position in the sequence
    failed: Failed | None = None

    @property
    def output(self) -> list[int]:
        return self.tokens[self.num_prompt_tokens :]


@dataclass(frozen=True)
class Position:
    """Log-probabilities at one position: of the token itself first, then of the likeliest."""

    token_ids: list[int]
    values: list[float]
    rank: int


class Driver:
    """Hands out rows and blocks in the simplest way, and books what comes back."""

    def __init__(self, runner: Any, block_size: int, num_rows: int) -> None:
        self._runner = runner
        self._block_size = block_size
        self._num_groups = len(runner.state_groups)
        self._free_blocks = list(range(runner.num_blocks))
        self._free_rows = list(range(num_rows))
        self._new: list[Request] = []
        self._freed: list[int] = []
        self._copies: list[int] = []
        self._step = 0
        self.running: dict[int, Request] = {}

    def add(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        output: Sequence[int] = (),
        choice: int = 0,
        shared: tuple[Request, int] | None = None,
    ) -> Request:
        """Begin or resume a request. `shared`: another one, and how many of its computed tokens this one begins with.

        Whole blocks are shared; one that is shared in part is copied.
        """
        request = Request(self._free_rows.pop(0), [*prompt, *output], len(prompt), sampling, choice)
        request.blocks = [[] for _ in range(self._num_groups)]
        if shared is not None:
            self._share(request, *shared)
        self._new.append(request)
        self.running[request.row] = request
        return request

    def remove(self, request: Request) -> None:
        """The request leaves its row, to end or to be resumed."""
        del self.running[request.row]
        self._freed.append(request.row)
        self._free_rows.append(request.row)
        self._free_blocks.extend(block for blocks in request.blocks for block in blocks)

    def step(self, num_tokens: Mapping[int, int] | None = None) -> StepResult:
        """Run one step over `num_tokens` (row -> tokens to compute now); without it, all that each row has."""
        if num_tokens is None:
            num_tokens = {row: len(r.tokens) - r.num_computed for row, r in self.running.items()}
        requests = [self.running[row] for row in num_tokens]
        plan = self._plan(requests, list(num_tokens.values()))
        result = self._runner.step(plan)
        drawing = [r for r, samples in zip(requests, unpack_ints(plan.samples), strict=True) if samples]
        for request, token_id in zip(drawing, unpack_ints(result.token_ids), strict=True):
            request.tokens.append(token_id)
        for failed in result.failed:
            self.running[failed.key].failed = failed
        for logprobs in result.logprobs:
            self.running[logprobs.key].logprobs.update(_positions(logprobs))
        return result

    def plan_ahead(self) -> StepPlan:
        """A step over all that each row has, to be begun before the one before has ended.

        The tokens that it draws count as drawn; -1 stands for them, and nobody is told what they are.
        """
        requests = list(self.running.values())
        plan = self._plan(requests, [len(request.tokens) - request.num_computed for request in requests])
        for request in requests:
            request.tokens.append(-1)
        return plan

    def generate(self, num_tokens: int) -> None:
        """Step until every running request has `num_tokens` tokens of output."""
        while rows := {
            row: len(r.tokens) - r.num_computed for row, r in self.running.items() if len(r.output) < num_tokens
        }:
            self.step(rows)

    def _plan(self, requests: list[Request], num_tokens: list[int]) -> StepPlan:
        new = [self._enter(request) for request in self._new]
        blocks: list[int] = []
        num_new_blocks = []
        samples = []
        for request, num in zip(requests, num_tokens, strict=True):
            request.num_computed += num
            samples.append(int(request.num_computed == len(request.tokens)))
            for group in request.blocks:
                missing = -(-request.num_computed // self._block_size) - len(group)
                taken = [self._free_blocks.pop(0) for _ in range(missing)]
                group.extend(taken)
                blocks.extend(taken)
                num_new_blocks.append(len(taken))
        rows = [request.row for request in requests]
        plan = StepPlan(
            epoch=1,
            step=self._step,
            rows=ints(rows),
            num_tokens=ints(num_tokens),
            samples=ints(samples),
            new=new,
            freed=ints(self._freed),
            blocks=ints(blocks),
            num_new_blocks=ints(num_new_blocks),
            copies=ints(self._copies),
        )
        self._step += 1
        self._new, self._freed, self._copies = [], [], []
        return plan

    def _enter(self, request: Request) -> NewRow:
        return NewRow(
            request.row,
            ints(request.tokens),
            request.num_prompt_tokens,
            request.num_computed,
            request.choice,
            request.sampling,
            [ints(group) for group in request.blocks],
        )

    def _share(self, request: Request, other: Request, num_computed: int) -> None:
        request.num_computed = num_computed
        num_whole, rest = divmod(num_computed, self._block_size)
        for mine, theirs in zip(request.blocks, other.blocks, strict=True):
            mine.extend(theirs[:num_whole])
            if rest:
                mine.append(self._free_blocks.pop(0))
                self._copies += [theirs[num_whole], mine[-1]]


def _positions(logprobs: Logprobs) -> dict[int, Position]:
    width = logprobs.width
    token_ids, values = unpack_ints(logprobs.token_ids).tolist(), unpack_floats(logprobs.values).tolist()
    return {
        logprobs.first_index + i: Position(
            token_ids[i * width : (i + 1) * width], values[i * width : (i + 1) * width], rank
        )
        for i, rank in enumerate(unpack_ints(logprobs.ranks))
    }
