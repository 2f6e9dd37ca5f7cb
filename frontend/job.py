"""A job: the choices of one client request, and the mailbox their tokens come into."""

import asyncio
from collections.abc import Callable, Sequence

import msgspec

from cableway.frontend.errors import RequestError
from cableway.ipc.messages import Finish, Logprobs


class Update(msgspec.Struct):
    """What came for one choice since its reader last looked.

    `logprobs` cover `token_ids` when they were asked for; `prompt_logprobs` come in order, from the prompt's second
    token on. `finish` or `error` is set in a choice's last update.
    """

    index: int
    token_ids: list[int]
    logprobs: Sequence[Logprobs] = ()
    prompt_logprobs: Sequence[Logprobs] = ()
    finish: Finish | None = None
    error: RequestError | None = None

    def add(self, later: "Update") -> None:
        """Take in what came later for the same choice."""
        self.token_ids += later.token_ids
        self.logprobs = [*self.logprobs, *later.logprobs]
        self.prompt_logprobs = [*self.prompt_logprobs, *later.prompt_logprobs]
        self.finish, self.error = later.finish, later.error


class Job:
    """The choices of one request, and a mailbox; an async iterator over lists of `Update`, at most one a choice.

    A reader that is late finds its tokens merged, so that a slow client costs one write and not one a token. The
    iteration ends when every choice has ended. Call `abort()` when you stop reading before that.
    """

    __slots__ = ("_mail", "_open", "_reader", "_waiter")

    def __init__(self) -> None:
        self._mail: dict[int, Update] = {}
        self._open: dict[int, Callable[[], None]] = {}
        self._reader: Callable[[Update], None] | None = None
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
        """What the mailbox has, without waiting."""
        mail = list(self._mail.values())
        self._mail.clear()
        return mail

    def read_by(self, reader: Callable[[Update], None] | None) -> None:
        """Give updates to `reader` as they come, in place of iteration. It may `keep` what it cannot use yet."""
        self._reader = reader

    def keep(self, update: Update) -> None:
        """Put an update into the mailbox."""
        kept = self._mail.setdefault(update.index, update)
        if kept is not update:
            kept.add(update)

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

    def deliver(self, update: Update) -> None:
        """Something came for a choice that was not aborted; the update is the job's from now on."""
        if update.finish is not None or update.error is not None:
            del self._open[update.index]
        if self._reader is not None:
            self._reader(update)
        else:
            self.keep(update)
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
