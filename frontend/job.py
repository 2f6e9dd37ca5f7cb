"""A job: the choices of one client request, and the mailbox their tokens come into."""

import asyncio
from collections.abc import Callable

import msgspec

from cableway.frontend.errors import RequestError
from cableway.ipc.messages import Finish, Logprobs


class Update(msgspec.Struct):
    """What came for one choice since the mailbox was last read.

    `logprobs` cover `token_ids` when they were asked for; `prompt_logprobs` come in order, from the prompt's second
    token on. `finish` or `error` is set in a choice's last update.
    """

    index: int
    token_ids: list[int] = []
    logprobs: list[Logprobs] = []
    prompt_logprobs: list[Logprobs] = []
    finish: Finish | None = None
    error: RequestError | None = None


class Job:
    """Async iterator over lists of `Update`: everything that came since the last turn, at most one a choice.

    A reader that is late finds its tokens merged, so that a slow client costs one write and not one a token. The
    iteration ends when every choice has ended. Call `abort()` when you stop reading before that.
    """

    def __init__(self) -> None:
        self._mail: dict[int, Update] = {}
        self._open: dict[int, Callable[[], None]] = {}
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
        """Call `on_mail()` from the event loop, in place of iteration, when an empty mailbox gets something."""
        self._on_mail = on_mail

    def abort(self, index: int | None = None) -> None:
        """Stop one choice, or all that have not ended; nothing more comes for them."""
        for open_index in [index] if index is not None else list(self._open):
            stop = self._open.pop(open_index, None)
            if stop is not None:
                stop()
        if not self._open:
            self._wake()

    # The side of the engine's client -----------------------------------------------------------------------------

    def opened(self, index: int, abort: Callable[[], None]) -> None:
        """Choice `index` has begun; `abort` stops it in the engine."""
        assert index not in self._open, f"choice {index} submitted twice"
        self._open[index] = abort

    def deliver(self, index: int, token_ids: list[int]) -> None:
        """New tokens of choice `index`; the list is the job's from now on."""
        update = self._mail.get(index)
        if update is not None:
            update.token_ids += token_ids
        else:
            self._put(Update(index, token_ids))

    def update(self, index: int) -> Update:
        """The update being filled for choice `index`; wakes the reader."""
        update = self._mail.get(index)
        if update is None:
            update = Update(index)
            self._put(update)
        return update

    def closed(self, index: int) -> None:
        """Nothing more comes for choice `index`."""
        self._open.pop(index, None)

    def _put(self, update: Update) -> None:
        if not self._mail:
            self._wake()
        self._mail[update.index] = update

    def _wake(self) -> None:
        if self._on_mail is not None:
            asyncio.get_running_loop().call_soon(self._on_mail)
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
