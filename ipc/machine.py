"""What this machine can do, found out without importing torch."""

import importlib.metadata
import os
from pathlib import Path

_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}


def has_nvidia_gpu() -> bool:
    """Whether the NVIDIA driver shows a GPU."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def torch_is_cpu_build() -> bool:
    """Whether the installed torch cannot use a GPU, by its version alone; importing it would take a second."""
    try:
        return importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False


def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products; without them float32 is faster."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return bool(_BFLOAT16_FLAGS & set(flags.split()))


def num_cores() -> int:
    """Physical cores this process may use: its affinity without hyperthreads, under its control group's quota."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_siblings(cpu) for cpu in cpus}
    return max(1, min(len(cores), _quota_cores() or len(cores)))


def _siblings(cpu: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def _quota_cores() -> int:
    """Cores the control group (v2) allows, rounded; 0 when it sets no limit."""
    try:
        quota_us, period_us = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return 0
    return 0 if quota_us == "max" else max(1, round(int(quota_us) / int(period_us)))
