"""Whose requests there are, and what their frontends are to be told."""

from cableway.enginecore.outbox import Outbox
from cableway.enginecore.request import Request
from cableway.ipc.messages import Failed, IfLost, Tokens


class Clients(dict[bytes, dict[int, Request]]):
    """Frontend -> key that it gave a request -> the request, until it ends; and an outbox for each frontend."""

    def __init__(self) -> None:
        super().__init__()
        self._outboxes: dict[bytes, Outbox] = {}

    @property
    def num_live(self) -> int:
        return sum(map(len, self.values()))

    def of(self, frontend: bytes) -> tuple[dict[int, Request], Outbox]:
        """Its requests, and its outbox; from now on it has both."""
        return self.setdefault(frontend, {}), self._outboxes.setdefault(frontend, Outbox())

    def forget(self, frontend: bytes) -> None:
        self.pop(frontend, None)
        self._outboxes.pop(frontend, None)

    def take_messages(self, epoch: int) -> list[tuple[bytes, Tokens | Failed | IfLost]]:
        """What is to be sent, and to which frontend."""
        return [(frontend, message) for frontend, box in self._outboxes.items() for message in box.take(epoch)]
