"""The queue of requests that wait for a row, in the order in which they are served."""

import heapq
from collections.abc import Iterator

from cableway.enginecore.request import Request, State

_FEW = 64


class WaitingQueue:
    """Ordered by `Request.order`. A preempted request keeps its order, and so comes back before those behind it.

    A request that ends while it waits stays in the heap until it comes up, or until such ones are the greater part.
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
        self.num_tokens += len(request.tokens) + request.source_len

    def first(self) -> Request | None:
        """The request that is served next; it stays in the queue."""
        while self._heap and self._heap[0][1].state is not State.WAITING:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Request:
        """Take out what `first` gave."""
        request = heapq.heappop(self._heap)[1]
        self._count_out(request)
        return request

    def forget(self, request: Request) -> None:
        """A request of the queue has ended."""
        self._count_out(request)
        if len(self._heap) > 2 * self.num_requests + _FEW:
            self._heap = [(each.order, each) for each in self]
            heapq.heapify(self._heap)

    def _count_out(self, request: Request) -> None:
        self.num_requests -= 1
        self.num_tokens -= len(request.tokens) + request.source_len
