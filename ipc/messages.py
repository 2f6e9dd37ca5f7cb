"""Every message on the wire: one tagged union a direction. The file to read first.

Hot messages are columnar: parallel arrays packed as little-endian int32 (`Ints`), because 256 small structs a step cost
forty times what two packed arrays do. Strings travel only when a request begins or ends.

    frontend  --ToCore-->       core  --ToFrontend-->  frontend
    core      --ToWorker-->   worker  --FromWorker-->  core
"""

import array
import sys
from collections.abc import Iterable

import msgspec

PROTOCOL_VERSION = 2

Ints = bytes
"""Little-endian int32, packed."""
Floats = bytes
"""Little-endian float32, packed."""

assert sys.byteorder == "little", "messages carry native int32, and peers are little-endian"


def ints(values: Iterable[int]) -> Ints:
    """Pack int32 values; OverflowError when one does not fit."""
    return array.array("i", values).tobytes()


def unpack_ints(packed: Ints) -> "memoryview[int]":
    """View packed int32 values without a copy; index it, slice it, or `.tolist()`."""
    return memoryview(packed).cast("i")


def unpack_floats(packed: Floats) -> "memoryview[float]":
    """View packed float32 values without a copy."""
    return memoryview(packed).cast("f")


class Message(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Base of everything sent; a message is a value, never changed after it is made."""


# ---------------------------------------------------------------------------------------------------------------------
# Meeting: the same for every pair of peers


class Hello(Message, frozen=True, tag="hello"):
    """First message of whoever connects; sent again whenever the connection is made anew."""

    version: int
    role: str  # frontend | worker
    rank: int
    pid: int
    engine: str = "0"
    """Name of the engine this peer belongs to or speaks to: one core and its workers serve one model."""


class Welcome(Message, frozen=True, tag="welcome"):
    """The core's answer to Hello. `epoch` names this life of the core; messages of another epoch are ignored."""

    version: int
    epoch: int


class Refused(Message, frozen=True, tag="refused"):
    """The core's answer to a Hello that it cannot work with; the peer logs `reason` and exits."""

    reason: str


class Ping(Message, frozen=True, tag="ping"):
    """Sent now and then, both ways: a frontend that is silent for `lease_s` is gone, and its requests with it."""


# ---------------------------------------------------------------------------------------------------------------------
# Frontend -> core


class Sampling(Message, frozen=True):
    """How one request's tokens are drawn. Defaults are OpenAI's; the frontend draws `seed` when the client gave none.

    Draws are a function of (seed, choice, position) alone, so that a resumed request goes on as it would have.
    """

    seed: int = 0  # 0 … 2**63 - 1
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    min_p: float = 0.0
    max_tokens: int = 16
    min_tokens: int = 0  # end-of-sequence and stop tokens cannot be drawn before
    presence_penalty: float = 0.0  # over output tokens
    frequency_penalty: float = 0.0  # over output tokens
    repetition_penalty: float = 1.0  # over prompt and output tokens
    logit_bias: dict[int, float] = {}
    eos_token_ids: Ints = b""  # empty under ignore_eos
    stop_token_ids: Ints = b""
    logprobs: int = -1  # -1 = none; k = the drawn token and the k likeliest
    prompt_logprobs: int = -1
    bad_words: list[Ints] = []  # token sequences: the last of one cannot be drawn after the others of it
    allowed_token_ids: Ints = b""  # others cannot be drawn; empty = all can


class Standing(Message, frozen=True):
    """What is held against a choice: deaths of workers or of the core while it was getting no further.

    `reached` is how much of it was ever computed. A death counts when it hit the step that would have got further.
    """

    deaths: int = 0  # one after another, without a step forward between them
    alone: int = 0  # how many of these hit it alone, where all had been well without it
    reached: int = 0  # tokens of prompt and output

    @property
    def is_suspect(self) -> bool:
        """One death happens to anybody; after a second it runs alone, so that others need not die with it."""
        return self.deaths >= 2

    @property
    def is_convicted(self) -> bool:
        return self.alone >= 2

    def after(self, num_computed: int) -> "Standing":
        """It got so far: whoever made a step forward has nothing held against it, until the next death."""
        return Standing() if num_computed > self.reached else self

    def after_death(self, num_computed: int, num_planned: int, *, alone: bool) -> "Standing":
        """It had computed so much, and was about to have computed `num_planned` when it died."""
        if num_computed > self.reached:
            return Standing(1, 0, num_computed)
        if num_planned <= self.reached:
            return self  # it has been there before, and come through
        return Standing(self.deaths + 1, self.alone + alone, self.reached)


class Choice(Message, frozen=True):
    """One of a request's `n` continuations. `output` holds what was already delivered when the request is resumed."""

    key: int  # int32, chosen by the frontend, unique among its live choices
    index: int  # 0 … n-1
    output: Ints = b""
    standing: Standing = Standing()


class Generate(Message, frozen=True, tag="generate"):
    """Begin or resume a request. Prompt and output stay apart: penalties and minimum lengths depend on it."""

    request_id: str
    prompt: Ints
    choices: list[Choice]
    sampling: Sampling
    priority: int = 0  # lower runs first, under the priority policy
    cache_salt: str = ""  # prefix-cache blocks are shared only under the same salt
    resumed: bool = False  # an earlier life of the core had taken it in: queue limits do not turn it away
    source: Ints = b""  # what an encoder takes; the prompt is then what its decoder begins with


class Abort(Message, frozen=True, tag="abort"):
    """Stop these choices; nothing more is sent for them."""

    keys: Ints


class Sleep(Message, frozen=True, tag="sleep"):
    """Give the memory of weights and KV cache back, until Wake. What runs goes back to the queue and waits there.

    From a frontend to the core, which passes it on to its workers once no step is in flight.
    """


class Wake(Message, frozen=True, tag="wake"):
    """Take the memory again, and go on. On the same ways as Sleep."""


ToCore = Hello | Ping | Generate | Abort | Sleep | Wake


# ---------------------------------------------------------------------------------------------------------------------
# Core -> frontend


class Logprobs(Message, frozen=True):
    """Log-probabilities of `num` consecutive tokens, `width` entries each: first the token itself, then the likeliest.

    From a worker `key` is the row and `first_index` the position in the sequence; to a frontend `key` is the choice's
    key and `first_index` counts within the output, or in the prompt when `prompt` is set (whose first token has none).
    """

    key: int
    first_index: int
    num: int
    width: int
    token_ids: Ints  # [num, width]
    values: Floats  # [num, width]; natural logarithms of the softmax of the raw logits
    ranks: Ints  # [num]; rank of the token itself, 1 = likeliest
    prompt: bool = False


class Finish(Message, frozen=True):
    """A choice's end. `stop_token` is set when a client's stop token (not end-of-sequence) ended it."""

    key: int
    reason: str  # stop | length
    stop_token: int | None = None
    num_cached_tokens: int = 0
    queue_s: float = 0.0


class Tokens(Message, frozen=True, tag="tokens"):
    """Everything one step made for one frontend. Arrays are parallel, one entry a choice.

    A frontend takes only the index it expects, so a token is never doubled or skipped.
    """

    epoch: int
    keys: Ints
    first_index: Ints  # index of the first of these tokens in the choice's output
    num_tokens: Ints
    token_ids: Ints  # concatenated
    finished: list[Finish] = []
    logprobs: list[Logprobs] = []


class Failed(Message, frozen=True, tag="failed"):
    """A choice ended by an error of its own; the engine goes on."""

    key: int
    status: int  # HTTP status
    code: str
    text: str


class IfLost(Message, frozen=True, tag="if_lost"):
    """What a frontend is to say of a choice when it submits it to the next core, should this one die before more of it
    comes. Sent some time before the core does what may kill it."""

    key: int
    standing: Standing


class Status(Message, frozen=True, tag="status"):
    """The core's answer to Ping: what /health and /metrics tell. Counters count from the core's start."""

    epoch: int
    ready: bool  # every worker is up
    step_age_s: float  # since the last finished step; 0 when nothing is waiting for one
    steps: int
    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    kv_usage_frac: float
    num_blocks: int
    prefix_queries: int  # tokens looked up
    prefix_hits: int  # tokens found
    preemptions: int
    worker_step_ages_s: list[float] = []
    asleep: bool = False
    compilations: int = 0  # kernels that workers compiled after they were ready


ToFrontend = Welcome | Refused | Ping | Tokens | Failed | IfLost | Status


# ---------------------------------------------------------------------------------------------------------------------
# Core -> worker


class NewRow(Message, frozen=True):
    """A request that enters its row now: first admission, or again after preemption, with all its tokens."""

    row: int
    tokens: Ints  # prompt, then output so far
    num_prompt_tokens: int
    num_computed: int  # tokens whose KV is already in `blocks`
    choice: int
    sampling: Sampling
    blocks: list[Ints]  # one list a state group
    source_len: int = 0  # tokens that the encoder's state, in the blocks of its group, is of
    source: Ints = b""  # these tokens, where that state is not there yet: to be encoded before the forward pass


class StepPlan(Message, frozen=True, tag="plan"):
    """What every worker does in one step, or in a run of steps. `rows`, `num_tokens`, `samples` are parallel, one entry
    a scheduled row.

    Applied in this order: `freed`, `new`, `copies`, `blocks`, then the forward pass.
    """

    epoch: int
    step: int
    rows: Ints  # worker row of each request
    num_tokens: Ints  # tokens to compute now; 1 = decode
    samples: Ints  # 1 when a token is drawn after the last of them
    new: list[NewRow]
    freed: Ints  # rows whose request has left
    blocks: Ints  # new block ids, by row, then by state group, in order
    num_new_blocks: Ints  # [num_rows * num_groups] how many of `blocks` each row and group gets
    copies: Ints  # pairs (from_block, to_block): copy before the forward pass
    num_steps: int = 1
    """More than 1: a run. Steps `step + 1` and so on compute the token that each row drew in the one before, and draw
    the next. The worker does them without being told, and leaves the run when a row draws a token that ends it, or
    another plan comes."""


class Shutdown(Message, frozen=True, tag="shutdown"):
    """Finish what is under way and exit 0."""


ToWorker = Welcome | Refused | StepPlan | Ping | Shutdown | Sleep | Wake


# ---------------------------------------------------------------------------------------------------------------------
# Worker -> core


class StateGroup(Message, frozen=True):
    """Layers whose state is paged alike. All groups take blocks of the same `block_bytes` from one pool."""

    kind: str  # paged | sliding | latent | recurrent | encoder
    num_layers: int
    window: int = 0  # tokens a sliding layer sees, itself included


class Ready(Message, frozen=True, tag="ready"):
    """A worker has its weights and memory, or has given them back. The core plans with the fewest blocks any rank has.

    Sent after Welcome, Sleep and Wake.
    """

    rank: int
    num_blocks: int
    block_size: int
    groups: list[StateGroup]
    max_num_seqs: int
    load_s: float
    asleep: bool = False


class Compiled(Message, frozen=True, tag="compiled"):
    """So many kernels were compiled since this was last said: steps waited for what warming up should have done."""

    num: int


class StepResult(Message, frozen=True):
    """What one step drew. `token_ids` has one entry a row with `samples`, in the plan's order."""

    epoch: int
    step: int
    token_ids: Ints
    elapsed_us: int
    logprobs: list[Logprobs] = []
    failed: list[Failed] = []  # `key` is the row: this row alone could not be sampled (a NaN in its logits, say)


class StepResults(Message, frozen=True, tag="results"):
    """What steps drew, in order; those of a run are told together."""

    results: list[StepResult]


class RunLeft(Message, frozen=True, tag="run_left"):
    """Step `step` of a run will not be done, nor those after it; the worker goes on with the next plan."""

    epoch: int
    step: int


FromWorker = Hello | Ping | Ready | StepResults | RunLeft | Compiled
