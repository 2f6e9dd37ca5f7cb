"""What a frontend keeps of each choice that has not ended: enough to submit it again to a core that knows nothing."""

from array import array

from cableway.frontend.job import Job, Update
from cableway.ipc.messages import Choice, Ints, Logprobs, Sampling, Standing


class LiveRequest:
    """A prompt and how it is continued: what its choices have in common."""

    __slots__ = (
        "cache_salt",
        "num_live",
        "num_prompt_logprobs",
        "priority",
        "prompt",
        "request_id",
        "sampling",
        "source",
        "was_sent",
    )

    def __init__(
        self, request_id: str, prompt: Ints, sampling: Sampling, priority: int, cache_salt: str, source: Ints = b""
    ):
        self.request_id = request_id
        self.prompt = prompt
        self.sampling = sampling
        self.priority = priority
        self.cache_salt = cache_salt
        self.source = source
        self.num_live = 0  # choices that have not ended
        self.num_prompt_logprobs = 0
        self.was_sent = False

    @property
    def num_tokens(self) -> int:
        """Of the prompt, and of what an encoder takes."""
        return (len(self.prompt) + len(self.source)) // 4


class LiveChoice:
    """One continuation that has not ended, with all that has been delivered of it."""

    __slots__ = (
        "fresh",
        "if_lost",
        "index",
        "job",
        "key",
        "num_logprobs",
        "num_sent",
        "number",
        "output",
        "request",
        "standing",
    )

    def __init__(self, request: LiveRequest, job: Job, index: int, number: int):
        self.request = request
        self.job = job
        self.index = index  # in the job
        self.number = number  # 0 … n-1 in the request: what its random draws depend on
        self.key = 0
        self.fresh: Update | None = None  # what came for it in this turn of the loop
        self.output = array("i")
        self.num_logprobs = 0
        self.num_sent = 0  # tokens of the output that the core was told of
        self.standing = Standing()
        self.if_lost: tuple[Standing, int] | None = None  # the core's words, and how many tokens there were then

    def told(self) -> Choice:
        """As it is submitted now."""
        self.num_sent, self.if_lost = len(self.output), None
        return Choice(self.key, self.number, self.output.tobytes(), self.standing)

    def outlives_core(self) -> None:
        """Its core died: what is to be said of it to the next one."""
        num_output = len(self.output)
        if self.if_lost is not None and self.if_lost[1] == num_output:
            self.standing = self.if_lost[0]
        elif num_output > self.num_sent or not self.standing.deaths:
            self.standing = Standing(deaths=1)


def unknown_part(logprobs: Logprobs, expected: int) -> Logprobs | None:
    """The part of `logprobs` from index `expected` on; None when all of it is known already."""
    skip = expected - logprobs.first_index
    if skip <= 0:
        return logprobs
    if skip >= logprobs.num:
        return None
    row_bytes = 4 * logprobs.width
    return Logprobs(
        key=logprobs.key,
        first_index=expected,
        num=logprobs.num - skip,
        width=logprobs.width,
        token_ids=logprobs.token_ids[skip * row_bytes :],
        values=logprobs.values[skip * row_bytes :],
        ranks=logprobs.ranks[skip * 4 :],
        prompt=logprobs.prompt,
    )
