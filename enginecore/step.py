"""One step, or a run of steps: being drafted, then in flight until the workers' results are committed."""

from cableway.enginecore.request import Request
from cableway.ipc.messages import NewRow, StepPlan, ints


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

    def count_decodes(self) -> None:
        """All `requests` so far compute one token and draw one; their `num_planned` says so already."""
        num = len(self.requests)
        self.counts, self.samples = [1] * num, [True] * num
        self.budget -= num

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
