"""What a worker does before it is ready, and the account it gives of that."""

import ctypes
import subprocess
import sys
import time
from typing import Any

import pytest

from cableway.workers import head_start
from cableway.workers.account import Account


def test_an_account_has_all_of_the_time_that_counts():
    began_s = time.monotonic()
    account, other = Account(), Account()
    time.sleep(0.02)
    account.note("first_s")
    time.sleep(0.05)
    account.skip()
    time.sleep(0.01)
    account.note("second_s")
    account.note("first_s")
    elapsed_s = time.monotonic() - began_s
    other.note("its_own_s")
    account.beside["other"] = other
    fields = account.fields()
    assert fields.keys() == {"first_s", "second_s", "other"}
    assert fields["other"].keys() == {"its_own_s"}
    assert fields["first_s"] >= 0.02
    assert fields["second_s"] >= 0.01
    assert 0.03 <= account.total_s <= elapsed_s - 0.05


def test_a_head_start_without_gpu_or_triton_is_silent_and_imports_no_torch():
    code = """if True:
        import sys, threading
        sys.modules["triton"] = None
        from cableway.workers import head_start
        head_start.begin(rank=0, with_memory=True)
        for thread in threading.enumerate():
            if thread is not threading.current_thread():
                thread.join()
        assert "torch" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class Driver:
    """Some GPUs, whose handles are not their numbers."""

    def __init__(self, num_gpus: int, status: int = 0) -> None:
        self._num_gpus, self._status = num_gpus, status
        self.contexts: list[int] = []

    def cuInit(self, flags: int) -> int:
        return self._status

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self._num_gpus
        return 0

    def cuDeviceGet(self, gpu: Any, number: int) -> int:
        gpu._obj.value = 40 + number
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, gpu: ctypes.c_int) -> int:
        self.contexts.append(gpu.value)
        return 0


@pytest.mark.parametrize(
    ("driver", "rank", "with_memory", "contexts"),
    [
        (Driver(8), 0, True, [40]),
        (Driver(8), 3, True, [43]),
        (Driver(1), 3, True, [40]),
        (Driver(8), 3, False, []),
        (Driver(0), 0, True, []),
        (Driver(8, status=100), 0, True, []),
    ],
)
def test_a_rank_has_the_context_of_its_own_gpu(
    driver: Driver, rank: int, with_memory: bool, contexts: list[int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    head_start._wake_driver(rank, with_memory)
    assert driver.contexts == contexts
