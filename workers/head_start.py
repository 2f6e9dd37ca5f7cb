"""What a worker on a GPU begins before torch is imported: seconds of work that is not Python's, and needs no torch.

Failures are not told here: who comes for the result meets them again, and says it better.
"""

import contextlib
import ctypes
import threading


def begin(*, rank: int, with_memory: bool) -> None:
    """Do it in threads of its own.

    Args:
        rank: which worker this is; each has a GPU, in the order in which the process sees them.
        with_memory: whether the GPU's memory may be touched: a context takes half a gigabyte of it.
    """
    for work in (lambda: _wake_driver(rank, with_memory), _know_compiler):
        threading.Thread(target=work, name="head start", daemon=True).start()


def _wake_driver(rank: int, with_memory: bool) -> None:
    """Start the driver, and make the context of the rank's GPU, which torch then finds.

    A process that was shown its own GPU alone sees one, whatever its rank.
    """
    with contextlib.suppress(OSError):
        driver, num_gpus, gpu = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_int()
        if driver.cuInit(0) or not with_memory:
            return
        driver.cuDeviceGetCount(ctypes.byref(num_gpus))
        if num_gpus.value and driver.cuDeviceGet(ctypes.byref(gpu), rank % num_gpus.value) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(ctypes.c_void_p()), gpu)


def _know_compiler() -> None:
    """Have Triton find out which Triton it is: it reads all of its 400 MB, once a process, for the names of its files.

    PERF: 0.3 to 0.8 s; sixteen threads that begin to compile at once would do so sixteen times.
    """
    with contextlib.suppress(ImportError):
        from triton.runtime.cache import triton_key

        triton_key()
