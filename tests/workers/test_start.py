"""What a worker does before it is ready, and the account it gives of that."""

import subprocess
import sys
import time

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
        head_start.begin(with_memory=True)
        for thread in threading.enumerate():
            if thread is not threading.current_thread():
                thread.join()
        assert "torch" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
