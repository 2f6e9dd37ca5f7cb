"""A job: the choices of one client request, and the mailbox their tokens come into."""

import asyncio
from collections.abc import Callable, Sequence

import msgspec

from cableway.frontend.errors import RequestError
from cableway.ipc.messages import Finish, Logprobs


class Update(msgspec.Struct):
    """What came for one choice since the mailbox was last read.

    `logprobs` cover `token_ids` when they were asked for; `prompt_logprobs` come in order, from the prompt's second
    token on. `finish` or `error` is set in a choice's last update.
    """

    index: int
    token_ids: list[int]
    logprobs: Sequence[Logprobs] = ()
    prompt_logprobs: Sequence[Logprobs] = ()
    finish: Finish | None = None
    error: RequestError | None = None


class Job:
    """Async iterator over lists of `Update`: everything that came since the last turn, at most one a choice.

    A reader that is late finds its tokens merged, so that a slow client costs one write and not one a token. The
    iteration ends when every choice has ended. Call `abort()` when you stop reading before that.
    """

    __slots__ = ("_due", "_mail", "_on_mail", "_open", "_waiter")

    def __init__(self) -> None:
        self._mail: dict[int, Update] = {}
        self._open: dict[int, Callable[[], None]] = {}
        self._due: list[Job] = []
        self._on_mail: Callable[[], None] | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> "Job":
        return self

    async def __anext__(self) -> list[Update]:
        if not self._mail:
            if not self._open:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self.collect()

    @property
    def has_ended(self) -> bool:
        """Every choice has ended, and all that came was collected."""
        return not self._open and not self._mail

    def collect(self) -> list[Update]:
        """What came since the mailbox was last read, without waiting."""
        mail = list(self._mail.values())
        self._mail.clear()
        return mail

    def notify(self, on_mail: Callable[[], None] | None) -> None:
        """Call `on_mail()`, in place of iteration, when an empty mailbox got something."""
        self._on_mail = on_mail

    def abort(self, index: int | None = None) -> None:
        """Stop one choice, or all that have not ended; nothing more comes for them."""
        for open_index in [index] if index is not None else list(self._open):
            stop = self._open.pop(open_index, None)
            if stop is not None:
                stop()
        if not self._open:
            self._wake()

    def _wake(self) -> None:
        """Have an iteration go on."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # The side of the engine's client -----------------------------------------------------------------------------

    def opened(self, index: int, abort: Callable[[], None], due: "list[Job]") -> None:
        """Choice `index` has begun; `abort` stops it in the engine.

        Whenever the mailbox has been empty and gets something, the job is put on the list `due`, whose owner calls
        `tell` when everything that came at once has been delivered: one turn of the loop serves all readers.
        """
        assert index not in self._open, f"choice {index} submitted twice"
        self._open[index] = abort
        self._due = due

    def deliver(self, index: int, token_ids: list[int]) -> None:
        """New tokens of choice `index`; the list is the job's from now on."""
        mail = self._mail
        if not mail:
            self._due.append(self)
        update = mail.get(index)
        if update is None:
            mail[index] = Update(index, token_ids)
        else:
            update.token_ids += token_ids

    def update(self, index: int) -> Update:
        """The update being filled for choice `index`."""
        self.deliver(index, [])
        return self._mail[index]

    def closed(self, index: int) -> None:
        """Nothing more comes for choice `index`."""
        self._open.pop(index, None)

    def tell(self) -> None:
        """Tell the reader that there is mail."""
        if self._on_mail is not None:
            self._on_mail()
        else:
            self._wake()
