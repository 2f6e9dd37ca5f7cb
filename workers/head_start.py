"""What a worker on a GPU begins before torch is imported: seconds of work that is not Python's, and needs no torch.

Failures are not told here: who comes for the result meets them again, and says it better.
"""

import contextlib
import ctypes
import threading


def begin(*, with_memory: bool) -> None:
    """Do it in threads of its own.

    Args:
        with_memory: whether the GPU's memory may be touched: a context takes half a gigabyte of it.
    """
    for work in (lambda: _wake_driver(with_memory), _know_compiler):
        threading.Thread(target=work, name="head start", daemon=True).start()


def _wake_driver(with_memory: bool) -> None:
    """Start the driver, and make the context of the first GPU, which torch then finds."""
    with contextlib.suppress(OSError):
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.cuInit(0) == 0 and with_memory:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(ctypes.c_void_p()), 0)


def _know_compiler() -> None:
    """Have Triton find out which Triton it is: it reads all of its 400 MB, once a process, for the names of its files.

    PERF: 0.3 to 0.8 s; sixteen threads that begin to compile at once would do so sixteen times.
    """
    with contextlib.suppress(ImportError):
        from triton.runtime.cache import triton_key

        triton_key()
