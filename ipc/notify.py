"""The service manager's two protocols for a process that it started by itself: sd_notify and socket activation.

Both are spoken through variables that systemd sets for this one process; they are taken out of the environment, so that
no other process speaks in its name.
"""

import os
import socket

_FIRST_ACTIVATED_FD = 3


class ServiceManager:
    """Tells systemd (or whoever understands sd_notify) about this process; does nothing where nobody asked for it."""

    def __init__(self) -> None:
        address = os.environ.pop("NOTIFY_SOCKET", "")
        watched_pid = os.environ.pop("WATCHDOG_PID", "") or str(os.getpid())
        watchdog_us = int(os.environ.pop("WATCHDOG_USEC", "0"))
        self.watchdog_s = watchdog_us / 1e6 if address and watched_pid == str(os.getpid()) else 0.0
        """Silence after which it kills this process; 0 when it does not watch."""
        self._socket: socket.socket | None = None
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
            self._socket.connect("\0" + address[1:] if address.startswith("@") else address)

    def tell(self, *assignments: str) -> None:
        """Send `READY=1`, `WATCHDOG=1`, `STATUS=…`. One that does not listen just now hears the next."""
        if self._socket is None:
            return
        try:
            self._socket.send("\n".join(assignments).encode())
        except OSError:
            return  # it restarts itself, or its queue is full; its patience covers a beat or two


def activated_fds() -> list[int]:
    """Listening sockets that systemd holds for this process; none when it was not activated by sockets."""
    pid, number = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "0")
    os.environ.pop("LISTEN_FDNAMES", "")
    return list(range(_FIRST_ACTIVATED_FD, _FIRST_ACTIVATED_FD + int(number))) if pid == str(os.getpid()) else []
