"""What a step made for one frontend, gathered column by column into one message."""

from cableway.ipc.messages import Failed, Finish, IfLost, Logprobs, Tokens, ints


class Outbox:
    """Columns of the next `Tokens`, failures, and last wills. The columns are appended to from outside: it is hot."""

    __slots__ = ("failed", "finished", "first_index", "if_lost", "keys", "logprobs", "token_ids")

    def __init__(self) -> None:
        self._empty()

    def _empty(self) -> None:
        self.keys: list[int] = []
        self.first_index: list[int] = []
        self.token_ids: list[int] = []
        self.finished: list[Finish] = []
        self.logprobs: list[Logprobs] = []
        self.failed: list[Failed] = []
        self.if_lost: list[IfLost] = []

    def take(self, epoch: int) -> list[Tokens | Failed | IfLost]:
        """The messages to send now, if any; the box is empty afterwards."""
        messages: list[Tokens | Failed | IfLost] = []
        if self.keys or self.finished or self.logprobs:
            ones = b"\x01\x00\x00\x00" * len(self.keys)
            columns = ints(self.keys), ints(self.first_index), ones, ints(self.token_ids)
            messages.append(Tokens(epoch, *columns, finished=self.finished, logprobs=self.logprobs))
        messages += self.failed
        messages += self.if_lost
        self._empty()
        return messages
