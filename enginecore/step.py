"""One step, or a run of steps: being drafted, then in flight until the workers' results are committed."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from cableway.enginecore.kv.manager import KVManager
from cableway.enginecore.limits import Refusal
from cableway.enginecore.request import Request, State
from cableway.ipc.messages import NewRow, StepPlan, StepResult, ints

Reserve = Callable[["Step", Request, int], bool]
"""Gets a request, which is added next, the blocks for so many tokens; False when there are none."""


class Step:
    """Which requests compute how many tokens, and draw one afterwards or not. Lists are parallel, one entry a row.

    In a run of `num_steps` > 1 each computes one token and draws one, as many times.
    """

    __slots__ = ("budget", "counts", "grown", "new", "num_steps", "number", "requests", "samples")

    def __init__(self, number: int, budget: int, num_steps: int = 1):
        self.number = number  # of the first that has no result yet
        self.num_steps = num_steps  # that have none
        self.budget = budget  # tokens that may still be added
        self.requests: list[Request] = []
        self.counts: list[int] = []
        self.samples: list[int] = []
        self.new: list[NewRow] = []
        self.grown: dict[int, list[list[int]]] = {}  # place of a row in the lists -> its new blocks, one list a group

    def add(self, request: Request, count: int) -> None:
        """Compute `count` more tokens of `request`, and draw one when that is all it has."""
        request.num_planned = planned = request.num_planned + count
        self.requests.append(request)
        self.counts.append(count)
        self.samples.append(planned >= len(request.tokens) and planned < request.max_len)
        self.budget -= count

    def add_decodes(self, running: list[Request], reserve: Reserve) -> list[Request]:
        """Begin with those that have one token to compute and draw the next; returns those that have more to compute,
        or nothing to draw.

        PERF: 0.2 µs a row, most of which only have their `num_planned` counted up.
        """
        behind = []
        rows, budget, num_steps = self.requests, self.budget, self.num_steps
        for request in running:  # whom `reserve` takes out is always the last of these
            planned = request.num_planned + num_steps
            if planned > request.decodes_until:
                if planned > request.compute_limit:
                    continue  # its last token is being drawn
                if request.num_left > 1 or request.only_scores:
                    behind.append(request)
                    continue
                if planned > request.num_slots and not reserve(self, request, planned):
                    continue
                request.decodes_until = min(request.num_slots, request.compute_limit)
            request.num_planned = planned
            rows.append(request)
            budget -= 1
            if not budget:
                break
        num = len(rows)
        self.counts, self.samples = [1] * num, [True] * num
        self.budget -= num
        return behind

    def add_chunks(self, behind: list[Request], reserve: Reserve) -> None:
        """Spend the budget on prompts that are computed in part."""
        for request in behind:
            count = min(request.num_left, self.budget)
            if count and request.state is State.RUNNING and reserve(self, request, request.num_planned + count):
                self.add(request, count)

    def grow(self, grown: list[list[int]]) -> None:
        """The row added next got these blocks."""
        if any(grown):
            self.grown[len(self.requests)] = grown

    def message(self, epoch: int, num_groups: int, freed: list[int], copies: list[int]) -> StepPlan:
        blocks: list[int] = []
        num_new_blocks = [0] * (len(self.requests) * num_groups)
        for place, grown in self.grown.items():
            for group, block_ids in enumerate(grown):
                num_new_blocks[place * num_groups + group] = len(block_ids)
                blocks += block_ids
        return StepPlan(
            epoch=epoch,
            step=self.number,
            rows=ints([request.row for request in self.requests]),
            num_tokens=ints(self.counts),
            samples=ints(self.samples),
            new=self.new,
            freed=ints(freed),
            blocks=ints(blocks),
            num_new_blocks=ints(num_new_blocks),
            copies=ints(copies),
            num_steps=self.num_steps,
        )

    def take_extras(self, result: StepResult, fail: Callable[[Request, Refusal], None]) -> None:
        """Log-probabilities and failures, which name rows and positions; frontends know keys and indices."""
        by_row = {request.row: request for request in self.requests if request.state is not State.FINISHED}
        for logprobs in result.logprobs:
            if request := by_row.get(logprobs.key):
                first_index = logprobs.first_index - (0 if logprobs.prompt else request.num_prompt)
                chunk = msgspec.structs.replace(logprobs, key=request.key, first_index=first_index)
                request.outbox.logprobs.append(chunk)
        for failed in result.failed:
            if request := by_row.get(failed.key):
                fail(request, Refusal(failed.status, failed.code, failed.text))

    def take_tokens(self, drawn: list[int], kv: KVManager, finish_if_ended: Callable[[Request], None]) -> None:
        """What the first of the steps without a result has computed, and drawn: a token for each row that samples.

        PERF: 0.3 µs a row; to look up a member of an enumeration costs 0.2.
        """
        token_ids, finished = iter(drawn), State.FINISHED
        for request, count, samples in zip(self.requests, self.counts, self.samples, strict=True):
            token_id = next(token_ids) if samples else -1
            request.num_computed = computed = request.num_computed + count
            if request.state is finished:
                continue
            if computed >= request.next_border:
                kv.commit(request)
            if samples:
                tokens = request.tokens
                request.outbox.drawn += request.key, len(tokens) - request.num_prompt, token_id
                tokens.append(token_id)
                if token_id in request.stop_ids or len(tokens) >= request.max_len:
                    finish_if_ended(request)
            elif request.only_scores:
                finish_if_ended(request)


def new_row(request: Request) -> NewRow:
    """A request that enters its row, with the blocks that hold its first `num_computed` tokens already."""
    return NewRow(
        row=request.row,
        tokens=request.tokens.tobytes(),
        num_prompt_tokens=request.num_prompt,
        num_computed=request.num_computed,
        choice=request.index,
        sampling=request.sampling,
        # Where a sliding group gave a block back, any valid id does: nobody looks there.
        blocks=[ints(max(block_id, 0) for block_id in table) for table in request.tables],
        source_len=request.source_len,
        source=request.source if request.source_is_new else b"",
    )
