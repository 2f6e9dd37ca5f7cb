"""What goes wrong in a chaos run, when, and how long clients wait for it to pass."""

import asyncio
import itertools
import os
import random
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil

from cableway.ipc.control import Process
from tests.chaos.clients import Clients
from tests.server import Server

MIN_STREAMS = 8
"""A fault that disturbs fewer streams than this proves little: it waits until there are as many."""
_PATIENCE_S = 90.0

KILLS = [("worker",), ("enginecore",), ("worker", "enginecore"), ("frontend",), ("worker", "frontend")]
KILLS += [("enginecore", "frontend"), ("enginecore", "worker")]


@dataclass(frozen=True)
class Fault:
    """`how` is done to rank 0 or 1 of each of `roles`, `apart_s` seconds apart."""

    how: str  # kill | stop: SIGSTOP, until the supervisor finds out | pause: SIGSTOP, then SIGCONT in time
    roles: tuple[str, ...]
    delay_s: float
    apart_s: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.how} {'+'.join(self.roles)}"


def plan(seed: int, num: int, hows: Sequence[str] = ("kill", "kill", "kill", "stop", "pause")) -> list[Fault]:
    """`num` faults at random moments; every combination of roles is killed before chance decides."""
    rng = random.Random(seed)
    roles = itertools.chain(KILLS, iter(lambda: rng.choice(KILLS), None))
    faults = []
    for number, victims in zip(range(num), roles, strict=False):
        how = "kill" if number < len(KILLS) else rng.choice(hows)
        apart_s = rng.choice([0.0, rng.uniform(0.05, 1.5)]) if len(victims) > 1 else 0.0
        delay_s = rng.choice([rng.uniform(0.0, 1.5), rng.uniform(3.0, 8.0)])  # amid a recovery, or when all goes well
        faults.append(Fault(how, victims, delay_s, apart_s))
    return faults


@dataclass
class Outcome:
    fault: Fault
    num_hit: int
    pause_s: float  # longest time in which no client got anything


class Mischief:
    """Does faults to a server while its clients are busy."""

    def __init__(self, server: Server, clients: Clients, seed: int, say: Callable[[str], None]):
        self.outcomes: list[Outcome] = []
        self._server = server
        self._clients = clients
        self._rng = random.Random(seed)
        self._say = say

    async def run(self, faults: Sequence[Fault]) -> None:
        began_s = time.monotonic()
        for number, fault in enumerate(faults, 1):
            outcome = await self._one(fault)
            self.outcomes.append(outcome)
            self._say(
                f"{number:3}/{len(faults)} {time.monotonic() - began_s:5.0f} s  {fault.name:28} hit {outcome.num_hit:2}"
                f" streams, silence {outcome.pause_s:5.2f} s, {self._clients.num_answered} answered"
            )

    def summary(self) -> str:
        """Longest silences by fault, a line each."""
        pauses_s: dict[str, list[float]] = {}
        for outcome in self.outcomes:
            pauses_s.setdefault(outcome.fault.name, []).append(outcome.pause_s)
        return "\n".join(
            f"{name:28} {len(values):2}x  silence median {statistics.median(values):5.2f} s, most {max(values):5.2f} s"
            for name, values in sorted(pauses_s.items())
        )

    async def _one(self, fault: Fault) -> Outcome:
        await asyncio.sleep(fault.delay_s)
        victims = await self._victims(fault)
        began_s = time.monotonic()
        num_hit = self._num_hit(victims)
        for number, victim in enumerate(victims):
            if number:
                await asyncio.sleep(fault.apart_s)
            await self._harm(fault.how, victim)
        await self._until_recovered(victims, fault.how, began_s)
        return Outcome(fault, num_hit, self._silence_s(began_s))

    async def _victims(self, fault: Fault) -> list[Process]:
        """Wait until these processes are there, and enough streams would notice."""
        deadline_s = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline_s:
            ready = [process for process in await self._processes() if process.state == "ready"]
            by_role = {role: [process for process in ready if process.role == role] for role in fault.roles}
            if all(by_role.values()):
                victims = [self._rng.choice(by_role[role]) for role in fault.roles]
                if self._num_hit(victims) >= MIN_STREAMS:
                    return victims
            await asyncio.sleep(0.05)
        raise AssertionError(f"{fault.name}: never {MIN_STREAMS} streams at once\n{self._server.errors[-4000:]}")

    def _num_hit(self, victims: Sequence[Process]) -> int:
        """Streams that these processes are in the middle of."""
        if any(victim.role != "frontend" for victim in victims):
            return self._clients.num_mid_generation
        ports = set().union(*(_client_ports(victim.pid) for victim in victims))
        return sum(attempt.is_mid_generation and attempt.port in ports for attempt in self._clients.under_way)

    async def _harm(self, how: str, victim: Process) -> None:
        os.kill(victim.pid, signal.SIGSTOP)
        if victim.role == "frontend" and how != "pause":
            self._clients.expendable_ports |= _client_ports(victim.pid)
        if how == "kill":
            os.kill(victim.pid, signal.SIGKILL)
        elif how == "pause":
            await asyncio.sleep(self._rng.uniform(0.1, 0.5))
            os.kill(victim.pid, signal.SIGCONT)

    async def _until_recovered(self, victims: Sequence[Process], how: str, began_s: float) -> None:
        """Until every victim has a successor that is ready, and clients get tokens again."""
        gone = {victim.pid for victim in victims} if how != "pause" else set()
        while time.monotonic() < began_s + _PATIENCE_S:
            processes = await self._processes()
            is_whole = all(process.state == "ready" and process.pid not in gone for process in processes[1:])
            times_s = self._clients.token_times_s
            if is_whole:
                whole_s = time.monotonic()
                while time.monotonic() < began_s + _PATIENCE_S:
                    if times_s and times_s[-1] > whole_s:
                        return
                    await asyncio.sleep(0.02)
            await asyncio.sleep(0.05)
        raise AssertionError(f"not whole again after {_PATIENCE_S} s\n{self._server.errors[-4000:]}")

    def _silence_s(self, began_s: float) -> float:
        times_s = list(self._clients.token_times_s)
        last_s = next((time_s for time_s in reversed(times_s) if time_s <= began_s), began_s)
        after_s = [began_s if last_s < began_s else last_s, *(time_s for time_s in times_s if time_s > began_s)]
        return max(later - earlier for earlier, later in itertools.pairwise(after_s))

    async def _processes(self) -> list[Process]:
        return await asyncio.to_thread(self._server.processes)


def _client_ports(pid: int) -> set[int]:
    """Ports of the clients that this process serves."""
    connections = psutil.Process(pid).net_connections("tcp")
    return {connection.raddr.port for connection in connections if connection.raddr}
