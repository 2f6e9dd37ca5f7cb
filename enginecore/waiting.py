"""The queue of requests that wait for a row, in the order in which they are served."""

import heapq
from collections.abc import Iterator

from cableway.enginecore.request import Request, State


class WaitingQueue:
    """Ordered by `Request.order`. A preempted request keeps its order, and so comes back before those behind it.

    A request that ends while it waits is left in the heap and skipped when it comes up.
    """

    def __init__(self) -> None:
        self.num_requests = 0
        self.num_tokens = 0
        self._heap: list[tuple[tuple[int, int], Request]] = []

    def __iter__(self) -> Iterator[Request]:
        return (request for _, request in self._heap if request.state is State.WAITING)

    def push(self, request: Request) -> None:
        heapq.heappush(self._heap, (request.order, request))
        self.num_requests += 1
        self.num_tokens += len(request.tokens)

    def first(self) -> Request | None:
        """The request that is served next; it stays in the queue."""
        while self._heap and self._heap[0][1].state is not State.WAITING:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Request:
        """Take out what `first` gave."""
        request = heapq.heappop(self._heap)[1]
        self.forget(request)
        return request

    def forget(self, request: Request) -> None:
        """A waiting request ends: it counts no more."""
        self.num_requests -= 1
        self.num_tokens -= len(request.tokens)
