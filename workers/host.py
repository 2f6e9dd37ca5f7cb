"""What this machine offers a CPU worker: physical cores and free memory."""

import os
from pathlib import Path


def num_physical_cores() -> int:
    """Physical cores this process may run on: two hyper-threads of one core share its multipliers."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_core_of(cpu) for cpu in allowed}
    return max(1, min(len(cores), _cpu_quota()))


def available_memory_bytes() -> int:
    """Memory that can be taken without swapping: the kernel's estimate, or less where the control group allows less."""
    available = _meminfo_bytes("MemAvailable")
    limit, used = (_read_int(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        available = min(available, max(0, limit - used))
    return available


def _core_of(cpu: int) -> tuple[int, int]:
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    package, core = _read_int(topology / "physical_package_id"), _read_int(topology / "core_id")
    return (0, cpu) if package is None or core is None else (package, core)


def _cpu_quota() -> int:
    """Whole CPUs the control group grants; as many as there are when it does not say."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return os.cpu_count() or 1


def _meminfo_bytes(key: str) -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
