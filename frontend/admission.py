"""Whether requests are let in, and how many are inside."""

import asyncio

from cableway.frontend.errors import RequestError


class Admission:
    """Open until drained; counts what runs, so that a drain knows when it is over."""

    def __init__(self) -> None:
        self.is_draining = False
        self.is_retiring = False
        """Requests are let in, but each is its connection's last: another process takes the new ones."""
        self.num_active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def enter(self) -> None:
        """A request begins; 503 while draining."""
        if self.is_draining:
            raise RequestError(
                503, "The server is shutting down.", type="server_error", code="shutting_down", retry_after_s=5
            )
        self.num_active += 1
        self._idle.clear()

    def leave(self) -> None:
        """A request that was let in has ended."""
        self.num_active -= 1
        if not self.num_active:
            self._idle.set()

    async def drain(self, deadline_s: float) -> bool:
        """Let nobody in, wait for those inside; False when some are left after `deadline_s`."""
        self.is_draining = True
        try:
            async with asyncio.timeout(deadline_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
