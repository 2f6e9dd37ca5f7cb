"""What a step made for one frontend, gathered column by column into one message."""

from cableway.ipc.messages import Failed, Finish, IfLost, Logprobs, Tokens, ints


class Outbox:
    """Tokens that were drawn, failures, and last wills. They are appended to from outside: it is hot.

    `drawn` holds three numbers a token: the choice's key, the token's index in its output, and the token's id.
    """

    __slots__ = ("drawn", "failed", "finished", "if_lost", "logprobs")

    def __init__(self) -> None:
        self._empty()

    def _empty(self) -> None:
        self.drawn: list[int] = []
        self.finished: list[Finish] = []
        self.logprobs: list[Logprobs] = []
        self.failed: list[Failed] = []
        self.if_lost: list[IfLost] = []

    def take(self, epoch: int) -> list[Tokens | Failed | IfLost]:
        """The messages to send now, if any; the box is empty afterwards."""
        messages: list[Tokens | Failed | IfLost] = []
        drawn = self.drawn
        if drawn or self.finished or self.logprobs:
            ones = b"\x01\x00\x00\x00" * (len(drawn) // 3)
            columns = ints(drawn[0::3]), ints(drawn[1::3]), ones, ints(drawn[2::3])
            messages.append(Tokens(epoch, *columns, finished=self.finished, logprobs=self.logprobs))
        messages += self.failed
        messages += self.if_lost
        self._empty()
        return messages
