"""Who is connected to the core: frontends, each with a lease, and the workers, of which all ranks are needed."""

from collections.abc import Collection

from cableway.enginecore.kv.groups import group_of
from cableway.enginecore.scheduler import Memory
from cableway.ipc.messages import PROTOCOL_VERSION, Hello, Ready


class NotWelcome(Exception):
    """Why a peer cannot be worked with; it is told so."""


def check(hello: Hello, role: str, engine: str) -> None:
    """Raise NotWelcome for a peer of another protocol version, role or engine."""
    if hello.version != PROTOCOL_VERSION:
        raise NotWelcome(f"protocol version {hello.version} does not fit the core's {PROTOCOL_VERSION}")
    if hello.role != role:
        raise NotWelcome(f"this socket is for the role {role!r}, not {hello.role!r}")
    if hello.engine != engine:
        raise NotWelcome(f"this is engine {engine!r}, not {hello.engine!r}")


class Frontends:
    """Frontends that said Hello. One that is silent for `lease_s` has lapsed: it may come back, but has lost its
    requests."""

    def __init__(self, lease_s: float):
        self._lease_s = lease_s
        self._heard_s: dict[bytes, float] = {}
        self._lapsed: set[bytes] = set()

    def __contains__(self, peer: bytes) -> bool:
        return peer in self._heard_s

    @property
    def peers(self) -> list[bytes]:
        return list(self._heard_s)

    def join(self, peer: bytes, now_s: float) -> None:
        self._heard_s[peer] = now_s
        self._lapsed.discard(peer)

    def heard(self, peer: bytes, now_s: float) -> bool:
        """Note that the peer lives; True when it had lapsed and thus begins anew."""
        self._heard_s[peer] = now_s
        if peer not in self._lapsed:
            return False
        self._lapsed.discard(peer)
        return True

    def leave(self, peer: bytes) -> None:
        self._heard_s.pop(peer, None)
        self._lapsed.discard(peer)

    def lapse(self, now_s: float) -> list[bytes]:
        """Those whose lease has ended since the last call."""
        ended = [
            peer
            for peer, heard_s in self._heard_s.items()
            if peer not in self._lapsed and now_s - heard_s > self._lease_s
        ]
        self._lapsed.update(ended)
        return ended


class Workers:
    """The worker of each rank, and what it has."""

    def __init__(self, num_workers: int):
        self._num_workers = num_workers
        self._peers: dict[int, bytes] = {}
        self._ranks: dict[bytes, int] = {}
        self._ready: dict[int, Ready] = {}
        self._sleeping: set[int] = set()
        self._heard: set[int] = set()

    @property
    def peers(self) -> Collection[bytes]:
        """Identities of those that are here."""
        return self._ranks

    @property
    def all_ready(self) -> bool:
        return len(self._ready) == self._num_workers

    @property
    def all_asleep(self) -> bool:
        return len(self._sleeping) == self._num_workers

    def peer(self, rank: int) -> bytes | None:
        return self._peers.get(rank)

    def rank(self, peer: bytes) -> int | None:
        return self._ranks.get(peer)

    def join(self, peer: bytes, rank: int) -> None:
        """A worker said Hello; NotWelcome when there is no such rank."""
        if not 0 <= rank < self._num_workers:
            raise NotWelcome(f"rank {rank} of {self._num_workers} workers")
        self._peers[rank] = peer
        self._ranks[peer] = rank
        self._forget(rank)

    def leave(self, peer: bytes) -> None:
        rank = self._ranks.pop(peer, None)
        if rank is not None:
            del self._peers[rank]
            self._forget(rank)

    def sleeps(self, rank: int) -> None:
        """It has given its memory back."""
        self._sleeping.add(rank)

    def wakes(self, rank: int) -> None:
        """It has its memory."""
        self._sleeping.discard(rank)

    def hears_first(self, rank: int) -> bool:
        """Whether it says Ready for the first time since it joined."""
        is_first = rank not in self._heard
        self._heard.add(rank)
        return is_first

    def _forget(self, rank: int) -> None:
        self._ready.pop(rank, None)
        self._sleeping.discard(rank)
        self._heard.discard(rank)

    def begin_anew(self) -> None:
        """Whoever is still here has to say Ready again."""
        self._ready.clear()
        self._sleeping.clear()

    def ready(self, rank: int, ready: Ready) -> None:
        """NotWelcome when it does not fit the other ranks, or has state of a kind that this core does not know."""
        try:
            for group in ready.groups:
                group_of(group)
        except ValueError as error:
            raise NotWelcome(str(error)) from None
        if not ready.groups or ready.block_size < 1 or ready.max_num_seqs < 1:
            raise NotWelcome("no state groups, blocks or rows")
        for other in self._ready.values():
            if (other.block_size, other.groups) != (ready.block_size, ready.groups):
                raise NotWelcome("blocks or state groups differ from those of the other ranks")
        self._ready[rank] = ready

    def memory(self) -> Memory:
        """What all ranks have in common: plans are made with the fewest blocks any has."""
        ready = list(self._ready.values())
        return Memory(
            groups=[group_of(group) for group in ready[0].groups],
            num_blocks=min(each.num_blocks for each in ready),
            block_size=ready[0].block_size,
            max_num_seqs=min(each.max_num_seqs for each in ready),
        )
